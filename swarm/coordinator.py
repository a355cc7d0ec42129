"""The run: rollouts, ticks, fires, validation, checkpoints. Small decisions only; the work is in the actors.

    step:  engines ── batch ──▶ [tick T: plan ─▶ ranks] × ticks a step ── weights ──▶ engines
                                   └─ weights of tick s, batch s+1 ──▶ anchor ── correction ──▶ ranks at s + delay_k

Only references pass through here: a snapshot goes from a rank to the anchor, a correction from the
anchor to the ranks, by the object store.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from anchor_service.calls import gather
from anchor_service.errors import ActorLost, WaitTimeout, described
from anchor_service.line import NoFires
from anchor_service.places import Drains
from rl import mismatch
from rl.aggregation import weighted
from rl.batch import Batch
from rl.grpo import PG_LOSS
from rl.val_config import OWN
from swarm import checkpoint, scale
from swarm.corrections import Corrections, anchor_of
from swarm.dealt import Dealt
from swarm.engine_line import EngineLine
from swarm.failure_policy import Decision, FailurePolicy, Status, failure_of
from swarm.fleet import Fleet
from swarm.gate import RunGates
from swarm.json_lines import replace_text
from swarm.leaving import Leaving
from swarm.lookout import Lookout
from swarm.manifest import NotWritten
from swarm.messages import GRAD_NORM, RANK_S, MergeOutcome, TickPlan, TickReport
from swarm.nonfinite import Skips, judge_loss
from swarm.pace import DUE_TICK, TICK
from swarm.progress import Progress
from swarm.regroup import Regroup
from swarm.replay_choice import MiniFrame
from swarm.rollouts import SAMPLED_S, Rollouts, sample_metrics
from swarm.run_config import RunConfig
from swarm.telemetry import Telemetry, combine
from swarm.validation import accuracies, validation_metrics

WAIT_S = "timing_s/anchor_wait"
TICK_S, PAUSED_S = "timing_s/tick", "timing_s/diagnostics"  # the pace of a run is made of them
CONTROL_S = "timing_s/control"  # of a tick: asking ranks, hearing from them, and what the driver does between two ticks
PROMPTS = "training/prompts_digest"  # of each tick: which prompts were trained, and how often, can be counted


class Coordinator:
    """Drives one run to its end."""

    def __init__(
        self, config: RunConfig, fleet: Fleet, telemetry: Telemetry, folder: Path, policy: FailurePolicy | None = None
    ):
        self.config, self.fleet, self.telemetry, self.run_folder = config, fleet, telemetry, folder
        self.progress = progress = Progress(telemetry)
        asked = ["train", *config.val.asked()]
        rewarding = {f"generate {split}": config.task.reward_patience_s for split in asked}
        fleet.lookout = Lookout(config.faults, fleet.named, progress, folder, rewarding)
        clock, line = anchor_of(config, fleet)
        self.policy = policy or FailurePolicy(config.faults)
        followers = line if config.anchor.weights == "shared" else NoFires()
        engines = EngineLine(config, fleet, progress, followers, self.policy)
        self.rollouts = Rollouts(config, progress, engines)
        self.corrections = Corrections(config, fleet, progress, line, clock, ray.put, engines, self.policy)
        self.regroup = Regroup(config, fleet, progress, self.policy, line)
        self.leaving = Leaving(fleet, progress, self.regroup, engines, self.corrections.faults, Drains())
        self.gates, self.skips = RunGates(config, progress), Skips()
        self.dealt = Dealt(config, fleet, progress, self.regroup, ray.put)
        fleet.mend = self._mend
        self.after_step: Callable[[], None] = lambda: None  # whoever drives the run may end it there

    # --- the run --------------------------------------------------------------------------------

    def run(self) -> None:
        """From the present step to the last."""
        config, progress = self.config, self.progress
        problems = self.rollouts.begin()
        if problems.read:  # what a resume compares with
            replace_text(self.run_folder / "data.json", problems.to_json())
        self.rollouts.sync()
        self.corrections.begin()
        if progress.step == 0:
            self.gates.share()
            self._validate()
        while progress.step < config.run.steps:
            self._step()
            if config.validates_after(progress.step):
                self._validate()
            if config.saves_after(progress.step):
                self.save()
            self.after_step()
        self.telemetry.final_digest(self._digests())

    def _step(self) -> None:
        start = time.perf_counter()
        progress = self.progress
        self.leaving.between_steps()
        self.regroup.between_steps(scale.wanted(self.run_folder))
        progress.step += 1
        batch, timing = self.rollouts.train()
        self.gates.engine(timing)
        self.rollouts.engines.sleep()
        minis = self._mini_batches(batch)
        metrics = self._begin(batch, minis)
        ticks = [self._tick(i, minis) for i in range(len(minis))]
        self.fleet.take_turns("release_cache", self.fleet.workers)
        timing |= self.rollouts.sync()
        timing["timing_s/ticks"] = sum(tick[TICK_S] for tick in ticks)
        timing["timing_s/step"] = seconds = time.perf_counter() - start
        paused = sum(tick.get(PAUSED_S, 0.0) for tick in ticks)
        if paused:
            timing[PAUSED_S] = paused
        progress.paced((seconds - paused) / len(ticks))
        totals = {"perf/throughput": float(batch.total.sum()) / seconds}
        found = (
            step_means(ticks) | metrics | sample_metrics(batch, self.config.grpo) | timing | totals | progress.ratios()
        )
        self.telemetry.step(progress.step, progress.tick, found)

    def _begin(self, batch: Batch, minis: list[MiniFrame]) -> dict[str, float]:
        """Give every rank its share of the step's mini-batches."""
        first = self.progress.tick + 1
        reports = self.dealt.begin(minis, first)
        metrics, ledger = combine(reports, batch.own_tokens)
        self.progress.ledger.merge(ledger)
        self.progress.remember("worker", metrics["perf/max_memory_gb"])
        self.gates.codec(metrics)
        return metrics

    def _take(self, plans: list[TickPlan], minis: list[MiniFrame]) -> list[TickReport]:
        """One tick; once more where workers are lost in it."""
        tick, pp, reports = plans[0].tick, self.config.swarm.pp, list[TickReport]()
        first = tick
        due = plans[0].correction is not None
        limit, kind = self.fleet.tick_limit(due or self.corrections.may_be_fetched), DUE_TICK if due else TICK
        while True:
            try:
                self.dealt.give_again(minis, first)
                if first > tick:
                    return reports
                others = [replace(plan, record=False) for plan in plans]  # one replica is diagnosed
                asked = [((plans if rank < pp else others)[rank % pp],) for rank in range(len(self.fleet.workers))]
                return self.fleet.ask_workers("tick", asked, f"tick {tick}", limit, kind)
            except Exception as failure:
                met = self.dealt.note(self.regroup.after(failure, tick))
                first, reports = met.done + 1, met.reports or reports  # whoever took the tick may be lost in turn

    def _mend(self, failure: Exception) -> None:
        """Workers that were lost between two ticks."""
        self.dealt.note(self.regroup.after(failure, self.progress.tick))

    def _tick(self, index: int, minis: list[MiniFrame]) -> dict[str, float]:
        start, mini = time.perf_counter(), minis[index]
        progress = self.progress
        self.corrections.deliver()  # first: a worker that is done can start again at once
        self.telemetry.processes(self.fleet.processes())
        keep = self.corrections.offer(mini)
        progress.tick += 1
        diagnosed = self.corrections.sources.diagnosed(progress.tick)
        reports = self._take(self._plans(index, keep, diagnosed), minis)
        outcome = reports[0].merge  # all ranks decide alike
        metrics, ledger = combine(reports, mini.batch.loss_tokens)
        skipped = self.skips.judge(reports)
        if skipped is not None:
            progress.event("tick skipped", reason=str(skipped), in_a_row=self.skips.in_a_row)
        else:
            judge_loss(metrics.get(PG_LOSS, 0.0), mini.batch, progress.tick)
            self.gates.codec(metrics)
        progress.ledger.merge(ledger)
        self.corrections.log(outcome, metrics.get(GRAD_NORM, 0.0))
        metrics |= {"anchor/backwards": self.corrections.fires}
        if self.corrections.waited:
            metrics[WAIT_S] = metrics.get(WAIT_S, 0.0) + self.corrections.waited
        metrics |= progress.bytes_since_last_tick()
        metrics[TICK_S] = time.perf_counter() - start
        metrics[CONTROL_S] = metrics[TICK_S] - metrics.pop(RANK_S)
        if diagnosed and skipped is None:
            metrics |= self._diagnose(mini, outcome)
        trained = {PROMPTS: mini.batch.prompts_digest}
        self.telemetry.tick(progress.step, progress.tick, metrics | trained | progress.ratios())
        return metrics

    def _plans(self, index: int, keep: bool, diagnosed: bool) -> list[TickPlan]:
        """What the first ranks of each stage are to do in the present tick, on mini-batch `index`."""
        tick, pp = self.progress.tick, self.config.swarm.pp
        references, version = self.corrections.due(tick)
        anchor = self.corrections.maker(tick)
        return [
            TickPlan(tick, index, references and references[stage], version, keep, diagnosed, anchor)
            for stage in range(pp)
        ]

    def _diagnose(self, mini: MiniFrame, outcome: MergeOutcome) -> dict[str, float]:
        """What this tick's correction was worth. The swarm waits for it; it is not part of `timing_s/tick`."""
        start = time.perf_counter()
        tick, fleet = self.progress.tick, self.fleet
        source = self.corrections.sources.merged(outcome)
        # a correction from before a restart is left out whole: its M̄ may be that of a later fire
        known = (None, None, None)
        if source:
            known = source.due.source_tick, self.corrections.merged_m_bar, source.replay
        records = [*fleet.records(tick), *(source.records if source else [])]
        call = fleet.diagnosers[0].diagnose.remote(tick, mini.reference, *known, *records)
        try:
            (found,) = gather([("the diagnoser", call)], f"the diagnosis of tick {tick}", *fleet.anchor_limit)
        except (ActorLost, WaitTimeout) as failure:
            status = Status("diagnoser", failure_of(failure), tick)
            if self.policy.decide(status) is not Decision.RENEW:
                raise
            fleet.renew("diagnoser", 0)
            self.progress.event("diagnosis left out", reason=described(failure))
            return {PAUSED_S: time.perf_counter() - start}
        self.progress.remember("diagnoser", found.pop("perf/max_memory_gb"))
        if not found:
            self.progress.event("diagnosis left out", reason="the ranks that kept what the tick computed were lost")
        return found | {PAUSED_S: time.perf_counter() - start}

    def _validate(self) -> None:
        """On the uncompressed weights."""
        answered, timing = self.rollouts.validation()
        metrics = validation_metrics(self.config, answered) | {"timing_s/testing": timing.pop(SAMPLED_S)} | timing
        own, others = float(answered[OWN].batch.rewards.mean()), accuracies(self.config, answered)
        self.telemetry.val(self.progress.step, self.progress.tick, metrics, own, others)

    def _mini_batches(self, batch: Batch) -> list[MiniFrame]:
        """The step's mini-batches, each packed for the anchor and the diagnoser."""
        grpo, found = self.config.grpo, []
        samples = grpo.ppo_mini_batch_size * grpo.group_size
        for i in range(grpo.ticks_per_step):
            mini = weighted(batch.take(i * samples, (i + 1) * samples), grpo)
            frame = mini.to_frame(step=self.progress.step, index=i, denominator=mini.loss_tokens)
            found.append(MiniFrame(mini, ray.put(frame), frame.nbytes))
        return found

    def _digests(self) -> list[str]:
        found = self.fleet.ask_mended("digest", (), "the digest of its weights")
        return [f"{digest + (1 << 63):016x}" for digest in found]

    def summary(self) -> dict[str, Any]:
        """What the run came to, for summary.json."""
        return self.progress.summary() | {"anchor_backwards": self.corrections.fires}

    # --- checkpoints ----------------------------------------------------------------------------

    def save(self) -> None:
        """A checkpoint of the present step, with what is under way: it waits for samples ahead, and in lockstep for fires."""
        start = time.perf_counter()
        try:
            self._write_checkpoint()
        except NotWritten as failure:  # the one before it is still there
            self.progress.event("checkpoint not written", reason=described(failure))
            warnings.warn(f"step {self.progress.step} has no checkpoint, the run goes on: {failure}", stacklevel=2)
        else:
            self.progress.event("checkpoint", seconds=time.perf_counter() - start)

    def _write_checkpoint(self) -> None:
        """Raises NotWritten."""
        step = self.progress.step
        with checkpoint.CheckpointWriter(self.run_folder, step) as writer:
            files = self.fleet.ask_mended("save", (str(writer.path), step), "its checkpoint")
            state, frames = self.corrections.save()
            samples, batches = self.rollouts.save()
            writer.commit(self.progress.state() | state | samples, frames | batches, files)

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint. Raises CheckpointError if it does not fit the config."""
        state, progress = checkpoint.read_state(folder), self.progress
        progress.step, progress.tick = state["step"], state["tick"]
        ranks = len(self.fleet.workers)
        self.fleet.ask_workers("restore", [(str(folder),)] * ranks, "loading its checkpoint")
        self.corrections.restore(folder, state)
        self.rollouts.restore(folder, state)
        progress.restore(state)
        before, now = checkpoint.replicas_in(folder), self.config.swarm.dp
        if before != now:  # one alone sums nothing: it has nobody to send what was owed
            owed = now == 1 and checkpoint.owes(folder)
            dropped = "what replicas owed to the sum of gradients" if owed else None
            reason = f"swarm.dp {before} -> {now}: results are equal up to rounding, not to the bit"
            reason += f"; {dropped} is dropped" if dropped else ""
            progress.event("grid changed", reason=reason, dp_before=before, dp=now, dropped=dropped)


def step_means(ticks: list[dict[str, float]]) -> dict[str, float]:
    """Of a step's ticks, each name over those that have it."""
    names = {name for tick in ticks for name in tick}
    wanted = [n for n in names if n.startswith(("actor/", "rollout_corr/")) or n in mismatch.NAMES]  # the latter: once
    return {name: float(np.mean([tick[name] for tick in ticks if name in tick])) for name in wanted}
