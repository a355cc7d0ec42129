"""Snapshots as deltas: every bit comes back, little is sent, and what cannot be right is refused."""

from __future__ import annotations

import pickle
import tracemalloc

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from codec import bf16, delta, frames
from codec.delta import BaseMismatch

LAW = settings(deadline=None, derandomize=True, max_examples=200)
PATTERN = {"float32": np.uint32, "uint16": np.uint16}
SPECIAL = {
    # zeros, infinities, quiet and signalling NaNs with payloads, smallest and largest numbers, both signs
    "float32": [0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00001, 0x7F800001, 0xFFFFFFFF, 1, 0x007FFFFF, 0x7F7FFFFF],
    "uint16": [0, 1 << 15, 0x7F80, 0xFF80, 0x7FC1, 0x7F81, 0xFFFF, 1, 0x007F, 0x7F7F],
}
both_dtypes = pytest.mark.parametrize("dtype", PATTERN)


def patterns(dtype: str, size: int) -> st.SearchStrategy[np.ndarray]:
    bits = np.iinfo(PATTERN[dtype]).max
    return hnp.arrays(PATTERN[dtype], size, elements=st.sampled_from(SPECIAL[dtype]) | st.integers(0, bits))


@st.composite
def new_and_base(draw: st.DrawFn, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Two snapshots: unrelated ones, or one with a few weights changed."""
    size = draw(st.integers(0, 40))
    base, new = draw(patterns(dtype, size)), draw(patterns(dtype, size))
    if draw(st.booleans()):
        kept = draw(hnp.arrays(bool, size, elements=st.sampled_from([True, True, True, False])))
        new[kept] = base[kept]
    return new.view(dtype), base.view(dtype)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def sent_bytes(arrays: dict[str, np.ndarray]) -> int:
    return sum(a.nbytes for a in arrays.values())


def random_weights(dtype: str, size: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(0, 0.02, size).astype(np.float32)
    return values if dtype == "float32" else bf16.to_bf16(values)


def with_changes(base: np.ndarray, where: np.ndarray | slice | list[int]) -> np.ndarray:
    """`base` with the lowest bit of some weights flipped."""
    new = base.copy()
    new.view(PATTERN[str(base.dtype)])[where] ^= 1
    return new


# --- round trip --------------------------------------------------------------------------------


@both_dtypes
@LAW
@given(data=st.data())
def test_a_delta_brings_back_every_bit_pattern(dtype: str, data: st.DataObject):
    new, base = data.draw(new_and_base(dtype))
    kept_new, kept_base = new.copy(), base.copy()
    assert same_bits(delta.decode(delta.encode(new, base), base), new)
    assert same_bits(new, kept_new) and same_bits(base, kept_base)


@both_dtypes
@LAW
@given(data=st.data())
def test_a_full_snapshot_needs_no_base_and_ignores_the_values_of_one(dtype: str, data: st.DataObject):
    new, base = data.draw(new_and_base(dtype))
    arrays = delta.encode(new, None)
    assert same_bits(delta.decode(arrays, None, new.size), new)
    assert same_bits(delta.decode(arrays, base), new)


@both_dtypes
@pytest.mark.parametrize("size", [0, 1, 2, 3, 17, 255, 256, 257, 65_535, 65_536, 65_537, 300_001])
@pytest.mark.parametrize("share", ["none", "first", "last", "1 %", "under half", "half", "all"])
def test_every_size_comes_back_however_many_weights_changed(dtype: str, size: int, share: str):
    base = random_weights(dtype, size)
    order = np.random.default_rng(1).permutation(size)
    where = {
        "none": [],
        "first": slice(0, 1),
        "last": slice(-1, None),
        "1 %": order[: size // 100],
        "under half": order[: (size - 1) // 2],
        "half": order[: size // 2],
        "all": order,
    }[share]
    new = with_changes(base, where)
    assert same_bits(delta.decode(delta.encode(new, base), base), new)


@pytest.mark.parametrize("spread", [1, 3], ids=["all listed", "only the changed"])
def test_every_difference_of_two_bf16_patterns_comes_back(spread: int):
    """Zigzag at its extremes: differences 0x7FFF, 0x8000 and 0xFFFF, with wrap-around."""
    differences = np.zeros(spread * 65_536, np.uint16)
    differences[::spread] = np.arange(65_536, dtype=np.uint16)
    for start in (0, 1, 0x7FFF, 0x8000, 0xFFFF):
        base = np.full(differences.size, start, np.uint16)
        new = base + differences
        assert same_bits(delta.decode(delta.encode(new, base), base), new)


@both_dtypes
def test_a_snapshot_travels_in_a_frame(dtype: str):
    base = random_weights(dtype, 5001)
    new = with_changes(base, slice(None, None, 9))
    for arrays, base_there in ((delta.encode(new, base), base), (delta.encode(new, None), None)):
        fields, found = frames.unpack(frames.pack({"tick": 3}, arrays), "worker d0p1")
        assert fields == {"tick": 3}
        assert same_bits(delta.decode(found, base_there, new.size), new)


@pytest.mark.parametrize("level", [1, 3, 19])
def test_every_level_is_read_by_the_same_decoder(level: int):
    base = random_weights("uint16", 20_001)
    new = with_changes(base, slice(None, None, 30))
    assert same_bits(delta.decode(delta.encode(new, base, level), base), new)


def test_strided_and_read_only_weights_are_read_by_value():
    wide = np.random.default_rng(2).normal(size=600).astype(np.float32)
    wide.flags.writeable = False
    new, base = wide[::2], wide[::-2]
    assert same_bits(delta.decode(delta.encode(new, base), base), np.ascontiguousarray(new))


@both_dtypes
@pytest.mark.parametrize("size", [1, 2, 50])
def test_nothing_shares_memory_with_the_senders_or_the_receivers_weights(dtype: str, size: int):
    """The sender trains on while the frame is being packed; the receiver keeps its base."""
    new, base = random_weights(dtype, size), random_weights(dtype, size, seed=1)
    for against in (base, None):
        arrays = delta.encode(new, against)
        assert not any(np.shares_memory(a, w) for a in arrays.values() for w in (new, base))
        found = delta.decode(arrays, against, size)
        assert not any(np.shares_memory(found, w) for w in (*arrays.values(), base))
        assert found.flags.writeable


@pytest.mark.parametrize(
    "new, base, error",
    [
        (np.zeros(3, np.float64), None, TypeError),
        (np.zeros(3, np.int16), None, TypeError),
        (np.zeros(3, ">f4"), None, TypeError),
        (np.zeros((3, 1), np.float32), None, TypeError),
        (np.zeros(3, np.float32), np.zeros((3, 1), np.float32), TypeError),
        (np.zeros(3, np.float32), np.zeros(2, np.float32), ValueError),
        (np.zeros(3, np.float32), np.zeros(3, np.uint16), ValueError),
    ],
)
def test_the_sender_cannot_encode_what_has_no_meaning(new: np.ndarray, base: np.ndarray | None, error: type):
    with pytest.raises(error):
        delta.encode(new, base)


# --- size --------------------------------------------------------------------------------------


def after_adam(weights: np.ndarray, ticks: int, lr: float) -> np.ndarray:
    parameter = torch.nn.Parameter(torch.from_numpy(weights.copy()))
    adam = torch.optim.Adam([parameter], lr=lr)
    generator = torch.Generator().manual_seed(ticks)
    for _ in range(ticks):
        parameter.grad = torch.randn(weights.size, generator=generator)
        adam.step()
    return parameter.detach().numpy()


@pytest.mark.parametrize("ticks, bf16_share, fp32_share", [(1, 0.025, 0.23), (5, 0.042, 0.48), (20, 0.062, 0.51)])
def test_what_adam_changes_takes_a_small_part_of_a_snapshot(ticks: int, bf16_share: float, fp32_share: float):
    """Measured: 2.3, 3.8, 5.7 % of bf16; 21.6, 46.2, 49.6 % of fp32, whose low bits nearly all change."""
    base = random_weights("float32", 1_000_000)
    new = after_adam(base, ticks, lr=1e-6)
    fp32 = sent_bytes(delta.encode(new, base)) / new.nbytes
    new16, base16 = bf16.to_bf16(new), bf16.to_bf16(base)
    half = sent_bytes(delta.encode(new16, base16)) / new16.nbytes
    print(f"\nafter {ticks} ticks: bf16 {half:.4f}, fp32 {fp32:.4f} of a full snapshot")
    assert half < bf16_share and fp32 < fp32_share


@both_dtypes
def test_no_change_costs_nothing_and_noise_costs_no_more_than_itself(dtype: str):
    noise = np.random.default_rng(3).integers(0, 2**16, 100_000, np.uint16).view(dtype)
    other = np.random.default_rng(4).integers(0, 2**16, 100_000, np.uint16).view(dtype)
    assert sent_bytes(delta.encode(noise, noise)) < 64
    for base in (None, other):
        assert sent_bytes(delta.encode(noise, base)) <= noise.nbytes + 32


# --- another base ------------------------------------------------------------------------------


BASE = random_weights("float32", 400)
ANOTHER = {
    "one bit": with_changes(BASE, [399]),
    "the sign of a zero": None,
    "a weight less": BASE[:-1],
    "another dtype of the same bytes": BASE.view(np.uint16),
    "bf16": bf16.to_bf16(BASE),
    "empty": BASE[:0],
    "none": None,
}


@pytest.mark.parametrize("name", ANOTHER)
@pytest.mark.parametrize("step", [1, 50], ids=["all listed", "only the changed"])
def test_another_base_is_refused_in_a_way_a_caller_can_tell(name: str, step: int):
    base, other = BASE, ANOTHER[name]
    if name == "the sign of a zero":
        base, other = BASE.copy(), BASE.copy()
        base[7], other[7] = 0.0, -0.0
    arrays = delta.encode(with_changes(base, slice(None, None, step)), base)
    with pytest.raises(BaseMismatch):
        delta.decode(arrays, other, None if other is not None else base.size)


def test_a_full_snapshot_of_another_dtype_than_the_base_is_refused():
    with pytest.raises(BaseMismatch, match="uint16"):
        delta.decode(delta.encode(bf16.to_bf16(BASE), None), BASE)


def test_the_mismatch_names_both_digests_and_survives_pickling():
    arrays = delta.encode(with_changes(BASE, [3]), BASE)
    with pytest.raises(BaseMismatch) as caught:
        delta.decode(arrays, ANOTHER["one bit"])
    assert arrays["base"].tobytes().hex() in str(caught.value)
    assert frames.digest(ANOTHER["one bit"]) in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(again, BaseMismatch) and str(again) == str(caught.value)


def test_the_number_of_elements_must_be_known_and_agree():
    arrays = delta.encode(BASE, None)
    with pytest.raises(TypeError):
        delta.decode(arrays, None)
    with pytest.raises(ValueError, match="400"):
        delta.decode(arrays, BASE, 399)


# --- damage ------------------------------------------------------------------------------------


def forms(dtype: str) -> dict[str, tuple[dict[str, np.ndarray], np.ndarray, np.ndarray | None]]:
    """A delta of each form: arrays, what they hold, base. Changes are small and irregular."""
    base, rng = random_weights(dtype, 700), np.random.default_rng(7)
    steps = (rng.integers(1, 9, base.size) * rng.choice([-1, 1], base.size)).astype(PATTERN[dtype])
    dense, sparse = base.copy(), base.copy()
    dense.view(steps.dtype)[:] += steps
    where = rng.choice(base.size, 100, replace=False)
    sparse[where] = dense[where]
    made = {"sparse": (sparse, base), "dense": (dense, base), "full": (sparse, None)}
    return {form: (delta.encode(new, against), new, against) for form, (new, against) in made.items()}


FORMS = {f"{dtype} {form}": case for dtype in PATTERN for form, case in forms(dtype).items()}
every_form = pytest.mark.parametrize("arrays, new, base", FORMS.values(), ids=FORMS)


@every_form
def test_every_damaged_byte_is_refused_or_does_no_harm(arrays: dict, new: np.ndarray, base: np.ndarray | None):
    """zstd frames have a few bits without meaning; the weights are right even then."""
    harmless = damaged = 0
    for name, array in arrays.items():
        for bit in range(0, 8 * array.nbytes, 3):
            raw = bytearray(array.tobytes())
            raw[bit // 8] ^= 1 << bit % 8
            mutated = arrays | {name: np.frombuffer(bytes(raw), array.dtype)}
            damaged += 1
            try:
                found = delta.decode(mutated, base, new.size)
            except ValueError:
                continue
            harmless += 1
            assert same_bits(found, new)
    assert damaged > 500 and harmless < damaged / 20


@every_form
def test_every_truncation_and_every_extra_byte_is_refused(arrays: dict, new: np.ndarray, base: np.ndarray | None):
    for name, array in arrays.items():
        cuts = [array[:length] for length in range(array.size)] if array.size < 100 else [array[:-1], array[:1]]
        for other in (*cuts, np.append(array, array[:1]), np.append(array, array)):
            with pytest.raises(ValueError):
                delta.decode(arrays | {name: other}, base, new.size)


@every_form
def test_a_field_that_is_missing_or_of_another_kind_is_named(arrays: dict, new: np.ndarray, base: np.ndarray | None):
    for name, array in arrays.items():
        with pytest.raises(ValueError):
            delta.decode({key: value for key, value in arrays.items() if key != name}, base, new.size)
        for other in (array.astype(np.int8), array.astype(np.float32), array.reshape(1, -1), array.sum()):
            with pytest.raises(ValueError, match=name):
                delta.decode(arrays | {name: np.asarray(other)}, base, new.size)
    for extra in ("value9", "gap9", "", "weights"):
        with pytest.raises(ValueError, match=repr(extra)):
            delta.decode(arrays | {extra: np.zeros(1, np.uint8)}, base, new.size)


def test_planes_of_another_delta_are_refused():
    """Right in every check but the last: the digest of the result."""
    base = random_weights("uint16", 700)
    one, two = (delta.encode(with_changes(base, slice(i, None, 7)), base) for i in (0, 1))
    for name in ("gap0", "result"):
        with pytest.raises(ValueError, match="result"):
            delta.decode(one | {name: two[name]}, base)


# --- hostile arrays ----------------------------------------------------------------------------


def lying(frame: bytes, stated: int) -> np.ndarray:
    """A zstd frame whose header states another content size (a field of 4 bytes after magic and descriptor)."""
    assert frame[4] >> 6 == 2, "not a frame with a size field of 4 bytes"
    at = 5 if frame[4] & 0x20 else 6
    return np.frombuffer(frame[:at] + stated.to_bytes(4, "little") + frame[at + 4 :], np.uint8)


HUGE = 64 << 20
NUMEL = 100_000
ZEROS = zstandard.ZstdCompressor(level=1).compress(bytes(HUGE))
UNSTATED = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(bytes(HUGE))
SHORT = zstandard.ZstdCompressor(level=1).compress(bytes(NUMEL - 1))
BOMBS = {
    "one that states its size": np.frombuffer(ZEROS, np.uint8),
    "one that states no size": np.frombuffer(UNSTATED, np.uint8),
    "one that states the size of the plane": lying(ZEROS, NUMEL),
    "one that is too short": np.frombuffer(SHORT, np.uint8),
    "one that is too short and states the size of the plane": lying(SHORT, NUMEL),
    "right, with another one behind": np.frombuffer(
        zstandard.ZstdCompressor(level=1).compress(bytes(NUMEL)) + ZEROS, np.uint8
    ),
    "a skippable frame": np.frombuffer(b"\x50\x2a\x4d\x18" + NUMEL.to_bytes(4, "little") + bytes(50), np.uint8),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
@pytest.mark.parametrize("field", ["value0", "value1", "gap0"])
def test_a_frame_that_does_not_expand_to_its_plane_is_refused_and_allocates_nothing_large(bomb: np.ndarray, field: str):
    assert bomb.size < NUMEL
    base = random_weights("uint16", 5 * NUMEL)
    arrays = delta.encode(with_changes(base, slice(None, None, 5)), base)
    assert int(arrays["count"][0]) == NUMEL
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=field):
            delta.decode(arrays | {field: bomb}, base)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 * base.size  # 16 MB; the bomb holds 64


@pytest.mark.parametrize("count", [-1, 1, 99, 101, 701, 2**31, 2**40, 2**63 - 1, -(2**63)])
def test_a_count_that_is_not_right_is_refused_before_it_allocates(count: int):
    arrays, new, base = FORMS["uint16 sparse"]
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"count|gap|value"):
            delta.decode(arrays | {"count": np.array([count])}, base)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20 and new.size == base.size


@pytest.mark.parametrize("gaps", [[700], [0, 699], [0xFFFF], [0xFFFF] * 300], ids=["end", "sum", "one", "all"])
def test_a_gap_that_leads_outside_is_refused(gaps: list[int]):
    arrays, _, base = FORMS["uint16 sparse"]
    hostile = arrays | delta._split("gap", np.array(gaps, np.uint16), 1)
    hostile |= delta._split("value", np.ones(len(gaps), np.uint16), 1) | {"count": np.array([len(gaps)])}
    with pytest.raises(ValueError, match="gap"):
        delta.decode(hostile, base)


def test_gaps_that_wrap_around_64_bits_cannot_reach_outside():
    """Only more than 2^32 weights send gaps of 8 bytes; their sum is taken modulo 2^64."""
    gaps = np.array([2**63, 2**63 - 2, 5], np.uint64)
    changed = np.cumsum(gaps, dtype=np.int64) + np.arange(3)
    assert changed.min() < 0  # the check that _apply makes sees it


# --- bf16 --------------------------------------------------------------------------------------


def torch_bf16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()


def assert_rounded_as_torch(values: np.ndarray):
    found, nan = bf16.to_bf16(values), np.isnan(values)
    assert found.dtype == np.uint16
    assert np.array_equal(found[~nan], torch_bf16(values)[~nan])
    assert np.isnan(bf16.from_bf16(found[nan])).all()  # torch itself gives one NaN or another
    assert np.array_equal(np.signbit(bf16.from_bf16(found)), np.signbit(values))


def test_all_bf16_patterns_are_read_as_torch_reads_them_and_come_back():
    every = np.arange(65_536, dtype=np.uint16)
    values = bf16.from_bf16(every)
    there = torch.from_numpy(every).view(torch.bfloat16).float().numpy()
    assert values.tobytes() == there.tobytes()
    nan = np.isnan(values)
    assert nan.sum() == 2 * 127
    assert np.array_equal(bf16.to_bf16(values)[~nan], every[~nan])
    assert np.array_equal(bf16.to_bf16(values)[nan], every[nan] | 0x40)
    assert_rounded_as_torch(values)


@pytest.mark.parametrize("low", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_ties_go_to_the_even_pattern_for_every_upper_half(low: int):
    """All 65,536 upper halves with a lower half at, just below and just above the tie."""
    assert_rounded_as_torch((np.arange(65_536, dtype=np.uint32) << 16 | low).view(np.float32))


def test_random_fp32_patterns_are_rounded_as_torch_rounds_them():
    rng = np.random.default_rng(6)
    assert_rounded_as_torch(rng.integers(0, 2**32, 1_000_001, np.uint32).view(np.float32))
    assert_rounded_as_torch(rng.normal(0, 0.02, 1_000_001).astype(np.float32))
    assert_rounded_as_torch(np.zeros(0, np.float32))


@LAW
@given(patterns("float32", 9))
def test_rounding_special_patterns(bits: np.ndarray):
    assert_rounded_as_torch(bits.view(np.float32))


def test_other_dtypes_are_not_rounded():
    with pytest.raises(TypeError, match="float64"):
        bf16.to_bf16(np.zeros(2))
    with pytest.raises(TypeError, match="int16"):
        bf16.from_bf16(np.zeros(2, np.int16))
