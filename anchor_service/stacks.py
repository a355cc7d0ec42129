"""Where the processes of actors are at: their stacks, read on their nodes, whether or not they answer.

By py-spy where it is installed and may look, else by `faulthandler`: an actor that was told to `listen` writes its
stacks on a signal, into memory of its own that has a number in /proc and no file.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from anchor_service.calls import process_of

LOOK_S = 5.0  # for one look at a process
WRITE_S = 2.0  # for a process to write its stacks
_MEMORY = "stacks"


def listen(actor: object) -> None:
    """In the process of an actor: from now on it writes its stacks when it is asked to. On Linux."""
    if hasattr(os, "memfd_create") and _memory(os.getpid()) is None:
        faulthandler.register(signal.SIGUSR2, file=os.memfd_create(_MEMORY), all_threads=True)


def stacks_of(actors: Mapping[str, ActorHandle[Any]], seconds: float) -> dict[str, str]:
    """Name -> stacks of the actor's process, or why there are none; within `seconds`."""
    found, tasks = dict[str, str](), dict[Any, str]()
    for name, actor in actors.items():
        pid, node = process_of(actor)
        if pid is None or node is None:
            found[name] = "Ray does not know its process\n"
            continue
        here = NodeAffinitySchedulingStrategy(node, soft=False)
        tasks[ray.remote(look).options(num_cpus=0, max_retries=0, scheduling_strategy=here).remote(pid)] = name
    done = ray.wait(list(tasks), num_returns=len(tasks), timeout=seconds)[0] if tasks else []
    for reference, name in tasks.items():
        try:
            found[name] = ray.get(reference) if reference in done else f"its node did not look within {seconds:g} s\n"
        except Exception as error:  # of a run that has failed already: nothing may hide why
            found[name] = f"its node could not look: {error}\n"
        if reference not in done:
            with suppress(Exception):
                ray.cancel(reference, force=True)
    return found


def look(pid: int) -> str:
    """Stacks of a process on this machine, under a line that says what state the kernel has it in."""
    state = _state(pid)
    spied, why = _spied(pid, stopped=state.startswith(("T", "t")))
    head = f"process {pid} on {socket.gethostname()}: {state}\n"
    return head + (spied or f"py-spy: {why}\n{_written(pid)}")


def _state(pid: int) -> str:
    """As `S (sleeping)`."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError as error:
        return f"unknown ({error.strerror})"
    return next(line.split(None, 1)[1] for line in status.splitlines() if line.startswith("State:"))


def _spied(pid: int, stopped: bool) -> tuple[str, str]:
    """What py-spy sees; or nothing, and why."""
    here = os.path.dirname(sys.executable)  # of an environment that is not activated
    program = shutil.which("py-spy", path=os.pathsep.join([here, os.environ.get("PATH", "")]))
    if program is None:
        return "", "not installed"
    command = [program, "dump", "--pid", str(pid), *(["--nonblocking"] if stopped else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LOOK_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    if done.returncode or "Thread" not in done.stdout:
        return "", (done.stderr or done.stdout).strip() or "it says nothing"
    return done.stdout, ""


def _written(pid: int) -> str:
    """What the process writes of its stacks when it is asked to."""
    memory = _memory(pid)
    if memory is None:  # the signal would end it
        return "it does not listen: no stacks\n"
    before, deadline = memory.stat().st_size, time.monotonic() + WRITE_S
    os.kill(pid, signal.SIGUSR2)
    size = before
    while time.monotonic() < deadline:
        time.sleep(0.1)
        last, size = size, memory.stat().st_size
        if size > before and size == last:
            with memory.open("rb") as file:
                file.seek(before)
                return file.read().decode(errors="replace")
    return f"it wrote nothing within {WRITE_S:g} s: no stacks\n"


def _memory(pid: int) -> Path | None:
    """Where a process that listens writes to."""
    with suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                if os.readlink(link).startswith(f"/memfd:{_MEMORY} "):
                    return link
    return None
