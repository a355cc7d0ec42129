"""What Ray starts as a worker: asks forkserver.py for it. A program of its own, without packages, so done in no time.

python -IS fork_request.py ADDRESS program argument…     of a server's socket
python -IS fork_request.py @RUN program argument…        of the server that a run has on this node; started if it has none

In every doubt the program is started as it would be without a server.
"""

import json
import os
import socket
import struct
import sys
import time
import zlib

HEEDED = "PYTHON", "LD_", "OMP_", "KMP_", "MKL_", "HF_", "TRANSFORMERS_"  # as a program starts, or imports
WAIT_S = 45.0  # for a server that still imports, on a busy machine; Ray gives a worker a minute


def main(address: str, *program: str) -> None:
    if program[0].startswith("-") or not _forked(address, program):  # an option for Python itself
        os.execv(sys.executable, [sys.executable, *program])


def _forked(address: str, program: tuple[str, ...]) -> bool:
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.settimeout(WAIT_S)
            _connect(server, address)
            if peer_user(server) != os.geteuid():
                return False
            socket.send_fds(server, [b"."], [0, 1, 2])
            server.sendall(json.dumps([program, dict(os.environ), os.getcwd()]).encode())
            server.shutdown(socket.SHUT_WR)
            return _answer(server) == b"."
    except OSError:
        return False


def _answer(server: socket.socket) -> bytes:
    """The fork's, before it goes on; nothing if there is none, and then none will go on."""
    try:
        return server.recv(1)
    except TimeoutError:
        server.shutdown(socket.SHUT_RDWR)  # a fork that answers after this fails at it, and ends
        return server.recv(1)


def _connect(server: socket.socket, address: str) -> None:
    if not address.startswith("@"):
        return server.connect(address)
    name = name_here(address[1:])
    try:
        server.connect(name)
    except ConnectionRefusedError:
        _start(name)
        server.connect(name)


def name_here(run: str) -> str:
    """Of a run's server for those that see what this process sees, and were started alike: an abstract socket's.

    It is no file: nothing of it is left when its server has ended, and it is of one network namespace.
    """
    seen = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("mnt", "pid")]
    heeded = [each for each in sorted(os.environ.items()) if _heeded_at_start(each[0])]
    return f"\0northstar-{run}-{zlib.crc32(repr([sys.executable, seen, heeded]).encode()):08x}"


def _heeded_at_start(name: str) -> bool:
    return name.startswith(HEEDED) or name.endswith("_NUM_THREADS")


def peer_user(connection: socket.socket) -> int:
    """Who was at the other end of it as it was made."""
    return struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]


def _start(name: str) -> None:
    """A server in the background that is nobody's child: it outlives this process, and whoever that becomes."""
    import subprocess

    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(name)
        except OSError:  # another one was faster
            return time.sleep(0.1)
        listener.listen()
        call = [sys.executable, "-P", "-m", "deploy.cluster.forkserver", str(listener.fileno())]
        if not os.fork():
            try:
                subprocess.Popen(
                    call, env=os.environ | {"PYTHONPATH": path}, pass_fds=[listener.fileno()], start_new_session=True
                )
            finally:
                os._exit(0)
        os.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
