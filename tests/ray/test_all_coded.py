"""Everything that crosses is coded, as the demo ships it: the same bits again, and from a checkpoint on, with each kind of sum."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm.run_config import RunConfig
from tests.ray.conftest import as_if_killed, lines, of_kind, run_kept, small

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

GRADIENTS = {
    "powersgd": ("codec.gradient.kind=powersgd", "codec.gradient.rank=2", "codec.gradient.bits=4.0"),
    "sign": ("codec.gradient.kind=sign",),
    "sparse": ("codec.gradient.kind=sparse", "codec.gradient.bits=0.5"),
}


def coded(kind: str) -> RunConfig:
    """The demo's settings on a small scale: 2x2 ranks, six steps, checkpoints of every second."""
    layout = "swarm.dp=2", "swarm.pp=2", "run.checkpoint_every=2", "val.every=3", "codec.kind=transform"
    stream = "snapshot.dtype=bfloat16", "snapshot.rate=0.05", "rollout.max_staleness=1"
    policy = "grpo.rollout_is=token", "grpo.old_logprobs=tick", "merger.dose=0.5"
    return small(*layout, *stream, *policy, *GRADIENTS[kind])


@pytest.mark.parametrize("kind", GRADIENTS)
def test_a_run_stopped_on_the_way_ends_in_the_same_weights(kind: str, tmp_path: Path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = run_kept(coded(kind), whole)
    assert expected["comm/total_ratio"] < 0.25  # of few samples and steps
    again = run_kept(coded(kind), parts)
    assert again["weights_digests"] == expected["weights_digests"]
    as_if_killed(parts, 6)
    found = run_kept(coded(kind), parts, resume=True)
    assert found["weights_digests"] == expected["weights_digests"]
    assert found["validations"] == expected["validations"]
    assert lines(parts, "corrections.jsonl") == lines(whole, "corrections.jsonl")
    assert [r["rollout/weights_digest"] for r in of_kind(parts, "step")] == [
        r["rollout/weights_digest"] for r in of_kind(whole, "step")
    ]
