"""One command writes to a folder at a time, also where several machines mount it: a lock, and a heartbeat beside it.

The lock is the kernel's and gone with its process. Some shared file systems keep it to one machine, so whoever holds it
also writes down who it is, every BEAT_S. A heartbeat of another machine that has stood still for STALE_S is a dead one's.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from deploy.commands.options import refused

BEAT_S, STALE_S = 5.0, 20.0
LOCK, BEAT = ".lock", ".driver"
LOCK_FILES = LOCK, BEAT


@contextmanager
def alone_in(folder: Path) -> Generator[None]:
    """No other command writes there meanwhile; raises typer's refusal, which names the other, if one does."""
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder / LOCK).acquire(timeout=0)
    except Timeout:
        raise _taken(folder) from None
    except OSError as error:
        message = f"{folder} cannot be written to ({error.strerror}): choose another --out"
        raise refused(ValueError(message)) from None
    with held:
        if _beats_elsewhere(folder / BEAT):
            raise _taken(folder)
        over = threading.Event()
        beating = threading.Thread(target=_beat, args=(folder / BEAT, over), daemon=True)
        _write(folder / BEAT, 0)
        beating.start()
        try:
            yield
        finally:
            over.set()
            beating.join()
            with suppress(OSError):
                (folder / BEAT).unlink()


def _taken(folder: Path) -> Exception:
    other = _read(folder / BEAT)
    who = f" (process {other['pid']} on {other['host']})" if other else ""
    return refused(
        ValueError(
            f"another northstar command{who} is writing to {folder}: wait for it to end, or choose another --out"
        )
    )


def _beats_elsewhere(file: Path) -> bool:
    """Whether a process of another machine is at work; waits up to STALE_S to see it. Of this one the lock says it."""
    seen = _read(file)
    if seen is None or seen["host"] == socket.gethostname():
        return False
    deadline = time.monotonic() + STALE_S
    while (now := _read(file)) == seen and time.monotonic() < deadline:
        time.sleep(0.1)
    return now is not None and now != seen


def _beat(file: Path, over: threading.Event) -> None:
    number = 0
    while not over.wait(BEAT_S):
        number += 1
        with suppress(OSError):  # a file system that is away for a while
            _write(file, number)


def _write(file: Path, number: int) -> None:
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(
        json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "beat": number, "at": time.time()})
    )
    os.replace(partial, file)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text())
        return {name: found[name] for name in ("host", "pid", "beat", "at")}
    except (OSError, ValueError, KeyError, TypeError):
        return None
