"""Loops over arrays in machine code, made by LLVM for the processor on which they run: no compiler is needed, nothing is kept.

A loop takes LANES numbers at a time, and as many bits: bit i of a word belongs to the ith number. Products and sums round
one by one, as they are written: LLVM fuses or reorders floats only where it is told that it may, and it is not.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import binding, ir

Value = Any  # of LLVM's, whose Python face has no types
LANES = 16
FLOAT, WORD, COUNT = ir.FloatType(), ir.IntType(LANES), ir.IntType(64)
FLOATS, TRUTHS = ir.VectorType(FLOAT, LANES), ir.VectorType(ir.IntType(1), LANES)
FLOAT_ROW, WORD_ROW, COUNT_ROW = FLOAT.as_pointer(), WORD.as_pointer(), COUNT.as_pointer()
C_TYPES = {FLOAT: ctypes.c_float, COUNT: ctypes.c_int64}  # and rows are addresses


class Vectors(ir.IRBuilder):
    """Writes one function over vectors of LANES floats."""

    def constant(self, x: float) -> Value:
        return ir.Constant(FLOATS, [x] * LANES)

    def every(self, x: Value) -> Value:
        """One float in all lanes."""
        none, at = ir.Constant(FLOATS, ir.Undefined), ir.IntType(32)
        return self.shuffle_vector(
            self.insert_element(none, x, at(0)), none, ir.Constant(ir.VectorType(at, LANES), None)
        )

    def floats_at(self, row: Value, i: Value) -> Value:
        """Where the ith LANES floats of a row lie; it may begin at any float."""
        return self.bitcast(self.gep(row, [self.mul(i, COUNT(LANES))]), FLOATS.as_pointer())

    def truths(self, row: Value, i: Value) -> Value:
        """The ith word of a row, a truth a lane; the row may begin at any byte."""
        return self.bitcast(self.load(self.gep(row, [i]), align=1), TRUTHS)

    def word(self, truths: Value) -> Value:
        return self.bitcast(truths, WORD)

    def call_of(self, name: str, x: Value) -> Value:
        """A function of LLVM's own, from a type to the same."""
        found = self.module.globals.get(name)
        return self.call(found or ir.Function(self.module, ir.FunctionType(x.type, [x.type]), name), [x])

    def number_of(self, truths: Value) -> Value:
        return self.zext(self.call_of(f"llvm.ctpop.i{LANES}", self.word(truths)), COUNT)

    def loop(self, count: Value, begin: Sequence[Value], turn: Callable[..., Sequence[Value]]) -> Sequence[Value]:
        """`turn`(i, *carried) -> carried, for i from 0 to `count` - 1, at least once; the last of what was carried."""
        before, inside = self.block, self.append_basic_block()
        self.branch(inside)
        self.position_at_end(inside)
        phis = [self.phi(value.type) for value in (COUNT(0), *begin)]
        carried = turn(*phis)
        i, end = self.add(phis[0], COUNT(1)), self.block  # a turn may have blocks of its own
        for phi, first, later in zip(phis, (COUNT(0), *begin), (i, *carried), strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(later, end)
        after = self.append_basic_block()
        self.cbranch(self.icmp_unsigned("<", i, count), inside, after)
        self.position_at_end(after)
        return carried


@dataclass(frozen=True)
class Loop:
    """A function that returns nothing: `write` gets a builder and its arguments."""

    name: str
    takes: Sequence[Any]
    write: Callable[..., None]


def compiled(loops: Sequence[Loop]) -> dict[str, Callable[..., None]]:
    """By name. Rows are passed as addresses, and must be as long as `write` reads and writes them."""
    module = ir.Module()
    for loop in loops:
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), loop.takes), loop.name)
        builder = Vectors(function.append_basic_block())
        loop.write(builder, *function.args)
        builder.ret_void()
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    cpu, features = binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()
    machine = binding.Target.from_default_triple().create_target_machine(cpu, features, opt=3)
    code = binding.parse_assembly(str(module))
    code.verify()
    engine = binding.create_mcjit_compiler(code, machine)
    engine.finalize_object()
    return {loop.name: _callable(engine, loop) for loop in loops}


def addresses(*rows: np.ndarray) -> list[int]:
    """Of rows that have no gaps."""
    assert all(row.flags.c_contiguous for row in rows)
    return [row.ctypes.data for row in rows]


def _callable(engine: Any, loop: Loop) -> Callable[..., None]:
    types = [C_TYPES.get(kind, ctypes.c_void_p) for kind in loop.takes]
    call = ctypes.CFUNCTYPE(None, *types)(engine.get_function_address(loop.name))

    def run(*arguments: object, code: object = engine) -> None:  # the code lives as long as its engine
        call(*arguments)

    return run
