"""A run that is started again until it is completed, and raylets of one machine that come back when they are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos import Injector
from deploy.cluster.loopback import ADDRESS, loopback

MARK = "NORTHSTAR_CHAOS"
POLL_S = 0.2
FRUITLESS = 3  # starts in a row that complete no tick, and then it is given up
ENDED_S = 60.0  # a driver that was killed is gone within this


@dataclass(frozen=True)
class Start:
    """One start of the command, and how it ended: seconds since the epoch, exit code, last tick completed by then."""

    at: float
    code: int
    tick: int


def marked(marker: str) -> dict[str, str]:
    """The environment of all that is to be found again."""
    return os.environ | {MARK: marker, "COLUMNS": "160"}


def command(preset: str, overrides: Sequence[str], run: Path, address: str | None) -> list[str]:
    sets = [word for override in overrides for word in ("--set", override)]
    where = ["--address", address] if address else []
    return [sys.executable, "-m", "northstar", "run", preset, *sets, "--out", str(run), *where]


def completed(
    words: list[str], injector: Injector, marker: str, limit_s: float, beside: Callable[[], None] = lambda: None
) -> list[Start]:
    """Runs it, with --resume each time it ended before it was completed. `beside` is called while it runs.

    Gives up after FRUITLESS starts without a new tick, or `limit_s`: the last code says so.
    """
    starts, deadline = list[Start](), time.monotonic() + limit_s
    while not starts or (starts[-1].code != 0 and not _in_vain(starts) and time.monotonic() < deadline):
        at, resume = time.time(), ["--resume"] * bool(starts)
        run = injector.records.run
        run.mkdir(parents=True, exist_ok=True)
        with (run / f"driver-{len(starts)}.log").open("w") as out:
            process = subprocess.Popen(
                [*words, *resume], env=marked(marker), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                while process.poll() is None and time.monotonic() < deadline:
                    beside()
                    time.sleep(POLL_S)
            finally:
                _end(process)
        starts.append(Start(at, process.returncode, injector.records.tick))
    return starts


def _in_vain(starts: Sequence[Start]) -> bool:
    last = starts[-FRUITLESS - 1 :]
    return len(last) > FRUITLESS and last[0].tick == last[-1].tick


def _end(process: subprocess.Popen[bytes]) -> None:
    """Nothing, if it has ended."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(ENDED_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Raylets:
    """A head that runs nothing, and raylets with these arguments, each replaced when it was killed."""

    def __init__(self, nodes: Sequence[dict[str, Any]], back_s: float):
        from ray.cluster_utils import Cluster

        self.arguments, self.back_s = [each | {"node_ip_address": ADDRESS} for each in nodes], back_s
        head = {"num_cpus": 0, "include_dashboard": False, "node_ip_address": ADDRESS}
        self.cluster: Any = Cluster(initialize_head=True, head_node_args=head)
        self.held: list[Any] = [self.cluster.add_node(**each) for each in self.arguments]
        self.cluster._shutdown_at_exit = False  # or Ray sets a signal's handler, which it cannot in a thread
        self._changes: list[threading.Thread] = []

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def kill(self, index: int) -> int | None:
        """Its process; None if it is not back yet from the last time."""
        node, self.held[index] = self.held[index], None
        if node is None:
            return None
        pid = int(node.all_processes["raylet"][0].process.pid)
        os.kill(pid, signal.SIGKILL)  # at once: what else it had goes beside
        change = threading.Thread(target=self._replace, args=(index, node), daemon=True)
        self._changes.append(change)
        change.start()
        return pid

    def _replace(self, index: int, node: Any) -> None:
        self.cluster.remove_node(node, allow_graceful=False)
        time.sleep(self.back_s)
        self.held[index] = self.cluster.add_node(**self.arguments[index])

    def close(self) -> None:
        for change in self._changes:
            change.join()
        self.cluster.shutdown()


@contextmanager
def raylets_of(nodes: Sequence[dict[str, Any]], back_s: float) -> Generator[Raylets]:
    """A killed one is back after `back_s`. Nobody else reaches them."""
    with loopback():
        raylets = Raylets(nodes, back_s)
        try:
            yield raylets
        finally:
            raylets.close()
