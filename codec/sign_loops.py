"""Signs of float32 packed into planes, and merged from them: one pass over memory each, in machine code.

`codec/signs.py` and `merger/along_signs.py` say the same in whole arrays; tests hold them to it, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from codec.machine_code import (
    COUNT,
    COUNT_ROW,
    FLOAT,
    FLOAT_ROW,
    LANES,
    WORD,
    WORD_ROW,
    Loop,
    Value,
    Vectors,
    addresses,
    compiled,
)


def packed(values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, bool]:
    """float32 [n], contiguous -> bits of values > 0 and of zeros, if there are any, uint8 [n/8 rounded up] each; whether
    there is a NaN. Bits beyond n are 0."""
    rows = -(-values.size // LANES)
    plus, zero, found = np.empty(rows, "<u2"), np.empty(rows, "<u2"), np.zeros(2, np.uint16)
    last = np.full(LANES, -1.0, np.float32)  # neither positive nor 0
    whole, rest = divmod(values.size, LANES)
    last[:rest] = values[values.size - rest :]
    for part, at, count in ((values, 0, whole), (last, whole, int(rest > 0))):
        if count:
            seen = np.zeros(2, np.uint16)
            _loops()["pack"](*addresses(part, plus[at:], zero[at:]), count, *addresses(seen))
            found |= seen
    size = -(-values.size // 8)
    return plus.view(np.uint8)[:size], zero.view(np.uint8)[:size] if found[1] else None, bool(found[0])


def merge_planes(g: np.ndarray, plus: np.ndarray, zero: np.ndarray | None, a: float, b: float) -> tuple[int, int]:
    """g ← g + a·b·(|g|·sign - g), float32 [n], contiguous, in its place; signs as `packed` gives them.

    How many signs were those of g, and how many of g it has turned.
    """
    whole, rest = divmod(g.size, LANES)
    last = np.zeros(LANES, np.float32)
    last[:rest] = g[g.size - rest :]
    planes = [plus] if zero is None else [plus, zero]
    ends = [_last_word(plane[whole * LANES // 8 :], rest) for plane in planes]
    loop, counts = _loops()["merge" if zero is None else "merge with zeros"], np.zeros(2, np.int64)
    for part, bits, count in ((g, planes, whole), (last, ends, int(rest > 0))):
        if count:
            seen = np.zeros(2, np.int64)
            loop(*addresses(part, *bits), count, a, b, *addresses(seen))
            counts += seen
    g[g.size - rest :] = last[:rest]
    return int(counts[0]), int(counts[1])


def _last_word(plane: np.ndarray, bits: int) -> np.ndarray:
    """The `bits` that a plane has beyond its last whole word: what fills up its last byte means nothing, and is left out."""
    word = np.zeros(LANES // 8, np.uint8)
    word[: plane.size] = plane
    return word.view("<u2") & np.uint16((1 << bits) - 1)


@cache
def _loops() -> dict[str, Callable[..., None]]:
    return compiled(
        [
            Loop("pack", (FLOAT_ROW, WORD_ROW, WORD_ROW, COUNT, WORD_ROW), _write_pack),
            Loop("merge", (FLOAT_ROW, WORD_ROW, COUNT, FLOAT, FLOAT, COUNT_ROW), _write_merge),
            Loop(
                "merge with zeros", (FLOAT_ROW, WORD_ROW, WORD_ROW, COUNT, FLOAT, FLOAT, COUNT_ROW), _write_with_zeros
            ),
        ]
    )


def _write_pack(on: Vectors, values: Value, plus: Value, zero: Value, count: Value, found: Value) -> None:
    def turn(i: Value, nans: Value, zeros: Value) -> Sequence[Value]:
        x = on.load(on.floats_at(values, i), align=4)
        on.store(on.word(on.fcmp_ordered(">", x, on.constant(0.0))), on.gep(plus, [i]), align=1)
        nothing = on.word(on.fcmp_ordered("==", x, on.constant(0.0)))
        on.store(nothing, on.gep(zero, [i]), align=1)
        return on.or_(nans, on.word(on.fcmp_unordered("uno", x, x))), on.or_(zeros, nothing)

    for place, seen in enumerate(on.loop(count, (WORD(0), WORD(0)), turn)):
        on.store(seen, on.gep(found, [COUNT(place)]))


def _write_merge(on: Vectors, g: Value, plus: Value, count: Value, a: Value, b: Value, counts: Value) -> None:
    _write_with_zeros(on, g, plus, None, count, a, b, counts)


def _write_with_zeros(
    on: Vectors, g: Value, plus: Value, zero: Value | None, count: Value, a: Value, b: Value, counts: Value
) -> None:
    nought = on.constant(0.0)
    a, b = on.every(a), on.every(b)

    def turn(i: Value, agree: Value, flips: Value) -> Sequence[Value]:
        at = on.floats_at(g, i)
        x, is_plus = on.load(at, align=4), on.truths(plus, i)
        sign = on.select(is_plus, on.constant(1.0), on.constant(-1.0))
        up, down = on.fcmp_ordered(">", x, nought), on.fcmp_ordered("<", x, nought)
        same = on.select(is_plus, up, down)
        if zero is not None:
            is_zero = on.truths(zero, i)
            sign = on.select(is_zero, nought, sign)
            same = on.select(is_zero, on.not_(on.or_(up, down)), same)
        d = on.fmul(on.call_of(f"llvm.fabs.v{LANES}f32", x), sign)
        d = on.fmul(on.fmul(on.fsub(d, x), a), b)
        merged = on.fadd(d, x)
        on.store(merged, at, align=4)
        turned = on.fcmp_ordered("<", on.fmul(merged, x), nought)
        return on.add(agree, on.number_of(same)), on.add(flips, on.number_of(turned))

    for place, number in enumerate(on.loop(count, (COUNT(0), COUNT(0)), turn)):
        on.store(number, on.gep(counts, [COUNT(place)]))
