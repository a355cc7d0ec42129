"""The anchor's part in a run: what fires are offered, when their corrections are due, and which were merged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from anchor_service.calls import gather
from anchor_service.clock import Clock
from anchor_service.errors import NotFinite
from anchor_service.lag import Due
from anchor_service.line import Fire, FireLine
from anchor_service.messages import NORM, VOID
from anchor_service.norms import NormHistory
from rl.model_files import parameter_count
from rl.snapshot import BaseLost
from swarm import checkpoint
from swarm.diagnosis_sources import Sources
from swarm.fleet import Fleet
from swarm.messages import MergeOutcome
from swarm.progress import Progress
from swarm.replay_choice import FRAME, MiniFrame, make_choice
from swarm.run_config import RunConfig


class Corrections:
    """All fires of one run, by way of the `line` of its anchor workers.

    `store` puts an object where actors can fetch it and returns a reference; `resync` asks for whole weights for the
    engines' stream.
    """

    def __init__(
        self,
        config: RunConfig,
        fleet: Fleet,
        progress: Progress,
        line: FireLine,
        clock: Clock,
        store: Callable[[np.ndarray | dict[str, Any]], object],
        resync: Callable[[], None],
    ):
        self.anchor, self.swarm, grpo = config.anchor, config.swarm, config.grpo
        samples = grpo.ppo_mini_batch_size * grpo.group_size
        self.choice = make_choice(config.anchor, samples, config.run.seed, store)
        self.fleet, self.progress, self.line, self.clock = fleet, progress, line, clock
        self.store, self.resync = store, resync
        self.whole_frames = config.snapshot.encoding == "full"
        self.sources = Sources(config.diagnostics.every, clock)
        self.norms = NormHistory(config.anchor.norm_bound)
        self.fires = self.version = self.merged = 0
        self.merged_m_bar: object = None  # of the correction that is held: older than the last if that was refused
        self._last_m_bar: object = None  # of the last fire that left the line
        self._expired = False
        self._lost: set[str] = set()  # streams whose base is gone
        self._parameters = parameter_count(config.model.path)

    # --- before a tick --------------------------------------------------------------------------

    def begin(self) -> None:
        """Before the first tick the anchor workers' streams begin with what both ends have from the model's files."""
        if self.progress.tick or self.anchor.weights == "shared" or self.whole_frames:
            return
        for worker in range(len(self.line.workers)):
            references, nbytes = self._snapshot(worker)
            self.progress.ledger.add("snapshot", nbytes, 0)
            try:
                self.line.check(worker, references)
            except BaseLost as lost:
                self._lose(worker, lost)

    def offer(self, mini: MiniFrame) -> bool:
        """Hand θ_s and b_{s+1} to the anchor if a fire starts from them; waits for nothing. Whether one does."""
        dues = self.clock.to_start(self.progress.tick)
        ledger = self.progress.ledger
        self.choice.see(self.progress.tick + 1, mini)
        for due in dues:
            worker = self.line.free_worker(due.version)
            references, nbytes = self._snapshot(worker)
            replay = self.choice.take(due.version)
            if self.clock.waits:  # a fire that fails ends the run
                self.choice.release(due.version)
            self.line.start(due, worker, references, replay.reference, self._least_seconds(due))
            ledger.add("snapshot", nbytes, 0)
            ledger.add("replay", replay.size, 0)
            if self.sources.wants(due):
                self.sources.keep(due, self.fleet.records(self.progress.tick), replay.diagnosed)
            if self.anchor.workers > 1:  # M̄ goes from one anchor worker to the next, in fp32
                ledger.add("control", 4 * self._parameters, 0)
        return bool(dues)

    def _snapshot(self, worker: int) -> tuple[list[object], int]:
        """Weights for one fire; each anchor worker has its own stream, or none if it shares the engines'."""
        if self.anchor.weights == "shared":
            return [], 0
        stream = f"anchor {worker}"
        whole = stream in self._lost
        self._lost.discard(stream)
        return self.fleet.weights(self.progress.tick, stream, whole)

    def _least_seconds(self, due: Due) -> float:
        """On the wall clock a lag model slows the real anchor down by that many tick times."""
        return self.clock.least_ticks(due) * self.progress.tick_seconds

    def due(self, tick: int) -> tuple[list[object] | None, int | None]:
        """What `tick` is the first to merge, a reference for each stage; the version it must hold, None on the wall
        clock."""
        due = self.clock.due(tick)
        self.version = due.version if due else self.version
        references = self.line.under_way[due.version].corrections if due else None
        return references, self.version if self.clock.waits else None

    # --- on the wall clock ----------------------------------------------------------------------

    def deliver(self) -> None:
        """Pass corrections that are done on to every rank's inbox. On the wall clock only; waits for nothing."""
        if self.clock.waits:
            return
        for fire in self.line.arrived():
            self.clock.finished(fire.due.version)
            try:
                reason = self._fault(fire.due, self.line.report(fire))  # raises if the fire failed
            except BaseLost as lost:
                self._drop(fire, lost)
                continue
            if reason:
                self._void(fire)
                self.progress.event("correction refused", version=fire.due.version, reason=reason)
                continue
            self.choice.release(fire.due.version)
            self.line.deliver(fire, self.fleet.workers)
        self.line.check_deliveries()

    def _drop(self, fire: Fire, lost: BaseLost) -> None:
        """The anchor worker has lost the base of a delta: this fire is void, its next snapshot is a whole one."""
        self._void(fire)
        if self.anchor.weights == "shared":
            self.resync()
        self._lose(fire.worker, lost)

    def _void(self, fire: Fire) -> None:
        """Nobody gets it, and M̄ goes on without it."""
        self.line.drop(fire, self._last_m_bar)
        self.choice.give_back(fire.due.version)

    def _fault(self, due: Due, report: dict[str, Any]) -> str:
        """Why no rank is to get this correction; "" if all are. By its report: ranks look at the frames themselves.

        Signs have no size: a lie in them shows in the agreements that `calibrated` measures, and not here.
        """
        if VOID in report:
            error = NotFinite(*report[VOID])
            if self.swarm.on_nan == "stop":
                raise error
            return str(error)
        said = report["version"], report["source_tick"]
        if said != (due.version, due.source_tick):
            return f"it says it is version {said[0]} of source tick {said[1]}, not {due.version} of {due.source_tick}"
        return self.norms.judge(report[NORM])

    def _lose(self, worker: int, lost: BaseLost) -> None:
        stream = f"anchor {worker}"
        self._lost.add(stream)
        self.progress.event("snapshot lost", stream=stream, reason=str(lost))

    # --- after a tick ---------------------------------------------------------------------------

    def log(self, outcome: MergeOutcome) -> None:
        """Write down what this tick was the first to merge, what it passed over, and what it dropped."""
        newest = outcome.newest
        for fire in self.line.settled(newest) if newest > self.merged else []:
            self._settle(fire, newest, merged_now=fire.due.version == outcome.version)
        if outcome.refused is not None:
            self.progress.event("correction refused", version=outcome.refused, reason=outcome.reason)
        self.sources.settle(outcome)
        if outcome.expired and not self._expired:
            self.progress.event("correction dropped at max_age", version=outcome.version)
        self._expired = outcome.expired

    def _settle(self, fire: Fire, newest: int, merged_now: bool) -> None:
        progress = self.progress
        report = {name: value for name, value in self.line.report(fire).items() if name not in (NORM, VOID)}
        self.fires += 1
        self.merged, self._last_m_bar = newest, fire.m_bar
        if merged_now:
            self.merged_m_bar = fire.m_bar
        progress.remember("anchor", report["perf/max_memory_gb"])
        copies = [len(self.fleet.nodes(self.fleet.replicas_of(p))) for p in range(self.swarm.pp)]
        progress.ledger.add("correction", sum(n * size for n, size in zip(copies, report["stage_bytes"])), 0)
        first_tick = progress.tick if merged_now else None
        progress.telemetry.fire(progress.step, progress.tick, report | {"first_tick": first_tick})

    # --- checkpoints ----------------------------------------------------------------------------

    def save(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What a checkpoint keeps: plain numbers, and frames. Waits for fires under way, in lockstep."""
        counters = {
            "fires": self.fires,
            "version": self.version,
            "merged": self.merged,
            "norms": list(self.norms.taken),
        }
        calls: dict[str, object] = {}
        fires = self._unmerged()
        for fire in fires:
            calls |= {_report(fire.due): fire.report}
            calls |= {f"fire-{fire.due.version}-{p}": c for p, c in enumerate(fire.corrections)}
        m_bar = fires[-1].m_bar if fires else self.line.m_bar if self.clock.waits else self._last_m_bar
        calls |= {} if m_bar is None else {"m_bar": m_bar}
        found = gather(calls.items(), "what a checkpoint keeps of the anchor", *self.fleet.anchor_limit)
        frames = dict(zip(calls, found, strict=True))
        pending = [{"due": asdict(fire.due), "report": frames.pop(_report(fire.due))} for fire in fires]
        if frames.get("m_bar") is None:  # no M so far was finite
            frames.pop("m_bar", None)
        else:
            frames["m_bar"] = frames["m_bar"].view(np.uint8)
        frames |= self.choice.save(set(self.line.under_way) - {fire.due.version for fire in fires})
        return counters | {"pending": pending}, frames

    def _unmerged(self) -> list[Fire]:
        """Fires not merged yet, oldest first. On the wall clock only those that are done: it waits for none."""
        fires = [self.line.under_way[v] for v in sorted(self.line.under_way)]
        if self.clock.waits:
            return fires
        ready = {fire.due.version for fire in self.line.arrived()}
        return [fire for fire in fires if fire.delivered or (fire.due.version in ready and self.line.good(fire))]

    def restore(self, folder: Path, state: dict[str, Any]) -> None:
        """Go on from a checkpoint. Raises CheckpointError if it lacks a correction that will be due."""
        self.fires, self.version, self.merged = (state[name] for name in ("fires", "version", "merged"))
        self.norms.taken.extend(state.get("norms", ()))
        m_bar = checkpoint.read_frame(folder, "m_bar")
        self.line.m_bar = None if m_bar is None else self.store(m_bar.view(np.float32))
        self.choice.restore(checkpoint.read_frame(folder, FRAME))
        newest = max([self.merged, *(saved["due"]["version"] for saved in state["pending"])])
        wanted = self.clock.resume(self.progress.tick, newest)
        for saved in state["pending"]:
            due = Due(**saved["due"])
            if due.version in wanted or not self.clock.waits or due.first_tick is None:  # else due after the end
                self._take_up(due, saved["report"], folder)
        self._last_m_bar = self.line.m_bar
        missing = wanted - set(self.line.under_way)
        if missing:
            raise checkpoint.CheckpointError(
                f"{folder.name} lacks corrections {sorted(missing)}: the saved run was to end before they are due; "
                f"start a longer run anew"
            )

    def _take_up(self, due: Due, report: dict[str, Any], folder: Path) -> None:
        """A fire that was under way, or done and not merged, when the checkpoint was written."""
        frames = [checkpoint.frame_of(folder, f"fire-{due.version}-{p}") for p in range(self.swarm.pp)]
        references = [self.store(frame) for frame in frames]
        self.line.add(Fire(due, 0, self.store(report), self.line.m_bar, references))


def _report(due: Due) -> str:
    return f"report-{due.version}"
