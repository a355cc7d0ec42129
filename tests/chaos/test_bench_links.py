"""A bench of slow links that is stopped leaves no network, and nothing that runs in one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.slow_links import BRIDGE, HEAD_NODE, NODES, clear, inside

pytestmark = pytest.mark.slow

PROBE = "nslink-probe"


def _can_make_networks() -> bool:
    if sys.platform != "linux" or os.geteuid() or not shutil.which("ip"):
        return False
    made = subprocess.run(["ip", "netns", "add", PROBE], capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "del", PROBE], capture_output=True)
    return made


def _left() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.split()
    bridge = subprocess.run(["ip", "link", "show", BRIDGE], capture_output=True).returncode == 0
    return [name for name in listed if name in NODES] + [BRIDGE] * bridge


def _alive(numbers: set[int]) -> set[int]:
    return {n for n in numbers if Path(f"/proc/{n}/stat").exists() and _state(n) != "Z"}


def _state(number: int) -> str:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


@pytest.fixture
def networks() -> Iterator[None]:
    if not _can_make_networks():
        pytest.skip("network namespaces need Linux and root")
    yield
    clear()


def test_a_bench_that_is_terminated_leaves_nothing(networks: None):
    command = [sys.executable, "-m", "benchmarks.slow_links"]
    bench = subprocess.Popen(command, cwd=Path(__file__).parents[2], start_new_session=True, stdout=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 90
        while len(seen := set(inside(HEAD_NODE))) < 3:  # ray start, its control store, its raylet
            assert bench.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        bench.send_signal(signal.SIGTERM)
        assert bench.wait(60) != 0
        assert _left() == []
        deadline = time.monotonic() + 20
        while _alive(seen) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert _alive(seen) == set()
    finally:
        bench.kill()


def test_what_a_killed_bench_left_goes_when_the_next_one_starts(networks: None):
    subprocess.run(["ip", "netns", "add", HEAD_NODE], check=True)
    subprocess.run(["ip", "link", "add", BRIDGE, "type", "bridge"], check=True)
    left = subprocess.Popen(["ip", "netns", "exec", HEAD_NODE, "sleep", "100"])
    deadline = time.monotonic() + 30
    while not inside(HEAD_NODE) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _left() == [HEAD_NODE, BRIDGE]
    clear()
    assert _left() == [] and left.wait(10) == -signal.SIGKILL
    clear()  # of nothing
