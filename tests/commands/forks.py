"""`northstar` for the documents' commands: a fork of one process that has imported what takes long.

    shim (scratch.py) passes on what it was given ─▶ this server forks, and runs that ─▶ the shim ends with its exit code

Importing torch, transformers and matplotlib is six seconds of a core for each command else. One that is sent Ctrl-C is
a program of its own all the same, and so is the wheel's (test_wheel.py).

python -m tests.commands.forks SOCKET     until standard input ends; one command after the other
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from contextlib import suppress
from importlib import import_module

from deploy.cluster.forkserver import IMPORTED, _become, _read

MORE = "deploy.cli", "experiments.report"


def main() -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen()
    for module in (*IMPORTED, *MORE):
        import_module(module)
    assert "ray" not in sys.modules  # a command forks its own workers before it imports Ray
    while sys.stdin.fileno() not in select.select([sys.stdin.fileno(), listener], [], [])[0]:
        asked, _ = listener.accept()
        output, request = _read(asked)
        child = os.fork()
        if not child:
            listener.close()
            asked.close()
            return _become(output, *request)
        for file in output:
            os.close(file)
        code = _code(child, asked)
        with suppress(OSError):  # who asked may be gone: its command was ended
            asked.sendall(str(code).encode())
        asked.close()


def _code(child: int, asked: socket.socket) -> int:
    """The exit code of a command when it has ended; it is killed with its group if who asked for it is gone before."""
    ended, both = os.pidfd_open(child), select.poll()
    both.register(ended, select.POLLIN)
    both.register(asked, 0)  # hears of its end alone
    if ended not in dict(both.poll()):
        os.killpg(child, signal.SIGKILL)
    os.close(ended)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    main()
