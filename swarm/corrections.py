"""The anchor's part in a run: what fires are offered, when their corrections are due, and which were merged."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from anchor_service.calls import salvaged
from anchor_service.clock import Clock, Lockstep, make_clock
from anchor_service.config import correction_payload
from anchor_service.errors import ActorLost, Hung, described
from anchor_service.lag import Due
from anchor_service.line import Fire, FireLine, NoFires
from anchor_service.messages import NORM, VOID
from anchor_service.norms import NormHistory
from merger import merger_class
from rl.model_files import trained_count
from swarm import checkpoint
from swarm.anchor_faults import AnchorFaults
from swarm.diagnosis_sources import Sources
from swarm.engine_line import EngineLine
from swarm.failure_policy import FailurePolicy
from swarm.fleet import Fleet
from swarm.messages import MergeOutcome
from swarm.pace import FIRE
from swarm.progress import Progress
from swarm.refusal import fault_of
from swarm.replay_choice import FRAME, MiniFrame, make_choice
from swarm.run_config import RunConfig
from swarm.snapshots import Snapshots


class Corrections:
    """All fires of one run, by way of the `line` of its anchor workers.

    `store` puts an object where actors can fetch it and returns a reference; `engines`: whose stream of weights the
    anchor may share.
    """

    def __init__(
        self,
        config: RunConfig,
        fleet: Fleet,
        progress: Progress,
        line: FireLine,
        clock: Clock,
        store: Callable[[np.ndarray | dict[str, Any]], object],
        engines: EngineLine,
        policy: FailurePolicy,
    ):
        self.anchor, self.swarm, grpo = config.anchor, config.swarm, config.grpo
        samples = grpo.ppo_mini_batch_size * grpo.group_size
        self.choice = make_choice(config.anchor, samples, config.run.seed, store)
        self.fleet, self.progress, self.line, self.clock = fleet, progress, line, clock
        self.store, self.waited = store, 0.0  # seconds before the last tick, for a correction that was due
        self.faults = AnchorFaults(config, fleet, progress, line, clock, self.choice, engines, policy)
        self.snapshots = Snapshots(config.anchor, fleet, progress, self.faults)
        self.whole_frames = config.snapshot.encoding == "full"
        self.sources = Sources(config.diagnostics.every, clock)
        self.norms = NormHistory(config.anchor.norm_bound)
        self.fires = self.version = self.merged = 0
        self.merged_m_bar: object = None  # of the correction that is held: older than the last if that was refused
        self._expired = False
        self._whole = False  # ranks merge something of what they hold: of the next one they will too
        self._parameters = trained_count(config.model)
        self._measured = not clock.waits and correction_payload(config.anchor, config.merger) == "sign"

    # --- before a tick --------------------------------------------------------------------------

    def begin(self) -> None:
        """Before the first tick the anchor workers' streams begin with what both ends have from the model's files."""
        if self.progress.tick or self.anchor.weights == "shared" or self.whole_frames:
            return
        for worker in range(len(self.line.workers)):
            self.faults.check(worker, partial(self.snapshots.of, worker))

    def offer(self, mini: MiniFrame) -> bool:
        """Hand θ_s and b_{s+1} to the anchor if a fire starts from them; waits for nothing. Whether one does."""
        dues = self.clock.to_start(self.progress.tick)
        ledger = self.progress.ledger
        self.choice.see(self.progress.tick + 1, mini)
        for due in dues:
            worker = self.line.free_worker(due.version)
            references = self.snapshots.of(worker, None if self.clock.waits else due.version)
            replay = self.choice.take(due.version)
            if self.clock.waits:  # a fire that fails ends the run
                self.choice.release(due.version)
            self.line.start(due, worker, references, replay.reference, self._least_seconds(due))
            ledger.add("replay", replay.size, 0)
            if self.sources.wants(due):
                self.sources.keep(due, self.fleet.records(self.progress.tick), replay.diagnosed)
            if self.anchor.workers > 1:  # M̄ goes from one anchor worker to the next, in fp32
                ledger.add("control", 4 * self._parameters, 0)
        return bool(dues)

    def _least_seconds(self, due: Due) -> float:
        """On the wall clock a lag model slows the real anchor down by that many tick times."""
        return self.clock.least_ticks(due) * self.progress.tick_seconds

    def due(self, tick: int) -> tuple[list[list[object]] | None, int | None]:
        """What `tick` is the first to merge, references for each stage; the version it must hold, None on the wall
        clock.

        Waits until it is there: here a worker that fails can be renewed, in the tick that would break it. Only for one
        that started in this very tick the ranks wait, having done their own part.
        """
        due, self.waited = self.clock.due(tick), 0.0
        self.version = due.version if due else self.version
        if due:  # also where a tick is taken again
            self.faults.look()
        if due and due.source_tick < tick - 1:
            start = time.perf_counter()
            self.faults.done(self.line.under_way[due.version])
            self.waited = time.perf_counter() - start
        references = self.line.under_way[due.version].corrections if due else None
        return references, self.version if self.clock.waits else None

    @property
    def may_be_fetched(self) -> bool:
        """Whether a tick may have to fetch what is behind the head of a correction, on the wall clock."""
        return not self.clock.waits and self.line.parts > 1

    def maker(self, tick: int) -> int:
        """The anchor worker that makes what `tick` is the first to merge."""
        due = self.clock.due(tick)
        return self.line.under_way[due.version].worker if due else 0

    # --- on the wall clock ----------------------------------------------------------------------

    def deliver(self) -> None:
        """On the wall clock, pass corrections that are done on to every rank's inbox. Waits for nothing.

        First of all whatever has failed is dealt with.
        """
        self.faults.look()
        if self.clock.waits:
            return
        self._look_after_fires()
        for fire in self.line.arrived():
            if self.faults.failure(fire):  # since a moment ago: the next tick will see to it
                continue
            report = self.line.report(fire)  # raises what else it failed with
            if reason := fault_of(fire.due, report, self.norms, self.swarm.on_nan):
                self.faults.refuse(fire, reason)
                break  # those behind it are published again, after another M̄
            self.clock.finished(fire.due.version)
            self.choice.release(fire.due.version)
            self.line.deliver(fire, self.fleet.workers, self._whole)
        for failure in self.line.check_deliveries():
            self.progress.event("correction lost on its way", reason=described(failure))

    def _look_after_fires(self) -> None:
        """Nobody waits for them, so it is here that one is found to hang: it is void, and its worker renewed."""
        oldest = self.line.oldest()
        if oldest and oldest.job and self.fleet.lookout:
            who, what = f"anchor {oldest.worker}", f"correction {oldest.due.version}"
            since = oldest.since + oldest.job.least_seconds
            try:
                self.fleet.lookout.look_after(FIRE, who, what, self.fleet.anchor_limit, since)
            except Hung as hung:
                self.faults.void(oldest.worker, hung)

    # --- after a tick ---------------------------------------------------------------------------

    def log(self, outcome: MergeOutcome, grad_norm: float) -> None:
        """Write down what this tick was the first to merge, what it passed over, and what it dropped.

        On the wall clock signs are measured by the swarm's own gradient, whose norm they leave as it is.
        """
        if self._measured:
            self.norms.saw(self.progress.tick, grad_norm)
        self.snapshots.settle()
        newest = outcome.newest
        for fire in self.line.settled(newest) if newest > self.merged else []:
            self._settle(fire, outcome)
        if outcome.refused is not None:
            self.progress.event("correction refused", version=outcome.refused, reason=outcome.reason)
        self.sources.settle(outcome)
        if outcome.expired and not self._expired:
            self.progress.event("correction dropped at max_age", version=outcome.version)
        self._expired, self._whole = outcome.expired, outcome.whole

    def _settle(self, fire: Fire, outcome: MergeOutcome) -> None:
        """Of a correction whose head was enough, the head alone was sent."""
        progress = self.progress
        report = {name: value for name, value in self.line.report(fire).items() if name not in (NORM, VOID)}
        merged_now = fire.due.version == outcome.version
        self.fires += 1
        self.merged, self.faults.m_bar = outcome.newest, fire.m_bar
        if merged_now:
            self.merged_m_bar = fire.m_bar
        progress.remember("anchor", report["perf/max_memory_gb"])
        whole = fire.whole or (merged_now and outcome.whole)
        sizes = [sum(parts if whole else parts[:1]) for parts in report["stage_bytes"]]
        seconds = report.pop("seconds", None)  # there is none in checkpoints of before
        if self.fleet.lookout and seconds is not None:
            self.fleet.lookout.pace.observe(FIRE, seconds)
        copies = [len(self.fleet.nodes(self.fleet.replicas_of(p))) for p in range(self.swarm.pp)]
        progress.ledger.add("correction", sum(n * size for n, size in zip(copies, sizes)), 0)
        found = {"first_tick": progress.tick if merged_now else None, "bytes": sum(sizes)}
        progress.telemetry.fire(progress.step, progress.tick, report | found)

    # --- checkpoints ----------------------------------------------------------------------------

    def save(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What a checkpoint keeps: plain numbers, and frames. In lockstep waits for fires under way, else leaves out what is lost."""
        counters: dict[str, Any] = {"fires": self.fires, "version": self.version, "merged": self.merged}
        counters |= {"norms": list(self.norms.taken), "own_norms": list(self.norms.beside)}
        fires = self._unmerged()
        if self.clock.waits and fires:
            self.faults.done(fires[-1])
        m_bar = fires[-1].m_bar if fires else self.line.m_bar if self.clock.waits else self.faults.m_bar
        calls: dict[str, object] = {} if m_bar is None else {"m_bar": m_bar}
        for fire in fires:
            calls |= _calls(fire)
        frames, gone = salvaged(calls, "what a checkpoint keeps of the anchor", self.fleet.anchor_limit)
        if gone:
            reason = next(iter(gone.values()))
            if self.clock.waits:
                raise ActorLost("the anchor", "what a checkpoint keeps of it", described(reason)) from reason
            self.progress.event("checkpoint without", what=[*gone], reason=described(reason))
        fires = [fire for fire in fires if gone.keys().isdisjoint(_calls(fire))]
        names = {"m_bar"}.union(*map(_calls, fires))
        frames = {name: frame for name, frame in frames.items() if name in names}
        pending = [{"due": asdict(fire.due), "report": frames.pop(_report(fire.due))} for fire in fires]
        if frames.get("m_bar") is None:  # no M so far was finite, or M̄ was lost
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
        return [fire for fire in fires if fire.delivered or self.line.good(fire)]

    def restore(self, folder: Path, state: dict[str, Any]) -> None:
        """Go on from a checkpoint. Raises CheckpointError if it lacks a correction that will be due."""
        self.fires, self.version, self.merged = (state[name] for name in ("fires", "version", "merged"))
        self.norms.taken.extend(state.get("norms", ()))
        self.norms.beside.extend(state.get("own_norms", ()))
        m_bar = checkpoint.read_frame(folder, "m_bar")
        self.line.m_bar = None if m_bar is None else self.store(m_bar.view(np.float32))
        self.choice.restore(checkpoint.read_frame(folder, FRAME))
        newest = max([self.merged, *(saved["due"]["version"] for saved in state["pending"])])
        wanted = self.clock.resume(self.progress.tick, newest)
        for saved in state["pending"]:
            due = Due(**saved["due"])
            if due.version in wanted or not self.clock.waits or due.first_tick is None:  # else due after the end
                self._take_up(due, saved["report"], folder)
        self.faults.m_bar = self.line.m_bar
        missing = wanted - set(self.line.under_way)
        if missing:
            raise checkpoint.CheckpointError(
                f"{folder.name} lacks corrections {sorted(missing)}: the saved run was to end before they are due; "
                f"start a longer run anew"
            )

    def _take_up(self, due: Due, report: dict[str, Any], folder: Path) -> None:
        """A fire that was under way, or done and not merged, when the checkpoint was written."""
        stages = [_parts(due, p, self.line.parts) for p in range(self.swarm.pp)]
        references = [[self.store(checkpoint.frame_of(folder, name)) for name in names] for names in stages]
        self.line.add(Fire(due, 0, self.store(report), self.line.m_bar, references))


