"""What a rank saves is all that its next tick depends on: a new rank that takes it over goes on to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import merger
from anchor_service.messages import Correction, joined
from codec.config import CodecConfig
from merger.config import MergerConfig
from merger.interface import Merger, Norm, local_norm
from swarm import checkpoint
from swarm.messages import TickPlan
from swarm.rank import Rank
from swarm.tick import tick
from tests.conftest import make_batch
from tests.contract.harness import make_rank, mini_batch

TICKS = 6


class Counting(Merger):
    """Half of the correction in its first merge, a third in its second, …: what it counts decides."""

    payload = "sign"
    merges = 0

    def prepare(self, g_comp: torch.Tensor, correction: torch.Tensor, age: int, norm: Norm = local_norm) -> None:
        self.merges += 1
        self.dose = 1 / (1 + self.merges)

    def apply(self, g_comp: torch.Tensor, correction: torch.Tensor) -> torch.Tensor:
        return g_comp + self.dose * g_comp.abs() * correction

    def state(self) -> dict[str, torch.Tensor]:
        return {"merges": torch.tensor(self.merges)}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        self.merges = int(state["merges"])


KINDS = {
    "signed_ema, powersgd": (MergerConfig(), CodecConfig(kind="powersgd", rank=8)),
    "signed_ema, random_k": (MergerConfig(), CodecConfig(kind="random_k", rank=8)),
    "delta, transform": (MergerConfig(kind="delta"), CodecConfig(total_rate=0.3)),
    "signed_ema, transform by what errors cost": (MergerConfig(), CodecConfig(total_rate=0.3, sensitivity=0.5)),
    "calibrated, of no share": (MergerConfig(kind="calibrated", prior=0.0), CodecConfig(kind="none")),
    "calibrated": (MergerConfig(kind="calibrated", prior=0.5), CodecConfig(kind="none")),
    "a placebo": (MergerConfig(placebo="own"), CodecConfig(kind="none")),
    "a merger that counts": (MergerConfig(kind=f"{__name__}:Counting"), CodecConfig(kind="none")),
}


def _correction(rank: Rank, version: int, source: int) -> Correction:
    """For a merger that looks a head, from which it fetches the whole; its M agrees with what the codec left of it."""
    values = torch.randn(rank.stage.weights.numel, generator=torch.Generator().manual_seed(version))
    values = values if rank.held.merger.payload == "dense" else values.sign().char()
    whole = Correction(version, source, None, values, "")
    if rank.held.at is None:
        return whole
    started = rank.held.merger.sources.get(source)
    look = started.signs if started else values[rank.held.at]
    return Correction(version, source, None, None, "", look, lambda: joined(whole, whole))


def _go(rank: Rank, ticks: range) -> None:
    """Ticks in which corrections 1 and 2 come, the second in the last of them."""
    due = {} if rank.held.placebo else {3: (1, 1), TICKS: (2, 3)}
    for t in ticks:
        correction = _correction(rank, *due[t]) if t in due else None
        version = max([v for first, (v, _) in due.items() if first <= t], default=0)
        plan = TickPlan(t, 0, correction, version, keep_source=t - 1 in (1, 3))
        tick(rank, plan, mini_batch(rank, make_batch(seed=t)), lambda c: c)


@pytest.mark.parametrize("name", KINDS)
def test_a_rank_that_takes_over_a_checkpoint_goes_on_as_if_nothing_had_been(
    untied_model: Path, tmp_path: Path, name: str
):
    merger_config, codec = KINDS[name]
    whole, first, second = (make_rank(untied_model, merger=merger_config, codec=codec) for _ in range(3))
    _go(whole, range(1, TICKS + 1))
    _go(first, range(1, 5))  # with a correction held, and of `delta` a source kept
    assert first.held.at is None or ("correction" in first.state()[0]) == (merger_config.prior > 0)
    checkpoint.save_rank(first, str(tmp_path), 4)
    checkpoint.restore_rank(second, str(tmp_path))
    _go(second, range(5, TICKS + 1))
    np.testing.assert_array_equal(second.stage.weights.master.numpy(), whole.stage.weights.master.numpy())
    expected, found = whole.state()[0], second.state()[0]
    assert expected.keys() == found.keys()
    for key in expected:
        assert torch.equal(expected[key], found[key]), key


@pytest.mark.parametrize("name", ["signed_ema, powersgd", "calibrated"])
def test_packed_signs_make_no_difference_to_a_run_nor_to_a_state(
    untied_model: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    """A model is large or small, and a checkpoint may be of before signs were held packed."""
    merger_config, codec = KINDS[name]
    plain, packed, resumed = (make_rank(untied_model, merger=merger_config, codec=codec) for _ in range(3))
    _go(plain, range(1, 5))
    tensors, fields = plain.state()
    assert "correction" in tensors
    tensors = {k: v.detach().clone() for k, v in tensors.items()}
    _go(plain, range(5, TICKS + 1))
    monkeypatch.setattr(merger, "COMPILED_FROM", 0)
    resumed.restore(tensors, fields)
    _go(packed, range(1, 5))
    again = {k: v.detach().clone() for k, v in packed.state()[0].items()}
    assert "correction.plus" in again and "correction" not in again
    packed.restore(again, packed.state()[1])
    for rank in (packed, resumed):
        _go(rank, range(5, TICKS + 1))
        np.testing.assert_array_equal(rank.stage.weights.master.numpy(), plain.stage.weights.master.numpy())


def test_a_state_of_another_model_is_refused(untied_model: Path, tied_model: Path):
    with pytest.raises(ValueError, match="weights, this stage has"):
        make_rank(tied_model).restore(*make_rank(untied_model).state())
