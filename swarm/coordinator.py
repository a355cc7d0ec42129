"""The run: rollouts, ticks, fires, validation, checkpoints. Small decisions only; the work is in the actors.

    step:  engines ── batch ──▶ [tick T: plan ─▶ ranks] × ticks a step ── weights ──▶ engines
                                   └─ weights of tick s, batch s+1 ──▶ anchor ── correction ──▶ ranks at s + delay_k

Only references pass through here: a snapshot goes from a rank to the anchor, a correction from the
anchor to the ranks, by the object store.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray

from anchor_service.calls import gather
from anchor_service.clock import Clock, Lockstep, make_clock
from anchor_service.config import correction_payload
from anchor_service.line import FireLine, NoFires
from rl import mismatch
from rl.batch import Batch
from rl.grpo import PG_LOSS
from swarm import checkpoint
from swarm.corrections import Corrections
from swarm.fleet import Fleet
from swarm.gate import EngineGate, LaunchGate
from swarm.messages import MergeOutcome, TickPlan, TickReport
from swarm.nonfinite import Skips, judge_loss
from swarm.progress import Progress
from swarm.replay_choice import MiniFrame
from swarm.rollouts import SAMPLED_S, Rollouts, sample_metrics
from swarm.run_config import RunConfig
from swarm.shares import shares
from swarm.telemetry import Telemetry, combine, replace_text

TICK_S, PAUSED_S = "timing_s/tick", "timing_s/diagnostics"  # the pace of a run is made of them


class Coordinator:
    """Drives one run to its end."""

    def __init__(self, config: RunConfig, fleet: Fleet, telemetry: Telemetry, folder: Path):
        self.config, self.fleet, self.telemetry, self.run_folder = config, fleet, telemetry, folder
        self.progress = progress = Progress(telemetry)
        clock, line = _anchor_of(config, fleet)
        self.rollouts = Rollouts(config, fleet, progress, line)
        self.corrections = Corrections(config, fleet, progress, line, clock, ray.put, self.rollouts.resync)
        self.gate, self.engine_gate = LaunchGate(config.codec), EngineGate(config.rollout)
        self.skips = Skips()

    # --- the run --------------------------------------------------------------------------------

    def run(self) -> None:
        """From the present step to the last."""
        config, progress = self.config, self.progress
        problems = self.rollouts.begin()
        if problems.sources:  # what a resume compares with
            replace_text(self.run_folder / "data.json", problems.to_json())
        self.rollouts.sync()
        self.corrections.begin()
        if progress.step == 0:
            self._validate()
        while progress.step < config.run.steps:
            self._step()
            if config.validates_after(progress.step):
                self._validate()
            if config.saves_after(progress.step):
                self.save()
        self.telemetry.final_digest(self._digests())

    def _step(self) -> None:
        start = time.perf_counter()
        progress = self.progress
        progress.step += 1
        batch, timing = self.rollouts.train()
        self._judge_engine(timing)
        self.fleet.take_turns("sleep", self.fleet.engines)
        minis = self._mini_batches(batch)
        metrics = self._begin(batch, minis)
        ticks = [self._tick(i, mini) for i, mini in enumerate(minis)]
        self.fleet.take_turns("release_cache", self.fleet.workers)
        timing |= self.rollouts.sync()
        timing["timing_s/ticks"] = sum(tick[TICK_S] for tick in ticks)
        timing["timing_s/step"] = seconds = time.perf_counter() - start
        paused = sum(tick.get(PAUSED_S, 0.0) for tick in ticks)
        if paused:
            timing[PAUSED_S] = paused
        progress.paced((seconds - paused) / len(ticks))
        totals = {"perf/throughput": float(batch.total.sum()) / seconds}
        found = step_means(ticks) | metrics | sample_metrics(batch) | timing | totals | progress.ratios()
        self.telemetry.step(progress.step, progress.tick, found)

    def _begin(self, batch: Batch, minis: list[MiniFrame]) -> dict[str, float]:
        """Give every rank its share of the step's mini-batches."""
        swarm, arguments = self.config.swarm, []
        for share in shares([mini.batch for mini in minis], swarm.dp, swarm.pp):
            self.progress.control(share.ranks * share.frame.nbytes, share.ranks * share.dense)
            arguments += [(self.progress.tick + 1, ray.put(share.frame))] * share.ranks
        reports = self.fleet.ask_workers("begin_step", arguments, "the start of a step")
        metrics, ledger = combine(reports, batch.response_tokens)
        self.progress.ledger.merge(ledger)
        self.progress.remember("worker", metrics["perf/max_memory_gb"])
        self._judge_codec(metrics)
        return metrics

    def _tick(self, index: int, mini: MiniFrame) -> dict[str, float]:
        start = time.perf_counter()
        progress = self.progress
        self.corrections.deliver()  # first: a worker that is done can start again at once
        keep = self.corrections.offer(mini)
        progress.tick += 1
        diagnosed = self.corrections.sources.diagnosed(progress.tick)
        plans = self._plans(index, keep, diagnosed)
        limit = self.fleet.tick_limit(due=plans[0][0].correction is not None)
        reports: list[TickReport] = self.fleet.ask_workers("tick", plans, f"tick {progress.tick}", limit)
        outcome = reports[0].merge  # all ranks decide alike
        metrics, ledger = combine(reports, mini.batch.response_tokens)
        skipped = self.skips.judge(reports)
        if skipped is not None:
            progress.event("tick skipped", reason=str(skipped), in_a_row=self.skips.in_a_row)
        else:
            judge_loss(metrics.get(PG_LOSS, 0.0), mini.batch, progress.tick)
            self._judge_codec(metrics)
        progress.ledger.merge(ledger)
        self.corrections.log(outcome)
        metrics |= {"anchor/backwards": self.corrections.fires}
        metrics |= progress.bytes_since_last_tick()
        metrics[TICK_S] = time.perf_counter() - start
        if diagnosed and skipped is None:
            metrics |= self._diagnose(mini, outcome)
        self.telemetry.tick(progress.step, progress.tick, metrics | progress.ratios())
        return metrics

    def _plans(self, index: int, keep: bool, diagnosed: bool) -> list[tuple[TickPlan]]:
        """What each rank is to do in the present tick, on mini-batch `index`."""
        tick, pp = self.progress.tick, self.config.swarm.pp
        references, version = self.corrections.due(tick)
        return [
            (TickPlan(tick, index, references and [references[rank % pp]], version, keep, diagnosed and rank < pp),)
            for rank in range(len(self.fleet.workers))
        ]

    def _judge_codec(self, metrics: dict[str, float]) -> None:
        """Once, and early: does the codec leave the policy as it is? Stops the run above `codec.max_kl`."""
        kl = metrics.get(mismatch.LOGPROB_KL)
        if kl is not None and math.isnan(kl) and self.config.swarm.on_nan == "skip":
            return  # of samples whose tick is skipped
        kl = self.gate.judge(kl, self.progress.tick)
        if kl is not None:
            self.progress.event("codec changes the policy", **{mismatch.LOGPROB_KL: kl})

    def _judge_engine(self, metrics: dict[str, float]) -> None:
        """Once, at the first measurement: does the engine compute what a plain forward does?"""
        kl = self.engine_gate.judge(metrics.get(mismatch.DENSE_K3))
        if kl is not None:
            self.progress.event("engine differs from the model", **{mismatch.DENSE_K3: kl})

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
        (found,) = gather([("the diagnoser", call)], f"the diagnosis of tick {tick}", *fleet.anchor_limit)
        self.progress.remember("diagnoser", found.pop("perf/max_memory_gb"))
        return found | {PAUSED_S: time.perf_counter() - start}

    def _validate(self) -> None:
        """On the uncompressed weights."""
        batch, timing = self.rollouts.validation()
        task = self.config.task.name.replace(":", "_").replace("/", "_")
        accuracy = float(batch.rewards.mean())
        metrics = {
            f"val-core/{task}/acc/mean@1": accuracy,
            "val-aux/response_length/mean": float(batch.response_lengths.mean()),
            "val-aux/response_length/clip_ratio": float(batch.truncated.mean()),
            "timing_s/testing": timing[SAMPLED_S],
        }
        self.telemetry.val(self.progress.step, self.progress.tick, metrics, accuracy)

    def _mini_batches(self, batch: Batch) -> list[MiniFrame]:
        """The step's mini-batches, each packed for the anchor and the diagnoser."""
        grpo, found = self.config.grpo, []
        samples = grpo.ppo_mini_batch_size * grpo.group_size
        for i in range(grpo.ticks_per_step):
            mini = batch.take(i * samples, (i + 1) * samples)
            frame = mini.to_frame(step=self.progress.step, index=i, denominator=mini.response_tokens)
            found.append(MiniFrame(mini, ray.put(frame), frame.nbytes))
        return found

    def _digests(self) -> list[str]:
        found = self.fleet.ask_workers("digest", [()] * len(self.fleet.workers), "the digest of its weights")
        return [f"{digest + (1 << 63):016x}" for digest in found]

    def summary(self) -> dict[str, Any]:
        """What the run came to, for summary.json."""
        return self.progress.summary() | {"anchor_backwards": self.corrections.fires}

    # --- checkpoints ----------------------------------------------------------------------------

    def save(self) -> None:
        """A checkpoint of the present step, with what is under way: it waits for samples ahead, and in lockstep for fires."""
        start = time.perf_counter()
        step, ranks = self.progress.step, len(self.fleet.workers)
        writer = checkpoint.CheckpointWriter(self.run_folder, step)
        files = self.fleet.ask_workers("save", [(str(writer.path), step)] * ranks, "its checkpoint")
        state, frames = self.corrections.save()
        samples, batches = self.rollouts.save()
        writer.commit(self.progress.state() | state | samples, frames | batches, files)
        self.progress.event("checkpoint", seconds=time.perf_counter() - start)

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint. Raises CheckpointError if it does not fit the config."""
        state, progress = checkpoint.read_state(folder), self.progress
        progress.step, progress.tick = state["step"], state["tick"]
        ranks = len(self.fleet.workers)
        self.fleet.ask_workers("restore", [(str(folder),)] * ranks, "loading its checkpoint")
        self.corrections.restore(folder, state)
        self.rollouts.restore(folder, state)
        progress.restore(state)


def _anchor_of(config: RunConfig, fleet: Fleet) -> tuple[Clock, FireLine]:
    """When this run's fires start and end, and the workers that run them."""
    if correction_payload(config.anchor, config.merger) is None:
        return Lockstep([]), NoFires()
    run, ticks_per_step = config.run, config.grpo.ticks_per_step
    longer = run.checkpoint_every > 0
    clock = make_clock(config.anchor, run.seed, run.steps * ticks_per_step, ticks_per_step, beyond=longer)
    return clock, FireLine(fleet.anchors, config.swarm.pp, config.anchor.timeout_s, clock.bound())


def step_means(ticks: list[dict[str, float]]) -> dict[str, float]:
    """Of a step's ticks, each name over those that have it."""
    names = {name for tick in ticks for name in tick}
    wanted = [n for n in names if n.startswith(("actor/", "rollout_corr/")) or n in mismatch.NAMES]  # the latter: once
    return {name: float(np.mean([tick[name] for tick in ticks if name in tick])) for name in wanted}
