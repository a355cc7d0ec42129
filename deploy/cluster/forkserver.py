"""Workers by fork: torch and all else but Ray is imported once on a node, and not in every worker.

    Ray starts a program a worker ─▶ fork_request.py passes on what it was given ─▶ this server forks, and runs that

On a cluster of one's own the command has the server; on another one the first that asks on a node starts it
(node_forks.py), and it ends when the last that it forked has. It serves no other user.
Ray itself is imported after the fork: its C++ side keeps what the environment said when it was loaded. Without an
answer of the server a worker starts as it always did. A command that has not imported Ray yet is forked itself: what
it needs of torch and transformers is then imported once for it and for all workers (`fork_ahead`).
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.cluster.fork_request import peer_user

if TYPE_CHECKING:
    from swarm.run_config import RunConfig

IMPORTED = "rl.rollout", "swarm.tick", "anchor_service.dense_gradient"  # what takes long, and no Ray
OF_RAY = "requests", "jsonschema", "google.protobuf.descriptor_pb2", "pdb", "uvloop"  # half of what its import takes
REQUEST = Path(__file__).with_name("fork_request.py")
OUTPUT = 0, 1, 2
READ_S = 5.0  # for one that asks to say what
LOOK_S, IDLE_S = 1.0, 10.0  # a server that nobody watches ends when it has had no fork for so long


_ahead: dict[str, str] | None = None  # what `fork_ahead` offers while it lasts


def may_fork(config: RunConfig) -> bool:
    """CUDA does not live on in a fork, and what is imported may wake it."""
    devices = config.swarm.device, config.rollout.device, config.anchor.device
    return sys.platform == "linux" and "cuda" not in devices


@contextmanager
def forkserver(threads: int) -> Generator[dict[str, str]]:
    """A runtime environment for Ray, in which its workers are forked by a server that ends with this process."""
    if _ahead is not None:
        yield _ahead
        return
    with tempfile.TemporaryDirectory(prefix="northstar-") as folder:  # nobody else may look into it, and so ask
        with _listening(folder) as listener:
            server = _started(listener.fileno(), threads)
        try:
            yield _offer(folder)
        finally:
            server.kill()
            server.communicate()
            end_session(server.pid)  # a worker that was still starting waits half a minute for a Ray that is gone


@contextmanager
def fork_ahead(threads: int) -> Generator[None]:
    """Each `forkserver` within this one is a fork that is made of this very process now: before Ray, and any thread.

    A worker returns from here too, by SystemExit: callers hold nothing that a worker's end must not undo.
    """
    global _ahead
    assert "ray" not in sys.modules
    os.environ["OMP_NUM_THREADS"] = str(threads)  # heeded as torch is imported
    _import()
    folder = tempfile.mkdtemp(prefix="northstar-")  # no TemporaryDirectory: a worker would remove it as it ends
    with _listening(folder) as listener:
        server, alive = _forked(listener)
    _ahead = _offer(folder)
    try:
        yield
    finally:
        _ahead = None
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
        os.close(alive)
        end_session(server)
        shutil.rmtree(folder)


def _listening(folder: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(_address(folder))
    listener.listen()
    return listener


def _address(folder: str) -> str:
    return f"{folder}/forks"


def _offer(folder: str) -> dict[str, str]:
    return {"py_executable": shlex.join([sys.executable, "-IS", str(REQUEST), _address(folder)])}


def _import() -> None:
    """All of it, for good: looking for garbage meanwhile is a fifth of the time, and what it finds 8 MB."""
    gc.disable()
    try:
        for module in IMPORTED:
            import_module(module)
        for module in OF_RAY:
            with suppress(ImportError):  # another version of Ray may do without
                import_module(module)
        gc.freeze()  # later collections pass over it; a worker's copy none of its pages
    finally:
        gc.enable()


def _forked(listener: socket.socket) -> tuple[int, int]:
    """The server's process, and the end of a pipe that tells it that this one lives. Raises SystemExit in a worker."""
    watched, alive = os.pipe()
    if server := os.fork():
        os.close(watched)
        return server, alive
    os.close(alive)
    os.setsid()  # Ctrl-C is for the parent alone
    _serve(listener, watched)
    sys.exit()


def _started(listener: int, threads: int) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, str(listener), "--watched"],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)},
        stdin=subprocess.PIPE,  # ends when this process does
        pass_fds=[listener],
        start_new_session=True,  # Ctrl-C is for this process alone
    )


def main() -> None:
    """`--watched`: it ends with its standard input. Else there is nobody whom it could end with."""
    listener, *watched = sys.argv[1:]
    if not watched and os.getppid() == int(os.environ.get("RAY_RAYLET_PID", 0)):
        sys.exit()  # a raylet that takes in orphans (a setting of Ray's) ends them
    _import()
    _serve(socket.socket(fileno=int(listener)), sys.stdin.fileno() if watched else None)


def _serve(listener: socket.socket, watched: int | None) -> None:
    """Until `watched` ends, or without one the last fork, this process forks; returns in a worker, when that is done."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # of a worker that ended nothing is left
    files, patience = ([listener], LOOK_S) if watched is None else ([listener, watched], None)
    used = time.monotonic()
    while watched not in (ready := select.select(files, [], [], patience)[0]):
        if ready and _worker(listener):
            return
        if _has_forks():
            used = time.monotonic()
        elif watched is None and time.monotonic() > used + IDLE_S:
            break
    if watched is not None:  # who made the folder, and would end the forks, was killed
        end_session(os.getpid())
        shutil.rmtree(Path(listener.getsockname()).parent, ignore_errors=True)
    os._exit(0)


def end_session(leader: int) -> None:
    """Whoever is left in the session of process `leader`, which stays as it is: at once, asked by nobody."""
    for process in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if os.getsid(int(process)) == leader != int(process):
                os.kill(int(process), signal.SIGKILL)


def _has_forks() -> bool:
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def _worker(listener: socket.socket) -> bool:
    """A fork for the next one that asks; true in it, when what it was made for is done."""
    asked, _ = listener.accept()
    with asked:
        try:
            asked.settimeout(READ_S)
            if peer_user(asked) != os.geteuid():
                return False
            output, request = _read(asked)
        except (OSError, ValueError):  # who asked was ended before all was said
            return False
        if os.fork():
            for file in output:
                os.close(file)
            return False
        try:
            asked.sendall(b".")
        except OSError:  # it waits no more, and has gone on without
            os._exit(0)
    listener.close()
    _become(output, *request)
    return True


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
