"""Who is to blame for a wait: patterns of a dp2 x pp2 grid, and any pattern at all."""

from __future__ import annotations

import pickle

from hypothesis import given
from hypothesis import strategies as st

from anchor_service.errors import Hung, WaitTimeout
from swarm.doing import Doing, Wait, culprits

A, B, C, D = GRID = [f"worker d{d}p{p}" for d in (0, 1) for p in (0, 1)]  # A-B and C-D are pipelines
BUSY = Doing("tick, forward_backward", 9.0)


def at(*names: str, what: str = "an activation") -> Doing:
    return Doing("tick", 9.0, Wait(names, what))


def everybody(name: str, what: str = "the agreement on a version") -> Doing:
    return at(*(k for k in GRID if k != name), what=what)


def test_one_that_does_not_answer_is_named_whatever_the_others_wait_for():
    assert culprits({B: at(A), C: BUSY, D: at(C)}, silent={A}) == [A]


def test_one_that_waits_for_nobody_while_the_others_wait_for_it_is_named_alone():
    assert culprits({A: BUSY, B: at(A), C: everybody(C), D: everybody(D)}) == [A]


def test_one_that_only_computes_is_not_named_beside_it():
    assert culprits({A: BUSY, B: at(A), C: BUSY}) == [A]


def test_a_chain_of_waits_is_followed_to_its_end():
    assert culprits({A: at(B, what="a gradient"), B: at(D, what="a sum"), D: at(C), C: BUSY}) == [C]


def test_those_in_one_exchange_do_not_keep_each_other_waiting():
    assert culprits({A: everybody(A), B: everybody(B), C: everybody(C), D: BUSY}) == [D]


def test_an_exchange_that_all_are_in_names_all():
    assert culprits({name: everybody(name) for name in GRID}) == GRID


def test_all_that_wait_for_the_anchor_name_it():
    waits = {A: at("anchor 1", what="a correction"), B: at("anchor 1", what="a correction"), C: everybody(C)}
    assert culprits(waits, done=[D]) == ["anchor 1"]


def test_a_ring_is_named_whole_and_who_waits_for_it_is_not():
    ring = {A: at(B, what="a gradient"), B: at(C, what="a sum"), C: at(A)}
    assert culprits(ring | {D: at(C)}) == [A, B, C]


def test_one_that_is_done_is_not_named_in_place_of_one_that_is_not():
    assert culprits({B: at(A)}, done=[A, C, D]) == [B]


def test_all_that_are_busy_are_named():
    assert culprits({A: BUSY, B: BUSY}) == [A, B]


@given(
    st.fixed_dictionaries({k: st.sets(st.sampled_from([*GRID, "anchor 0"])) for k in GRID}),
    st.sets(st.sampled_from(GRID)),
)
def test_somebody_is_always_named_and_never_one_that_is_done(waits: dict[str, set[str]], done: set[str]):
    doings = {k: at(*sorted(names - {k}), what=k) for k, names in waits.items() if k not in done}
    found = culprits(doings, done=done)
    assert bool(found) == bool(doings) and not set(found) & done and set(found) <= {*GRID, "anchor 0"}


def test_the_error_travels_and_says_all_it_knows():
    error = Hung(A, "tick 7", 60.0, "faults.hang_floor_s", 2.0, f"{A} does not answer", "/runs/a/stacks")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, WaitTimeout) and again.who == A and str(again) == str(error)
    for part in (
        A,
        "tick 7",
        "within 60 s",
        "faults.hang_floor_s",
        "usually takes 2 s",
        "not answer",
        "/runs/a/stacks",
    ):
        assert part in str(again)
