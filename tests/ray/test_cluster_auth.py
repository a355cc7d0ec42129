"""What docs/deploy.md promises of a cluster that is started with a token, on one started here as the manifests do it."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import psutil
import pytest

from tests.ray.conftest import SIZES
from tests.ray.test_loopback import members

pytestmark = pytest.mark.slow

RAY = Path(sys.executable).parent / "ray"


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int, str]]:
    """GCS address, dashboard port and token of `ray start --head` with the options of the manifests."""
    token, log = secrets.token_hex(32), tmp_path_factory.mktemp("head") / "log"
    environment = _with(token)
    call = [
        RAY,
        "start",
        "--head",
        "--port=0",
        "--num-cpus=4",
        "--dashboard-host=127.0.0.1",
        "--dashboard-port=0",
        "--block",
    ]
    with log.open("w") as out:
        process = subprocess.Popen(call, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        port = int(_found(log, r"dashboard at.*?127\.0\.0\.1:(\d+)"))
        (store,) = (process for process in members(token) if process.name() == "gcs_server")
        (listens,) = {c.laddr.port for c in store.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        yield f"127.0.0.1:{listens}", port, token
    finally:
        for member in [psutil.Process(process.pid), *members(token)[1:]]:
            with suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGKILL)
        process.wait(10)


def _with(token: str) -> dict[str, str]:
    """An environment for processes of the cluster, which stays on the loopback interface."""
    return os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def _found(log: Path, pattern: str) -> str:
    """In what `ray start` printed, once it has; colours left out."""
    deadline = time.monotonic() + 120
    while not (found := re.search(pattern, re.sub(r"\x1b\[\d+m", "", log.read_text()), re.S)):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    return found.group(1)


def _status(port: int, token: str | None) -> int:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/api/jobs/", headers=headers)
    try:
        return urllib.request.urlopen(request, timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code


def test_its_control_store_answers_nobody_without_the_token(head: tuple[str, int, str]):
    address, _, token = head
    for bearer, answered in ((None, False), ("0" * 64, False), (token, True)):
        metadata = [] if bearer is None else [("authorization", f"Bearer {bearer}")]
        with grpc.insecure_channel(address) as channel:
            ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
            if answered:
                assert ask(b"", metadata=metadata, timeout=30)
                continue
            with pytest.raises(grpc.RpcError) as refused:
                ask(b"", metadata=metadata, timeout=30)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_its_jobs_want_the_token_and_the_dashboard_is_not_on_the_network(head: tuple[str, int, str]):
    _, port, token = head
    assert _status(port, token) == 200
    assert _status(port, None) in (401, 403) and _status(port, "0" * 64) in (401, 403)
    listening = {
        c.laddr.ip
        for process in members(token)
        for c in process.net_connections("inet")
        if c.status == psutil.CONN_LISTEN and c.laddr.port == port
    }
    assert listening == {"127.0.0.1"}


def test_a_run_on_it_is_the_printed_command(head: tuple[str, int, str], tmp_path: Path):
    """`northstar run k5 --address auto`, where RAY_ADDRESS says which of the clusters on this machine is meant."""
    address, _, token = head
    environment = _with(token) | {"RAY_ADDRESS": address}
    sets = [
        x
        for override in (*SIZES, "run.steps=1", "anchor.enabled=false", "merger.kind=none")
        for x in ("--set", override)
    ]
    call = [RAY.parent / "northstar", "run", "k5", "--address", "auto", "--out", tmp_path / "run", *sets]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "k5: completed" in done.stdout, done.stdout + done.stderr
    assert address in done.stderr  # it did not start a cluster of its own
