"""The run: rollouts, ticks, fires, validation, checkpoints. Small decisions only; the work is in the actors.

    step:  engines ── batch ──▶ [tick T: plan ─▶ ranks] × ticks a step ── weights ──▶ engines
                                   └─ weights of tick s, batch s+1 ──▶ anchor ── correction ──▶ ranks at s + delay_k

Only references pass through here: a snapshot goes from a rank to the anchor, a correction from the
anchor to the ranks, by the object store.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from anchor_service.errors import WaitTimeout
from anchor_service.messages import FireJob, TickPlan
from anchor_service.ring import SnapshotRing, anchor_should_fire
from codec.ledger import Ledger
from merger import MERGERS
from rl.batch import Batch, Prompts, concat
from swarm import checkpoint
from swarm.telemetry import Telemetry, combine


@dataclass(frozen=True)
class Fleet:
    """Handles of the actors of one run, workers in rank order."""

    workers: list[Any]
    engines: list[Any]
    anchor: Any | None


@dataclass(frozen=True)
class Fire:
    """A fire under way: its job and references to its report and to one correction a stage."""

    job: FireJob
    report: Any
    corrections: list[Any]


def gather(calls: Iterable[tuple[str, Any]], what: str, seconds: float, knob: str) -> list[Any]:
    """Results of named calls, in order. The first failure ends the wait; the deadline names who is missing."""
    names = {ref: name for name, ref in calls}
    waiting, deadline = list(names), time.monotonic() + seconds
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            raise WaitTimeout(", ".join(names[ref] for ref in waiting), what, seconds, knob)
        ray.get(done)  # raises what the actor raised
    return ray.get(list(names))


class Coordinator:
    """Drives one run to its end. `config` is a `deploy.config.RunConfig`."""

    def __init__(self, config: Any, fleet: Fleet, telemetry: Telemetry, run: Path):
        self.config, self.fleet, self.telemetry, self.run_folder = config, fleet, telemetry, run
        self.ledger = Ledger()
        self.ring: SnapshotRing[Fire] = SnapshotRing(config.anchor.cadence, config.anchor.delay_k)
        self.tick = self.step = self.fires = self.version = 0
        self.corrects = MERGERS[config.merger.kind].payload is not None
        self.peaks: dict[str, float] = {}  # peak memory of the largest process of a role, GB
        self._logged: dict[str, float] = {}
        self._weights: tuple[int, list[Any], int] | None = None  # newest frames: tick, references, bytes

    # --- the run --------------------------------------------------------------------------------

    def run(self) -> None:
        """From the present step to the last."""
        config = self.config
        self._sync_engines()
        if self.step == 0:
            self._validate()
        while self.step < config.run.steps:
            self._step()
            if self.step % config.val.every == 0 or self.step == config.run.steps:
                self._validate()
            every = config.run.checkpoint_every
            if every and (self.step % every == 0 or self.step == config.run.steps):
                self.save()
        self.telemetry.final_digest(self._digests())

    def _step(self) -> None:
        start = time.perf_counter()
        self.step += 1
        batch, timing = self._rollout()
        minis = self._mini_batches(batch)
        self._control(sum(size for _, size in minis) * len(self.fleet.workers))
        references = [ref for ref, _ in minis]
        begun = self._on_workers("begin_step", [references] * len(self.fleet.workers), "the start of a step")
        metrics, step_ledger = combine(begun, batch.response_tokens)
        self.ledger.merge(step_ledger)
        self._remember("worker", metrics["perf/max_memory_gb"])
        ticks = [self._tick(i, *mini, self._mini(batch, i).response_tokens) for i, mini in enumerate(minis)]
        self._sync_engines()
        timing |= {k: v for k, v in metrics.items() if k.startswith("timing_s/")}
        timing["timing_s/ticks"] = sum(t["timing_s/tick"] for t in ticks)
        timing["timing_s/step"] = time.perf_counter() - start
        means = {
            k: float(np.mean([t[k] for t in ticks if k in t])) for k in set().union(*ticks) if k.startswith("actor/")
        }
        self.telemetry.step(
            self.step,
            self.tick,
            means
            | metrics
            | sample_metrics(batch)
            | timing
            | {
                "perf/throughput": float(batch.total.sum()) / timing["timing_s/step"],
                **self._totals(),
            },
        )

    def _tick(self, index: int, mini: Any, size: int, tokens: int) -> dict[str, float]:
        start = time.perf_counter()
        self._offer(mini, size)
        self.tick += 1
        fire = self._due()
        self.version = fire.job.version if fire else self.version
        plans = []
        for rank in range(len(self.fleet.workers)):
            stage = rank % self.config.swarm.pp
            plans.append((TickPlan(self.tick, index, [fire.corrections[stage]] if fire else None, self.version),))
        reports = self._on_workers("tick", plans, f"tick {self.tick}")
        metrics, ledger = combine(reports, tokens)
        if fire:
            self._log_fire(fire)
        self.ledger.merge(ledger)
        metrics |= self._bytes_since_last_tick()
        metrics["timing_s/tick"] = time.perf_counter() - start
        if self.fleet.anchor:
            metrics["anchor/backwards"] = self.fires
        self.telemetry.tick(self.step, self.tick, metrics | self._totals())
        return metrics

    # --- the anchor -----------------------------------------------------------------------------

    def _offer(self, mini: Any, size: int) -> None:
        """Hand θ_s and b_{s+1} to the anchor if a fire within this run will need them; waits for nothing."""
        s = self.tick
        if not self._needed(s):
            return
        first = s + self.config.anchor.delay_k
        references, nbytes = self._weights_of(s)
        version = first // self.config.anchor.cadence - self._fires_before_first()
        job = FireJob(version, s, first, references, [mini])
        count = 1 + self.config.swarm.pp
        report, *corrections = self.fleet.anchor.fire.options(num_returns=count).remote(job)
        self.ring.put(s, Fire(job, report, corrections))
        self.ledger.add("snapshot", nbytes, 0)
        self.ledger.add("replay", size, 0)

    def _needed(self, s: int) -> bool:
        last = self.config.run.steps * self.config.grpo.ticks_per_step
        return bool(
            self.fleet.anchor and self.corrects and self.ring.wants(s) and s + self.config.anchor.delay_k <= last
        )

    def _fires_before_first(self) -> int:
        """Multiples of the cadence that come before `delay_k`: no fire happens there, so versions start at 1."""
        return (self.config.anchor.delay_k - 1) // self.config.anchor.cadence

    def _due(self) -> Fire | None:
        anchor = self.config.anchor
        if not (self.fleet.anchor and self.corrects and anchor_should_fire(self.tick, anchor.cadence, anchor.delay_k)):
            return None
        return self.ring.take(self.tick)

    def _log_fire(self, fire: Fire) -> None:
        (report,) = gather([("the anchor", fire.report)], "its report", *self._anchor_limit())
        self.fires += 1
        self._remember("anchor", report["perf/max_memory_gb"])
        self.ledger.add("correction", sum(report["bytes_by_stage"]) * self.config.swarm.dp, 0)
        self.telemetry.fire(self.step, self.tick, report)

    # --- rollouts and weights -------------------------------------------------------------------

    def _rollout(self) -> tuple[Batch, dict[str, float]]:
        size = self.config.grpo.train_batch_size
        first = (self.step - 1) * size
        indices = range(first, first + size)
        batch, timing = self._generate(
            "train", self.step, indices, self.config.grpo.group_size, self.config.rollout.temperature
        )
        return batch, timing

    def _generate(self, split: str, step: int, indices: range, n: int, temperature: float) -> tuple[Batch, dict]:
        """Batches of `rollout.batch_size` prompts, whatever the number of engines: so results do not depend on it."""
        start = time.perf_counter()
        size, engines = self.config.rollout.batch_size, self.fleet.engines
        calls = []
        for i in range(0, len(indices), size):
            k = (i // size) % len(engines)
            ask = Prompts(split, step, tuple(indices[i : i + size]), n, temperature)
            calls.append((f"engine {k}", engines[k].generate.remote(ask)))
        results = gather(calls, f"{split} samples of step {step}", self.config.rollout.timeout_s, "rollout.timeout_s")
        batch = concat([Batch.from_frame(frame, "an engine")[1] for frame, _ in results])
        self._control(sum(frame.nbytes for frame, _ in results))
        self._remember("engine", max(peak for _, peak in results))
        return batch, {"timing_s/gen": time.perf_counter() - start}

    def _validate(self) -> None:
        """On the uncompressed weights; the same prompts and random numbers each time, so that runs are paired."""
        config = self.config
        temperature = config.rollout.val_temperature or config.rollout.temperature
        batch, timing = self._generate("val", 0, range(config.val.size), 1, temperature)
        task = config.task.name.replace(":", "_").replace("/", "_")
        accuracy = float(batch.rewards.mean())
        self.telemetry.val(
            self.step,
            self.tick,
            {
                f"val-core/{task}/acc/mean@1": accuracy,
                "val-aux/response_length/mean": float(batch.response_lengths.mean()),
                "val-aux/response_length/clip_ratio": float(batch.truncated.mean()),
                "timing_s/testing": timing["timing_s/gen"],
            },
            accuracy,
        )

    def _weights_of(self, tick: int) -> tuple[list[Any], int]:
        """References to the weights frames of all stages after `tick` ticks; asked for once a tick."""
        if self._weights is None or self._weights[0] != tick:
            first_replica = self.fleet.workers[: self.config.swarm.pp]
            pairs = [worker.weights.options(num_returns=2).remote(tick) for worker in first_replica]
            calls = [(f"worker d0p{p}", size) for p, (_, size) in enumerate(pairs)]
            nbytes = sum(gather(calls, f"the weights of tick {tick}", *self._swarm_limit()))
            self._weights = (tick, [frame for frame, _ in pairs], nbytes)
        return self._weights[1:]

    def _sync_engines(self) -> None:
        references, nbytes = self._weights_of(self.tick)
        calls = [
            (f"engine {i}", e.load_weights.remote(self.tick, *references)) for i, e in enumerate(self.fleet.engines)
        ]
        gather(calls, f"loading the weights of tick {self.tick}", self.config.rollout.timeout_s, "rollout.timeout_s")
        total = nbytes * len(self.fleet.engines)
        self.ledger.add("rollout_sync", total, total)

    # --- small helpers --------------------------------------------------------------------------

    def _mini(self, batch: Batch, index: int) -> Batch:
        samples = self.config.grpo.ppo_mini_batch_size * self.config.grpo.group_size
        return batch.take(index * samples, (index + 1) * samples)

    def _mini_batches(self, batch: Batch) -> list[tuple[Any, int]]:
        """References to the frames of the step's mini-batches, with their sizes."""
        frames = [
            self._mini(batch, i).to_frame(step=self.step, index=i) for i in range(self.config.grpo.ticks_per_step)
        ]
        return [(ray.put(frame), frame.nbytes) for frame in frames]

    def _on_workers(self, method: str, arguments: list[tuple], what: str) -> list[Any]:
        calls = []
        for rank, (worker, args) in enumerate(zip(self.fleet.workers, arguments)):
            d, p = divmod(rank, self.config.swarm.pp)
            calls.append((f"worker d{d}p{p}", getattr(worker, method).remote(*args)))
        return gather(calls, what, *self._swarm_limit())

    def _swarm_limit(self) -> tuple[float, str]:
        # the ranks' own deadlines are shorter and say more, so this one only catches a rank that is stuck
        swarm, anchor = self.config.swarm, self.config.anchor
        return swarm.timeout_s * 2 + (anchor.timeout_s if self.fleet.anchor else 0), "swarm.timeout_s"

    def _anchor_limit(self) -> tuple[float, str]:
        return self.config.anchor.timeout_s, "anchor.timeout_s"

    def _bytes_since_last_tick(self) -> dict[str, float]:
        """Bytes by channel since the last call, whoever counted them."""
        now = {channel: sent for channel, (sent, _) in self.ledger.state().items()}
        before, self._logged = self._logged, now
        return {f"comm/{channel}_bytes": sent - before.get(channel, 0.0) for channel, sent in now.items()}

    def _remember(self, role: str, gigabytes: float) -> None:
        self.peaks[role] = max(self.peaks.get(role, 0.0), gigabytes)

    def _control(self, nbytes: int) -> None:
        self.ledger.add("control", nbytes, nbytes)

    def _totals(self) -> dict[str, float]:
        ratios = {"comm/bytes_ratio": self.ledger.bytes_ratio(), "comm/total_ratio": self.ledger.total_ratio()}
        return {k: v for k, v in ratios.items() if v is not None}

    def _digests(self) -> list[str]:
        found = self._on_workers("digest", [()] * len(self.fleet.workers), "the digest of its weights")
        return [f"{d + (1 << 63):016x}" for d in found]

    def summary(self) -> dict[str, Any]:
        """What the run came to, for summary.json."""
        channels = {c: {"sent": sent, "dense": dense} for c, (sent, dense) in self.ledger.state().items()}
        return {
            "steps": self.step,
            "ticks": self.tick,
            "anchor_backwards": self.fires,
            "peak_memory_gb": self.peaks,
            "bytes": channels,
            "bytes_total": sum(c["sent"] for c in channels.values()),
            "bytes_total_dense": sum(c["dense"] for c in channels.values()),
            "comm/bytes_ratio": self.ledger.bytes_ratio(),
            "comm/total_ratio": self.ledger.total_ratio(),
        }

    # --- checkpoints ----------------------------------------------------------------------------

    def save(self) -> None:
        """A checkpoint of the present step. Waits for fires under way: their results are part of it."""
        start = time.perf_counter()
        writer = checkpoint.Writer(self.run_folder, self.step)
        folder = str(writer.path)
        self._on_workers("save", [(folder, self.step)] * len(self.fleet.workers), "its checkpoint")
        frames, reports = {}, {}
        for s, fire in self.ring.pending().items():
            report, *corrections = gather(
                [("the anchor", ref) for ref in (fire.report, *fire.corrections)],
                "a pending fire",
                *self._anchor_limit(),
            )
            reports[str(s)] = {"report": report, "version": fire.job.version, "first_tick": fire.job.first_tick}
            frames |= {f"fire-{s}-{p}": correction for p, correction in enumerate(corrections)}
        if self.fleet.anchor:
            call = self.fleet.anchor.save.remote(str(writer.path / "anchor.safetensors"))
            gather([("the anchor", call)], "its checkpoint", *self._anchor_limit())
        state = {
            "step": self.step,
            "tick": self.tick,
            "fires": self.fires,
            "version": self.version,
            "pending": reports,
            "ledger": self.ledger.state(),
            "telemetry": self.telemetry.state(),
        }
        writer.commit(state, frames)
        self.telemetry.event(self.step, self.tick, "checkpoint", seconds=time.perf_counter() - start)

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint. Raises CheckpointError if it does not fit the config."""
        state = checkpoint.read_state(folder)
        self.step, self.tick, self.fires, self.version = (state[k] for k in ("step", "tick", "fires", "version"))
        if self.step >= self.config.run.steps:
            raise checkpoint.CheckpointError(
                f"{folder.name} is at step {self.step} and run.steps is {self.config.run.steps}: nothing is left to do"
            )
        self._on_workers("restore", [(str(folder),)] * len(self.fleet.workers), "loading its checkpoint")
        if self.fleet.anchor:
            call = self.fleet.anchor.restore.remote(str(folder / "anchor.safetensors"))
            gather([("the anchor", call)], "loading its checkpoint", *self._anchor_limit())
        for s, saved in state["pending"].items():
            corrections = [ray.put(checkpoint.read_frame(folder, f"fire-{s}-{p}")) for p in range(self.config.swarm.pp)]
            job = FireJob(saved["version"], int(s), saved["first_tick"], [], [])
            self.ring.put(int(s), Fire(job, ray.put(saved["report"]), corrections))
        missing = [
            s
            for s in range(self.tick)
            if self._needed(s) and s + self.config.anchor.delay_k > self.tick and str(s) not in state["pending"]
        ]
        if missing:
            raise checkpoint.CheckpointError(
                f"{folder.name} lacks the fires from ticks {missing}: the saved run was to end there; start a longer run anew"
            )
        self.ledger.merge({c: tuple(v) for c, v in state["ledger"].items()})
        self.telemetry.restore(state["telemetry"], self.step, self.tick)


def sample_metrics(batch: Batch) -> dict[str, float]:
    """verl's names for rewards and lengths of one step's samples."""
    lengths = batch.response_lengths
    return {
        "critic/rewards/mean": float(batch.rewards.mean()),
        "response_length/mean": float(lengths.mean()),
        "response_length/max": int(lengths.max()),
        "response_length/clip_ratio": float(batch.truncated.mean()),
        "prompt_length/mean": float(batch.prompt.mean()),
        "training/zero_advantage_ratio": float((batch.advantages == 0).mean()),
    }
