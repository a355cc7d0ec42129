"""A program that is forked is what it would be if it had been started, but for what is imported already."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from deploy.cluster.forkserver import forkserver

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone"),
]

PROGRAM = """
import json, os, signal, sys
told = dict(arguments=sys.argv, environment=dict(os.environ), folder=os.getcwd(), path=sys.path[0], parent=os.getppid())
told |= dict(imported=sorted({"torch", "ray", "rl.rollout"} & set(sys.modules)), name=__name__)
told |= dict(chld=signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL)
print(json.dumps(told))
print("said", file=sys.stderr)
"""


def test_a_worker_is_forked_with_all_imported_but_ray_and_started_where_the_server_is_gone(tmp_path: Path):
    program, folder, environment = (
        tmp_path / "its own" / "program.py",
        tmp_path / "there",
        os.environ | {"GIVEN": "1 2"},
    )
    for made in (program.parent, folder):
        made.mkdir()
    program.write_text(PROGRAM)

    def told(executable: str) -> dict:
        call = [*shlex.split(executable), str(program), "a b", "--c"]
        done = subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stderr == "said\n", done.stderr
        return json.loads(done.stdout)

    others = _servers()  # of a cluster that other tests of this process hold
    with forkserver(threads=1) as offered:
        while not (servers := [server for server in _servers() if server not in others]):
            pass  # for an instant it has no name
        (server,) = servers
        assert server.environ()["OMP_NUM_THREADS"] == "1"
        forked = told(offered["py_executable"])
        assert forked["parent"] == server.pid
        assert forked["imported"] == ["rl.rollout", "torch"]  # Ray reads the environment when it is imported
        server.kill()
        server.wait()
        alone = told(offered["py_executable"])
    assert alone["imported"] == []
    for found in (forked, alone):
        assert found["arguments"] == [str(program), "a b", "--c"] and found["name"] == "__main__" and found["chld"]
        assert found["folder"] == str(folder) and found["path"] == str(program.parent)
        assert {k: found["environment"].get(k) for k in environment} == environment


def _servers() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.ZombieProcess, psutil.NoSuchProcess):  # of other tests
            found += [child] if "deploy.cluster.forkserver" in child.cmdline() else []
    return found


def test_it_ends_with_the_process_it_serves(tmp_path: Path):
    body = "from deploy.cluster.forkserver import forkserver\nimport time\nwith forkserver(1):\n    time.sleep(60)"
    owner = subprocess.Popen([sys.executable, "-c", body])
    try:
        while not (servers := psutil.Process(owner.pid).children()):
            assert owner.poll() is None
    finally:
        owner.kill()
        owner.wait()
    assert psutil.wait_procs(servers, timeout=60)[1] == []
