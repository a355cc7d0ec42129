"""Frames: what is packed comes back as views; what is damaged or hostile is refused, and only with FrameError."""

from __future__ import annotations

import math
import pickle
import random
from typing import Any

import msgpack
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from codec.frames import FrameError, digest, digest_of, pack, unpack

LAW = settings(deadline=None, derandomize=True, max_examples=100)
DTYPES = ["float32", "float64", "float16", "int8", "int32", "int64", "uint8", "uint16", "uint32", "bool"]
ARRAY = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6))
)
FIELD = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def by_hand(header: Any, body: bytes = b"", magic: bytes = b"NSF1") -> bytes:
    """A frame with a right digest, from the layout in words: magic, u32 length, xxh3-128, header, padding, body."""
    head = header if isinstance(header, bytes) else msgpack.packb(header)
    size, body = len(head), bytes(-(24 + len(head)) % 64) + body
    return magic + size.to_bytes(4, "little") + xxhash.xxh3_128(head + body).digest() + head + body


def with_array(dtype: Any = "uint8", shape: Any = (4,), offset: Any = 0, body: bytes = bytes(64)) -> bytes:
    shape = list(shape) if isinstance(shape, tuple) else shape
    return by_hand({"fields": {}, "arrays": [["weights", dtype, shape, offset]]}, body)


def refused(frame: Any) -> FrameError:
    with pytest.raises(FrameError) as caught:
        unpack(frame, "worker d1p0")
    assert caught.value.sender == "worker d1p0" and "worker d1p0" in str(caught.value)
    assert caught.value.field in str(caught.value)
    return caught.value


# --- round trip --------------------------------------------------------------------------------