def _report(due: Due) -> str:
    return f"report-{due.version}"


def _calls(fire: Fire) -> dict[str, object]:
    """What a checkpoint keeps of it, by its name there."""
    stages = [_parts(fire.due, p, len(parts)) for p, parts in enumerate(fire.corrections)]
    return {_report(fire.due): fire.report} | dict(zip(chain(*stages), chain(*fire.corrections), strict=True))


def _parts(due: Due, stage: int, parts: int) -> list[str]:
    """What a checkpoint calls the parts of a stage's correction."""
    return [f"fire-{due.version}-{stage}" + f"-{k}" * (k > 0) for k in range(parts)]


def anchor_of(config: RunConfig, fleet: Fleet) -> tuple[Clock, FireLine]:
    """When this run's fires start and end, and the workers that run them."""
    if correction_payload(config.anchor, config.merger) is None:
        return Lockstep([]), NoFires()
    longer = config.run.checkpoint_every > 0
    clock = make_clock(config.anchor, config.run.seed, config.ticks, config.grpo.ticks_per_step, beyond=longer)
    parts = 2 if merger_class(config.merger.kind).looks else 1  # a head comes before what is merged
    return clock, FireLine(fleet.anchors, config.swarm.pp, parts, config.anchor.timeout_s, clock.bound())
