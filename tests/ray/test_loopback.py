"""A run of one's own listens on the loopback interface alone, and wants a token of whoever knocks there."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

import grpc
import psutil
import pytest
import ray

from tests.ray.conftest import run_kept, small

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

GRID = "swarm.dp=2", "swarm.pp=2"


def members(mark: str) -> list[psutil.Process]:
    """Processes whose environment holds `mark`, and this one."""
    found = [psutil.Process()]
    for process in psutil.process_iter():
        try:
            if mark in process.environ().values():
                found.append(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    return found


def open_to_others(processes: list[psutil.Process]) -> list[str]:
    """Sockets that listen on more than the loopback interface."""
    found = []
    for process in processes:
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                address = ipaddress.ip_address(connection.laddr.ip)
                mapped = getattr(address, "ipv4_mapped", None)
                if not (mapped or address).is_loopback:
                    found.append(f"{process.name()} {' '.join(process.cmdline())[:80]} {connection.laddr}")
    return found


def test_no_process_of_a_run_listens_beyond_loopback(tmp_path: Path):
    """Actors of a 2x2 grid, whose process groups and their store are still there when the run is over."""
    run_kept(small(*GRID, "run.steps=1"), tmp_path / "run")
    processes = members(os.environ["RAY_AUTH_TOKEN"])
    names = {process.name() for process in processes}
    assert {"gcs_server", "raylet", "ray::Worker", "ray::RolloutWorker", "ray::Anchor"} <= {
        n.split(".")[0] for n in names
    }
    assert open_to_others(processes) == []
    helpers = "log_monitor.py", "monitor.py", "dashboard.py"  # nobody asks them for anything
    assert [word for process in processes for word in process.cmdline() if word.endswith(helpers)] == []


@pytest.mark.parametrize("token", [None, "0" * 64, "ours"])
def test_a_stranger_is_refused(token: str | None):
    """The first question of every client: without the token, or with another, it is not answered."""
    metadata = []
    if token is not None:
        metadata = [("authorization", f"Bearer {os.environ['RAY_AUTH_TOKEN'] if token == 'ours' else token}")]
    with grpc.insecure_channel(ray.get_runtime_context().gcs_address) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        if token == "ours":
            assert ask(b"", metadata=metadata, timeout=30)
            return
        with pytest.raises(grpc.RpcError) as refused:
            ask(b"", metadata=metadata, timeout=30)
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
