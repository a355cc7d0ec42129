"""A tick that breaks off is taken back, ranks meet again, a twin's state takes the place of a lost one's: to the bit."""

from __future__ import annotations

import copy
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from anchor_service.messages import Correction
from codec.config import CodecConfig, GradientConfig
from codec.ledger import Ledger
from merger.config import MergerConfig
from rl.config import SnapshotConfig
from swarm import twin
from swarm.grid import Grid, PeerLost
from swarm.meeting import meeting
from swarm.messages import ENGINES_STREAM, Standing, TickPlan
from swarm.rank import Rank
from swarm.reunion import Reunion, reunion
from swarm.tick import tick
from swarm.worker import Worker, WorkerSetup
from tests.conftest import make_batch, on_ranks
from tests.contract.harness import make_rank, mini_batch
from tests.contract.test_rank_state import KINDS, TICKS, _correction, _go


class BrokenOff(RuntimeError):
    pass


def _break_off(rank: Rank, t: int) -> None:
    """Tick `t` up to its optimizer, with a correction that comes in it."""
    comes = not rank.held.placebo and not rank.held.merger.needs_source and rank.held.seen == 0
    plan = TickPlan(t, 0, _correction(rank, 1, 0) if comes else None, 1 if comes else None, keep_source=True)
    step = rank.optimizer.step

    def broken() -> None:
        raise BrokenOff

    rank.optimizer.step = broken
    with pytest.raises(BrokenOff):
        tick(rank, plan, mini_batch(rank, make_batch(seed=99)), lambda c: c)
    rank.optimizer.step = step


@pytest.mark.parametrize("name", KINDS)
def test_a_tick_that_is_taken_back_has_never_been(untied_model: Path, name: str):
    """The first ones too, in which tables, corrections and averages begin."""
    merger, codec = KINDS[name]
    whole, broken = (make_rank(untied_model, merger=merger, codec=codec) for _ in range(2))
    _go(whole, range(1, TICKS + 1))
    for t in range(1, TICKS + 1):
        broken.mark()
        _break_off(broken, t)
        broken.rollback()
        _go(broken, range(t, t + 1))
    np.testing.assert_array_equal(broken.stage.weights.master.numpy(), whole.stage.weights.master.numpy())


CODECS = {
    "powersgd": CodecConfig(kind="powersgd", rank=8),
    "transform": CodecConfig(kind="transform", total_rate=0.3),
    "owed": CodecConfig(kind="none", gradient=GradientConfig(kind="sparse", bits=1.0)),
}


def _address(rank: int, folder: Path) -> str:
    """Where the ranks meet the second time."""
    file = folder / "again"
    if rank == 0:
        global _store
        _store, address = meeting("127.0.0.1")
        file.with_suffix(".part").write_text(address)
        file.with_suffix(".part").rename(file)
    while not file.exists():
        time.sleep(0.01)
    return file.read_text()


def _meet_again(rank: int, init: str, model: Path, folder: Path, codec: CodecConfig) -> tuple[bytes, bytes]:
    """Weights of a run that was left alone, and of one whose tick 4 broke off on all ranks, which met again."""
    last = []
    for broken in (False, True):
        state = make_rank(model, rank, dp=2, pp=2, codec=codec, init=init)
        for t in range(1, 6):
            if broken and t == 4:
                _break_off(state, t)
                Grid.leave()
                state.rollback()
                state.meet(rank, 2, _address(rank, folder))
            tick(state, TickPlan(t, 0, None, 0), mini_batch(state, make_batch(seed=t)), lambda c: c)
        last.append(state.stage.weights.master.numpy().tobytes())
        if not broken:
            Grid.leave()
            init = _address_of_second_run(rank, folder)
    return last[0], last[1]


def _address_of_second_run(rank: int, folder: Path) -> str:
    (folder / "second").mkdir(exist_ok=True)
    return _address(rank, folder / "second")


@pytest.mark.parametrize("name", CODECS)
def test_ranks_that_meet_again_go_on_to_the_bit(untied_model: Path, tmp_path: Path, name: str):
    for alone, again in on_ranks(4, _meet_again, untied_model, tmp_path, CODECS[name]):
        assert alone == again


def _replaced(
    rank: int, init: str, model: Path, folder: Path, codec: CodecConfig, ends: int
) -> tuple[bytes, bytes, bool]:
    """As above; replica 1 is lost after tick `ends`, and another one takes the state of its twin."""
    last, own = [], False
    for lost in (False, True):
        state = make_rank(model, rank, dp=2, pp=1, codec=codec, init=init)
        for t in range(1, 7):
            tick(state, TickPlan(t, 0, None, 0), mini_batch(state, make_batch(seed=t)), lambda c: c)
            if lost and t == ends:
                own = state.has_own(t + 1)
                state = _after_a_loss(state, rank, model, folder, codec)
        last.append(state.stage.weights.master.numpy().tobytes())
        if not lost:
            Grid.leave()
            init = _address_of_second_run(rank, folder)
    return last[0], last[1], own


