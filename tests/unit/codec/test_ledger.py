"""The ledger: bytes by channel, and two ratios that say what they count."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from codec.ledger import CHANNELS, Ledger

BOUNDARY = {"boundary_fwd", "boundary_bwd", "basis"}


def entries(seed: int, count: int = 200) -> list[tuple[str, int, int]]:
    rng = random.Random(seed)
    return [(rng.choice(CHANNELS), rng.randrange(10**9), rng.randrange(10**9)) for _ in range(count)]


def filled(rows: list[tuple[str, int, int]]) -> Ledger:
    ledger = Ledger()
    for row in rows:
        ledger.add(*row)
    return ledger


def ratio(rows: list[tuple[str, int, int]], channels: set[str]) -> Fraction:
    kept = [row for row in rows if row[0] in channels]
    return Fraction(sum(sent for _, sent, _ in kept), sum(dense for _, _, dense in kept))


def test_the_channels_are_those_of_the_contract():
    contract = "boundary_fwd boundary_bwd basis grad_dp tied snapshot replay correction rollout_sync control"
    assert set(CHANNELS) == set(contract.split())


@pytest.mark.parametrize("seed", range(3))
def test_bytes_ratio_is_y_dy_and_basis_over_the_dense_boundary_alone(seed: int):
    rows = entries(seed)
    assert filled(rows).bytes_ratio() == pytest.approx(float(ratio(rows, BOUNDARY)), rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_total_ratio_is_everything_over_everything(seed: int):
    rows = entries(seed)
    assert filled(rows).total_ratio() == pytest.approx(float(ratio(rows, set(CHANNELS))), rel=1e-12)


@pytest.mark.parametrize("channel", sorted(set(CHANNELS) - BOUNDARY))
def test_no_other_channel_moves_the_published_ratio_and_every_channel_moves_the_total(channel: str):
    ledger = filled([("boundary_fwd", 5, 100)])
    ledger.add(channel, 1000, 0)
    assert ledger.bytes_ratio() == 0.05
    assert ledger.total_ratio() == 10.05


def test_there_is_no_ratio_before_anything_dense_would_have_crossed():
    ledger = Ledger()
    assert ledger.bytes_ratio() is None and ledger.total_ratio() is None
    ledger.add("correction", 10, 0)
    ledger.add("control", 1, 1)
    assert ledger.bytes_ratio() is None and ledger.total_ratio() == 11


@pytest.mark.parametrize("channel", ["boundary", "Basis", "", "weights"])
def test_an_unknown_channel_is_refused_and_nothing_is_counted(channel: str):
    ledger = Ledger()
    with pytest.raises(KeyError, match="boundary_fwd"):
        ledger.add(channel, 1, 1)
    with pytest.raises(KeyError):
        ledger.merge({channel: (1, 1)})
    assert ledger.drain() == {}


def test_draining_takes_everything_out_once():
    ledger = filled([("basis", 3, 0), ("tied", 2, 4), ("basis", 1, 0), ("replay", 0, 0)])
    assert ledger.drain() == {"basis": (4, 0), "tied": (2, 4)}
    assert ledger.drain() == {} and ledger.total_ratio() is None


@pytest.mark.parametrize("seed", range(3))
def test_ranks_that_drain_into_one_ledger_add_up_to_one_ledger_that_saw_it_all(seed: int):
    rows = entries(seed)
    ranks, total = [Ledger() for _ in range(3)], Ledger()
    for i, row in enumerate(rows):
        ranks[i % 3].add(*row)
        if i % 10 == 0:
            for rank in ranks:
                total.merge(rank.drain())
    for rank in ranks:
        total.merge(rank.drain())
    assert total.state() == filled(rows).state()


def test_a_ledger_goes_on_from_its_state():
    whole, rows = filled(entries(1)), entries(1)
    resumed = filled(rows[:50])
    state = resumed.state()
    again = Ledger()
    again.merge(state)
    for row in rows[50:]:
        again.add(*row)
    assert again.state() == whole.state()
    assert resumed.state() == state  # asking for the state takes nothing out
