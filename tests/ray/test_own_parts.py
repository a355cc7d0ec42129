"""`northstar run` with a codec and a merger of the user's own, in the folder where the command is given."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.own_parts import BETWEEN_REPLICAS, NAMED, write_parts
from tests.ray.conftest import SMALL, of_kind

pytestmark = pytest.mark.slow


def test_every_actor_finds_them_and_their_bytes_are_those_planned(tmp_path: Path):
    write_parts(tmp_path)
    sizes = (*SMALL, "run.steps=3", "swarm.dp=2", "swarm.pp=2", "val.every=3", BETWEEN_REPLICAS)
    command = [str(Path(sys.executable).with_name("northstar")), "run", "k5", "--out", "run"]
    command += [word for override in (*sizes, *NAMED) for word in ("--set", override)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for channel in ("boundary_fwd", "boundary_bwd", "grad_dp", "tied"):
        assert summary["bytes"][channel]["sent"] == summary["bytes"][channel]["dense"] / 2
    doses = [tick["merger/dose"] for tick in of_kind(tmp_path / "run", "tick") if "merger/dose" in tick]
    assert set(doses) == {1.0, 0.9} and len(doses) == 3  # ticks 4, 5 and 6: fires in 4 and 6