def _after_a_loss(state: Rank, rank: int, model: Path, folder: Path, codec: CodecConfig) -> Rank:
    Grid.leave()
    if rank == 0:
        tensors, fields = copy.deepcopy(state.state())
        torch.save((tensors, fields), folder / "part")
        (folder / "part").rename(folder / "state")
        state.meet(0, 2, _address(rank, folder))
        return state
    state = make_rank(model, rank, dp=2, pp=1, codec=codec, init=_address(rank, folder))
    while not (folder / "state").exists():
        time.sleep(0.01)
    tensors, fields = torch.load(folder / "state", weights_only=True)
    state.restore(
        tensors | {name: torch.zeros_like(tensors[name]) for name in state.summed() if name in tensors}, fields
    )
    return state


@pytest.mark.parametrize("name, ends, exact", [("powersgd", 4, True), ("powersgd", 3, False), ("owed", 4, False)])
def test_a_twin_s_state_is_exact_where_replicas_have_nothing_of_their_own(
    untied_model: Path, tmp_path: Path, name: str, ends: int, exact: bool
):
    """Q is refreshed before ticks 2, 4 and 6: before tick 4 each replica has a V of its own."""
    results = on_ranks(2, _replaced, untied_model, tmp_path, CODECS[name], ends)
    assert [own for *_, own in results] == [not exact] * 2
    assert len({again for _, again, _ in results}) == 1  # replicas agree in any case
    assert all((alone == again) is exact for alone, again, _ in results)


def _moved(rank: int, init: str, model: Path, folder: Path, codec: CodecConfig, ends: int) -> tuple[bytes, bytes]:
    """As above; replica 1 leaves in order after tick `ends`: whoever takes its place has its own state."""
    last = []
    for leaves in (False, True):
        state = make_rank(model, rank, dp=2, pp=1, codec=codec, init=init)
        for t in range(1, 7):
            tick(state, TickPlan(t, 0, None, 0), mini_batch(state, make_batch(seed=t)), lambda c: c)
            if leaves and t == ends:
                Grid.leave()
                frame, old = twin.pack_state(state, {}), state
                if rank == 0:
                    state.meet(0, 2, _address(rank, folder))
                else:
                    state = make_rank(model, rank, dp=2, pp=1, codec=codec, init=_address(rank, folder))
                    assert state is not old and twin.take_state(state, frame, SnapshotConfig()) == {}
        last.append(state.stage.weights.master.numpy().tobytes())
        if not leaves:
            Grid.leave()
            init = _address_of_second_run(rank, folder)
    return last[0], last[1]


@pytest.mark.parametrize("name, ends", [("powersgd", 3), ("owed", 4), ("transform", 3)])
def test_a_replica_that_leaves_in_order_takes_nothing_with_it(untied_model: Path, tmp_path: Path, name: str, ends: int):
    """Neither statistics that are not summed yet, nor what it owes."""
    for alone, again in on_ranks(2, _moved, untied_model, tmp_path, CODECS[name], ends):
        assert alone == again


@pytest.mark.parametrize("snapshot", [SnapshotConfig(), SnapshotConfig(rate=0.05), SnapshotConfig(encoding="full")])
def test_streams_of_weights_go_on_from_whoever_takes_the_place_of_one_that_leaves(
    untied_model: Path, snapshot: SnapshotConfig
):
    first, second = (make_rank(untied_model, codec=CodecConfig(kind="none")) for _ in range(2))
    names = ENGINES_STREAM, "anchor 0"
    senders = {name: twin.sender_of(name, snapshot, first.setup.model) for name in names}
    for t in (1, 2):  # what is sent after the first is exact in any stream
        tick(first, TickPlan(t, 0, None, 0), mini_batch(first, make_batch(seed=t)), lambda c: c)
        if t == 1:
            for sender in senders.values():
                sender.frame(first.stage.weights.master, t, 0)
            taken = twin.take_state(second, twin.pack_state(first, senders), snapshot)
    tick(second, TickPlan(2, 0, None, 0), mini_batch(second, make_batch(seed=2)), lambda c: c)
    assert [*taken] == [*names]
    for name in names:
        one, other = (
            by[name].frame(r.stage.weights.master, 2, 0, exact=False) for by, r in ((senders, first), (taken, second))
        )
        np.testing.assert_array_equal(one, other)


def test_what_a_rank_owes_is_its_own_where_the_number_of_replicas_changes(untied_model: Path):
    """A grid of one sums nothing; of what was owed before nothing is left over there."""
    state = make_rank(untied_model, codec=CODECS["owed"])
    state.meet(0, 1, "")
    assert state.grid.alone
    assert not state.reducer.state()


