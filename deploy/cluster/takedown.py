"""Take Ray down in bounded time: with its control store gone, Ray waits a minute for it and then ends the process."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress

from anchor_service.errors import described

CALL_S = 5.0  # a healthy cluster answers in a moment
TAKEDOWN_S = 10.0  # and one of our own is down in about two seconds
_STUCK = "Ray does not answer"  # the name of a thread that waits for it


def bounded(call: Callable[[], None], seconds: float = CALL_S) -> bool:
    """Whether `call` was over within `seconds`. What it raises is a warning: how the run ended is already written."""
    if stuck():
        return False
    thread = threading.Thread(target=_warned, args=(call,), daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        thread.name = _STUCK
        warnings.warn(f"Ray did not answer within {seconds:g} s: it is left as it is", stacklevel=2)
    return not thread.is_alive()


def shut_down() -> None:
    """Leave the cluster; end one of our own, also if it no longer answers."""
    import ray

    node = ray._private.worker._global_node  # pyright: ignore
    if not bounded(ray.shutdown, TAKEDOWN_S) and node is not None:
        with suppress(Exception):
            node.kill_all_processes(check_alive=False)


def stuck() -> bool:
    """Whether something in this process still waits for a Ray that does not answer."""
    return any(thread.name == _STUCK for thread in threading.enumerate())


def leave(code: str | int | None) -> None:
    """End the process at once if it is stuck: Ray's exit handlers would wait too, and end it with a code of their own."""
    if stuck():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def _warned(call: Callable[[], None]) -> None:
    try:
        call()
    except Exception as error:
        warnings.warn(f"Ray was not taken down well: {described(error)}", stacklevel=2)
