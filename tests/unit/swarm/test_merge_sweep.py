"""A merge from packed signs is the merger's own `apply`, and only mergers that are known to need no more get them."""

from __future__ import annotations

import pytest
import torch

import merger
from codec.signs import SignPlanes, planes_of
from merger import MERGERS
from merger.config import MergerConfig
from merger.interface import local_norm
from merger.signed_ema import SignedEMA
from swarm.merge_sweep import CACHED, held_form, merge_in_place, restored, stored

N = CACHED + 1003
G = torch.randn(N, generator=torch.Generator().manual_seed(0))
M = torch.randn(N, generator=torch.Generator().manual_seed(1))
G[::11], G[1::17], M[::7] = 0.0, -0.0, 0.0


class Mine(SignedEMA):
    """Of a user's: what is inherited says nothing about it."""


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merger, "COMPILED_FROM", 0)


@pytest.mark.parametrize("share", [0.0, 0.3, 1 / 3, 1.0])
@pytest.mark.parametrize("kind", ["signed_ema", "calibrated"])
def test_packed_signs_are_merged_as_signs_in_int8(kind: str, share: float):
    merger = MERGERS[kind](MergerConfig(kind=kind))
    merger.dose = share
    packed, plain = G.clone(), G.clone()
    assert merge_in_place(merger, packed, planes_of(M)) == merge_in_place(merger, plain, M.sign().char())
    assert torch.equal(packed.view(torch.int32), plain.view(torch.int32))
    assert torch.equal(plain.view(torch.int32), merger.apply(G, M).view(torch.int32))


def test_the_ratio_gate_finds_the_same_dose_in_packed_signs():
    doses = []
    for held in (planes_of(M), M.sign().char()):
        gate = SignedEMA(MergerConfig(adaptive_lambda_mode="ratio", lambda_cap=0.7))
        gate.prepare(G, held, 3, local_norm)
        doses.append(gate.dose)
    assert doses[0] == doses[1] > 0


@pytest.mark.usefixtures("packs")
@pytest.mark.parametrize(
    ("kind", "device", "packed"),
    [
        ("signed_ema", "cpu", True),
        ("calibrated", "cpu", True),
        ("delta", "cpu", False),
        ("replace", "cpu", False),
        (f"{__name__}:Mine", "cpu", False),
        ("signed_ema", "meta", False),
    ],
)
def test_signs_stay_packed_for_our_mergers_along_signs(kind: str, device: str, packed: bool):
    found = held_form(merger.make_merger(MergerConfig(kind=kind)), planes_of(M), device)
    assert isinstance(found, SignPlanes) == packed
    if isinstance(found, torch.Tensor):
        assert found.device.type == device and found.dtype == torch.int8


def test_on_a_gpu_signs_stay_packed_however_few_they_are():
    assert merger.holds_planes(SignedEMA, "cuda", 1) and not merger.holds_planes(MERGERS["delta"], "cuda", 1)


@pytest.mark.usefixtures("packs")
def test_a_dense_correction_is_held_as_its_signs_where_these_are_all_that_is_merged():
    found = held_form(SignedEMA(MergerConfig()), M, "cpu")
    assert torch.equal(found.sign(), M.sign().char())


def test_few_signs_are_held_as_they_always_were():
    found = held_form(SignedEMA(MergerConfig()), planes_of(M), "cpu")
    assert isinstance(found, torch.Tensor) and torch.equal(found, M.sign().char())


@pytest.mark.parametrize("held", [planes_of(M), planes_of(M.abs() + 1), M, None], ids=["two", "one", "dense", "none"])
def test_what_is_held_comes_back_from_a_state(held: torch.Tensor | SignPlanes | None):
    found = restored("correction", stored("correction", held), N)
    assert type(found) is type(held) and (held is None or torch.equal(found.sign(), held.sign()))
