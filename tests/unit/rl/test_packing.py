"""Samples packed: back to the bit, prompts once, as few bits as their numbers need; damaged bytes refused or harmless."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.frames import FrameError
from rl.batch import Batch
from rl.packing import OPTIONAL, pack_samples, unpack_samples
from tests.unit.codec.test_fuzz import bounded_memory, mutate
from tests.unit.rl.test_batch import random_batch

LAW = settings(deadline=None, derandomize=True, max_examples=100)
FIELDS = ("prompt", "total", *OPTIONAL)
CASES = 100_000


def arrays_of(batch: Batch) -> dict[str, np.ndarray]:
    return {name: getattr(batch, name) for name in FIELDS}


def group(prompts: int, samples: int, prompt: int = 40, response: int = 10, vocab: int = 1000) -> Batch:
    """Groups of samples that share their prompt."""
    rng, n = np.random.default_rng(0), prompts * samples
    heads = np.repeat(rng.integers(0, vocab, (prompts, prompt)), samples, axis=0)
    tokens = np.concatenate([heads, rng.integers(0, vocab, (n, response))], axis=1)
    tokens[0, -1] = vocab - 1
    return Batch(
        tokens=tokens.reshape(-1).astype(np.int32),
        prompt=np.full(n, prompt, np.int32),
        total=np.full(n, prompt + response, np.int32),
        rollout_logprobs=np.log(rng.random(n * response)).astype(np.float32),
        ref_logprobs=np.zeros(0, np.float32),
        rewards=rng.integers(0, 2, n).astype(np.float32),
        advantages=rng.choice(np.array([-1.5, 0, 0.5], np.float32), n),
        truncated=np.zeros(n, bool),
    )


@LAW
@given(st.integers(0, 12), st.integers(0, 1000), st.booleans(), st.sampled_from([2, 17, 2**16, 2**31 - 1]))
def test_what_is_packed_comes_back_to_the_bit(n: int, seed: int, ref: bool, vocab: int):
    batch = random_batch(n, seed, ref)
    rng = np.random.default_rng(seed)
    odd = rng.integers(0, 2**32, batch.rollout_logprobs.size, np.uint32).view(np.float32)  # NaNs and all
    some = np.array([0.0, -0.0, np.nan, np.inf, 1e-40, -1.0], np.float32)
    arrays = arrays_of(batch) | {
        "tokens": rng.integers(0, vocab, batch.tokens.size).astype(np.int32),
        "rollout_logprobs": odd,
        "rewards": rng.choice(some, n),
        "loss_weights": rng.choice(some, n if ref else 0),
    }
    found = unpack_samples(*pack_samples_of(arrays, n))
    assert {name: (a.dtype, a.tobytes()) for name, a in found.items()} == {
        name: (a.dtype, a.tobytes()) for name, a in arrays.items()
    }


def pack_samples_of(arrays: dict[str, np.ndarray], n: int) -> tuple[np.ndarray, int, int, str]:
    body, sent = pack_samples(arrays)
    return body, n, sent, "engine 1"


def size(batch: Batch, *names: str) -> int:
    return pack_samples(arrays_of(batch.only(*names)))[0].size


def test_a_prompt_costs_once_and_a_token_the_bits_of_the_vocabulary():
    one, many = group(1, 1), group(1, 8)
    # seven more samples: 10 tokens of 10 bits, a length of 4 bits, and a bit that says which prompt
    assert size(many, "tokens") - size(one, "tokens") == pytest.approx(7 * (10 * 10 + 4 + 1) / 8, abs=2)
    assert size(one, "tokens") == pytest.approx(50 * 10 / 8 + 8, abs=4)


def test_a_log_prob_costs_28_bits_and_a_reward_as_many_as_tell_apart_what_occurs():
    batch = group(4, 16)
    plain, n = size(batch, "tokens"), len(batch)
    logprobs = size(batch, "tokens", "rollout_logprobs") - plain
    assert logprobs == pytest.approx(n * 10 * 28 / 8, abs=40)  # and the exponents that occur
    assert size(batch, "tokens", "rewards") - plain == pytest.approx(n / 8 + 2 * 4 + 5, abs=1)
    assert size(batch, "tokens", "advantages") - plain == pytest.approx(n * 2 / 8 + 3 * 4 + 5, abs=1)


def test_the_size_does_not_depend_on_what_is_said_but_on_how_much():
    batch = group(4, 8)
    shuffled = np.random.default_rng(1).permutation(batch.rollout_logprobs)
    assert pack_samples(arrays_of(batch) | {"rollout_logprobs": shuffled})[0].size == size(batch, *OPTIONAL)


HONEST = [
    (*pack_samples(arrays_of(batch)), len(batch))
    for batch in (random_batch(6, ref=True, shortest=1), random_batch(6).only("rewards", "truncated"), group(3, 8))
]


def test_100000_damaged_bodies_are_refused_by_sender_and_field_or_give_a_batch_that_adds_up():
    rng, outcomes = random.Random(5), Counter()
    with bounded_memory():
        for case in range(CASES):
            body, sent, samples = HONEST[case % len(HONEST)]
            data = bytearray(body.tobytes())
            mutate(rng, data)
            if rng.random() < 0.1:
                samples = rng.choice([0, 1, samples + 1, 1 << 20, 1 << 40])
            if rng.random() < 0.1:
                sent = rng.randrange(1 << 7)
            outcomes[attempt(np.frombuffer(bytes(data), np.uint8), samples, sent)] += 1
    print(dict(outcomes.most_common()))
    for field in ("accepted", "sent", "body", "prompt", "total", "tokens", "rewards", "rollout_logprobs"):
        assert outcomes[field] > 5, field


def attempt(body: np.ndarray, samples: int, sent: int) -> str:
    try:
        found = unpack_samples(body, samples, sent, "engine 1")
    except FrameError as error:
        assert error.sender == "engine 1"
        return error.field
    Batch(**found).to_frame()  # raises if it does not add up
    return "accepted"


def test_a_long_prompt_claimed_by_very_many_samples_is_no_batch():
    length, n = 100_000, 100_000
    prompt = np.zeros(length, np.int32)
    bits = np.zeros(n // 8, np.uint8)
    lengths = pack_samples(arrays_of(group(1, 1, length, 0).only()))[0][2:]
    tokens = np.packbits(prompt.astype(np.uint8))
    one = np.array([1], np.uint8)
    body = np.concatenate([one, bits, lengths[:4], one, bits, one, tokens])
    with bounded_memory(), pytest.raises(FrameError, match="tokens"):
        unpack_samples(body, n, 1, "engine 1")
