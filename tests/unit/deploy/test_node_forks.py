"""Forks on a cluster that one has joined: who starts their server, whom it serves, when it ends; in doubt there is none."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from deploy.cluster import fork_request, forkserver, node_forks
from deploy.config import load

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")

PROGRAM = """
import json, os, sys
told = dict(arguments=sys.argv[1:], environment=dict(os.environ), folder=os.getcwd(), parent=os.getppid(), me=os.getpid())
print(json.dumps(told), flush=True)
os.environ.get("STAYS") and sys.stdin.read()
"""
QUICK = {"IMPORTED = ": "IMPORTED = ()  # ", "LOOK_S, IDLE_S = 1.0, 10.0": "LOOK_S, IDLE_S = 0.05, 0.3"}
RUN = f"test-{os.getpid()}"


@pytest.fixture
def request_file(tmp_path: Path) -> Path:
    """The programs as they are, but that the server imports nothing, and is quick to end."""
    room = tmp_path / "root" / "deploy" / "cluster"
    room.mkdir(parents=True)
    server = Path(forkserver.__file__).read_text()
    for was, now in QUICK.items():
        assert was in server
        server = server.replace(was, now)
    for package in (room, room.parent):
        (package / "__init__.py").touch()
    (room / "forkserver.py").write_text(server)
    (room / "fork_request.py").write_text(Path(fork_request.__file__).read_text())
    (tmp_path / "program.py").write_text(PROGRAM)
    return room / "fork_request.py"


def _asked(request_file: Path, run: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    program = request_file.parents[3] / "program.py"
    call = [sys.executable, "-IS", request_file, f"@{run}", program, *arguments]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(call, env=os.environ | environment, cwd=program.parent, text=True, **streams)


def _told(asked: subprocess.Popen[str]) -> dict:
    assert asked.stdout
    return json.loads(asked.stdout.readline())


def test_the_first_that_asks_starts_the_server_which_outlives_it_and_ends_after_the_last_fork(request_file: Path):
    run = f"{RUN}-ends"
    with _asked(request_file, run, "a b", STAYS="1") as first:
        one = _told(first)
        assert first.wait(20) == 0 and one["me"] != first.pid  # who asked is gone, and was not needed
        with _asked(request_file, run, GIVEN="1 2") as second:
            two = _told(second)
        assert one["parent"] == two["parent"] and psutil.Process(one["parent"]).ppid() != os.getpid()
        assert one["arguments"] == ["a b"] and two["arguments"] == [] and two["environment"]["GIVEN"] == "1 2"
        assert "GIVEN" not in one["environment"] and "STAYS" not in two["environment"]
        assert one["folder"] == two["folder"] == str(request_file.parents[3])
        server = psutil.Process(one["parent"])
        time.sleep(0.6)  # twice what it waits for when the last one has ended
        assert server.is_running() and psutil.Process(one["me"]).ppid() == server.pid
    assert psutil.wait_procs([server], timeout=20)[1] == []
    with socket.socket(socket.AF_UNIX) as late, pytest.raises(ConnectionRefusedError):
        late.connect(fork_request.name_here(run))


def test_without_a_server_it_is_started_plainly(request_file: Path):
    (request_file.parent / "forkserver.py").write_text("raise SystemExit('broken')")
    with _asked(request_file, f"{RUN}-broken", "a") as asked:
        told = _told(asked)
    assert told["me"] == asked.pid and told["arguments"] == ["a"]
    adopted = [sys.executable, "-P", "-m", "deploy.cluster.forkserver", "0"]  # a raylet that takes in orphans ends them
    root = {"PYTHONPATH": str(Path(forkserver.__file__).parents[2]), "RAY_RAYLET_PID": str(os.getpid())}
    assert subprocess.run(adopted, env=os.environ | root, timeout=20).returncode == 0


def test_nobody_is_served_but_ones_own_user(monkeypatch: pytest.MonkeyPatch):
    name, mine = fork_request.name_here(f"{RUN}-user"), os.geteuid()
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as asks:
        listener.bind(name)
        listener.listen()
        asks.connect(name)
        asks.sendall(b".")
        assert fork_request.peer_user(asks) == mine
        monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
        assert forkserver._worker(listener) is False
        with pytest.raises(ConnectionResetError):  # what was said is not read
            asks.recv(1)
        assert not fork_request._forked(f"@{RUN}-user", ("program.py",))
        with listener.accept()[0] as asked:
            assert asked.recv(1) == b""  # nor is anything said to another's server


def test_one_that_waits_no_longer_is_not_forked_for_as_well(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fork_request, "WAIT_S", 0.05)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(fork_request.name_here(f"{RUN}-late"))
        listener.listen()
        assert not fork_request._forked(f"@{RUN}-late", ("program.py",))
        with listener.accept()[0] as asked, pytest.raises(BrokenPipeError):
            asked.sendall(b".")  # as a fork does before it goes on


def test_a_server_is_for_those_that_were_started_alike(monkeypatch: pytest.MonkeyPatch):
    names = [fork_request.name_here("run")]
    monkeypatch.setenv("NOT_HEEDED", "1")
    assert fork_request.name_here("run") == names[0]
    for name, value in (
        ("OMP_NUM_THREADS", "7"),
        ("HF_HOME", "/elsewhere"),
        ("PYTHONPATH", "/elsewhere"),
        ("LD_PRELOAD", "libelsewhere.so"),
    ):
        monkeypatch.setenv(name, value)
        names.append(fork_request.name_here("run"))
    assert len({*names, fork_request.name_here("another")}) == 6 and max(map(len, names)) < 100


def test_what_ray_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    job: dict[str, object] = {"env_vars": {"A": "1"}, "working_dir": "gcs://_ray_pkg.zip"}
    monkeypatch.setattr(node_forks.ray, "get_runtime_context", lambda: SimpleNamespace(runtime_env=job))
    config = load("demo", [])
    call = shlex.split(node_forks.node_forks(config)["py_executable"])
    assert call == shlex.split(node_forks.node_forks(config)["py_executable"])  # one server for a run
    assert node_forks.node_forks(load("demo", ["swarm.device=cuda"])) == {}
    for chosen in ("py_executable", "pip", "image_uri"):  # what starts workers is the job's own
        job[chosen] = "its own"
        assert node_forks.node_forks(config) == {}
        del job[chosen]

    there = tmp_path / "python"
    there.write_text(f"#!{sys.executable}\nimport sys\nprint(sys.argv)")
    there.chmod(0o700)
    raylet = [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[2:])"]
    told = [f"--python_worker_command={there} setup_worker.py"]
    for request, added in ((call[4], ["-IS", *call[4:]]), ("/no/file.py", [])):
        words = [*raylet, *told, *call[:4], request, *call[5:], "default_worker.py", "--a=b c"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
        assert done.stdout.strip() == str([str(there), *added, "default_worker.py", "--a=b c"])
