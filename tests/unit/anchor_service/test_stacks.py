"""Stacks of a process that computes, of one that is stopped, and of one that never listened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from anchor_service import stacks

SLEEPER = """
import time
from anchor_service.stacks import listen
{listen}
def deep_in_the_tick():
    print("ready", flush=True)
    time.sleep(60)
deep_in_the_tick()
"""


@pytest.fixture
def process() -> Iterator[Callable[[str], int]]:
    started: list[subprocess.Popen[str]] = []

    def start(listen: str) -> int:
        code = SLEEPER.format(listen=listen)
        started.append(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout and started[-1].stdout.readline() == "ready\n"
        return started[-1].pid

    yield start
    for one in started:
        one.send_signal(signal.SIGCONT)
        one.kill()
        one.communicate()


def test_without_py_spy_a_process_writes_its_own_stacks_and_a_stopped_one_is_said_to_be(
    process: Callable[[str], int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stacks.shutil, "which", lambda *args, **more: None)
    monkeypatch.setattr(stacks, "WRITE_S", 30.0)
    pid = process("listen(None); listen(None)")
    for _ in range(2):  # the second look shows what is new alone
        said = stacks.look(pid)
        assert f"process {pid} on " in said and "py-spy: not installed" in said
        assert said.count("in deep_in_the_tick") == 1
    os.kill(pid, signal.SIGSTOP)
    while not stacks._state(pid).startswith("T"):
        time.sleep(0.01)
    monkeypatch.setattr(stacks, "WRITE_S", 0.5)
    said = stacks.look(pid)
    assert "T (stopped)" in said and "it wrote nothing within 0.5 s: no stacks" in said
    os.kill(pid, signal.SIGCONT)
    monkeypatch.setattr(stacks, "WRITE_S", 30.0)
    assert stacks.look(pid).count("in deep_in_the_tick") >= 1


def test_a_process_that_does_not_listen_is_left_alive(process: Callable[[str], int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stacks.shutil, "which", lambda *args, **more: None)
    pid = process("")
    assert "it does not listen: no stacks" in stacks.look(pid)
    os.kill(pid, 0)


def test_a_process_that_is_gone_is_said_to_be(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stacks.shutil, "which", lambda *args, **more: None)
    assert "unknown (No such file or directory)" in stacks.look(2**22 + 1)
