"""Deltas of bf16 weights in machine code against whole arrays: the same patterns, frames and errors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codec import bf16, delta
from codec.delta_loops import apply_changes, changes, round_into
from codec.machine_code import LANES

LAW = settings(deadline=None, derandomize=True, max_examples=150)


@pytest.fixture(scope="module", autouse=True)
def of_few():
    """Machine code from the first weight on; `numpys` is without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bf16, "COMPILED_FROM", 0)
        patch.setattr(delta, "_gap_dtype", lambda numel: np.dtype(np.uint32))  # as of many weights
        yield


def numpys(call, *arguments, **more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bf16, "COMPILED_FROM", 1 << 40)
        return call(*arguments, **more)


def weights(n: int, seed: int, changed: float) -> tuple[np.ndarray, np.ndarray]:
    """Patterns, and others of which a share differs, by anything."""
    rng = np.random.default_rng(seed)
    old = rng.integers(0, 1 << 16, n, np.uint16)
    moved = rng.random(n) < changed
    return np.where(moved, old + rng.choice(np.array([1, -1, 3, 0x8000], np.int64), n), old).astype(np.uint16), old


SHARES = st.sampled_from([0.0, 0.02, 0.3, 0.5, 1.0])


@LAW
@given(st.integers(0, 20 * LANES + 3), st.integers(0, 1 << 30), SHARES)
def test_a_delta_is_the_same_and_leads_there_and_back(n: int, seed: int, share: float):
    new, old = weights(n, seed, share)
    found, expected = delta.encode(new, old), numpys(delta.encode, new, old)
    assert found.keys() == expected.keys()
    assert all(found[k].dtype == expected[k].dtype and np.array_equal(found[k], expected[k]) for k in found)
    assert np.array_equal(delta.decode(found, old), new) and np.array_equal(delta.undo(found, new), old)
    assert np.array_equal(delta.decode(found, old.copy(), keeps_base=False), new)
    kept = old.copy()
    delta.decode(found, kept)
    assert np.array_equal(kept, old)


@LAW
@given(st.integers(0, 5 * LANES), st.integers(0, 1 << 30))
def test_any_pattern_is_rounded_and_widened_as_by_numpy(n: int, seed: int):
    values = np.random.default_rng(seed).integers(0, 1 << 32, n, np.uint32).view(np.float32)
    values[::7] = np.array([0x7F800001, 0xFFFFFFFF, 0x7F7FFFFF, 0x0000FFFF], np.uint32).view(np.float32)[seed % 4]
    patterns = bf16.to_bf16(values)
    assert np.array_equal(patterns, numpys(bf16.to_bf16, values))
    widened = bf16.from_bf16(patterns)
    assert widened.tobytes() == numpys(bf16.from_bf16, patterns).tobytes()
    into = np.empty(n, np.float32)
    assert bf16.from_bf16(patterns, into) is into and into.tobytes() == widened.tobytes()


@pytest.mark.parametrize("at", [0, 15, 16, 47])
def test_a_position_beyond_the_weights_is_refused_and_nothing_beyond_them_is_touched(at: int):
    new, old = np.zeros(48, np.uint16), np.zeros(48, np.uint16)
    new[at] = 1
    arrays = delta.encode(new, old)
    arrays["gap0"] = np.array([48], np.uint8)
    with pytest.raises(ValueError, match="'gap': positions up to 48 are outside 48 weights"):
        delta.decode(arrays, old)
    memory = np.zeros(64, np.uint16)
    after = apply_changes(memory[:48], np.array([47, 0, 2**32 - 1], np.uint32), np.full(3, 2, np.uint16), back=False)
    assert after > 48 and memory[47] == 1 and memory.sum() == 1


def test_beyond_the_limit_changes_are_counted_and_not_kept():
    new, old = np.ones(64, np.uint16), np.zeros(64, np.uint16)
    count, after, gaps, values = changes(new, old, 10)
    assert (count, after) == (64, 64) and gaps.tolist() == [0] * 10 and values.tolist() == [2] * 10


def test_rows_that_fill_no_vector_or_have_gaps_are_refused():
    with pytest.raises(AssertionError):
        round_into(np.zeros(LANES + 1, np.uint16), np.zeros(LANES + 1, np.float32))
    with pytest.raises(AssertionError):
        round_into(np.zeros(2 * LANES, np.uint16)[::2], np.zeros(LANES, np.float32))
    assert bf16.LANES == LANES
