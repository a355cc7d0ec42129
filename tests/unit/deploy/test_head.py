"""The head of a cluster of one's own beside the command: it ends with the command, and says nothing if it did not start.

That it is joined, and is taken down when a command ends by itself, tests/chaos/test_signals.py holds.
"""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from deploy.cluster.placement import OwnCluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="a head is started ahead where workers are forked"),
]

COMMAND = f"""
import sys
from deploy.cluster.head import head_ahead, head_place
from deploy.cluster.placement import OwnCluster

size = {OwnCluster(2, ("spare",))}
with head_ahead(size):
    place = head_place(size, 60)
    print(place and place.address, flush=True)
    if place:
        sys.stdin.read()
assert head_place(size, 60) is None and "ray" not in sys.modules
"""


def _command(**environment: str) -> subprocess.Popen[str]:
    call = [sys.executable, "-c", COMMAND]
    return subprocess.Popen(
        call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )


def test_a_head_ends_with_the_command_even_if_that_is_killed():
    with _command() as command:
        assert command.stdout
        host, _, port = command.stdout.readline().partition(":")
        assert host == "127.0.0.1" and int(port)
        (owner,) = psutil.Process(command.pid).children()
        its = owner.children(recursive=True)
        assert {"gcs_server", "raylet"} <= {process.name() for process in its}
        assert os.getsid(owner.pid) == owner.pid  # Ctrl-C does not reach it
        command.kill()
        assert psutil.wait_procs([owner, *its], timeout=30)[1] == []


def test_of_a_head_that_could_not_start_nothing_is_there():
    with _command(RAY_TMPDIR="/proc/nowhere") as command:
        said, _ = command.communicate(timeout=60)
    assert said == "None\n" and command.returncode == 0
