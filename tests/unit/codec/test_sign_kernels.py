"""Triton's kernels by its interpreter, on a CPU. On a GPU: tests/gpu/test_sign_kernels.py."""

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
