"""sign(M) as bit planes: lossless, small, and refused when it cannot be right."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codec import signs

LAW = settings(deadline=None, derandomize=True, max_examples=200)
SPECIAL = [0.0, -0.0, math.inf, -math.inf, 1e-45, -1e-45, 3.4e38, -3.4e38]
VALUES = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32, allow_nan=False))


def sign_of(value: float) -> int:
    return (value > 0) - (value < 0)


def sent_bytes(arrays: dict[str, np.ndarray]) -> int:
    return sum(a.nbytes for a in arrays.values())


@LAW
@given(st.lists(VALUES, max_size=70))
def test_what_is_decoded_is_the_sign_of_every_value(values: list[float]):
    found = signs.decode(signs.encode(torch.tensor(values, dtype=torch.float32)), len(values))
    assert found.dtype == torch.int8
    assert found.tolist() == [sign_of(v) for v in values]


@pytest.mark.parametrize("n", [*range(18), 4096, 4097])
@pytest.mark.parametrize("zeros", ["none", "one", "half", "all"])
def test_every_size_comes_back_whatever_the_number_of_zeros(n: int, zeros: str):
    m = torch.randn(n, generator=torch.Generator().manual_seed(n))
    share = {"none": 0, "one": min(1, n), "half": n // 2, "all": n}[zeros]
    m[torch.randperm(n, generator=torch.Generator().manual_seed(n + 1))[:share]] = 0
    assert torch.equal(signs.decode(signs.encode(m), n), m.sign().to(torch.int8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_sign_is_that_of_the_values_own_dtype(dtype: torch.dtype):
    m = torch.tensor([1.5, -2.0, 0.0, -0.0, torch.finfo(dtype).tiny, -torch.finfo(dtype).tiny], dtype=dtype)
    assert signs.decode(signs.encode(m), 6).tolist() == [1, -1, 0, 0, 1, -1]


def test_a_matrix_is_sent_flat_and_encoding_leaves_it_as_it_was():
    m = torch.tensor([[1.0, -1.0], [0.0, 5.0]], requires_grad=True)
    before = m.detach().clone()
    assert signs.decode(signs.encode(m), 4).tolist() == [1, -1, 0, 1]
    assert torch.equal(m, before)


def test_a_nan_is_refused_with_the_name_of_the_parameter():
    with pytest.raises(ValueError, match=r"model\.layers\.3\.mlp"):
        signs.encode(torch.tensor([1.0, math.nan]), "model.layers.3.mlp")


@pytest.mark.parametrize("n", [100_000, 1_000_003])
def test_without_zeros_a_correction_takes_less_than_a_31st_of_fp32(n: int):
    m = torch.randn(n, generator=torch.Generator().manual_seed(0))
    m[m == 0] = 1.0
    assert sent_bytes(signs.encode(m)) <= 4 * n / 31


@pytest.mark.parametrize("share", [1e-4, 1e-3, 1 / 32, 0.1, 0.9])
def test_zeros_never_cost_more_than_a_second_plane_nor_more_than_four_bytes_each(share: float):
    n = 64_000
    m = torch.ones(n)
    m[: round(share * n)] = 0
    extra = sent_bytes(signs.encode(m)) - n // 8
    assert extra <= min(n // 8, 4 * round(share * n))
    assert torch.equal(signs.decode(signs.encode(m), n), m.to(torch.int8))


def plane(n: int, dtype: type = np.uint8) -> np.ndarray:
    return np.zeros(n, dtype)


HOSTILE = {
    "no plane at all": {},
    "a plane too short": {"plus": plane(1)},
    "a plane too long": {"plus": plane(3)},
    "a plane in two dimensions": {"plus": plane(2).reshape(1, 2)},
    "a plane of floats": {"plus": plane(2, np.float32)},
    "a plane of signed bytes": {"plus": plane(2, np.int8)},
    "a zero plane too short": {"plus": plane(2), "zero_plane": plane(1)},
    "a zero plane of words": {"plus": plane(2), "zero_plane": plane(2, np.uint16)},
    "an index one too large": {"plus": plane(2), "zero": np.array([3, 10], np.uint32)},
    "a huge index": {"plus": plane(2), "zero": np.array([2**63], np.uint64)},
    "a negative index": {"plus": plane(2), "zero": np.array([-1], np.int64)},
    "indices that are not whole": {"plus": plane(2), "zero": np.array([1.0])},
    "indices that are a mask": {"plus": plane(2), "zero": np.zeros(10, bool)},
    "indices in two dimensions": {"plus": plane(2), "zero": np.array([[1], [2]], np.uint32)},
}


@pytest.mark.parametrize("arrays", HOSTILE.values(), ids=HOSTILE)
def test_arrays_that_do_not_fit_ten_parameters_are_refused(arrays: dict[str, np.ndarray]):
    with pytest.raises(ValueError):
        signs.decode(arrays, 10)


def test_the_bits_that_fill_the_last_byte_mean_nothing():
    full = {"plus": np.array([0xFF, 0xFF], np.uint8), "zero_plane": np.array([0, 0xFC], np.uint8)}
    assert signs.decode(full, 10).tolist() == [1] * 10
