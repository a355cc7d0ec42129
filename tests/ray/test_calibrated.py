"""A calibrated anchor in real runs: nothing at a share of 0, the same on every layout and after a resume; and δ, spent at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.estimate.bytes import correction_bytes, head_bytes
from deploy.estimate.parameters import parameters, stage_parameters
from tests.ray.conftest import as_if_killed, lines, of_kind, run_kept, small

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

CALIBRATED = "merger.kind=calibrated", "merger.prior=0.05", "codec.q_cadence=2"
GRID = "swarm.dp=2", "swarm.pp=2"


def shares(run: Path) -> list[float]:
    return [tick["merger/w"] for tick in of_kind(run, "tick") if "merger/w" in tick]


def test_with_a_share_of_0_it_is_the_run_without_an_anchor(tmp_path: Path):
    never = run_kept(small(*GRID, *CALIBRATED[::2], "merger.prior=-1"), tmp_path / "never")
    assert set(shares(tmp_path / "never")) == {0.0}
    without = run_kept(small(*GRID, "codec.q_cadence=2", "merger.kind=none", "anchor.enabled=false"), tmp_path / "none")
    assert never["weights_digests"] == without["weights_digests"]
    config = small(*GRID, *CALIBRATED[::2])
    stages = stage_parameters(config, parameters(config))
    heads, fires = sum(head_bytes(config, stages)), len(lines(tmp_path / "never", "corrections.jsonl"))
    assert never["bytes"]["correction"]["sent"] == pytest.approx(heads * fires, rel=0.05)  # headers
    assert sum(correction_bytes(config, stages)) > 3 * heads


def test_a_run_stopped_on_the_way_ends_in_the_same_weights(tmp_path: Path):
    config, whole, parts = small(*GRID, *CALIBRATED, "run.checkpoint_every=2"), tmp_path / "whole", tmp_path / "parts"
    expected = run_kept(config, whole)
    assert max(shares(whole)) > 0.01
    run_kept(config, parts)
    as_if_killed(parts, 6)
    assert run_kept(config, parts, resume=True)["weights_digests"] == expected["weights_digests"]
    assert shares(parts) == shares(whole) and lines(parts, "corrections.jsonl") == lines(whole, "corrections.jsonl")


def test_every_layout_looks_at_the_same_coordinates(tmp_path: Path):
    """Without a codec the layouts differ in the order of their sums alone."""
    config = *CALIBRATED, "codec.kind=none"
    run_kept(small(*config), tmp_path / "one")
    run_kept(small(*config, *GRID), tmp_path / "four")
    assert shares(tmp_path / "four") == pytest.approx(shares(tmp_path / "one"), rel=0.02)


def test_what_the_codec_lost_given_back_in_its_own_tick_is_the_dense_run(tmp_path: Path):
    given_back = "merger.kind=delta", "merger.spend=once", "anchor.delay_k=1", "anchor.cadence=1", "anchor.beta_anc=0"
    run_kept(small("swarm.pp=2", "codec.rank=2", *given_back), tmp_path / "delta")
    run_kept(small("swarm.pp=2", "codec.kind=none", "anchor.enabled=false", "merger.kind=none"), tmp_path / "dense")
    norms = [[tick["actor/grad_norm"] for tick in of_kind(tmp_path / run, "tick")] for run in ("delta", "dense")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3) and max(norms[1]) > 0
