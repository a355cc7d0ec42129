"""A reward function that ends its process ends the run by its name: engines are not started anew for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rl.reward import RewardError
from tests.ray.conftest import of_kind, run_kept, small

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def test_a_reward_that_crashes_stops_the_run_and_restarts_no_engine(tmp_path: Path):
    says = r"bad_rewards:crashes' failed on 8 answers in a row .*, the last time it ended its process \(exit code 9\)"
    with pytest.raises(RewardError, match=says):
        run_kept(small("task.reward=tests.ray.bad_rewards:crashes"), tmp_path)
    assert [record["event"] for record in of_kind(tmp_path, "event")] == ["started"]
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "failed"
