"""Workers of a local cluster by fork: torch and all else but Ray is imported once, and not in every worker.

    Ray starts a program a worker ─▶ fork_request.py passes on what it was given ─▶ this server forks, and runs that

Ray itself is imported after the fork: its C++ side keeps what the environment said when it was loaded. Without an
answer of the server a worker starts as it always did.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

IMPORTED = "rl.rollout", "swarm.tick", "anchor_service.dense_gradient"  # what takes long, and no Ray
REQUEST = Path(__file__).with_name("fork_request.py")
OUTPUT = 0, 1, 2


@contextmanager
def forkserver(threads: int) -> Generator[dict[str, str]]:
    """A runtime environment for Ray, in which its workers are forked by a server that ends with this process."""
    if sys.platform != "linux":
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="northstar-") as folder:  # nobody else may look into it, and so ask
        address = f"{folder}/forks"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen()
            server = _started(listener.fileno(), threads)
        try:
            yield {"py_executable": shlex.join([sys.executable, "-IS", str(REQUEST), address])}
        finally:
            server.kill()
            server.communicate()


def _started(listener: int, threads: int) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, str(listener)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)},
        stdin=subprocess.PIPE,  # ends when this process does
        pass_fds=[listener],
        start_new_session=True,  # Ctrl-C is for this process alone
    )


def main() -> None:
    for module in IMPORTED:
        import_module(module)
    listener = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # of a worker that ended nothing is left
    while sys.stdin not in select.select([sys.stdin, listener], [], [])[0]:
        asked, _ = listener.accept()
        try:
            output, request = _read(asked)
        except (OSError, ValueError):  # who asked was ended before all was said
            asked.close()
            continue
        child = not os.fork()
        asked.close()
        if child:
            listener.close()
            return _become(output, *request)
        for file in output:
            os.close(file)


def _read(asked: socket.socket) -> tuple[list[int], tuple[list[str], dict[str, str], str]]:
    """Where the worker's output goes; its arguments, environment and working directory."""
    _, output, _, _ = socket.recv_fds(asked, 1, len(OUTPUT))
    parts = iter(lambda: asked.recv(1 << 16), b"")
    arguments, environment, folder = json.loads(b"".join(parts))
    return output, (arguments, environment, folder)


def _become(output: list[int], arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """Go on as if this process had been started with all that."""
    os.setpgid(0, 0)  # Ray ends a worker with its group
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, file in zip(OUTPUT, output, strict=True):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