@LAW
@given(st.dictionaries(st.text(max_size=5), FIELD, max_size=4), st.dictionaries(st.text(max_size=5), ARRAY, max_size=4))
def test_fields_and_arrays_come_back_as_they_were(header: dict[str, Any], arrays: dict[str, np.ndarray]):
    frame = pack(header, arrays)
    assert frame.dtype == np.uint8 and frame.ndim == 1 and frame.flags.c_contiguous
    for form in (frame, frame.tobytes(), memoryview(frame)):
        fields, found = unpack(form, "anyone")
        assert fields == header
        assert list(found) == list(arrays)
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype and found[name].shape == array.shape
            assert found[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("view", ["transposed", "strided", "reversed", "broadcast", "big-endian"])
def test_an_array_in_any_memory_layout_comes_back_by_value(view: str):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    array = {
        "transposed": base.T,
        "strided": base[::2, 1::3],
        "reversed": base[::-1],
        "broadcast": np.broadcast_to(base[0], (3, 6)),
        "big-endian": base.astype(">f4"),
    }[view]
    found = unpack(pack({}, {"a": array}), "anyone")[1]["a"]
    assert found.dtype == np.float32 and np.array_equal(found, array)


def test_the_arrays_are_read_only_views_into_the_frame():
    frame = pack({}, {"a": np.arange(5, dtype=np.int32), "b": np.ones(3)})
    for array in unpack(frame, "anyone")[1].values():
        assert np.shares_memory(array, frame)
    held = unpack(frame.tobytes(), "anyone")[1]["a"]
    with pytest.raises(ValueError, match="read-only"):
        held[0] = 1


def test_every_array_starts_at_a_multiple_of_64_bytes_of_the_frame():
    names = [f"a{i}" for i in range(6)]
    frame = pack({}, {n: np.full(i, i, np.uint8) for i, n in enumerate(names)}).tobytes()
    size = int.from_bytes(frame[4:8], "little")
    table = msgpack.unpackb(frame[24 : 24 + size])["arrays"]
    assert [row[0] for row in table] == names
    for (_, _, (n,), offset), value in zip(table, range(6)):
        assert offset % 64 == 0
        assert frame[24 + size + -(24 + size) % 64 + offset :][:n] == bytes([value]) * n


@pytest.mark.parametrize("dtype", ["O", "U3", "S3", "complex64", "datetime64[s]", "V4"])
def test_a_dtype_that_frames_do_not_carry_is_refused_by_the_sender(dtype: str):
    with pytest.raises(TypeError, match="'weights' has dtype"):
        pack({}, {"weights": np.zeros(2, dtype)})


def test_a_header_beyond_the_limit_is_refused_by_the_sender():
    with pytest.raises(ValueError, match="at most"):
        pack({"x": bytes(5 << 20)}, {})


def test_the_digest_tells_frames_apart_and_is_the_one_that_is_sent():
    one, two = (pack({"i": i}, {"a": np.arange(3)}) for i in (1, 2))
    assert digest_of(one) != digest_of(two)
    assert digest_of(one) == xxhash.xxh3_128(one[24:].tobytes()).hexdigest()
    assert digest(b"ab", b"c") == digest(b"abc") == xxhash.xxh3_128(b"abc").hexdigest()


# --- damage ------------------------------------------------------------------------------------


SMALL = pack({"tick": 7}, {"a": np.arange(3, dtype=np.float32)}).tobytes()


def test_every_single_flipped_bit_is_refused():
    for bit in range(8 * len(SMALL)):
        damaged = bytearray(SMALL)
        damaged[bit // 8] ^= 1 << bit % 8
        refused(bytes(damaged))


def test_every_truncation_is_refused():
    for length in range(len(SMALL)):
        refused(SMALL[:length])
        refused(np.frombuffer(SMALL, np.uint8)[:length])


def test_bytes_too_many_are_refused():
    for extra in (b"\0", bytes(64), SMALL):
        refused(SMALL + extra)


def test_mutations_are_refused_and_nothing_else_is_ever_raised():
    """20,000 frames with some bytes changed, cut out, put in or swapped; half of them with a digest made right again."""
    rng = random.Random(5)
    seeds = [SMALL, with_array(), pack({}, {"x": np.zeros((2, 3)), "y": np.ones(9, bool)}).tobytes()]
    accepted = refusals = 0
    for _ in range(20_000):
        frame = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(frame))
            match rng.randrange(4):
                case 0:
                    frame[at] = rng.randrange(256)
                case 1:
                    del frame[at : at + rng.randint(1, 8)]
                case 2:
                    frame[at:at] = rng.randbytes(rng.randint(1, 8))
                case 3:
                    frame[at] = rng.choice([0x00, 0x7F, 0x80, 0x90, 0xC0, 0xC1, 0xC7, 0xCF, 0xDD, 0xDF, 0xFF])
            if len(frame) < 32:
                break
        if rng.random() < 0.5:
            frame[8:24] = xxhash.xxh3_128(bytes(frame[24:])).digest()
        try:
            fields, arrays = unpack(bytes(frame), "anyone")
        except FrameError:
            refusals += 1
        else:
            accepted += 1
            assert isinstance(fields, dict) and all(isinstance(a, np.ndarray) for a in arrays.values())
    assert refusals > 15_000 and accepted > 100  # both sides were reached


# --- frames with a right digest and a hostile header -------------------------------------------


TWO63 = 2**63
HOSTILE = {
    "object dtype": (with_array(dtype="object"), "arrays.weights.dtype"),
    "dtype O": (with_array(dtype="O"), "arrays.weights.dtype"),
    "structured dtype": (with_array(dtype="f4,f4"), "arrays.weights.dtype"),
    "dtype not text": (with_array(dtype=4), "arrays.weights.dtype"),
    "dtype a list": (with_array(dtype=["float32"]), "arrays.weights.dtype"),
    "absurd shape": (with_array(shape=(2**40, 2**40)), "arrays.weights"),
    "shape that wraps around 64 bits to 4 bytes": (with_array(shape=(2**32, 2**32)), "arrays.weights"),
    "empty but with an absurd side": (with_array(shape=(0, TWO63)), "arrays.weights.shape"),
    "empty but too big in total": (with_array(shape=(0, 2**62, 4)), "arrays.weights.shape"),
    "negative side": (with_array(shape=(-1,)), "arrays.weights.shape"),
    "two negative sides": (with_array(shape=(-2, -2)), "arrays.weights.shape"),
    "side not whole": (with_array(shape=(1.0,)), "arrays.weights.shape"),
    "side a boolean": (with_array(shape=(True,)), "arrays.weights.shape"),
    "nine dimensions": (with_array(shape=(1,) * 9), "arrays.weights.shape"),
    "a thousand dimensions": (with_array(shape=(1,) * 1000), "arrays.weights.shape"),
    "shape a number": (with_array(shape=4), "arrays.weights.shape"),
    "shape missing": (with_array(shape=None), "arrays.weights.shape"),
    "negative offset": (with_array(offset=-64), "arrays.weights.offset"),
    "unaligned offset": (with_array(offset=1), "arrays.weights.offset"),
    "offset beyond the end": (with_array(offset=128), "arrays.weights.offset"),
    "huge offset": (with_array(offset=2**64 - 64), "arrays.weights.offset"),
    "end beyond the end": (with_array(shape=(65,)), "arrays.weights.offset"),
    "end beyond the end from a right offset": (with_array(shape=(1,), offset=64), "arrays.weights.offset"),
    "offset not whole": (with_array(offset=0.0), "arrays.weights.offset"),
    "offset a boolean": (with_array(offset=False), "arrays.weights.offset"),
    "offset missing": (with_array(offset=None), "arrays.weights.offset"),
    "header a list": (by_hand([1, 2]), "header"),
    "header a number": (by_hand(7), "header"),
    "header empty": (by_hand(b""), "header"),
    "header two messages": (by_hand(b"\x80\x80"), "header"),
    "header not msgpack": (by_hand(b"\xc1"), "header"),
    "header nested without end": (by_hand(b"\x91" * 100_000 + b"\xc0"), "header"),
    "header promising 4 billion entries": (by_hand(b"\xdf\xff\xff\xff\xff"), "header"),
    "header with text that is not UTF-8": (by_hand(b"\x81\xa1\xff\xc0"), "header"),
    "keys that cannot be hashed": (by_hand(b"\x81\x90\xc0"), "header"),
    "fields missing": (by_hand({"arrays": []}), "header"),
    "arrays missing": (by_hand({"fields": {}}), "header"),
    "a key too many": (by_hand({"fields": {}, "arrays": [], "code": ""}), "header"),
    "fields a list": (by_hand({"fields": [], "arrays": []}), "fields"),
    "fields nothing": (by_hand({"fields": None, "arrays": []}), "fields"),
    "arrays a table": (by_hand({"fields": {}, "arrays": {}}), "arrays"),
    "row a number": (by_hand({"fields": {}, "arrays": [3]}), "arrays"),
    "row too short": (by_hand({"fields": {}, "arrays": [["a", "uint8", [1]]]}, bytes(64)), "arrays"),
    "row too long": (by_hand({"fields": {}, "arrays": [["a", "uint8", [1], 0, 0]]}, bytes(64)), "arrays"),
    "row with a name that is no text": (by_hand({"fields": {}, "arrays": [[["a"], "uint8", [1], 0]]}), "arrays"),
    "another magic": (by_hand({"fields": {}, "arrays": []}, magic=b"NSF2"), "magic"),
    "header length beyond the frame": (b"NSF1" + (200).to_bytes(4, "little") + bytes(60), "header length"),
    "header length of 4 GiB": (b"NSF1" + b"\xff" * 4 + bytes(60), "header length"),
    "header length beyond the limit": (by_hand({"fields": {"x": bytes(5 << 20)}, "arrays": []}), "header length"),
}


@pytest.mark.parametrize(("frame", "field"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_is_refused_by_naming_the_sender_and_the_field(frame: bytes, field: str):
    error = refused(frame)
    assert error.field.startswith(field)


def test_the_same_header_made_honest_is_accepted():
    """So the refusals above come from what is hostile in them, not from how the frame was built."""
    _, arrays = unpack(with_array("float32", (2, 8), body=np.arange(16, dtype=np.float32).tobytes()), "anyone")
    assert np.array_equal(arrays["weights"], np.arange(16, dtype=np.float32).reshape(2, 8))
    assert unpack(by_hand({"fields": {"a": 1}, "arrays": []}), "anyone") == ({"a": 1}, {})


@LAW
@given(
    dtype=st.sampled_from([*DTYPES, "object", "", "float128"]) | st.none() | st.integers(-9, 9),
    shape=st.lists(st.integers(-2, 2**64 - 1) | st.integers(0, 5), max_size=10) | st.none() | st.text(max_size=3),
    offset=st.integers(-(2**63), 2**64 - 1) | st.sampled_from([0, 64, 128]) | st.floats() | st.none(),
)
def test_an_array_row_is_either_inside_the_body_or_refused(dtype: Any, shape: Any, offset: Any):
    body = bytes(range(128))
    try:
        found = unpack(with_array(dtype, shape, offset, body), "anyone")[1]["weights"]
    except FrameError:
        return
    assert found.shape == tuple(shape) and found.dtype == dtype
    assert found.nbytes == math.prod(shape) * np.dtype(dtype).itemsize
    assert found.tobytes() == body[offset : offset + found.nbytes]


# --- the error ---------------------------------------------------------------------------------


def test_a_frame_error_survives_pickling():
    error = pickle.loads(pickle.dumps(FrameError("the anchor", "digest", "does not fit")))
    assert isinstance(error, FrameError)
    assert (error.sender, error.field, error.reason) == ("the anchor", "digest", "does not fit")
    assert str(error) == "bad frame from the anchor: digest: does not fit"


def test_two_arrays_of_one_name_are_refused():
    rows = [["a", "uint8", [4], 0], ["a", "uint8", [4], 0]]
    assert refused(by_hand({"fields": {}, "arrays": rows}, bytes(64))).field == "arrays"


def test_arrays_are_aligned_in_memory_where_the_frame_is():
    base = np.zeros(4096, np.uint8)
    start = -base.ctypes.data % 64
    for fields in ({}, {"tick": 3}, {"tick": 3, "stage": 1, "kind": "weights"}):
        frame = pack(fields, {"weights": np.arange(7, dtype=np.float32)})
        held = base[start : start + len(frame)]
        held[:] = frame
        assert unpack(held, "anyone")[1]["weights"].ctypes.data % 64 == 0
