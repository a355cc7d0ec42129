"""Ticks between nodes whose links carry 16 Mbit/s, over the same ticks on fast links, for each codec. `make bench-links`.

Three network namespaces on a bridge, each with a raylet of its own: one stage of the pipeline on each of the first two,
engine and anchor on the third. What leaves and what reaches a node is shaped by a token bucket. Linux, as root; nothing
of it is left afterwards.

    swarm 0 (head, driver) ──16 Mbit/s── bridge ──16 Mbit/s── swarm 1
                                           └────16 Mbit/s──── engine, anchor
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deploy.config import load
from deploy.launch import cluster, drive

RATE, BRIDGE, NET, PORT = "16mbit", "nsbr", "10.77.0", 6479
NODES = {"nsa": "swarm", "nsb": "swarm", "nsc": "far"}  # namespace: custom resource of its node
STEPS = 4
START_S = 10  # the others look for the head; two that start at once take each other's socket names
COMMON = [
    f"run.steps={STEPS}",
    "val.size=8",
    "val.every=1000",
    "swarm.pp=2",
    "rollout.replicas=1",
    "rollout.resource=far",
]
COMMON += ["swarm.resource=swarm", "anchor.resource=far", "swarm.placement=pack"]
CODECS = {
    "none": ["codec.kind=none"],
    "powersgd r=4": ["codec.kind=powersgd", "codec.rank=4"],
    "transform 5 %": ["codec.kind=transform", "codec.total_rate=0.05"],
}


def sh(command: str) -> None:
    subprocess.run(shlex.split(command), check=True, capture_output=True, text=True)


def shape(rate: str | None) -> None:
    """Both directions of every node's link; None: as fast as the machine is."""
    for name in NODES:
        for where, device in ((f"ip netns exec {name} ", "eth0"), ("", f"{name}-br")):
            with suppress(subprocess.CalledProcessError):  # there was none
                sh(f"{where}tc qdisc del dev {device} root")
            if rate:
                sh(f"{where}tc qdisc add dev {device} root tbf rate {rate} burst 32kb latency 500ms")


@contextmanager
def network() -> Iterator[None]:
    """Namespaces with one interface each, eth0, joined by a bridge."""
    try:
        sh(f"ip link add {BRIDGE} type bridge")
        sh(f"ip link set {BRIDGE} up")
        for i, name in enumerate(NODES, 1):
            sh(f"ip netns add {name}")
            sh(f"ip link add {name}-br type veth peer name eth0 netns {name}")
            sh(f"ip link set {name}-br master {BRIDGE} up")
            sh(f"ip -n {name} addr add {NET}.{i}/24 dev eth0")
            sh(f"ip -n {name} link set eth0 up")
            sh(f"ip -n {name} link set lo up")
        yield
    finally:
        for name in NODES:
            with suppress(subprocess.CalledProcessError):
                sh(f"ip netns del {name}")
        with suppress(subprocess.CalledProcessError):
            sh(f"ip link del {BRIDGE}")


@contextmanager
def raylets() -> Iterator[None]:
    """One in each namespace, the first with the head."""
    ray = Path(sys.executable).parent / "ray"
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "GLOO_SOCKET_IFNAME": "eth0"}
    started = []
    try:
        for i, (name, tag) in enumerate(NODES.items(), 1):
            role = f"--head --port {PORT} --include-dashboard=false" if i == 1 else f"--address {NET}.1:{PORT}"
            resources = json.dumps({tag: 1})
            command = f"ip netns exec {name} {ray} start {role} --block --node-ip-address {NET}.{i} --num-cpus "
            command += f"{1 if tag == 'swarm' else 3} --object-store-memory 200000000 --resources '{resources}'"
            started.append(
                subprocess.Popen(
                    shlex.split(command), env=environment, stdout=subprocess.DEVNULL, start_new_session=True
                )
            )
            time.sleep(START_S)
        yield
    finally:
        for process in reversed(started):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 15)
            process.wait(30)


def ticks(folder: Path) -> tuple[float, float]:
    """Median seconds of a tick, the first step left out as warm-up, and kB that crossed the boundary in one."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    after = [r for r in records if r["kind"] == "tick" and r["step"] > 1]
    crossed = statistics.mean(r["comm/boundary_fwd_bytes"] + r["comm/boundary_bwd_bytes"] for r in after)
    return statistics.median(r["timing_s/tick"] for r in after), crossed / 1e3


def drive_one(name: str, folder: str) -> None:
    """In the head's namespace, a program of its own."""
    config = load("k5", COMMON + CODECS[name])
    with cluster(config, f"{NET}.1:{PORT}"):
        drive(config, Path(folder), lambda record: None)


def main() -> None:
    if sys.platform != "linux" or os.geteuid():
        sys.exit("network namespaces need Linux and root: run it as root, on a machine that nobody else uses")
    with tempfile.TemporaryDirectory() as temporary, network(), raylets():
        print(f"{'codec':15} {'kB a tick':>10} {'s, fast':>8} {'s, ' + RATE:>10} {'slower':>7}", flush=True)
        for name in CODECS:
            seconds = []
            for rate in (None, RATE):
                shape(rate)
                folder = Path(temporary) / f"{name}-{rate}".replace(" ", "-")
                inside = [
                    "ip",
                    "netns",
                    "exec",
                    "nsa",
                    sys.executable,
                    "-m",
                    "benchmarks.slow_links",
                    name,
                    str(folder),
                ]
                subprocess.run(inside, check=True, timeout=900)
                median, crossed = ticks(folder)
                seconds.append(median)
            fast, slow = seconds
            print(f"{name:15} {crossed:10.0f} {fast:8.2f} {slow:10.2f} {slow / fast:6.2f} x", flush=True)


if __name__ == "__main__":
    drive_one(*sys.argv[1:]) if len(sys.argv) > 1 else main()
