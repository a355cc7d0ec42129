"""What both ends draw from keys: as plain integers of Python say, evenly, and the same wherever a sample is dealt to."""

from __future__ import annotations

from collections import Counter
from math import comb

import numpy as np
import pytest
import torch

from codec.keyed import centred_uniforms, coordinates, mix, row_keys
from codec.rows import rows_of

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def plain_mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def plain_drawn(key: int, k: int) -> list[int]:
    return [plain_mix((plain_mix(key & MASK) + i * GOLDEN) & MASK) for i in range(1, k + 1)]


def keys_of(*values: int) -> torch.Tensor:
    return torch.from_numpy(np.array([value & MASK for value in values], np.uint64).view(np.int64))


def test_mixing_is_that_of_plain_integers():
    values = [0, 1, -1, 2**63, 2**63 - 1, 0x0123456789ABCDEF, GOLDEN]
    found = mix(keys_of(*values)).numpy().view(np.uint64)
    assert [int(value) for value in found] == [plain_mix(value & MASK) for value in values]


@pytest.mark.parametrize(("hidden", "k"), [(1, 1), (7, 7), (32, 5), (1536, 77)])
def test_coordinates_are_those_of_a_shuffle_that_stops(hidden: int, k: int):
    values = [3, -5, 2**62]
    found = coordinates(keys_of(*values), hidden, k)
    for row, value in zip(found.tolist(), values):
        order = list(range(hidden))
        for i, drawn in enumerate(plain_drawn(value, k)):
            j = i + ((drawn & 0xFFFFFFFF) * (hidden - i) >> 32)
            order[i], order[j] = order[j], order[i]
        assert row == order[:k] and len(set(row)) == k


def test_every_set_of_coordinates_is_as_likely_as_any_other():
    hidden, k, draws = 6, 3, 40_000
    found = coordinates(torch.arange(draws), hidden, k).sort(1).values.tolist()
    counts = Counter(map(tuple, found))
    expected = draws / comb(hidden, k)
    assert len(counts) == comb(hidden, k)
    # chi-squared of 19 degrees of freedom: above 50 in one of 7,000 cases
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 50


def test_uniform_numbers_are_uniform_and_exact():
    found = centred_uniforms(torch.arange(50_000), 4)
    step = [(((drawn >> 41) + 0.5) / 2**23 - 0.5) for drawn in plain_drawn(11, 4)]
    assert found[11].tolist() == step
    assert found.abs().max() < 0.5
    counts = torch.histc(found, 20, -0.5, 0.5)
    assert ((counts - 10_000).abs() < 5 * 10_000**0.5).all()
    assert torch.corrcoef(found.T).fill_diagonal_(0).abs().max() < 0.02


def test_a_sample_has_its_keys_wherever_it_is_dealt_to_and_new_ones_in_every_tick():
    rng = np.random.default_rng(0)
    ids, lengths = rng.integers(0, 50, (6, 9)), np.array([9, 4, 7, 1, 9, 6])
    real = np.arange(9) < lengths[:, None]
    whole = row_keys(ids, real, tick=5)
    assert len(set(whole.tolist())) == real.sum() == len(whole)
    borders = np.cumsum([0, *lengths])
    for b in range(6):
        width = lengths[b]
        alone = row_keys(ids[b : b + 1, :width], real[b : b + 1, :width], tick=5)
        np.testing.assert_array_equal(alone, whole[borders[b] : borders[b + 1]])
    order = [4, 2, 0]
    np.testing.assert_array_equal(
        row_keys(ids[order], real[order], 5), np.concatenate([whole[borders[b] : borders[b + 1]] for b in order])
    )
    assert not set(whole.tolist()) & set(row_keys(ids, real, tick=6).tolist())


def test_what_is_padding_does_not_matter_and_equal_samples_are_told_apart():
    ids = np.array([[1, 2, 3], [1, 2, 9], [1, 2, 3]])
    real = np.array([[1, 1, 0], [1, 1, 0], [1, 1, 1]], bool)
    keys = row_keys(ids, real, tick=1)
    assert len(set(keys.tolist())) == 7
    ids[:2, 2] = 7
    np.testing.assert_array_equal(row_keys(ids, real, tick=1), keys)


def test_rows_can_be_drawn_again():
    rows = rows_of(np.array([[1, 2, 3]]), np.ones((1, 3), bool), torch.device("cpu"), tick=2)
    others = [rows.redrawn(draw) for draw in range(4)]
    assert len({key for other in others for key in other.keys.tolist()}) == 12
    assert all(torch.equal(other.kept, rows.kept) for other in others)
