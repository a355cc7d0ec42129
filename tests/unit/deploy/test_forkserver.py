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

from deploy.cluster import worker_setup
from deploy.cluster.forkserver import forkserver
from deploy.cluster.worker_setup import CONTEXT, LANGUAGE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone"),
]

SETUP = str(Path(worker_setup.__file__))
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
        context = json.dumps({"env_vars": {"GIVEN": "1 2"}, "py_executable": offered["py_executable"], "java_jars": []})
        by_ray = [f"{LANGUAGE}=PYTHON", f"{CONTEXT}={context}"]  # as a raylet starts it
        assert {k: v for k, v in told(shlex.join([sys.executable, SETUP, *by_ray])).items() if k != "environment"} == {
            k: v for k, v in forked.items() if k != "environment"
        }
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


AHEAD = """
import json, os, shlex, subprocess, sys, time
from deploy.cluster.forkserver import fork_ahead, forkserver

with fork_ahead(1), forkserver(1) as offered:
    call = [*shlex.split(offered["py_executable"]), sys.argv[1], "a b", "--c"]
    done = [subprocess.run(call, capture_output=True, text=True, timeout=60) for _ in range(2)]
    assert all(os.path.exists(call[3]) and each.stderr == "said\\n" for each in done)
    print(json.dumps([json.loads(each.stdout) for each in done]), flush=True)
    if sys.argv[2] == "stays":
        time.sleep(60)
assert not os.path.exists(os.path.dirname(call[3]))
"""


@pytest.mark.parametrize("end", ["leaves", "stays"])
def test_a_process_without_ray_is_forked_itself_and_takes_the_server_with_it(end: str, tmp_path: Path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with subprocess.Popen([sys.executable, "-c", AHEAD, program, end], stdout=subprocess.PIPE) as owner:
        assert owner.stdout
        found = json.loads(owner.stdout.readline())
        server = psutil.Process(found[0]["parent"]) if end == "stays" else None
        if server:
            owner.kill()
        rest = owner.stdout.read()  # ends with the last process that has it: the server too
    assert rest == b"" and (owner.returncode == 0 or server)
    assert found[0]["parent"] == found[1]["parent"] != owner.pid
    for worker in found:
        assert worker["arguments"] == [str(program), "a b", "--c"] and worker["name"] == "__main__" and worker["chld"]
        assert worker["imported"] == ["rl.rollout", "torch"]


def test_a_worker_that_needs_more_is_left_to_what_ray_starts_it_by(tmp_path: Path):
    (tmp_path / "setup_worker.py").write_text("import json, sys\nprint(json.dumps(sys.argv[1:]))")
    context = json.dumps({"py_executable": sys.executable, "command_prefix": ["nice"]})
    for given in ([f"{CONTEXT}={context}", f"{LANGUAGE}=PYTHON"], [f"{LANGUAGE}=PYTHON"], [f"{CONTEXT}={{}}"]):
        call = [str(tmp_path / "default_worker.py"), "--a=b c", *given]
        done = subprocess.run([sys.executable, SETUP, *call], capture_output=True, text=True, timeout=60, check=True)
        assert json.loads(done.stdout) == call


def test_it_ends_with_the_process_it_serves():
    body = "from deploy.cluster.forkserver import forkserver\nimport time\nwith forkserver(1):\n    time.sleep(60)"
    owner = subprocess.Popen([sys.executable, "-c", body])
    try:
        while not (servers := psutil.Process(owner.pid).children()):
            assert owner.poll() is None
    finally:
        owner.kill()
        owner.wait()
    assert psutil.wait_procs(servers, timeout=60)[1] == []
