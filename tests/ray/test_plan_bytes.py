"""What `plan` says a run will send is what the run's ledger counted, channel by channel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deploy.launch import drive
from deploy.plan import make_plan
from deploy.sizes import total_ticks
from tests.ray.conftest import ignore, of_kind, small

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

CHANNELS = (
    "boundary_fwd",
    "boundary_bwd",
    "basis",
    "grad_dp",
    "tied",
    "snapshot",
    "replay",
    "correction",
    "rollout_sync",
)
# nearly every mini-batch is replayed, so that their mean length is that of all; whole snapshots, because the
# size of a delta depends on the weights
RUN = (
    "swarm.dp=2",
    "swarm.pp=2",
    "rollout.replicas=2",
    "anchor.delay_k=2",
    "anchor.cadence=1",
    "codec.q_cadence=5",
    "snapshot.encoding=full",
)


def measured_lengths(run: Path) -> list[str]:
    """Mean prompt and response of all samples of a run, as overrides."""
    steps = of_kind(run, "step")
    prompt, response = (float(np.mean([s[f"{part}_length/mean"] for s in steps])) for part in ("prompt", "response"))
    return [f"links.prompt_tokens={prompt}", f"links.response_tokens={response}"]


def blank_corrections(run: Path) -> float:
    """Share of the fires whose M̄ was zero everywhere (no group had an advantage): they cost a second bit plane."""
    fires = of_kind(run, "fire")
    return sum(fire["anchor/m_norm"] == 0 for fire in fires) / len(fires)


def test_the_planned_bytes_are_those_of_the_ledger(tmp_path: Path):
    run = tmp_path / "run"
    summary = drive(small(*RUN), run, ignore)
    plan = make_plan(small(*RUN, *measured_lengths(run)))
    ticks = total_ticks(plan.config)
    assert summary["ticks"] == ticks
    planned = {c: [sent * ticks, dense * ticks] for c, (sent, dense) in plan.configured.channels.items()}
    counted = {c: [entry["sent"], entry["dense"]] for c, entry in summary["bytes"].items()}
    print("\n".join(f"{c:14} planned {planned[c][0]:12.0f} counted {counted[c][0]:12.0f}" for c in planned))
    planned["correction"][0] *= 1 + blank_corrections(run)
    for channel in CHANNELS:
        assert planned[channel] == pytest.approx(counted[channel], rel=0.02), channel
    assert plan.configured.bytes_ratio == pytest.approx(summary["comm/bytes_ratio"], rel=1e-3)
    assert plan.configured.total_ratio == pytest.approx(summary["comm/total_ratio"], rel=0.02)
    # messages of the driver and small agreements are only estimated
    assert planned["control"] == pytest.approx(counted["control"], rel=0.1)
