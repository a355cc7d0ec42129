"""Ragged batches: cut, joined, framed, dealt and padded, against loops over samples."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.frames import FrameError, pack
from rl.batch import Batch, concat, concat_parts, deal, deal_together
from rl.objective import MicroBatch, microbatches
from rl.packing import OPTIONAL, PER_TOKEN
from tests.conftest import with_environment

LAW = settings(deadline=None, derandomize=True, max_examples=100)
CPU = torch.device("cpu")


def random_batch(
    n: int, seed: int = 0, ref: bool = False, shortest: int = 0, longest: int = 9, turns: bool = False
) -> Batch:
    """Samples of 1 to 5 prompt tokens and `shortest` to `longest` response tokens; every value is told apart.

    `turns`: some of the response tokens are an environment's.
    """
    rng = np.random.default_rng(seed)
    prompt = rng.integers(1, 6, n).astype(np.int32)
    response = rng.integers(shortest, longest + 1, n).astype(np.int32)
    r = int(response.sum())
    batch = Batch(
        tokens=rng.integers(1, 1000, int((prompt + response).sum())).astype(np.int32),
        prompt=prompt,
        total=prompt + response,
        rollout_logprobs=-rng.random(r).astype(np.float32),
        ref_logprobs=-rng.random(r if ref else 0).astype(np.float32),
        rewards=rng.random(n).astype(np.float32),
        advantages=rng.normal(size=n).astype(np.float32),
        truncated=rng.random(n) < 0.5,
    )
    return with_environment(batch, seed) if turns else batch


def samples(batch: Batch) -> list[dict[str, Any]]:
    """The batch as a list of samples, cut with two running positions."""
    found, t, r, at = [], 0, 0, 0
    for i in range(len(batch.prompt)):
        p, n = int(batch.prompt[i]), int(batch.total[i])
        own = batch.own[at : at + n - p].tolist() if batch.own.size else [True] * (n - p)
        k = sum(own)
        found.append(
            {
                "prompt": batch.tokens[t : t + p].tolist(),
                "response": batch.tokens[t + p : t + n].tolist(),
                "own": own,
                "rollout": batch.rollout_logprobs[r : r + k].tolist(),
                "ref": batch.ref_logprobs[r : r + k].tolist(),
                "reward": float(batch.rewards[i]),
                "advantage": float(batch.advantages[i]),
                "truncated": bool(batch.truncated[i]),
            }
        )
        t, r, at = t + n, r + k, at + n - p
    assert t == len(batch.tokens) and r == len(batch.rollout_logprobs)
    return found


BATCHES = st.builds(random_batch, st.integers(1, 12), st.integers(0, 1000), st.booleans(), turns=st.booleans())


# --- cut and join ------------------------------------------------------------------------------


@LAW
@given(BATCHES, st.data())
def test_taking_samples_takes_those_samples_and_all_that_is_theirs(batch: Batch, data: st.DataObject):
    start = data.draw(st.integers(0, len(batch)))
    stop = data.draw(st.integers(start, len(batch)))
    assert samples(batch.take(start, stop)) == samples(batch)[start:stop]


@LAW
@given(BATCHES, st.data())
def test_picked_samples_are_those_in_that_order_and_what_was_not_sent_stays_empty(batch: Batch, data: st.DataObject):
    chosen = data.draw(st.lists(st.integers(0, len(batch) - 1), max_size=20))
    assert samples(batch.pick(np.array(chosen, np.int64))) == [samples(batch)[i] for i in chosen]
    rows = batch.only("tokens").pick(np.array(chosen, np.int64))
    assert rows.tokens.tolist() == batch.pick(np.array(chosen, np.int64)).tokens.tolist()
    assert not rows.advantages.size and not rows.rollout_logprobs.size and len(rows) == len(chosen)


@LAW
@given(
    st.lists(
        st.builds(random_batch, st.integers(1, 5), st.integers(0, 1000), turns=st.booleans()), min_size=1, max_size=4
    )
)
def test_joining_batches_puts_their_samples_one_after_the_other(batches: list[Batch]):
    assert samples(concat(batches)) == [sample for batch in batches for sample in samples(batch)]


@LAW
@given(BATCHES, st.data())
def test_a_batch_cut_in_two_and_joined_is_the_same_batch(batch: Batch, data: st.DataObject):
    cut = data.draw(st.integers(0, len(batch)))
    joined = concat([batch.take(0, cut), batch.take(cut, len(batch))])
    for field in fields(Batch):
        ours, theirs = getattr(joined, field.name), getattr(batch, field.name)
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)


@LAW
@given(BATCHES)
def test_own_tokens_and_turns_are_those_of_a_loop(batch: Batch):
    found = [s["own"] for s in samples(batch)]
    assert batch.own_lengths.tolist() == [sum(own) for own in found]
    assert batch.loss_tokens == batch.own_tokens == sum(map(sum, found))
    if batch.own.size:
        assert batch.turns.tolist() == [
            sum(mine and not before for before, mine in zip([False, *own], own)) for own in found
        ]
    else:
        assert batch.turns.tolist() == [1] * len(batch)


def test_response_tokens_are_counted_without_prompts():
    batch = random_batch(9)
    assert batch.response_tokens == sum(len(s["response"]) for s in samples(batch))
    assert len(batch) == 9


# --- frames ------------------------------------------------------------------------------------


@LAW
@given(BATCHES)
def test_a_batch_comes_back_from_its_frame_with_the_fields_it_was_sent_with(batch: Batch):
    header, found = Batch.from_frame(batch.to_frame(step=3, split="val"), "an engine")
    assert header == {"step": 3, "split": "val"}
    assert samples(found) == samples(batch)
    assert {f.name: getattr(found, f.name).dtype for f in fields(Batch)} == {
        f.name: getattr(batch, f.name).dtype for f in fields(Batch)
    }


GOOD = random_batch(4, ref=True, shortest=1)
N = len(GOOD)
BAD = {
    "rollout_logprobs": {"a log-prob too few": replace(GOOD, rollout_logprobs=GOOD.rollout_logprobs[:-1])},
    "total": {
        "a length too many": replace(GOOD, total=np.append(GOOD.total, np.int32(1))),
        "lengths in two dimensions": replace(GOOD, total=GOOD.total.reshape(2, 2)),
        "lengths in 64 bits": replace(GOOD, total=GOOD.total.astype(np.int64)),
    },
    "prompt": {
        "a prompt longer than the whole": replace(
            GOOD, prompt=GOOD.prompt + np.array([9, -9, 0, 0], np.int32) * 2, total=GOOD.total
        ),
        "a prompt of no tokens": replace(
            GOOD,
            prompt=np.array([0, *GOOD.prompt[1:]], np.int32),
            total=np.array([GOOD.total[0] - GOOD.prompt[0], *GOOD.total[1:]], np.int32),
            tokens=GOOD.tokens[GOOD.prompt[0] :],
        ),
        "lengths that are not whole": replace(GOOD, prompt=GOOD.prompt.astype(np.float32)),
    },
    "rewards": {"a reward too few": replace(GOOD, rewards=GOOD.rewards[:-1])},
    "advantages": {
        "one advantage for all": replace(GOOD, advantages=GOOD.advantages[:1]),
        "advantages in halves": replace(GOOD, advantages=GOOD.advantages.astype(np.float16)),
    },
    "own": {
        "a mark too few": replace(GOOD, own=np.ones(GOOD.response_tokens - 1, bool)),
        "marks as bytes": replace(GOOD, own=np.ones(GOOD.response_tokens, np.uint8)),
    },
    "rollout_logprobs of the policy's alone": {
        "log-probs of an environment": replace(GOOD, own=np.zeros(GOOD.response_tokens, bool))
    },
    "truncated": {
        "a mark too many": replace(GOOD, truncated=np.append(GOOD.truncated, True)),
        "marks as bytes": replace(GOOD, truncated=GOOD.truncated.astype(np.uint8)),
    },
    "ref_logprobs": {
        "a base log-prob too few": replace(GOOD, ref_logprobs=GOOD.ref_logprobs[:-1]),
        "a single base log-prob": replace(GOOD, ref_logprobs=GOOD.ref_logprobs[:1]),
    },
    "tokens": {
        "a token too many": replace(GOOD, tokens=np.append(GOOD.tokens, np.int32(1))),
        "a token too few": replace(GOOD, tokens=GOOD.tokens[:-1]),
        "tokens in 64 bits": replace(GOOD, tokens=GOOD.tokens.astype(np.int64)),
    },
}
CASES = [pytest.param(field, batch, id=what) for field, found in BAD.items() for what, batch in found.items()]


@pytest.mark.parametrize(("field", "batch"), CASES)
def test_a_batch_that_does_not_add_up_is_not_sent_and_the_field_is_named(field: str, batch: Batch):
    with pytest.raises(ValueError, match=field.split()[0]):
        batch.to_frame()


@LAW
@given(BATCHES, st.sets(st.sampled_from(OPTIONAL)))
def test_of_a_batch_only_what_is_asked_for_travels(batch: Batch, names: set[str]):
    names = names | {"tokens", "own"} if names & set(PER_TOKEN) else names
    sent = batch.only(*names)
    found = Batch.from_frame(sent.to_frame(), "engine 1")[1]
    for field in fields(Batch):
        whole, arrived = getattr(batch, field.name), getattr(found, field.name)
        assert arrived.dtype == whole.dtype
        assert arrived.tobytes() == (whole.tobytes() if field.name in (*names, "prompt", "total") else b"")
    assert found.nbytes == sent.nbytes == sum(getattr(sent, field.name).nbytes for field in fields(Batch))


def test_a_frame_that_is_no_batch_is_refused_by_naming_the_sender_and_the_field():
    body = np.zeros(9, np.uint8)
    wrong = {
        "arrays": [
            ({}, {}),
            ({}, {"tokens": body}),
            ({}, {"body": body.view(bool)}),
            ({}, {"body": body, "more": body}),
        ],
        "samples": [({}, {"body": body}), ({"samples": -1, "sent": 0}, {"body": body})],
        "sent": [({"samples": 1, "sent": None}, {"body": body}), ({"samples": 1, "sent": 1 << 8}, {"body": body})],
        "prompt": [({"samples": 1 << 40, "sent": 0}, {"body": body + 1})],
    }
    for field, found in wrong.items():
        for header, arrays in found:
            with pytest.raises(FrameError) as caught:
                Batch.from_frame(pack(header, arrays), "engine 1")
            assert (caught.value.sender, caught.value.field) == ("engine 1", field)


def test_the_good_batch_of_these_cases_is_accepted_with_and_without_base_log_probs():
    for batch in (GOOD, replace(GOOD, ref_logprobs=GOOD.ref_logprobs[:0])):
        assert len(Batch.from_frame(batch.to_frame(), "engine 1")[1]) == N


# --- dealing -----------------------------------------------------------------------------------


@LAW
@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 1000))
def test_every_sample_is_dealt_to_exactly_one_rank_and_all_get_as_many(ranks: int, each: int, seed: int):
    batch = random_batch(ranks * each, seed)
    hands = [hand.tolist() for hand in deal(batch, ranks)]
    assert sorted(i for hand in hands for i in hand) == list(range(ranks * each))
    assert {len(hand) for hand in hands} == {each}


@LAW
@given(st.integers(2, 6), st.integers(1, 12), st.integers(0, 1000))
def test_no_two_ranks_differ_by_more_tokens_than_the_longest_and_shortest_sample(ranks: int, each: int, seed: int):
    """Dealt back and forth in order of length, the differences of the rounds cannot add up."""
    batch = random_batch(ranks * each, seed, longest=60)
    weights = [int(batch.total[hand].sum()) for hand in deal(batch, ranks)]
    assert max(weights) - min(weights) <= batch.total.max() - batch.total.min()


def test_each_rank_takes_its_longest_samples_first_so_that_microbatches_hold_little_padding():
    batch = random_batch(24, longest=60)
    for hand in deal(batch, 3):
        lengths = batch.total[hand]
        assert (np.diff(lengths) <= 0).all()


@LAW
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.integers(0, 1000))
def test_dealt_together_all_ranks_get_as_many_and_few_prompts_are_in_two_hands(
    ranks: int, each: int, g: int, seed: int
):
    """None where prompts of as many samples divide, else at most one between two ranks."""
    for prompts in (ranks * each, each):
        single = random_batch(prompts, seed)
        batch = single.pick(np.repeat(np.arange(prompts), g * ranks))
        hands = deal_together(batch, ranks)
        assert sorted(np.concatenate(hands)) == list(range(len(batch)))
        assert {len(hand) for hand in hands} == {prompts * g}
        if len({tuple(each["prompt"]) for each in samples(single)}) == prompts:
            held = sum(len(set(hand // (g * ranks))) for hand in hands)
            assert held == prompts if prompts % ranks == 0 else held <= prompts + ranks - 1


# --- microbatches ------------------------------------------------------------------------------


def check(micro: MicroBatch, chosen: list[dict[str, Any]], ref: bool) -> None:
    """Each real token in its place, and each response token with the position before it, target and numbers."""
    longest = max(len(s["prompt"]) + len(s["response"]) for s in chosen)
    assert micro.ids.shape == micro.real.shape == (len(chosen), longest)
    rows, positions, targets, advantages, rollout, base = [], [], [], [], [], []
    for b, s in enumerate(chosen):
        whole = s["prompt"] + s["response"]
        assert micro.ids[b].tolist() == whole + [0] * (longest - len(whole))
        assert micro.real[b].tolist() == [True] * len(whole) + [False] * (longest - len(whole))
        known = iter(zip(s["rollout"], s["ref"] if ref else s["rollout"], strict=True))
        for t, token in enumerate(s["response"]):
            if not s["own"][t]:
                continue
            rows.append(b)
            positions.append(len(s["prompt"]) + t - 1)
            targets.append(token)
            advantages.append(s["advantage"])
            of_engine, of_base = next(known)
            rollout.append(of_engine)
            base.append(of_base if ref else None)
    assert micro.predicts[0].tolist() == rows and micro.predicts[1].tolist() == positions
    assert micro.targets.tolist() == targets
    assert micro.advantages.tolist() == advantages
    assert micro.rollout_logprobs.tolist() == rollout
    assert (micro.ref_logprobs.tolist() == base) if ref else (micro.ref_logprobs is None)
    assert micro.tokens == sum(len(s["prompt"]) + len(s["response"]) for s in chosen)
    assert micro.ids.dtype == micro.targets.dtype == torch.int64 and micro.real.dtype == torch.bool


@LAW
@given(
    st.integers(1, 12),
    st.integers(0, 1000),
    st.booleans(),
    st.integers(0, 2),
    st.integers(1, 14),
    st.booleans(),
    st.randoms(),
)
def test_microbatches_hold_the_samples_in_the_given_order_with_each_number_at_its_token(
    n: int, seed: int, ref: bool, shortest: int, size: int, turns: bool, rng: Any
):
    # without a token of the policy's in the whole batch, base log-probs of length 0 cannot be told from none
    batch = random_batch(n, seed, ref, max(shortest, int(ref)), turns=turns)
    ref = ref and bool(batch.own_tokens)
    order = list(range(n))
    rng.shuffle(order)
    found = microbatches(batch, np.array(order), size, CPU)
    listed = samples(batch)
    groups = [order[i : i + size] for i in range(0, n, size)]
    assert len(found) == len(groups)
    for micro, group in zip(found, groups):
        check(micro, [listed[i] for i in group], ref)


def test_a_samples_numbers_do_not_depend_on_who_shares_its_microbatch():
    batch = random_batch(8, shortest=1)
    for i in range(8):
        (alone,) = microbatches(batch, np.array([i]), 1, CPU)
        (together,) = microbatches(batch, np.array([3, i] if i != 3 else [3]), 2, CPU)
        mine = together.predicts[0] == (1 if i != 3 else 0)
        assert torch.equal(together.targets[mine], alone.targets)
        assert torch.equal(together.predicts[1][mine], alone.predicts[1])
        assert torch.equal(together.rollout_logprobs[mine], alone.rollout_logprobs)


def test_no_samples_make_no_microbatches():
    assert microbatches(random_batch(3), np.array([], np.int64), 4, CPU) == []


def test_parts_of_rewards_travel_beside_a_batch_and_change_nothing_of_one_without():
    batch, part = random_batch(5), np.array([1, np.nan, 0.25, -3, 0], np.float32)
    assert np.array_equal(batch.to_frame({}, step=3), batch.to_frame(step=3))
    header, found, parts = Batch.with_parts(batch.to_frame({"a b": part, "c": 2 * part}, step=3), "engine 1")
    assert header == {"step": 3} and samples(found) == samples(batch) and list(parts) == ["a b", "c"]
    np.testing.assert_array_equal(parts["c"], 2 * part)
    joined = concat_parts([(5, parts), (2, {}), (1, {"c": np.ones(1, np.float32)})])
    np.testing.assert_array_equal(joined["c"], [*(2 * part), np.nan, np.nan, 1])
    np.testing.assert_array_equal(joined["a b"], [*part, np.nan, np.nan, np.nan])
    assert concat_parts([(5, {}), (2, {})]) == {}


@pytest.mark.parametrize("part", [np.zeros(4, np.float32), np.zeros(5, np.float64), np.zeros((5, 1), np.float32)])
def test_parts_that_do_not_fit_the_samples_are_refused(part: np.ndarray):
    with pytest.raises(FrameError, match=r"engine 1: part right: is float.* of 5 samples"):
        Batch.with_parts(random_batch(5).to_frame({"right": part}), "engine 1")
