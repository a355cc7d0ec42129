"""A function in a process of its own: one that hangs, exits or crashes takes nothing with it, and can be named. No torch.

The process starts once and is asked over a socket pair, with a deadline; it ends when its parent does.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

IMPORT_S = 60.0  # what a child imports may be much, on a busy machine
_SLICE_S = 0.5  # a child that has died may have left a process that keeps the socket open
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from rl.child import serve; "
    "serve(int(sys.argv[2]), sys.argv[3], sys.argv[4:])"
)


class ChildFailed(Exception):
    """`reason` follows on the name of what was asked: `ended its process (exit code 3)`. `late`: by the deadline."""

    def __init__(self, reason: str, late: bool = False):
        super().__init__(reason)
        self.reason, self.late = reason, late


class Child:
    """`make` (module:function) is called there with `arguments`, once; what it returns answers every `ask`.

    The first answer waits for the start of the process as well. After a failure it is over.
    """

    def __init__(self, make: str, *arguments: str):
        self._connection, theirs = Pipe()
        fd = theirs.fileno()
        command = [sys.executable, "-P", "-c", _START, json.dumps([*map(str, sys.path)]), str(fd), make, *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[fd])
        theirs.close()
        self._end = weakref.finalize(self, _end, self._process, self._connection)

    def started(self, seconds: float) -> None:
        """Waits for the start. Raises ChildFailed with what `make` raised, or if it takes longer."""
        self._answer(seconds)

    def ask(self, seconds: float, *values: Any) -> Any:
        """The function's answer, as JSON holds it, on values that travel as copies.

        Raises ChildFailed if it raises, ends the process, or is not done after `seconds`.
        """
        try:
            self._connection.send(values)
        except OSError:  # it has died since the last answer
            raise self._ended() from None
        except Exception as error:  # a value that cannot be copied, of whatever kind
            raise ChildFailed(f"cannot be given its arguments ({type(error).__name__}: {error})") from None
        return self._answer(seconds)

    @property
    def over(self) -> bool:
        """Whether its process has ended."""
        return not self._end.alive

    def close(self) -> None:
        self._end()

    def _answer(self, seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        while not self._connection.poll(min(_SLICE_S, max(0.0, deadline - time.monotonic()))):
            if self._process.poll() is not None and not self._connection.poll():
                raise self._ended()
            if time.monotonic() >= deadline:
                self.close()
                raise ChildFailed(f"was not done after {seconds:g} s", late=True)
        try:
            answer = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            raise self._ended() from None
        if "failed" in answer:
            raise ChildFailed(answer["failed"])
        return answer["value"]

    def _ended(self) -> ChildFailed:
        self._process.wait()
        code = self._process.returncode
        self.close()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return ChildFailed(f"ended its process ({how})")


class Service:
    """A child, and another in its place where it has ended. Raises ValueError if one does not start.

    Of `what` (`task.reward 'a:b'`) errors speak; `timeout_s` is the setting `key`, the deadline of an answer.
    """

    def __init__(self, what: str, key: str, timeout_s: float, make: str, *arguments: str):
        self.what, self.key, self.timeout_s = what, key, timeout_s
        self._make = make, *arguments
        self._child = self._started()

    def ask(self, seconds: float, *values: Any) -> Any:
        """As `Child.ask`. Raises ValueError if there is no child that could be asked."""
        if self._child.over:
            try:
                self._child = self._started()
            except ValueError as error:
                raise ValueError(f"could not be started again: {error}") from None
        return self._child.ask(seconds, *values)

    def _started(self) -> Child:
        child = Child(*self._make)
        try:
            child.started(max(IMPORT_S, self.timeout_s))
        except ChildFailed as failure:
            hint = f": raise {self.key}" if failure.late else ""
            raise ValueError(f"{self.what} cannot be imported: its module {failure.reason}{hint}") from None
        return child


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    process.kill()
    process.wait()


def serve(fd: int, make: str, arguments: list[str]) -> None:
    """The child's part: until the parent goes."""
    os.set_inheritable(fd, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    connection = Connection(fd)
    asked: queue.SimpleQueue[tuple[Any, ...] | Exception] = queue.SimpleQueue()
    module, _, name = make.partition(":")
    function = _reply(connection, lambda: getattr(importlib.import_module(module), name)(*arguments), lambda _: None)
    threading.Thread(target=_listen, args=(connection, asked), daemon=True).start()
    while True:
        values = asked.get()
        _reply(connection, lambda values=values: _called(function, values), lambda value: value)


def _called(function: Callable[..., Any], values: tuple[Any, ...] | Exception) -> Any:
    if isinstance(values, Exception):
        raise values
    return function(*values)


def _listen(connection: Connection, asked: queue.SimpleQueue[tuple[Any, ...] | Exception]) -> None:
    """In a thread, so that the end of the parent is seen while the function is at work."""
    while True:
        try:
            asked.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)
        except Exception as error:  # of a class that is not there in this process
            asked.put(error)


def _reply(connection: Connection, work: Callable[[], Any], told: Callable[[Any], Any]) -> Any:
    try:
        found = work()
        answer = {"value": told(found)}
        connection.send_bytes(json.dumps(answer).encode())
    except BaseException as error:  # sys.exit() too is the function's answer
        connection.send_bytes(json.dumps({"failed": f"raised {type(error).__name__}: {error}"}).encode())
        return None
    return found
