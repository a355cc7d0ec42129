"""sign(M) as bit planes: lossless, small, and refused when it cannot be right."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch
import zstandard
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


@pytest.mark.parametrize("share", [0, 1e-4, 1e-3, 1 / 32, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("where", ["scattered", "in rows"])
def test_zeros_cost_at_most_a_second_plane_and_few_bytes_each(share: float, where: str):
    n, row = 640_000, 640
    rng = np.random.default_rng(0)
    zero = rng.random(n) < share if where == "scattered" else np.repeat(rng.random(n // row) < share, row)
    m = torch.from_numpy(np.where(zero, 0.0, rng.choice([-1.0, 1.0], n)))
    arrays = signs.encode(m)
    runs = int(np.count_nonzero(np.diff(zero))) + 1
    assert sent_bytes(arrays) - n // 8 <= min(n // 8, 8 * runs + 32)
    assert torch.equal(signs.decode(arrays, n), m.to(torch.int8))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1])
def test_rows_of_zeros_make_a_correction_smaller(share: float):
    """Rows of an embedding whose tokens never occurred, or all of an M whose batch had no advantage."""
    m = torch.randn(1000, 1024, generator=torch.Generator().manual_seed(0))
    m[: round(share * 1000)] = 0
    assert sent_bytes(signs.encode(m)) <= (1 - share) * m.numel() / 8 + 2048


@LAW
@given(st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 1.0]), st.integers(1, 3000)), max_size=12))
def test_runs_of_any_length_come_back_in_no_more_than_two_planes(runs: list[tuple[float, int]]):
    m = torch.tensor([sign for sign, length in runs for _ in range(length)])
    arrays = signs.encode(m)
    assert torch.equal(signs.decode(arrays, m.numel()), m.to(torch.int8))
    assert all(a.dtype == np.uint8 and a.nbytes <= -(-m.numel() // 8) for a in arrays.values())
    assert ("zero" in arrays) == bool((m == 0).any())


def plane(n: int, dtype: type = np.uint8) -> np.ndarray:
    return np.zeros(n, dtype)


def zstd(data: bytes, **options: bool) -> np.ndarray:
    return np.frombuffer(zstandard.ZstdCompressor(**options).compress(data), np.uint8)


HUGE = 256 << 20
BOMBS = {
    "of a huge stated size": zstd(bytes(HUGE)),
    "of no stated size": zstd(bytes(HUGE), write_content_size=False),
    "one byte too short": zstd(bytes(1249)),
    "one byte too long": zstd(bytes(1251)),
    "followed by a bomb": np.concatenate([zstd(bytes(1250)), zstd(bytes(HUGE))])[:1249],
    "cut off": zstd(bytes(1250))[:-1],
    "of noise": np.full(20, 0xA5, np.uint8),
    "of nothing": np.zeros(0, np.uint8),
}


@pytest.mark.parametrize("field", ["plus", "zero"])
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_frame_that_is_not_its_plane_is_refused_by_name_and_allocates_nothing_large(bomb: np.ndarray, field: str):
    honest = np.full(1250, 0x55, np.uint8)
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"sign plane '{field}'"):
        signs.decode({"plus": honest, "zero": honest, field: bomb}, 10_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


HOSTILE = {
    "no plane at all": {},
    "no plane of signs": {"zero": plane(2)},
    "a plane that no one knows": {"plus": plane(2), "minus": plane(2)},
    "a plane too short": {"plus": plane(1)},
    "a plane too long": {"plus": plane(3)},
    "a plane in two dimensions": {"plus": plane(2).reshape(1, 2)},
    "a plane in no dimension": {"plus": plane(2)[0]},
    "a plane of floats": {"plus": plane(2, np.float32)},
    "a plane of signed bytes": {"plus": plane(2, np.int8)},
    "a zero plane too short": {"plus": plane(2), "zero": plane(1)},
    "a zero plane of words": {"plus": plane(2), "zero": plane(2, np.uint16)},
    "indices of zeros": {"plus": plane(2), "zero": np.array([3, 9], np.uint32)},
}


@pytest.mark.parametrize("arrays", HOSTILE.values(), ids=HOSTILE)
def test_arrays_that_do_not_fit_ten_parameters_are_refused(arrays: dict[str, np.ndarray]):
    with pytest.raises(ValueError):
        signs.decode(arrays, 10)


def test_the_bits_that_fill_the_last_byte_mean_nothing():
    full = {"plus": np.array([0xFF, 0xFF], np.uint8), "zero": np.array([0, 0xFC], np.uint8)}
    assert signs.decode(full, 10).tolist() == [1] * 10
