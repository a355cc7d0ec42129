"""The anchor as a Ray actor, and the driver's side of it. It runs its fires one after the other, in the background of
the swarm's ticks."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from anchor_service.calls import gather, take
from anchor_service.clock import next_worker
from anchor_service.dense_gradient import DenseGradient, DenseSetup
from anchor_service.lag import Due
from anchor_service.messages import FireJob, content_digest, pack_correction
from anchor_service.ring import RingOverflow
from codec.frames import digest
from rl.batch import Batch
from rl.device import peak_memory_gb
from rl.snapshot import BaseLost


class Anchor:
    """One anchor worker. Nothing but its copy of the model stays between fires."""

    def __init__(self, setup: DenseSetup, payload: str):
        torch.set_num_threads(setup.threads)
        self.config, self.payload = setup.anchor, payload
        self.dense = DenseGradient.beside(setup)

    def gradient(self, job: FireJob) -> tuple[dict[str, Any], np.ndarray]:
        """M of one job, fp32 [numel] on the host, with a report."""
        start = time.perf_counter()
        snapshot, replay = self._pull(job)
        pulled = time.perf_counter()
        if snapshot:
            self.dense.load(snapshot, job.source_tick)
        elif self.dense.receiver.tick != job.source_tick:
            raise BaseLost(0, job.source_tick, self.dense.receiver.tick)
        header, batch = Batch.from_frame(replay, f"replay of tick {job.source_tick + 1}")
        m = self.dense.gradient(batch, header["denominator"])
        norm = m.norm().item()
        if not math.isfinite(norm):
            self.dense.check(m, batch, job.source_tick)
        computed = time.perf_counter()
        least = max(job.least_seconds, self.config.slowdown * (computed - start))
        time.sleep(max(0.0, least - (computed - start)))
        report = {
            "version": job.version,
            "source_tick": job.source_tick,
            "first_tick": job.first_tick,
            "anchor/grad_norm": norm,
            "perf/max_memory_gb": peak_memory_gb(self.dense.device),
            "timing_s/anchor_pull": pulled - start,
            "timing_s/anchor_compute": computed - pulled,
            "timing_s/anchor_total": time.perf_counter() - start,
        }
        return report, m.cpu().numpy().copy()

    def publish(self, report: dict[str, Any], m: np.ndarray, m_bar: np.ndarray | None) -> list[Any]:
        """Report, M̄, then one correction frame a stage (each its own object: a stage fetches only its shard).

        M̄ ← beta_anc·M̄ + (1-beta_anc)·M. The last M̄ is an argument, so that fires of several anchor
        workers enter it in the order of their versions, whoever computed them.
        """
        start = time.perf_counter()
        new = torch.from_numpy(m.copy())
        if m_bar is not None:
            new = torch.from_numpy(m_bar.copy()).lerp_(new, 1 - self.config.beta_anc)
        ticks = [report[k] for k in ("version", "source_tick", "first_tick")]
        corrections = [
            pack_correction(self.dense.shard(new, p), self.payload, *ticks, p) for p in range(len(self.dense.stages))
        ]
        report = report | {
            "digest": digest(*(content_digest(c).encode() for c in corrections)),
            "bytes": sum(c.nbytes for c in corrections),
            "anchor/m_norm": new.norm().item(),
            "timing_s/anchor_publish": time.perf_counter() - start,
        }
        return [report, new.numpy(), *corrections]

    def follow(self, tick: int, *parts: np.ndarray) -> None:
        """Weights that the engines get too (anchor.weights = "shared"): the next jobs are of this tick."""
        self.dense.load(list(parts), tick)

    def _pull(self, job: FireJob) -> tuple[list[np.ndarray], np.ndarray]:
        calls = [("the swarm", reference) for reference in [*job.snapshot, *job.replay]]
        what = f"the snapshot of tick {job.source_tick} or its replay"
        *snapshot, replay = gather(calls, what, self.config.timeout_s, "anchor.timeout_s")
        return snapshot, replay


@dataclass
class Fire:
    """A fire under way, or done and not merged yet."""

    due: Due
    worker: int
    report: Any
    m_bar: Any
    corrections: list[Any]  # one a stage
    delivered: bool = False


class AnchorLine:
    """The driver's side of the anchor workers: which fires are under way, in the order of their versions."""

    def __init__(self, workers: list[Any], stages: int, timeout_s: float, bound: int | None):
        self.workers, self.stages, self.timeout_s, self.bound = workers, stages, timeout_s, bound
        self.fires: dict[int, Fire] = {}
        self.m_bar: Any = None
        self._deliveries: list[Any] = []

    def free_worker(self, version: int) -> int:
        """Who should run fire `version`."""
        busy = [fire.worker for fire in self.fires.values() if not fire.delivered]
        return next_worker([busy.count(k) for k in range(len(self.workers))], version)

    def start(self, due: Due, k: int, snapshot: list[Any], replay: Any, least_seconds: float = 0.0) -> None:
        """Hand one job to worker `k`; waits for nothing. M̄ passes from one fire to the next.

        Raises RingOverflow if more would be under way than the clock's agenda can have.
        """
        if self.bound is not None and len(self.fires) >= self.bound:
            raise RingOverflow(
                f"versions {sorted(self.fires)} are under way, {due.version} would be beyond {self.bound}"
            )
        worker = self.workers[k]
        job = FireJob(due.version, due.source_tick, due.first_tick, snapshot, [replay], least_seconds)
        report, m = worker.gradient.options(num_returns=2).remote(job)
        returned = worker.publish.options(num_returns=2 + self.stages).remote(report, m, self.m_bar)
        self.add(Fire(due, k, returned[0], returned[1], returned[2:]))

    def follow(self, tick: int, references: list[Any]) -> None:
        """Weights for every anchor worker, in order before the jobs that start from them; waits for nothing."""
        for worker in self.workers:
            worker.follow.remote(tick, *references)

    def add(self, fire: Fire) -> None:
        self.fires[fire.due.version] = fire
        self.m_bar = fire.m_bar

    def drop(self, fire: Fire, m_bar: Any) -> None:
        """Forget a fire that failed; M̄ goes on from the fire before it, or from `m_bar` if that is merged."""
        del self.fires[fire.due.version]
        earlier = [v for v in self.fires if v < fire.due.version]
        self.m_bar = self.fires[max(earlier)].m_bar if earlier else m_bar

    def arrived(self) -> list[Fire]:
        """Fires that are done and not delivered yet, oldest first; waits for nothing."""
        waiting = {fire.report: fire for fire in self.fires.values() if not fire.delivered}
        done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0) if waiting else ([], [])
        return sorted((waiting[ref] for ref in done), key=lambda fire: fire.due.version)

    def deliver(self, fire: Fire, ranks: list[Any]) -> None:
        """Send each rank its stage's correction, beside whatever tick is running; waits for nothing."""
        fire.delivered = True
        for index, rank in enumerate(ranks):
            reference = [fire.corrections[index % self.stages]]
            self._deliveries.append(rank.deliver.options(concurrency_group="inbox").remote(reference))

    def check_deliveries(self) -> None:
        """Raises what a delivery that is over raised; waits for nothing."""
        if self._deliveries:
            count = len(self._deliveries)
            done, self._deliveries = ray.wait(self._deliveries, num_returns=count, timeout=0)
            for delivery in done:
                take(delivery, "a worker", "the arrival of a correction")

    def report(self, fire: Fire) -> dict[str, Any]:
        """Raises WaitTimeout if the fire is not done in time."""
        what = f"the report of correction {fire.due.version}"
        (report,) = gather([("the anchor", fire.report)], what, self.timeout_s, "anchor.timeout_s")
        return report

    def good(self, fire: Fire) -> bool:
        """Of a fire that is done: whether it has a correction. One that lost its base is dropped in the next tick."""
        try:
            self.report(fire)
        except BaseLost:
            return False
        return True

    def settled(self, version: int) -> list[Fire]:
        """Fires up to `version`, oldest first; they leave the line."""
        return [self.fires.pop(v) for v in sorted(self.fires) if v <= version]
