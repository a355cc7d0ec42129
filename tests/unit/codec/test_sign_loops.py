"""Machine code against whole arrays: the same bits of planes and gradients, and the same counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codec import signs
from codec.machine_code import LANES
from codec.sign_loops import merge_planes, packed
from codec.signs import SignPlanes

LAW = settings(deadline=None, derandomize=True, max_examples=150)
TINY, LARGE = 1e-45, 3.4e38
SPECIAL = np.array(
    [0.0, -0.0, TINY, -TINY, 1e-38, -1e-38, 1e-23, -1e-23, LARGE, -LARGE, math.inf, -math.inf], np.float32
)
SHARES = st.sampled_from([0.0, 1.0, 0.75, 0.1, 1e-30]) | st.floats(0, 2)


def numbers(n: int, seed: int, special: float = 0.3) -> np.ndarray:
    """Normal ones, and a share of special ones; not at the start of their memory, so at no vector's boundary."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(n + 1, np.float32)[1:]
    return np.where(rng.random(n) < special, rng.choice(SPECIAL, n), x).astype(np.float32)


def in_whole_arrays(g: np.ndarray, sign: np.ndarray, a: float, b: float) -> tuple[np.ndarray, int, int]:
    with np.errstate(all="ignore"):
        merged = abs(g) * sign.astype(np.float32) - g
        merged = merged * np.float32(a) * np.float32(b) + g
        return merged, int((np.sign(g) == sign).sum()), int((merged * g < 0).sum())


def same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    """All NaN are alike: which of two goes on is the processor's choice."""
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(found), nan)
    assert np.array_equal(found[~nan].view(np.int32), expected[~nan].view(np.int32))


@pytest.mark.parametrize("n", [*range(2 * LANES + 2), 4095, 4096, 4097])
def test_every_length_is_packed_and_merged_as_whole_arrays_are(n: int):
    for special in (0.0, 0.3):  # without zeros there is one plane
        m, g = numbers(n, n, special), numbers(n, n + 10_000, special)
        plus, zero, nan = packed(m)
        expected = signs.plain_planes(torch.from_numpy(m))
        assert np.array_equal(plus, expected[0]) and not nan
        assert np.array_equal(zero, expected[1]) if zero is not None else expected[1] is None
        merged, *counts = in_whole_arrays(g, np.sign(m), 0.75, 0.9)
        assert merge_planes(g, plus, zero, 0.75, 0.9) == tuple(counts)
        same_bits(g, merged)


@LAW
@given(st.integers(0, 70), st.integers(0, 1 << 30), st.binary(min_size=18, max_size=18), st.booleans(), SHARES, SHARES)
def test_any_planes_are_merged_as_the_signs_that_they_say(
    n: int, seed: int, bits: bytes, zeros: bool, a: float, b: float
):
    """Whatever fills up their last byte, and where a bit is set in both."""
    size = -(-n // 8)
    plus, zero = np.frombuffer(bits, np.uint8)[:size], np.frombuffer(bits, np.uint8)[9 : 9 + size]
    planes = SignPlanes(torch.tensor(plus), torch.tensor(zero) if zeros else None, n)
    g = numbers(n, seed)
    merged, *counts = in_whole_arrays(g, planes.sign().numpy(), a, b)
    assert merge_planes(g, plus, zero if zeros else None, a, b) == tuple(counts)
    same_bits(g, merged)


@pytest.mark.parametrize("at", [0, LANES - 1, LANES, 3 * LANES, 3 * LANES + 2])
def test_a_nan_is_seen_wherever_it_is(at: int):
    m = numbers(3 * LANES + 3, 0)
    assert not packed(m)[2]
    m[at] = math.nan
    assert packed(m)[2]


def test_neighbours_of_a_gradient_are_left_alone():
    memory = numbers(100, 0, 0.0)
    before = memory.copy()
    plus, zero, _ = packed(numbers(37, 1))
    merge_planes(memory[20:57], plus, zero, 0.75, 1.0)
    assert np.array_equal(memory[:20], before[:20]) and np.array_equal(memory[57:], before[57:])
    assert not np.array_equal(memory[20:57], before[20:57])


def test_a_gradient_with_gaps_is_refused():
    with pytest.raises(AssertionError):
        merge_planes(np.ones(64, np.float32)[::2], np.zeros(4, np.uint8), None, 0.5, 1.0)


@LAW
@given(st.integers(0, 70), st.integers(0, 1 << 30))
def test_a_long_correction_is_encoded_as_a_short_one(n: int, seed: int):
    m = torch.from_numpy(numbers(n, seed))
    short = signs.encode(m)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signs, "COMPILED_FROM", 0)
        long = signs.encode(m)
        if n:
            m[seed % n] = math.nan
            with pytest.raises(ValueError, match="layer 3"):
                signs.encode(m, "layer 3")
    assert short.keys() == long.keys()
    assert all(np.array_equal(short[field], long[field]) for field in short)
