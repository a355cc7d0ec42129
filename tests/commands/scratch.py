"""A folder as a user has it after `make setup`, whose `northstar` does what is printed on a smaller scale."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.commands.documents import ROOT

NORTHSTAR = Path(sys.executable).parent / "northstar"
SMALLER = "NORTHSTAR_SMALLER"  # {subcommand: arguments that are put behind the printed ones}, as JSON
FORKS = "NORTHSTAR_FORKS"  # where forks.py is asked for a command; unset: the command is a program of its own
SHIM = """#!{python} -IS
import json, os, socket, sys
more = json.loads(os.environ[{smaller!r}])
call = [{real!r}, *sys.argv[1:], *more.get("".join(sys.argv[1:2]), [])]
if {forks!r} not in os.environ:
    os.execv({real!r}, call)
with socket.socket(socket.AF_UNIX) as server:
    server.connect(os.environ[{forks!r}])
    socket.send_fds(server, [b"."], [0, 1, 2])
    server.sendall(json.dumps([call, dict(os.environ), os.getcwd()]).encode())
    server.shutdown(socket.SHUT_WR)
    code = int(server.recv(8))
sys.exit(code if code >= 0 else 128 - code)
"""


class Scratch:
    """Where the documents' commands run, one after the other."""

    def __init__(self, folder: Path):
        self.folder, self.bin = folder, folder / ".venv" / "bin"
        self.bin.mkdir(parents=True)
        shim = self.bin / "northstar"
        shim.write_text(SHIM.format(python=sys.executable, real=str(NORTHSTAR), smaller=SMALLER, forks=FORKS))
        python = self.bin / "python"  # for make; a link would not find the packages
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        for made in (shim, python):
            made.chmod(0o755)
        for name in ("Makefile", "pyproject.toml", "constraints.txt", "examples"):
            (folder / name).symlink_to(ROOT / name)
        (folder / ".venv" / ".installed").touch()  # newer than pyproject.toml: make has nothing to install
        self.forks: subprocess.Popen[bytes] | None = None

    def close(self) -> None:
        if self.forks:
            self.forks.communicate()

    def _forks(self) -> str:
        """Where a server forks commands (forks.py)."""
        address = self.bin / "forks"
        if not self.forks:
            self.forks = subprocess.Popen(
                [sys.executable, "-P", "-m", "tests.commands.forks", address],
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,  # ends when this process does
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
            while not address.exists():
                assert self.forks.poll() is None, "tests.commands.forks ended"
                time.sleep(0.05)
        return str(address)

    def run(self, text: str, smaller: dict[str, list[str]], until: Callable[[], bool] | None = None) -> tuple[int, str]:
        """Exit code and output of a command in bash, its whole process group sent Ctrl-C as soon as `until` holds."""
        environment = dict(os.environ) | {SMALLER: json.dumps(smaller), "COLUMNS": "160"}
        environment["PATH"] = f"{self.bin}:{environment['PATH']}"
        environment["PYTHONPATH"] = f"{ROOT}:{environment.get('PYTHONPATH', '')}".rstrip(":")
        if sys.platform == "linux" and not until:
            environment[FORKS] = self._forks()
        log = self.folder / "output.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", text],
                cwd=self.folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # also in the background of a shell
            )
            try:
                while until and process.poll() is None and not until():
                    time.sleep(0.1)
                if until and process.poll() is None:
                    os.killpg(process.pid, signal.SIGINT)
                code = process.wait(560)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        return code, log.read_text()
