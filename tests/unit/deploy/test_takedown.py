"""A Ray that does not answer holds up nothing for long, and does not change the exit code."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from deploy.cluster.takedown import bounded, stuck


def test_a_call_that_ends_is_waited_for_and_what_it_raises_is_a_warning():
    done: list[int] = []
    assert bounded(lambda: done.append(1), 60) and done == [1] and not stuck()

    def fail() -> None:
        raise ConnectionError("no control store")

    with pytest.warns(UserWarning, match="Ray was not taken down well: ConnectionError: no control store"):
        assert bounded(fail, 60)


def test_a_call_that_does_not_end_is_left_and_no_other_is_tried_while_it_waits():
    let_go = threading.Event()
    with pytest.warns(UserWarning, match=r"did not answer within 0\.05 s"):
        assert not bounded(let_go.wait, 0.05)
    assert stuck() and not bounded(lambda: None, 60)
    (thread,) = (t for t in threading.enumerate() if t.name == "Ray does not answer")
    let_go.set()
    thread.join(10)
    assert not stuck() and bounded(lambda: None, 60)


def test_a_stuck_process_ends_with_its_own_code_and_not_that_of_an_exit_handler():
    program = """
import atexit, os, sys, threading
from deploy import cli
from deploy.cluster import takedown
atexit.register(lambda: os._exit(1))  # as Ray ends a process
takedown.bounded(threading.Event().wait, 0.01)
print("said")
cli.app = lambda: sys.exit(130)
cli.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[3]
    )
    assert done.returncode == 130 and done.stdout == "said\n", done.stderr
