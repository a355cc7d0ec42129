"""Laws of Triton's kernels against whole arrays: the same bits and counts. On a GPU, or by Triton's interpreter on a CPU, which
has to be asked for before Triton is imported: TRITON_INTERPRET=1 python -m tests.unit.codec.kernel_laws
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from codec import sign_kernels, signs
from codec.sign_kernels import PACKING, merge_planes, packed
from tests.unit.codec.test_sign_loops import in_whole_arrays, numbers, same_bits

BLOCK = 8 * PACKING.rows  # a few of those of merging
LENGTHS = [0, 1, 7, 8, 9, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 13]


def every_length_is_packed_and_merged_as_whole_arrays_are(n: int, device: str) -> None:
    for special in (0.0, 0.3):  # without zeros there is one plane
        m, g = numbers(n, n, special), numbers(n, n + 10_000, special)
        plus, zero, nan = packed(torch.from_numpy(m).to(device))
        expected = signs.plain_planes(torch.from_numpy(m))
        assert np.array_equal(plus.cpu().numpy(), expected[0]) and not nan
        assert np.array_equal(zero.cpu().numpy(), expected[1]) if zero is not None else expected[1] is None
        for a, b in ((0.75, 0.9), (1.0, 1e-30), (0.1, 1.0)):
            found = torch.tensor(g, device=device)
            merged, *counts = in_whole_arrays(g, np.sign(m), a, b)
            assert merge_planes(found, plus, zero, a, b) == tuple(counts)
            same_bits(found.cpu().numpy(), merged)


def a_nan_is_seen_wherever_it_is(at: int, device: str) -> None:
    m = torch.from_numpy(numbers(BLOCK + 1000, 0)).to(device)
    assert not packed(m)[2]
    m[at] = math.nan
    assert packed(m)[2]


def bits_beyond_the_last_number_mean_nothing(device: str) -> None:
    g, plus = torch.ones(9, device=device), torch.full((2,), 255, dtype=torch.uint8, device=device)
    assert merge_planes(g, plus, plus, 0.5, 1.0) == (0, 0)
    assert g.tolist() == [0.5] * 9


def hold(device: str) -> None:
    """All of them."""
    for n in LENGTHS:
        every_length_is_packed_and_merged_as_whole_arrays_are(n, device)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PACKING", "MERGING"):
            patch.setattr(sign_kernels, name, replace(getattr(sign_kernels, name), programs=2))
        every_length_is_packed_and_merged_as_whole_arrays_are(5 * BLOCK - 3, device)  # several blocks for each
    for at in (0, BLOCK - 1, BLOCK, BLOCK + 999):
        a_nan_is_seen_wherever_it_is(at, device)
    bits_beyond_the_last_number_mean_nothing(device)


if __name__ == "__main__":
    with np.errstate(all="ignore"):
        hold("cpu")
    print("they hold")
