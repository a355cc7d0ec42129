"""A run on an environment of the package `verifiers`: its turns, its rubric, and the same run twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ray.conftest import of_kind, run_kept, small

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def test_a_run_is_trained_and_validated_by_the_rubric(tmp_path: Path):
    pytest.importorskip("verifiers", reason="pip install 'northstar[verifiers]'")
    task = "task.name=verifiers:tests.digit_sums", "task.max_turns=3", 'task.stop=["?"]', "run.steps=2", "val.every=2"
    summary = run_kept(small(*task), tmp_path)
    assert summary["status"] == "completed"
    for step in of_kind(tmp_path, "step"):
        right, asked = (step[f"critic/rewards/{part}/mean"] for part in ("right", "asked"))
        assert step["critic/rewards/mean"] == pytest.approx(right + asked / 4)
        assert step["num_turns/mean"] == pytest.approx(1 + asked) == step["critic/rewards/num_turns/mean"]
        assert asked > 0 and step["response_length/env/mean"] == pytest.approx(asked)
