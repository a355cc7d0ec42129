"""Coded steps of weights: both ends hold the same bits, and 100,000 damaged ones are refused by the name of a field."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
import xxhash

from codec import coded_delta
from codec.coded_delta import decode, encode
from codec.delta import BaseMismatch
from codec.frames import FrameError, pack, unpack
from codec.vector import EntropyVector, SignVector
from tests.unit.codec.test_fuzz import FRAME_OF, NASTY, Target, bounded_memory, mutate, mutated_bytes, mutated_header

CASES = {"bytes": 30_000, "headers": 20_000, "payloads": 50_000}
NUMEL, CODER = 1300, EntropyVector(0.8)


def weights(seed: int, n: int = NUMEL) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.02, n).astype(np.float32)


@pytest.mark.parametrize("n", [0, 1, 511, 10_000])
@pytest.mark.parametrize("coder", [EntropyVector(0.3), EntropyVector(2.0), SignVector()])
def test_both_ends_hold_the_same_bits_and_come_nearer(n: int, coder: EntropyVector | SignVector):
    new, held = weights(0, n), weights(1, n)
    receiver, far = held.copy(), float(np.square(new - held).sum())
    for _ in range(5):
        receiver = decode(encode(new, held, coder), receiver, coder)
        np.testing.assert_array_equal(receiver, held)
    assert n < 1000 or np.square(new - held).sum() <= 0.5 * far  # of few values the scales are all that fits


@pytest.mark.parametrize("coder", [CODER, SignVector()])
def test_a_weight_of_minus_zero_is_the_same_at_both_ends(coder: EntropyVector | SignVector):
    new, held = weights(0), weights(1)
    new[::2] = held[::2] = -0.0  # as Q4_0 files have thousands
    new[::4] = -1e-9
    receiver = held.copy()
    for _ in range(3):
        receiver = decode(encode(new, held, coder), receiver, coder)
        np.testing.assert_array_equal(receiver.view(np.int32), held.view(np.int32))


def test_pieces_are_coded_one_after_the_other(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(coded_delta, "PIECE", 512)
    new, held = weights(0), weights(1)
    before = held.copy()
    arrays = encode(new, held, CODER)
    assert len(arrays["sizes"]) == 3
    np.testing.assert_array_equal(decode(arrays, before, CODER), held)
    for start in (0, 512, 1024):
        part = slice(start, start + 512)
        decoded = CODER.encode(torch.from_numpy(new[part] - before[part]))[1].numpy()
        np.testing.assert_array_equal(held[part], before[part] + decoded)


def test_weights_that_are_not_finite_are_refused():
    new = weights(0)
    new[3] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        encode(new, weights(1), CODER)


# --- damaged -------------------------------------------------------------------------------------


def target() -> Target:
    base, held = weights(1), weights(1)
    arrays = encode(weights(0), held, CODER)

    def check(sent: dict[str, np.ndarray], found: np.ndarray) -> None:
        assert found.dtype == np.float32 and found.shape == (NUMEL,)
        if sent["result"].tobytes() == arrays["result"].tobytes():
            np.testing.assert_array_equal(found, held)

    return Target(arrays, lambda sent: decode(sent, base, CODER), check)


HONEST = target()
FRAME_OF[id(HONEST)] = pack({}, HONEST.arrays).tobytes()


def outcome(frame: bytes) -> str:
    """ "accepted", or the field that was named. Anything but a ValueError escapes."""
    try:
        _, arrays = unpack(frame, "a peer")
        found = HONEST.decode(arrays)
    except FrameError as error:
        return f"frame {error.field.split('.')[-1]}"
    except BaseMismatch:
        return "another base"
    except ValueError as error:
        field = re.match(r"coded delta field (['\"])(.*?)\1: ", str(error), re.DOTALL)
        return f"unnamed: {error}" if field is None else field[2] if field[2] in HONEST.arrays else "another field"
    HONEST.check(arrays, found)
    return "accepted"


def mutated_step(rng: random.Random, _: Target) -> bytes:
    """An honest frame around arrays that are not; the payload's own digest and the result's are mostly right again."""
    arrays = dict(HONEST.arrays)
    match rng.randrange(6):
        case 0:
            arrays["sizes"] = np.array(
                rng.choices([0, -1, arrays["coded"].size, 1 << 62], k=rng.randrange(3)), np.int64
            )
        case 1:
            name = rng.choice(list(arrays))
            arrays[name] = rng.choice([arrays.pop(name), np.array([rng.choice([0, 1, 255])], np.uint8)])
        case _:
            body = bytearray(arrays["coded"][8:].tobytes())
            if rng.random() < 0.3:
                body[: len(body)] = _nasty_head(rng) + bytes(body[8:])
            mutate(rng, body)
            seal = xxhash.xxh3_64_intdigest(bytes(body)).to_bytes(8, "little")
            arrays["coded"] = np.frombuffer(seal + bytes(body), np.uint8)
            arrays["sizes"] = np.array([arrays["coded"].size], np.int64)
    return pack({}, _right_result(arrays) if rng.random() < 0.5 else arrays).tobytes()


def _nasty_head(rng: random.Random) -> bytes:
    """A step and a number of symbols."""
    step = rng.choice([0.0, -1.0, 1e-30, 1e30, float("nan"), float("inf")])
    symbols = rng.choice([n for n in NASTY if type(n) is int and 0 <= n < 2**32])
    return np.float32(step).tobytes() + int(symbols).to_bytes(4, "little")


def _right_result(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """If only the result's digest is wrong, the one that the error tells."""
    try:
        HONEST.decode(arrays)
    except ValueError as error:
        if told := re.search(r"what was decoded has ([0-9a-f]{32})", str(error)):
            return arrays | {"result": np.frombuffer(bytes.fromhex(told[1]), np.uint8)}
    return arrays


def fuzz(kind: str, make: Callable[[random.Random, Target], bytes]) -> Counter[str]:
    rng, outcomes = random.Random(kind), Counter()
    with bounded_memory():
        for case in range(CASES[kind]):
            try:
                outcomes[outcome(make(rng, HONEST))] += 1
            except BaseException as error:
                error.add_note(f"in case {case} of {kind!r}")
                raise
    print(f"\n{kind}: {dict(outcomes.most_common())}")
    assert not [name for name in outcomes if name.startswith("unnamed")]
    return outcomes


def test_an_honest_frame_is_accepted_and_there_are_enough_others():
    assert outcome(FRAME_OF[id(HONEST)]) == "accepted" and sum(CASES.values()) >= 100_000


@pytest.mark.slow
def test_damaged_bytes_of_a_coded_step():
    outcomes = fuzz("bytes", mutated_bytes)
    for name in ("frame digest", "coded", "result", "another base"):
        assert outcomes[name] > 20, name


@pytest.mark.slow
def test_damaged_headers_of_a_coded_step():
    outcomes = fuzz("headers", mutated_header)
    assert min(outcomes[name] for name in ("frame shape", "sizes", "another field")) > 20


@pytest.mark.slow
def test_damaged_payloads_of_a_coded_step():
    outcomes = fuzz("payloads", mutated_step)
    for name in ("coded", "result", "sizes", "accepted"):
        assert outcomes[name] > 20, name
