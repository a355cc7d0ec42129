"""What links of 16 Mbit/s between nodes cost, over the same work on fast links. `make bench-links`.

First the ticks of k5 in two stages, a node each, for each codec; then the demo as it is, a replica on each of two nodes,
and with gradients summed dense.

Three network namespaces on a bridge, each with a raylet of its own: the swarm on the first two, engines and anchor on
the third. What leaves and what reaches a node is shaped by a token bucket. Linux, as root. Nothing of it is left when it
ends, Ctrl-C and SIGTERM included; what a run left that was killed goes when the next one starts.

    swarm 0 (head, driver) ──16 Mbit/s── bridge ──16 Mbit/s── swarm 1
                                           └────16 Mbit/s──── engines, anchor
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from benchmarks.records import kept_records
from deploy.cluster.launch import cluster, drive
from deploy.config import load

RATE, BRIDGE, NET, PORT = "16mbit", "nslink-br", "10.77.0", 6479
NODES = {"nslink-a": "swarm", "nslink-b": "swarm", "nslink-c": "far"}  # namespace: custom resource of its node
HEAD_NODE = next(iter(NODES))
LOCK = Path(tempfile.gettempdir()) / "northstar-bench-links.lock"
START_S = 60.0
PLACES = ["swarm.resource=swarm", "rollout.resource=far", "anchor.resource=far"]
TICKS = ["run.steps=4", "val.size=8", "val.every=1000", "swarm.pp=2", "rollout.replicas=1", "swarm.placement=pack"]
COMPARED = {
    "none": ["codec.kind=none"],
    "powersgd r=4": ["codec.kind=powersgd", "codec.rank=4"],
    "transform 5 %": ["codec.kind=transform", "codec.total_rate=0.05"],
}
DEMOS = {"demo": [], "demo, gradients dense": ["codec.gradient.kind=none"]}


def sh(command: str) -> None:
    subprocess.run(shlex.split(command), check=True, capture_output=True, text=True)


@contextmanager
def alone() -> Generator[None]:
    """The only benchmark of links on this machine, as root, and ended in order by SIGTERM. Else it exits."""
    if sys.platform != "linux" or os.geteuid():
        sys.exit("network namespaces need Linux and root: run it as root, on a machine that nobody else uses")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    try:
        lock = FileLock(LOCK).acquire(timeout=0)
    except Timeout:
        sys.exit("another benchmark of links runs on this machine")
    with lock:
        yield


def ends() -> list[tuple[str, str]]:
    """Of every node's link, the node's and the bridge's: what stands before a command there, and the device."""
    return [end for name in NODES for end in ((f"ip netns exec {name} ", "eth0"), ("", f"{name}-br"))]


def shape(rate: str | None, queue_ms: int = 500) -> None:
    """Both directions of every node's link; None: as fast as the machine is. What waits longer than `queue_ms` is dropped."""
    for where, device in ends():
        with suppress(subprocess.CalledProcessError):  # there was none
            sh(f"{where}tc qdisc del dev {device} root")
        if rate:
            sh(f"{where}tc qdisc add dev {device} root tbf rate {rate} burst 32kb latency {queue_ms}ms")


@contextmanager
def network() -> Generator[None]:
    """Namespaces with one interface each, eth0, joined by a bridge."""
    clear()
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
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not end the cleaning
        clear()


def clear() -> None:
    """Remove the namespaces with all that runs in them, whoever started it, and the bridge."""
    for name in NODES:
        for number in inside(name):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        with suppress(subprocess.CalledProcessError):  # there was none
            sh(f"ip netns del {name}")
    with suppress(subprocess.CalledProcessError):
        sh(f"ip link del {BRIDGE}")


def inside(name: str) -> list[int]:
    """Processes in a namespace; none if it is not there."""
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
    return [int(number) for number in found.stdout.split()]


