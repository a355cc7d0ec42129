"""A run of adapters over two replicas of two stages, everything compressed: it is resumed to the bit and sends adapters alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from deploy.estimate.parameters import stage_parameters
from deploy.estimate.plan import make_plan
from deploy.export import export_policy
from tests.ray.conftest import run_kept, small

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

RUN = (
    "model.lora.rank=4",
    "model.lora.targets=['q_proj', 'down_proj']",
    "swarm.dp=2",
    "swarm.pp=2",
    "run.checkpoint_every=1",
    "codec.kind=transform",
    "codec.total_rate=0.1",
    "codec.gradient.kind=powersgd",
    "merger.kind=calibrated",
    "grpo.lr=1e-3",
)


def test_a_run_of_adapters_is_resumed_to_the_bit_and_sends_them_alone(tmp_path: Path):
    config = small(*RUN, "run.steps=3", "val.every=3")
    whole = run_kept(config, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-000003")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-000002")
    (tmp_path / "again" / "summary.json").unlink()
    resumed = run_kept(config, tmp_path / "again", resume=True)
    assert resumed["weights_digests"] == whole["weights_digests"]

    plan = make_plan(config)
    assert sum(stage_parameters(config, plan.params)) == plan.params.total  # no embedding that two stages sum
    counted = whole["bytes"]
    assert counted.get("tied", {"sent": 0})["sent"] == 0
    assert counted["rollout_sync"]["dense"] == 4 * (1 + 3) * plan.params.total  # before the first step, and after each
    assert 0 < counted["rollout_sync"]["sent"] < counted["rollout_sync"]["dense"]
    adapters = export_policy(tmp_path / "run", tmp_path / "adapters")
    assert adapters.parameters == plan.params.total