def test_what_is_owed_is_summed_with_as_many_as_there_are_after_a_meeting_that_broke_off(
    untied_model: Path, monkeypatch: pytest.MonkeyPatch
):
    """It had set the grid's number already."""
    state = make_rank(untied_model, codec=CODECS["owed"])
    assert state.grid.alone and not state.reducer.state()

    def broken(grid: Grid, init: str) -> None:
        raise RuntimeError("connection reset")

    monkeypatch.setattr(Grid, "_connect", broken)
    with pytest.raises(PeerLost, match="connection reset"):
        state.meet(0, 2, "")
    monkeypatch.setattr(Grid, "_connect", lambda grid, init: None)
    state.meet(0, 2, "")
    assert state.reducer.state()


def _adjourned(rank: int, _: str, folder: Path) -> str:
    """Two of three meet; the third has died on its way."""
    address = _address(rank, folder)
    if rank == 0:
        threading.Timer(1.0, globals().pop, ["_store"]).start()
    try:
        Grid(rank, 3, 1, torch.device("cpu"), Ledger(), 100.0, address)
    except PeerLost as lost:
        return str(lost)
    return "met"


def test_who_waits_for_one_that_has_died_on_its_way_learns_so_when_the_meeting_is_over(tmp_path: Path):
    for said in on_ranks(2, _adjourned, tmp_path):
        assert "its first word with another rank failed" in said


def _at(marked: int, done: int, own: bool = False) -> Standing:
    return Standing(marked, done, own, own, None)


@pytest.mark.parametrize(
    "standings, expected",
    [
        # of 2x2 one rank is lost in tick 5, all others broke off
        ([_at(5, 4), _at(5, 4), _at(5, 4), None], Reunion(4, 0, (1,), (0,), True)),
        # replica 0 has ended it
        ([_at(5, 5), _at(5, 5), _at(5, 4), None], Reunion(5, 0, (1,), (), True)),
        # replica 0 is lost, and what 1 has is not what 0 had
        ([None, _at(5, 4), _at(5, 4, True), _at(5, 4)], Reunion(4, 1, (0,), (1,), False)),
        # nobody is lost: a link broke
        ([_at(5, 4)] * 4, Reunion(4, 0, (), (0, 1), True)),
        # some had not begun it
        ([_at(4, 4), _at(4, 4), _at(5, 4), None], Reunion(4, 0, (1,), (), True)),
        # a stage of each replica is lost
        ([_at(5, 4), None, None, _at(5, 4)], None),
        # one replica ended on one stage alone: it can neither stay nor go back
        ([_at(5, 5), _at(5, 4), None, None], None),
    ],
)
def test_from_where_the_others_go_on(standings: list[Standing | None], expected: Reunion | None):
    assert reunion(standings, 2, 5) == expected


def _worker(rank: Rank, marked: int) -> Worker:
    """Around a rank that is at tick `marked`."""
    worker = Worker(cast(WorkerSetup, SimpleNamespace(rank=rank.setup, snapshot=SnapshotConfig())))
    worker.rank, worker.marked, worker.done = rank, marked, marked - 1
    return worker


def test_a_step_that_is_taken_stands_where_a_replica_is_lost_before_it_told_its_digest(untied_model: Path):
    """Optimizer and weights cannot go back: taken again the tick would be two."""
    whole, alone = (make_rank(untied_model, codec=CodecConfig(kind="none")) for _ in range(2))
    plan, worker = TickPlan(1, 0, None, None), _worker(alone, 1)
    expected = tick(whole, plan, mini_batch(whole, make_batch(seed=1)), lambda c: c)

    def lost(*_: object) -> None:
        raise PeerLost("its digest never came")

    alone.seal.compare = lost
    with pytest.raises(PeerLost):
        tick(alone, plan, mini_batch(alone, make_batch(seed=1)), lambda c: c)
    np.testing.assert_array_equal(alone.stage.weights.master.numpy(), whole.stage.weights.master.numpy())
    for _ in range(2):
        said = worker.standing()
        assert (said.marked, said.done) == (1, 1) and said.report is not None
        assert (said.report.sums, said.report.ledger) == (expected.sums, expected.ledger)
        assert reunion([said, None], 1, 1) == Reunion(1, 0, (1,), (), True)


def test_corrections_come_back_with_the_tick(untied_model: Path):
    """On the wall clock nobody sends them again."""
    rank = make_rank(untied_model, merger=MergerConfig())
    rank.held.inbox.put(Correction(1, 0, None, torch.ones(rank.stage.weights.numel, dtype=torch.int8), ""))
    rank.mark()
    rank.held.agree(TickPlan(1, 0, None, None))
    rank.held.merge(TickPlan(1, 0, None, None), rank.stage.weights.grad, rank.norm)
    assert rank.held.seen == 1 and rank.held.inbox.newest() == 0
    rank.rollback()
    assert rank.held.seen == 0 and rank.held.inbox.newest() == 1 and rank.held.correction is None
