"""The run: rollouts, ticks, fires, validation, checkpoints. Small decisions only; the work is in the actors.

    step:  engines ── batch ──▶ [tick T: plan ─▶ ranks] × ticks a step ── weights ──▶ engines
                                   └─ weights of tick s, batch s+1 ──▶ anchor ── correction ──▶ ranks at s + delay_k

Only references pass through here: a snapshot goes from a rank to the anchor, a correction from the
anchor to the ranks, by the object store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError

from anchor_service.actor import AnchorLine, Fire
from anchor_service.clock import make_clock
from anchor_service.errors import WaitTimeout
from anchor_service.lag import Due
from anchor_service.messages import TickPlan
from codec.ledger import Ledger
from merger import MERGERS
from rl import mismatch
from rl.batch import Batch, Prompts, concat
from rl.engine import EngineFailed
from rl.model_files import model_shape, resolve, tensor_sizes
from rl.snapshot import BaseLost
from swarm import checkpoint
from swarm.gate import EngineGate, LaunchGate
from swarm.sources import Sources
from swarm.telemetry import Telemetry, combine


@dataclass(frozen=True)
class Fleet:
    """Handles of the actors of one run, workers in rank order. `new_engines` kills the engines and starts others."""

    workers: list[Any]
    engines: list[Any]
    anchors: list[Any]
    diagnosers: list[Any]
    new_engines: Callable[[], list[Any]]


@dataclass(frozen=True)
class MiniFrame:
    """One tick's samples, and a reference to them as a frame."""

    batch: Batch
    reference: Any
    size: int


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
        self.tick = self.step = self.fires = self.version = self.merged = 0
        self.tick_seconds = 0.0  # running mean over steps, rollouts included: ticks pass at this pace
        ticks_per_step = config.grpo.ticks_per_step
        last_tick = config.run.steps * ticks_per_step
        self.clock = make_clock(config.anchor, config.run.seed, last_tick, ticks_per_step)
        corrects = fleet.anchors and MERGERS[config.merger.kind].payload is not None
        timeout_s, bound = config.anchor.timeout_s, self.clock.bound()
        self.line = AnchorLine(fleet.anchors, config.swarm.pp, timeout_s, bound) if corrects else None
        self.sources = Sources(config.diagnostics.every, self.clock)
        self._deliveries: list[Any] = []
        self._expired = False
        self._last_m_bar: Any = None  # of the last fire that left the line
        self._merged_m_bar: Any = None  # of the correction that is held, which is an older one if that fire was refused
        self.peaks: dict[str, float] = {}  # peak memory of the largest process of a role, GB
        self._logged: dict[str, float] = {}
        self.gate, self.engine_gate = LaunchGate(config.codec), EngineGate(config.rollout)
        self._lost: set[str] = set()  # anchor streams whose base is gone
        self._resync = True  # the first frames of a run are whole ones
        self._parameters = parameter_count(config)

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
        self._judge_engine(timing)
        self._share_gpus("sleep", self.fleet.engines)
        minis = self._mini_batches(batch)
        self._control(sum(mini.size for mini in minis) * len(self.fleet.workers))
        references = [mini.reference for mini in minis]
        begun = self._on_workers("begin_step", [references] * len(self.fleet.workers), "the start of a step")
        metrics, step_ledger = combine(begun, batch.response_tokens)
        self.ledger.merge(step_ledger)
        self._remember("worker", metrics["perf/max_memory_gb"])
        self._judge_codec(metrics)
        ticks = [self._tick(i, mini) for i, mini in enumerate(minis)]
        self._share_gpus("release_cache", self.fleet.workers)
        digest = self._sync_engines()
        timing |= {k: v for k, v in metrics.items() if k.startswith("timing_s/")}
        timing["timing_s/ticks"] = sum(t["timing_s/tick"] for t in ticks)
        timing["timing_s/step"] = time.perf_counter() - start
        paused = sum(t.get("timing_s/diagnostics", 0.0) for t in ticks)
        timing |= {"timing_s/diagnostics": paused} if paused else {}
        seconds = (timing["timing_s/step"] - paused) / len(ticks)
        self.tick_seconds += (0.2 if self.tick_seconds else 1.0) * (seconds - self.tick_seconds)
        means = {
            k: float(np.mean([t[k] for t in ticks if k in t]))
            for k in set().union(*ticks)
            if k.startswith(("actor/", "rollout_corr/")) or k in mismatch.NAMES  # the latter of the first tick alone
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
                "rollout/weights_digest": digest,
                **self._totals(),
            },
        )

    def _tick(self, index: int, mini: MiniFrame) -> dict[str, float]:
        start = time.perf_counter()
        self._deliver()  # first: a worker that is done can start again at once
        keep = self._offer(mini)
        self.tick += 1
        due = self.clock.due(self.tick) if self.line else None
        self.version = due.version if due else self.version
        plans, pp, version = [], self.config.swarm.pp, self.version if self.clock.waits else None
        diagnosed = self.sources.diagnosed(self.tick)
        for rank in range(len(self.fleet.workers)):
            correction = [self.line.fires[due.version].corrections[rank % pp]] if due else None
            plans.append((TickPlan(self.tick, index, correction, version, keep, diagnosed and rank < pp),))
        reports = self._on_workers("tick", plans, f"tick {self.tick}")
        metrics, ledger = combine(reports, mini.batch.response_tokens)
        self._judge_codec(metrics)
        self.ledger.merge(ledger)
        self._log_corrections(metrics)
        metrics |= self._bytes_since_last_tick()
        metrics["timing_s/tick"] = time.perf_counter() - start
        if diagnosed:
            metrics |= self._diagnose(mini, metrics)
        self.telemetry.tick(self.step, self.tick, metrics | self._totals())
        return metrics

    def _judge_codec(self, metrics: dict[str, float]) -> None:
        """Once, and early: does the codec leave the policy as it is? Stops the run above `codec.max_kl`."""
        kl = self.gate.judge(metrics, self.tick)
        if kl is not None:
            self.telemetry.event(self.step, self.tick, "codec changes the policy", **{"codec/logprob_kl": kl})

    def _judge_engine(self, metrics: dict[str, float]) -> None:
        """Once, at the first measurement: does the engine compute what a plain forward does?"""
        kl = self.engine_gate.judge(metrics)
        if kl is not None:
            self.telemetry.event(self.step, self.tick, "engine differs from the model", **{"rollout_corr/dense_k3": kl})

    # --- the anchor -----------------------------------------------------------------------------

    def _offer(self, mini: MiniFrame) -> bool:
        """Hand θ_s and b_{s+1} to the anchor if a fire starts from them; waits for nothing."""
        dues = self.clock.to_start(self.tick) if self.line else []
        for due in dues:
            worker = self.line.free_worker(due.version)
            references, nbytes = self._snapshot(worker)
            replay, size = self._replay(mini, due.version)
            self.line.start(due, worker, references, replay, self._least_seconds(due))
            self.ledger.add("snapshot", nbytes, 0)
            self.ledger.add("replay", size, 0)
            if self.sources.wants(due):
                self.sources.keep(due, self._records(), mini.reference)
            if self.config.anchor.workers > 1:  # M̄ goes from one anchor worker to the next, in fp32
                self.ledger.add("control", 4 * self._parameters, 0)
        return bool(dues)

    def _snapshot(self, worker: int) -> tuple[list[Any], int]:
        """Weights for one fire; each anchor worker has its own stream, or none if it shares the engines'."""
        if self.config.anchor.weights == "shared":
            return [], 0
        stream = f"anchor {worker}"
        whole = stream in self._lost
        self._lost.discard(stream)
        return self._weights_of(self.tick, stream, whole)

    def _replay(self, mini: MiniFrame, version: int) -> tuple[Any, int]:
        """The mini-batch, or a seeded share of its samples with the denominator that keeps M unbiased."""
        fraction = self.config.anchor.replay_fraction
        if fraction == 1:
            return mini.reference, mini.size
        count = max(1, round(fraction * len(mini.batch)))
        rng = np.random.default_rng([self.config.run.seed, 0x5A3, version])
        chosen = np.sort(rng.choice(len(mini.batch), count, replace=False))
        denominator = mini.batch.response_tokens * count / len(mini.batch)
        frame = mini.batch.pick(chosen).to_frame(denominator=denominator)
        return ray.put(frame), frame.nbytes

    def _least_seconds(self, due: Due) -> float:
        """On the wall clock a lag model slows the real anchor down by that many tick times."""
        if self.clock.waits or self.config.anchor.lag.kind == "fixed":
            return 0.0
        return self.clock.lag_of(due.version - 1, due.source_tick) * self.tick_seconds

    def _deliver(self) -> None:
        """Pass corrections that are done on to every rank's inbox. On the wall clock only; waits for nothing."""
        if self.line is None or self.clock.waits:
            return
        for fire in self.line.arrived():
            self.clock.finished(fire.due.version)
            try:
                self.line.report(fire)  # raises if the fire failed
            except BaseLost as lost:
                self._drop(fire, lost)
                continue
            fire.delivered = True
            for rank, worker in enumerate(self.fleet.workers):
                reference = [fire.corrections[rank % self.config.swarm.pp]]
                self._deliveries.append(worker.deliver.options(concurrency_group="inbox").remote(reference))
        done, self._deliveries = (
            ray.wait(self._deliveries, num_returns=len(self._deliveries), timeout=0) if self._deliveries else ([], [])
        )
        ray.get(done)  # raises what a delivery raised

    def _drop(self, fire: Fire, lost: BaseLost) -> None:
        """The anchor worker has lost the base of a delta: this fire is void, its next snapshot is a whole one."""
        stream = f"anchor {fire.worker}"
        self._lost.add(stream)
        self.line.drop(fire, self._last_m_bar)
        self._resync |= self.config.anchor.weights == "shared"
        self.telemetry.event(self.step, self.tick, "snapshot lost", stream=stream, reason=str(lost))

    def _log_corrections(self, metrics: dict[str, float]) -> None:
        """Write down what this tick was the first to merge, what it passed over, and what it dropped."""
        version, refused = (int(metrics.get(f"anchor/{name}", 0)) for name in ("version", "refused"))
        newest = max(version, refused)
        fires = self.line.settled(newest) if self.line and newest > self.merged else []
        for fire in fires:
            report = self.line.report(fire)
            first = self.tick if fire.due.version == version else None
            self.fires += 1
            self.merged, self._last_m_bar = newest, fire.m_bar
            self._merged_m_bar = self._merged_m_bar if first is None else fire.m_bar
            self._remember("anchor", report["perf/max_memory_gb"])
            self.ledger.add("correction", report["bytes"] * self.config.swarm.dp, 0)
            self.telemetry.fire(self.step, self.tick, report | {"first_tick": first})
        if refused:
            self.telemetry.event(self.step, self.tick, "correction refused", version=refused)
        self.sources.settle(metrics)
        expired = "anchor/expired" in metrics
        if expired and not self._expired:
            self.telemetry.event(self.step, self.tick, "correction dropped at max_age", version=version)
        self._expired = expired
        if self.line:
            metrics["anchor/backwards"] = self.fires

    # --- diagnosis ------------------------------------------------------------------------------

    def _records(self) -> list[Any]:
        """References to the weights of every stage, with what this tick kept; waits for nothing."""
        return [worker.record.remote(self.tick) for worker in self.fleet.workers[: self.config.swarm.pp]]

    def _diagnose(self, mini: MiniFrame, metrics: dict[str, float]) -> dict[str, float]:
        """What this tick's correction was worth. The swarm waits for it; it is not part of `timing_s/tick`."""
        start = time.perf_counter()
        source = self.sources.merged(metrics)
        # a correction from before a restart is left out whole: its M̄ may be that of a later fire
        known = (source.due.source_tick, self._merged_m_bar, source.replay) if source else (None, None, None)
        records = [*self._records(), *(source.records if source else [])]
        call = self.fleet.diagnosers[0].diagnose.remote(self.tick, mini.reference, *known, *records)
        (found,) = gather([("the diagnoser", call)], f"the diagnosis of tick {self.tick}", *self._anchor_limit())
        self._remember("diagnoser", found.pop("perf/max_memory_gb"))
        return found | {"timing_s/diagnostics": time.perf_counter() - start}

    # --- rollouts and weights -------------------------------------------------------------------

    def _rollout(self) -> tuple[Batch, dict[str, float]]:
        size = self.config.grpo.train_batch_size
        first = (self.step - 1) * size
        indices = range(first, first + size)
        grpo, rollout = self.config.grpo, self.config.rollout
        return self._generate("train", self.step, indices, grpo.group_size, rollout.temperature)

    def _generate(self, split: str, step: int, indices: range, n: int, temperature: float) -> tuple[Batch, dict]:
        """Batches of one number of samples, whatever the number of engines: so results do not depend on it."""
        start = time.perf_counter()
        size = self.config.rollout.batch_size * self.config.grpo.group_size // n
        asks = [
            Prompts(split, step, tuple(indices[i : i + size]), n, temperature) for i in range(0, len(indices), size)
        ]

        def answers() -> list[tuple[np.ndarray, float, dict[str, float]]]:
            engines = self.fleet.engines
            calls = [
                (f"engine {i % len(engines)}", engines[i % len(engines)].generate.remote(ask))
                for i, ask in enumerate(asks)
            ]
            return gather(calls, f"{split} samples of step {step}", *self._engine_limit())

        try:
            results = answers()
        except (EngineFailed, RayActorError) as failure:
            self._renew_engines(failure)
            self._sync_engines()
            results = answers()
        batch = concat([Batch.from_frame(frame, "an engine")[1] for frame, *_ in results])
        self._control(sum(frame.nbytes for frame, *_ in results))
        self._remember("engine", max(peak for _, peak, _ in results))
        compared = mismatch.dense_metrics([sums for *_, sums in results])
        return batch, {"timing_s/gen": time.perf_counter() - start} | compared

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

    def _weights_of(self, tick: int, stream: str, whole: bool = False) -> tuple[list[Any], int]:
        """References to the weights frames of all stages after `tick` ticks, for one stream of consumers."""
        first_replica = self.fleet.workers[: self.config.swarm.pp]
        pairs = [worker.weights.options(num_returns=2).remote(tick, stream, whole) for worker in first_replica]
        calls = [(f"worker d0p{p}", size) for p, (_, size) in enumerate(pairs)]
        nbytes = sum(gather(calls, f"the weights of tick {tick}", *self._swarm_limit()))
        return [frame for frame, _ in pairs], nbytes

    def _sync_engines(self) -> str:
        """Give the engines, and an anchor that shares their stream, the newest weights. Returns their digest."""
        try:
            return self._load_engines()
        except BaseLost as lost:
            self.telemetry.event(self.step, self.tick, "weights resynchronised", reason=str(lost))
            self._resync = True
        except (EngineFailed, RayActorError) as failure:
            self._renew_engines(failure)
        return self._load_engines()

    def _load_engines(self) -> str:
        references, nbytes = self._weights_of(self.tick, "engines", whole=self._resync)
        engines = [
            (f"engine {i}", e.load_weights.remote(self.tick, *references)) for i, e in enumerate(self.fleet.engines)
        ]
        if self.line and self.config.anchor.weights == "shared":
            self.line.follow(self.tick, references)
            if self.config.anchor.resource != self.config.rollout.resource:  # the engines' copy is on other nodes
                self.ledger.add("snapshot", nbytes * len(self.fleet.anchors), 0)
        self._resync = False
        digests = gather(engines, f"loading the weights of tick {self.tick}", *self._engine_limit())
        if len(set(digests)) > 1:
            raise EngineFailed(f"the weights of tick {self.tick}", f"engines hold {digests}", "start the run anew")
        copies = len(self.fleet.engines)
        dense = self._parameters * (2 if self.config.model.dtype == "bfloat16" else 4)  # what a dense system sends
        self.ledger.add("rollout_sync", nbytes * copies, dense * copies)
        return digests[0]

    def _renew_engines(self, failure: Exception) -> None:
        """All of them: they follow one stream, and the new ones begin it with a whole snapshot."""
        reason = str(failure).strip().splitlines()[-1]
        self.telemetry.event(self.step, self.tick, "engines started anew", reason=reason)
        self.fleet.engines[:] = self.fleet.new_engines()
        self._resync = True

    def _share_gpus(self, method: str, actors: list[Any]) -> None:
        """Engines and workers on the same GPUs take turns in their memory."""
        if self.config.rollout.placement == "colocated":
            calls = [(f"actor {i}", getattr(actor, method).remote()) for i, actor in enumerate(actors)]
            gather(calls, method, *self._engine_limit())

    # --- small helpers --------------------------------------------------------------------------

    def _mini_batches(self, batch: Batch) -> list[MiniFrame]:
        """The step's mini-batches, each packed once for workers and anchor."""
        grpo, found = self.config.grpo, []
        samples = grpo.ppo_mini_batch_size * grpo.group_size
        for i in range(grpo.ticks_per_step):
            mini = batch.take(i * samples, (i + 1) * samples)
            frame = mini.to_frame(step=self.step, index=i, denominator=mini.response_tokens)
            found.append(MiniFrame(mini, ray.put(frame), frame.nbytes))
        return found

    def _on_workers(self, method: str, arguments: list[tuple], what: str) -> list[Any]:
        calls = []
        for rank, (worker, args) in enumerate(zip(self.fleet.workers, arguments)):
            d, p = divmod(rank, self.config.swarm.pp)
            calls.append((f"worker d{d}p{p}", getattr(worker, method).remote(*args)))
        return gather(calls, what, *self._swarm_limit())

    def _swarm_limit(self) -> tuple[float, str]:
        # the ranks' own deadlines are shorter and say more, so this one only catches a rank that is stuck
        swarm, anchor = self.config.swarm, self.config.anchor
        return swarm.timeout_s * 2 + (anchor.timeout_s if self.line else 0), "swarm.timeout_s"

    def _engine_limit(self) -> tuple[float, str]:
        return self.config.rollout.timeout_s, "rollout.timeout_s"

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
        frames, pending = self._pending_fires()
        state = {
            "step": self.step,
            "tick": self.tick,
            "fires": self.fires,
            "version": self.version,
            "merged": self.merged,
            "pending": pending,
            "ledger": self.ledger.state(),
            "telemetry": self.telemetry.state(),
        }
        writer.commit(state, frames)
        self.telemetry.event(self.step, self.tick, "checkpoint", seconds=time.perf_counter() - start)

    def _pending_fires(self) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
        """Fires not merged yet, with M̄. On the wall clock only those that are done: it waits for none."""
        if self.line is None:
            return {}, []
        fires = [self.line.fires[v] for v in sorted(self.line.fires)]
        if not self.clock.waits:
            ready = {fire.due.version for fire in self.line.arrived()}
            fires = [fire for fire in fires if fire.delivered or (fire.due.version in ready and self.line.good(fire))]
        calls, pending = {}, []
        for fire in fires:
            pending.append({"due": asdict(fire.due), "report": self.line.report(fire)})
            calls |= {f"fire-{fire.due.version}-{p}": c for p, c in enumerate(fire.corrections)}
        m_bar = fires[-1].m_bar if fires else self.line.m_bar if self.clock.waits else self._last_m_bar
        calls |= {} if m_bar is None else {"m_bar": m_bar}
        frames = dict(zip(calls, gather(calls.items(), "what a checkpoint keeps of the anchor", *self._anchor_limit())))
        if m_bar is not None:
            frames["m_bar"] = frames["m_bar"].view(np.uint8)
        return frames, pending

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint. Raises CheckpointError if it does not fit the config."""
        state = checkpoint.read_state(folder)
        for name in ("step", "tick", "fires", "version", "merged"):
            setattr(self, name, state[name])
        if self.step >= self.config.run.steps:
            raise checkpoint.CheckpointError(
                f"{folder.name} is at step {self.step} and run.steps is {self.config.run.steps}: nothing is left to do"
            )
        self._on_workers("restore", [(str(folder),)] * len(self.fleet.workers), "loading its checkpoint")
        if self.line:
            self._restore_fires(folder, state["pending"])
        self.ledger.merge({c: tuple(v) for c, v in state["ledger"].items()})
        self._bytes_since_last_tick()  # what was logged before
        self.telemetry.restore(state["telemetry"], self.step, self.merged)

    def _restore_fires(self, folder: Path, pending: list[dict[str, Any]]) -> None:
        m_bar = checkpoint.read_frame(folder, "m_bar")
        self.line.m_bar = None if m_bar is None else ray.put(m_bar.view(np.float32))
        for saved in pending:
            due = Due(**saved["due"])
            frames = [checkpoint.read_frame(folder, f"fire-{due.version}-{p}") for p in range(self.config.swarm.pp)]
            self.line.add(Fire(due, 0, ray.put(saved["report"]), self.line.m_bar, [ray.put(f) for f in frames]))
        self._last_m_bar = self.line.m_bar
        newest = max([self.merged, *self.line.fires])
        missing = self.clock.resume(self.tick, newest) - set(self.line.fires)
        if missing:
            raise checkpoint.CheckpointError(
                f"{folder.name} lacks corrections {sorted(missing)}: the saved run was to end before they are due; "
                f"start a longer run anew"
            )


def parameter_count(config: Any) -> int:
    """Parameters of the whole model, a tied embedding once."""
    folder = resolve(config.model.path)
    sizes = tensor_sizes(folder)
    if model_shape(str(folder)).tied:
        sizes.pop("lm_head.weight", None)  # some checkpoints hold the tied embedding twice
    return sum(sizes.values())


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
