"""One command writes to a folder at a time, whichever machine it is on."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import typer
from filelock import FileLock

from deploy.commands import alone
from deploy.commands.alone import BEAT, LOCK, alone_in


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alone, "BEAT_S", 0.05)
    monkeypatch.setattr(alone, "STALE_S", 0.5)


def _as(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alone.socket, "gethostname", lambda: host)


def test_who_is_there_is_named_and_gone_without_a_trace_but_the_lock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    _as("node1", monkeypatch)
    with alone_in(tmp_path / "run"):
        with pytest.raises(typer.Exit) as caught, alone_in(tmp_path / "run"):
            pass
        said = json.loads((tmp_path / "run" / BEAT).read_text())
    assert caught.value.exit_code == 2
    assert f"another northstar command (process {said['pid']} on node1) is writing to" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "run").iterdir()] == [LOCK]
    with alone_in(tmp_path / "run"):
        pass


def test_where_the_lock_does_not_reach_the_heartbeat_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """As on a file system whose locks are each machine's own."""
    over = threading.Event()
    _as("node1", monkeypatch)
    alone._write(tmp_path / BEAT, 0)
    _as("node2", monkeypatch)

    def beat() -> None:
        while not over.wait(0.05):
            (tmp_path / "half").write_text(json.dumps({"host": "node1", "pid": 7, "beat": time.time(), "at": 0}))
            (tmp_path / "half").rename(tmp_path / BEAT)

    other = threading.Thread(target=beat)
    other.start()
    with pytest.raises(typer.Exit), alone_in(tmp_path):
        pass
    over.set()
    other.join()
    assert "(process 7 on node1) is writing to" in capsys.readouterr().err


@pytest.mark.parametrize("left", ["node1", "node2", "half"])
def test_a_dead_commands_heartbeat_is_taken_over(left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At once where it was on this machine, where its lock is gone with it; else when it has stood still."""
    _as(left, monkeypatch)
    alone._write(tmp_path / BEAT, 3)
    if left == "half":
        (tmp_path / BEAT).write_text('{"host": "no')
    _as("node2", monkeypatch)
    since = time.monotonic()
    with alone_in(tmp_path):
        assert json.loads((tmp_path / BEAT).read_text())["host"] == "node2"
    assert (time.monotonic() - since > 0.5) == (left == "node1")


def test_a_lock_without_a_name_is_heeded_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with FileLock(tmp_path / LOCK), pytest.raises(typer.Exit), alone_in(tmp_path):
        pass
    assert "another northstar command is writing to" in capsys.readouterr().err
