"""What a lossless delta of bf16 weights does to every weight, one pass over memory each, in machine code.

`codec/delta.py` says the same in whole arrays, and does what is beyond the last LANES; tests hold the two to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from llvmlite import ir

from codec.machine_code import (
    COUNT,
    COUNT_ROW,
    FLOAT_ROW,
    FLOATS,
    LANES,
    WORD,
    WORD_ROW,
    Loop,
    Value,
    Vectors,
    addresses,
    compiled,
)

LONG = ir.IntType(32)
WORDS, LONGS = ir.VectorType(WORD, LANES), ir.VectorType(LONG, LANES)
LONG_ROW = LONG.as_pointer()


def round_into(patterns: np.ndarray, weights: np.ndarray) -> None:
    """float32 [n] -> bf16 bit patterns, uint16 [n], n a multiple of LANES: to nearest even, a NaN becomes quiet."""
    _over(patterns, "round", weights)


def widen_into(weights: np.ndarray, patterns: np.ndarray) -> None:
    """bf16 bit patterns, uint16 [n], n a multiple of LANES -> float32 [n], exact."""
    _over(weights, "widen", patterns)


def changes(new: np.ndarray, old: np.ndarray, limit: int) -> tuple[int, int, np.ndarray, np.ndarray]:
    """Patterns, uint16 [n] each, n a multiple of LANES -> how many differ, and what follows the last that does; of the
    first `limit` of them the number of equal ones before each, uint32, and their differences in zigzag, uint16."""
    assert new.size == old.size and new.size % LANES == 0
    gaps, values = np.empty(limit + 1, np.uint32), np.empty(limit + 1, np.uint16)  # all beyond the limit go to the last
    found = np.zeros(2, np.int64)
    if new.size:
        rows = addresses(new, old, gaps, values)
        _loops()["changes"](*rows, new.size // LANES, limit, *addresses(found))
    count, after = (int(number) for number in found)
    return count, after, gaps[: min(count, limit)], values[: min(count, limit)]


def apply_changes(bits: np.ndarray, gaps: np.ndarray, values: np.ndarray, back: bool) -> int:
    """Add what `changes` gave to bits, uint16 [n], in their place, or take it off again; what follows the last position.

    Beyond n nothing is touched: then what follows is beyond n too.
    """
    assert gaps.size == values.size and gaps.dtype == np.uint32 and values.dtype == bits.dtype == np.uint16
    after = np.zeros(1, np.int64)
    if gaps.size and bits.size:
        rows = addresses(gaps, values, bits)
        _loops()["apply"](*rows, gaps.size, bits.size, -1 if back else 1, *addresses(after))
    return int(after[0])


def _over(into: np.ndarray, name: str, values: np.ndarray) -> None:
    assert into.size == values.size and values.size % LANES == 0
    if values.size:
        _loops()[name](*addresses(into, values), values.size // LANES)


@cache
def _loops() -> dict[str, Callable[..., None]]:
    rows = (WORD_ROW, WORD_ROW, LONG_ROW, WORD_ROW)
    return compiled(
        [
            Loop("round", (WORD_ROW, FLOAT_ROW, COUNT), _write_round),
            Loop("widen", (FLOAT_ROW, WORD_ROW, COUNT), _write_widen),
            Loop("changes", (*rows, COUNT, COUNT, COUNT_ROW), _write_changes),
            Loop("apply", (LONG_ROW, WORD_ROW, WORD_ROW, COUNT, COUNT, COUNT, COUNT_ROW), _write_apply),
        ]
    )


def _words_at(on: Vectors, row: Value, i: Value) -> Value:
    return on.bitcast(on.gep(row, [on.mul(i, COUNT(LANES))]), WORDS.as_pointer())


def _longs(x: int) -> Value:
    return ir.Constant(LONGS, [x] * LANES)


def _write_round(on: Vectors, patterns: Value, weights: Value, count: Value) -> None:
    def turn(i: Value) -> Sequence[Value]:
        x = on.load(on.floats_at(weights, i), align=4)
        bits = on.bitcast(x, LONGS)
        high = on.lshr(bits, _longs(16))
        up = on.add(on.and_(high, _longs(1)), _longs(0x7FFF))
        near = on.lshr(on.add(bits, up), _longs(16))
        quiet = on.or_(high, _longs(0x40))
        found = on.select(on.fcmp_unordered("uno", x, x), quiet, near)
        on.store(on.trunc(found, WORDS), _words_at(on, patterns, i), align=2)
        return ()

    on.loop(count, (), turn)


def _write_widen(on: Vectors, weights: Value, patterns: Value, count: Value) -> None:
    def turn(i: Value) -> Sequence[Value]:
        bits = on.shl(on.zext(on.load(_words_at(on, patterns, i), align=2), LONGS), _longs(16))
        on.store(on.bitcast(bits, FLOATS), on.floats_at(weights, i), align=4)
        return ()

    on.loop(count, (), turn)


def _write_changes(
    on: Vectors, new: Value, old: Value, gaps: Value, values: Value, count: Value, limit: Value, found: Value
) -> None:
    def turn(i: Value, number: Value, after: Value) -> Sequence[Value]:
        here, before = (on.load(_words_at(on, row, i), align=2) for row in (new, old))
        differ = on.word(on.icmp_unsigned("!=", here, before))

        def each(_: Value, left: Value, number: Value, after: Value) -> Sequence[Value]:
            lane = on.zext(on.cttz(left, ir.IntType(1)(1)), COUNT)
            at = on.add(on.mul(i, COUNT(LANES)), lane)
            here, before = (on.load(on.gep(row, [at]), align=2) for row in (new, old))
            step = on.sub(here, before)
            slot = on.select(on.icmp_unsigned("<", number, limit), number, limit)
            on.store(on.trunc(on.sub(at, after), LONG), on.gep(gaps, [slot]), align=4)
            zigzag = on.xor(on.shl(step, WORD(1)), on.ashr(step, WORD(LANES - 1)))
            on.store(zigzag, on.gep(values, [slot]), align=2)
            return on.and_(left, on.sub(left, WORD(1))), on.add(number, COUNT(1)), on.add(at, COUNT(1))

        quiet = on.block
        with on.if_then(on.icmp_unsigned("!=", differ, WORD(0))):
            bits = on.zext(on.call_of(f"llvm.ctpop.i{LANES}", differ), COUNT)
            _, number_then, after_then = on.loop(bits, (differ, number, after), each)
            busy = on.block
        merged: list[Value] = []
        for kept, moved in ((number, number_then), (after, after_then)):
            phi = on.phi(COUNT)
            phi.add_incoming(kept, quiet)
            phi.add_incoming(moved, busy)
            merged.append(phi)
        return merged

    for place, seen in enumerate(on.loop(count, (COUNT(0), COUNT(0)), turn)):
        on.store(seen, on.gep(found, [COUNT(place)]))


def _write_apply(
    on: Vectors, gaps: Value, values: Value, bits: Value, count: Value, size: Value, sign: Value, found: Value
) -> None:
    sign = on.trunc(sign, WORD)

    def turn(i: Value, after: Value) -> Sequence[Value]:
        at = on.add(after, on.zext(on.load(on.gep(gaps, [i]), align=4), COUNT))
        fits = on.icmp_unsigned("<", at, size)
        value = on.load(on.gep(values, [i]), align=2)
        step = on.xor(on.lshr(value, WORD(1)), on.sub(WORD(0), on.and_(value, WORD(1))))
        step = on.select(fits, on.mul(step, sign), WORD(0))
        place = on.gep(bits, [on.select(fits, at, COUNT(0))])
        on.store(on.add(on.load(place, align=2), step), place, align=2)
        return (on.add(at, COUNT(1)),)

    (after,) = on.loop(count, (COUNT(0),), turn)
    on.store(after, found)
