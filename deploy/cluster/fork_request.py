"""What Ray starts as a worker: asks forkserver.py for it. A program of its own, without packages, so done in no time.

python -IS fork_request.py ADDRESS program argument…
"""

import json
import os
import socket
import sys


def main(address: str, *program: str) -> None:
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.connect(address)
            socket.send_fds(server, [b"."], [0, 1, 2])
            server.sendall(json.dumps([program, dict(os.environ), os.getcwd()]).encode())
            server.shutdown(socket.SHUT_WR)
            server.recv(1)  # until it has forked
    except OSError:
        os.execv(sys.executable, [sys.executable, *program])


if __name__ == "__main__":
    main(*sys.argv[1:])