@contextmanager
def raylets(folder: Path, cpus: int) -> Generator[None]:
    """One in each namespace, the first with the head; those of the swarm with so many CPUs."""
    ray = Path(sys.executable).parent / "ray"
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "GLOO_SOCKET_IFNAME": "eth0"}
    started = []
    try:
        for i, (name, tag) in enumerate(NODES.items(), 1):
            role = f"--head --port {PORT} --include-dashboard=false" if i == 1 else f"--address {NET}.1:{PORT}"
            resources = json.dumps({tag: 1})
            command = f"ip netns exec {name} {ray} start {role} --block --node-ip-address {NET}.{i} --num-cpus "
            command += f"{cpus if tag == 'swarm' else 3} --object-store-memory 200000000 --resources '{resources}'"
            said = folder / f"{name}-{cpus}.log"
            with said.open("w") as out:
                process = subprocess.Popen(
                    shlex.split(command), env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
                )
                started.append(process)
            _await_start(name, said)  # two that start at once take each other's socket names
        yield
    finally:
        for process in reversed(started):
            for number in (signal.SIGTERM, signal.SIGKILL):  # a head with its raylets gone may not heed the first
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(5)
                    break


def _await_start(name: str, said: Path) -> None:
    deadline = time.monotonic() + START_S
    while "Ray runtime started" not in said.read_text():
        if time.monotonic() > deadline:
            sys.exit(f"the raylet of {name} did not start in {START_S:.0f} s (START_S):\n{said.read_text()}")
        time.sleep(0.2)


def drive_one(folder: str, preset: str, *overrides: str) -> None:
    """In the head's namespace, a program of its own."""
    config = load(preset, [*PLACES, *overrides])
    with cluster(config, f"{NET}.1:{PORT}"):
        drive(config, Path(folder), lambda record: None)


def run_over(folder: Path, preset: str, overrides: list[str], rate: str | None, queue_ms: int = 500) -> Path:
    """The folder of a finished run, over links of this rate, with such queues."""
    shape(rate, queue_ms)
    folder = folder / f"{time.time_ns()}"
    command = f"ip netns exec {HEAD_NODE} {sys.executable} -m benchmarks.slow_links {folder} {preset}"
    subprocess.run([*shlex.split(command), *overrides], check=True, timeout=1800)
    return folder


def ticks(folder: Path) -> tuple[float, float]:
    """Median seconds of a tick, the first step left out as warm-up, and kB that crossed the boundary in one."""
    records = kept_records(folder)
    after = [r for r in records if r["kind"] == "tick" and r["step"] > 1]
    crossed = statistics.mean(r["comm/boundary_fwd_bytes"] + r["comm/boundary_bwd_bytes"] for r in after)
    return statistics.median(r["timing_s/tick"] for r in after), crossed / 1e3


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def main() -> None:
    with alone(), tempfile.TemporaryDirectory() as temporary, network():
        folder = Path(temporary)
        with raylets(folder, cpus=1):
            print(f"{'codec':20} {'kB a tick':>10} {'s, fast':>8} {'s, ' + RATE:>10} {'slower':>7}", flush=True)
            for name, overrides in COMPARED.items():
                (fast, _), (slow, crossed) = [ticks(run_over(folder, "k5", TICKS + overrides, r)) for r in (None, RATE)]
                print(f"{name:20} {crossed:10.0f} {fast:8.2f} {slow:10.2f} {slow / fast:6.2f} x", flush=True)
        with raylets(folder, cpus=2):
            print(f"{'30 steps':20} {'MB':>10} {'s, fast':>8} {'s, ' + RATE:>10} {'slower':>7}", flush=True)
            for name, overrides in DEMOS.items():
                fast, slow = [summary(run_over(folder, "demo", overrides, rate)) for rate in (None, RATE)]
                seconds = [each["seconds"]["timing_s/step"] for each in (fast, slow)]
                same = "the same weights" if fast["weights_digests"] == slow["weights_digests"] else "OTHER WEIGHTS"
                line = f"{name:20} {slow['bytes_total'] / 1e6:10.0f} {seconds[0]:8.0f} {seconds[1]:10.0f}"
                line += f" {seconds[1] / seconds[0]:6.2f} x   accuracy {slow['val_start']:.3f} to {slow['val_end']:.3f}"
                print(f"{line}, {same}", flush=True)


if __name__ == "__main__":
    drive_one(*sys.argv[1:]) if len(sys.argv) > 1 else main()
