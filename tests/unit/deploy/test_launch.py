"""What is checked before Ray is asked for anything."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anchor_service.errors import WaitTimeout
from deploy.cli import app
from deploy.cluster.launch import _knock


def test_an_address_where_nobody_listens_is_named_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens on it, and nobody else can
        port = taken.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            with pytest.raises(WaitTimeout, match=rf"{address} \(.*refused\) did not deliver an answer.*--address"):
                _knock(address)
        taken.listen()
        _knock(f"127.0.0.1:{port}")
    _knock("auto")


def test_a_run_folder_that_cannot_be_made_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    found = CliRunner().invoke(app, ["run", "k5", "--out", str(tmp_path / "file" / "run")])
    assert found.exit_code == 2 and "cannot be written to (Not a directory): choose another --out" in found.output
