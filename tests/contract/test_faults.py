"""What goes wrong between ranks is caught, in real processes, and its error names who and what."""

from __future__ import annotations

import pickle
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from anchor_service.errors import ActorLost, ReplicaMismatch, WaitTimeout
from anchor_service.messages import Correction
from codec.frames import FrameError
from codec.ledger import Ledger
from merger.config import MergerConfig
from swarm.grid import Desync, Grid
from swarm.messages import TickPlan
from swarm.tick import tick
from tests.conftest import make_batch, on_ranks
from tests.contract.harness import make_rank, mini_batch


def _ticks(rank: int, init: str, folder: Path, fault) -> str:
    """Two good ticks, then `fault` on this rank's state, then a third; what the third said."""
    state = make_rank(folder, rank, dp=2, pp=1, init=init, merger=MergerConfig(kind="signed_ema"), timeout_s=5)
    signs = torch.ones(state.stage.weights.numel, dtype=torch.int8)
    batch = make_batch()
    for t in (1, 2):
        correction = Correction(1, 0, None, signs, "") if t == 2 else None
        tick(state, TickPlan(t, 0, correction, int(t == 2)), mini_batch(state, batch), lambda c: c)
    fault(state, rank)
    lost = fault is _lose_a_correction
    correction = Correction(2, 1, None, signs, "") if lost and rank == 0 else None
    try:
        tick(state, TickPlan(3, 0, correction, 1 + lost), mini_batch(state, batch), lambda c: c)
    except (ReplicaMismatch, WaitTimeout, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


def _flip_at_rest(state, rank: int) -> None:
    if rank == 1:
        state.stage.weights.master.view(torch.int32)[17] ^= 1


def _flip_during_the_tick(state, rank: int) -> None:
    if rank == 1:
        step = state.optimizer.step

        def faulty() -> None:
            step()
            state.stage.weights.master.view(torch.int32)[17] ^= 1

        state.optimizer.step = faulty


def _lose_a_correction(state, rank: int) -> None:
    """Version 2 is due and reaches rank 0 alone."""


def test_a_bit_flipped_between_ticks_is_named_by_its_own_rank(untied_model: Path):
    honest, faulty = on_ranks(2, _ticks, untied_model, _flip_at_rest)
    assert "worker d1p0 changed since tick 2" in faulty and "tick 3" in faulty and "version 1" in faulty
    assert "fine" not in honest


def test_a_bit_flipped_within_a_tick_is_caught_by_comparing_replicas(untied_model: Path):
    for report in on_ranks(2, _ticks, untied_model, _flip_during_the_tick):
        assert report.startswith("ReplicaMismatch: replicas of stage 0 differ")
        assert "worker d0p0 holds" in report and "worker d1p0 holds" in report and "tick 3" in report


def test_a_rank_that_does_not_hold_the_due_version_stops_the_run(untied_model: Path):
    for rank, report in enumerate(on_ranks(2, _ticks, untied_model, _lose_a_correction)):
        assert "version 2 is due but not held at tick 3" in report
        assert f"worker d{rank}p0 holds {2 - rank}, all ranks hold 1" in report


def _silent(rank: int, init: str) -> str:
    grid = Grid(rank, 1, 2, torch.device("cpu"), Ledger(), timeout_s=1.5, init=init)
    if rank == 0:
        time.sleep(4)  # alive, but sends nothing
        return ""
    with pytest.raises(WaitTimeout) as caught:
        grid.recv("fwd", 24, 24)
    return str(caught.value)


def test_a_silent_neighbour_is_named_with_the_knob(untied_model: Path):
    _, report = on_ranks(2, _silent)
    assert "worker d0p0 did not deliver an activation to worker d0p1 within 1.5 s" in report
    assert "swarm.timeout_s" in report


def _silent_in_a_grid(rank: int, init: str) -> list[str]:
    """Of four ranks the last says nothing: its replicas and the stage before it wait for it in groups of their own."""
    grid = Grid(rank, 2, 2, torch.device("cpu"), Ledger(), timeout_s=2.0, init=init)
    waits = {
        1: lambda: grid.sum_dp(torch.ones(3), "control"),
        2: lambda: grid.recv("bwd", 24, 24),
        3: lambda: time.sleep(5),
    }
    try:
        waits.get(rank, lambda: None)()
    except WaitTimeout as error:
        return [error.who, error.knob]
    finally:
        if rank == 0:
            time.sleep(5)  # alive, so that its leaving ends no wait
    return []


def test_every_group_of_a_grid_has_its_deadline():
    found = on_ranks(4, _silent_in_a_grid)
    assert found == [[], ["the replicas of a stage", "swarm.timeout_s"], ["worker d1p1", "swarm.timeout_s"], []]


def _silent_copy(rank: int, init: str, way: str) -> list[str]:
    grid = Grid(rank, 2, 1, torch.device("cpu"), Ledger(), timeout_s=1.5, init=init)
    if rank == 0:
        time.sleep(4)  # alive, but sends nothing
        return []
    payload = torch.zeros(8, dtype=torch.uint8)
    call = {
        "sum": lambda: grid.replicas.sum(torch.ones(3), 12.0),
        "scatter": lambda: grid.replicas.scatter([payload, payload], 8, 8, 0.0),
        "gather": lambda: grid.replicas.gather(payload, [(8, 8), (8, 8)]),
    }
    with pytest.raises(WaitTimeout) as caught:
        call[way]()
    return [caught.value.who, caught.value.knob]


@pytest.mark.parametrize("way", ["sum", "scatter", "gather"])
def test_a_silent_replica_ends_every_kind_of_sum_at_the_deadline(way: str):
    assert on_ranks(2, _silent_copy, way)[1] == ["those who hold a copy (grad_dp)", "swarm.timeout_s"]


def _too_much(rank: int, init: str) -> str:
    grid = Grid(rank, 2, 1, torch.device("cpu"), Ledger(), timeout_s=5, init=init)
    given = torch.zeros(100, dtype=torch.uint8) if rank == 0 else None
    with pytest.raises(Desync) as caught:
        grid.bytes_from_first_replica(given, "basis", most=99)
    return str(caught.value)


def test_tables_beyond_their_limit_are_not_allocated():
    for report in on_ranks(2, _too_much):
        assert "worker d0p0 sent message (number, bytes) [0, 100], expected [0, 99]" in report


def _short(rank: int, init: str) -> str:
    grid = Grid(rank, 1, 2, torch.device("cpu"), Ledger(), timeout_s=5, init=init)
    if rank == 0:
        grid.send("fwd", torch.zeros(2, 2))
        with suppress(RuntimeError):  # the other side leaves without taking the rest
            grid.flush()
        return ""
    with pytest.raises(Desync) as caught:
        grid.recv("fwd", 24, 24)
    return str(caught.value)


def test_a_message_shorter_than_expected_is_not_read_as_data(untied_model: Path):
    _, report = on_ranks(2, _short)
    assert "worker d0p0 sent message (number, bytes) [0, 16], expected [0, 24]" in report


def test_errors_survive_pickling():
    for error in (
        WaitTimeout("the anchor", "M", 3.0, "anchor.timeout_s"),
        ActorLost("engine 0", "val samples of step 0", "it was killed"),
        ReplicaMismatch("weights differ", 3, 1, ["worker d0p0"]),
        Desync("worker d0p0", [1, 2], [3, 4]),
        FrameError("stage 0", "digest", "bad"),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error) and str(copy) == str(error)


def test_a_gradient_that_is_not_finite_stops_the_run(untied_model: Path):
    state = make_rank(untied_model, on_nan="stop")
    batch = make_batch()
    batch.advantages[0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"gradient norm of tick 1 is (nan|inf)"):
        tick(state, TickPlan(1, 0, None, 0), mini_batch(state, batch), lambda c: c)
