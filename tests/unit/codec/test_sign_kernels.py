"""Triton's kernels on a machine without a GPU: their laws by its interpreter, and that they compile for two kinds of GPU.

On a GPU: tests/gpu/test_sign_kernels.py.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def test_the_laws_hold_by_the_interpreter():
    pytest.importorskip("triton", reason="Triton is for Linux")
    command = [sys.executable, "-m", "tests.unit.codec.kernel_laws"]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "they hold\n", done.stderr[-3000:]


@pytest.mark.parametrize("generation", [80, 90])
@pytest.mark.parametrize("zeros", [False, True, None], ids=["merge", "merge with zeros", "pack"])
def test_they_compile_and_no_product_is_fused_with_a_sum(zeros: bool | None, generation: int):
    triton = pytest.importorskip("triton", reason="Triton is for Linux")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from codec import sign_kernels

    blocks = sign_kernels.PACKING if zeros is None else sign_kernels.MERGING
    known = {"ROWS": blocks.rows} | ({} if zeros is None else {"ZEROS": zeros})
    rows = {"plus": "*u8", "zero": "*u8", "counts": "*i32", "n": "i64"} | dict.fromkeys(known, "constexpr")
    if zeros is None:
        source = ASTSource(sign_kernels._pack, {"values": "*fp32"} | rows, known)
    else:
        floats = {"g": "*fp32", "a": "fp32", "b": "fp32"}
        source = ASTSource(sign_kernels._merge, floats | rows, known)
    made = triton.compile(source, target=GPUTarget("cuda", generation, 32), options={"enable_fp_fusion": False})
    assert made.asm["cubin"] and "fma" not in made.asm["ptx"] and "ftz" not in made.asm["ptx"]
