"""The head of a cluster of one's own, started beside the imports of the command that will join it.

    command ─▶ fork ─▶ imports Ray, starts the head ─▶ says where it is ─▶ takes it down when the command is done, or gone
       └─ imports torch and transformers, forks its workers' server ─▶ imports Ray, joins

Each takes seconds, on Ray's side mostly of waiting. The command cannot start the head itself and go on: who has imported
Ray cannot fork workers any more. Between the two is a pair of sockets, which nobody else holds: the kernel closes the
command's end with the command, however that ends. A head that did not start has said nothing, and nothing is left of it:
the command starts one, as it does without this, and says why it cannot.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NoReturn

from anchor_service.errors import WaitTimeout
from deploy.cluster.forkserver import end_session
from deploy.cluster.placement import OwnCluster
from deploy.cluster.takedown import CALL_S, TAKEDOWN_S, shut_down, stuck

LONGEST = 1 << 12  # of what it says


@dataclass(frozen=True)
class HeadPlace:
    """What it takes to join a head."""

    address: str
    token: str


@dataclass(frozen=True)
class _Head:
    """A process that owns a head, as the command sees it."""

    size: OwnCluster
    process: int
    line: socket.socket  # it says once where the head is, and ends it when this one is closed


_ahead: _Head | None = None


@contextmanager
def head_ahead(size: OwnCluster) -> Generator[None]:
    """A head like `size` that `head_place` finds, and that is gone at the end. Before Ray is imported, and any thread made."""
    global _ahead
    assert "ray" not in sys.modules
    line, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if not (process := os.fork()):
        line.close()
        _own(size, its)
    its.close()
    _ahead = _Head(size, process, line)
    os.register_at_fork(after_in_child=_disown)
    try:
        yield
    finally:
        end_head()


def head_place(size: OwnCluster, seconds: float) -> HeadPlace | None:
    """Where the head is that was started ahead; None if there is none like `size`. Raises WaitTimeout."""
    if _ahead is None:
        return None
    if _ahead.size == size:
        if not select.select([_ahead.line], [], [], seconds)[0]:
            raise WaitTimeout("Ray's head node", "its address", seconds, "swarm.start_timeout_s")
        if said := _ahead.line.recv(LONGEST):
            return HeadPlace(**json.loads(said))
    end_head()
    return None


def end_head() -> None:
    """Of a head that was started ahead nothing is left, in bounded time, whether or not it still answers."""
    global _ahead
    if _ahead is None:
        return
    head, _ahead = _ahead, None
    with head.line:
        head.line.shutdown(socket.SHUT_WR)
        if stuck() or not _ended(head.line, TAKEDOWN_S + CALL_S):
            os.kill(head.process, signal.SIGKILL)  # the kernel ends Ray's processes with it, as Ray has asked for
    os.waitpid(head.process, 0)
    end_session(head.process)


def _ended(line: socket.socket, seconds: float) -> bool:
    """Whether the other end is closed in that time, whatever is said before."""
    deadline = time.monotonic() + seconds
    while select.select([line], [], [], max(0.0, deadline - time.monotonic()))[0]:
        if not line.recv(LONGEST):
            return True
    return False


def _disown() -> None:
    """In a fork of the command, as its workers' server: the head is not its to end, and does not stay for its sake."""
    global _ahead
    if _ahead:
        _ahead.line.close()
        _ahead = None


def _own(size: OwnCluster, line: socket.socket) -> NoReturn:
    """The process that owns the head: until the other end of `line` is closed. It prints no error: the command will."""
    try:
        os.setsid()  # Ctrl-C, and signals to the command's group, are for the command: it ends the head
        from deploy.cluster.loopback import loopback, start_head

        with loopback() as token:
            address = start_head(size, forks=True)
            with suppress(OSError):  # the command is gone
                line.send(json.dumps({"address": address, "token": token}).encode())
                line.recv(1)
            shut_down()
    finally:
        end_session(os.getpid())  # with their control store gone, Ray's agents would look for it half a minute
        os._exit(0)
