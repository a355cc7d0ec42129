"""Run a sweep: each run through `drive`, on actors that stay from run to run, in one lane or several.

A failure ends one run, not the sweep. Ctrl-C ends it; the next call redoes the runs that it stopped.
"""

from __future__ import annotations

import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import ray

from anchor_service.errors import described
from deploy.cluster.kept_actors import KeptActors
from deploy.cluster.launch import drive, session
from deploy.cluster.placement import largest, placement, runs_that_fit
from deploy.cluster.sweep_runs import SweepRun
from swarm.run_config import RunConfig


class Watcher(Protocol):
    """A display: told of every change of a run and of every record it writes."""

    def changed(self, run: SweepRun) -> None: ...

    def record(self, run: SweepRun, record: dict[str, Any]) -> None: ...


def execute_sweep(runs: list[SweepRun], watcher: Watcher, address: str | None = None, lanes: int | None = None) -> bool:
    """Run what is not completed, `lanes` runs side by side (default: as many as the cluster has room for).

    Returns whether it came to the end; else it was interrupted, and the same call goes on with the rest.
    """
    todo = [run for run in runs if run.state != "completed"]
    if not todo:
        return True
    most = largest(run.config for run in todo)
    try:
        with session(most, address, lanes or 1):
            return Lanes(todo, watcher).run(min(lanes or _room(most), len(todo)))
    except KeyboardInterrupt:
        return False


def _room(config: RunConfig) -> int:
    """How many runs like `config` the connected cluster can hold at once."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return max(1, runs_that_fit(placement(config).bundles, nodes))


def _clear(folder: Path) -> None:
    """Remove a run of this very config, as `planned_runs` has checked; at once, so that no half of one can be left."""
    aside = folder.with_name(f".{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
        shutil.rmtree(aside)


class Lanes:
    """Lanes take runs from one queue; each has actors of its own."""

    def __init__(self, todo: list[SweepRun], watcher: Watcher):
        self.waiting: Iterator[SweepRun] = iter(todo)
        self.watcher: Watcher | None = watcher
        self.lock, self.stop = threading.Lock(), threading.Event()

    def run(self, lanes: int) -> bool:
        if lanes == 1:
            self._lane()  # in the main thread, where Ctrl-C is raised: a run is stopped between any two lines
        else:
            self._side_by_side(lanes)
        return not self.stop.is_set()

    def _side_by_side(self, lanes: int) -> None:
        with ThreadPoolExecutor(lanes) as pool:
            futures = [pool.submit(self._lane) for _ in range(lanes)]
            try:
                for future in futures:
                    future.result()
            except KeyboardInterrupt:  # the other threads stop at their next record
                self.stop.set()

    def _lane(self) -> None:
        kept = KeptActors()
        try:
            while not self.stop.is_set() and (run := self._next()):
                self._one(run, kept)
        finally:
            kept.close()

    def _next(self) -> SweepRun | None:
        with self.lock:
            return next(self.waiting, None)

    def _one(self, run: SweepRun, kept: KeptActors) -> None:
        _clear(run.folder)
        self._change(run, "starting")

        def listen(record: dict[str, Any]) -> None:
            if self.stop.is_set():
                raise KeyboardInterrupt
            run.state = "running"
            self._show(lambda watcher: watcher.record(run, record))

        try:
            status = drive(run.config, run.folder, listen, actors=kept.lent)["status"]
        except Exception as error:
            run.error = described(error)
            status = "failed"
        if status == "interrupted":
            self.stop.set()
        self._change(run, status)

    def _change(self, run: SweepRun, state: str) -> None:
        run.state = state
        self._show(lambda watcher: watcher.changed(run))

    def _show(self, tell: Callable[[Watcher], None]) -> None:
        """A display that fails ends neither a run nor the sweep, which goes on without it."""
        with self.lock:
            try:
                if self.watcher:
                    tell(self.watcher)
            except (Exception, SystemExit) as error:
                self.watcher = None
                warnings.warn(f"the display failed, the sweep goes on without it: {described(error)}", stacklevel=2)
