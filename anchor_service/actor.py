"""The anchor as a Ray actor: it runs its fires one after the other, in the background of the swarm's ticks."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch

from anchor_service.calls import gather
from anchor_service.dense_gradient import DenseGradient, DenseSetup
from anchor_service.errors import SWARM, NotFinite
from anchor_service.messages import NORM, VOID, FireJob, content_digest, pack_correction, pack_head, pack_void
from anchor_service.replay import unpack_replay
from codec.frames import digest
from rl.device import peak_memory_gb
from rl.snapshot import BaseLost


class Anchor:
    """One anchor worker. Nothing but its copy of the model stays between fires."""

    def __init__(self, setup: DenseSetup, payload: str, stride: int | None = None):
        """`stride`: of the coordinates at which the merger looks, `merger.look`; None: it does not."""
        torch.set_num_threads(setup.threads)
        self.config, self.payload, self.stride = setup.anchor, payload, stride
        self.dense = DenseGradient.beside(setup)

    def gradient(self, job: FireJob) -> tuple[dict[str, Any], np.ndarray]:
        """M of one job, fp32 [numel] on the host, with a report, which says so if M is not finite (`void`)."""
        start = time.perf_counter()
        snapshot, replay = self._pull(job)
        pulled = time.perf_counter()
        if snapshot:
            self.dense.load(snapshot, job.source_tick)
        elif self.dense.receiver.tick != job.source_tick:
            raise BaseLost(0, job.source_tick, self.dense.receiver.tick)
        batch, denominator = unpack_replay(replay, f"replay of tick {job.source_tick + 1}")
        m = self.dense.gradient(batch, denominator)
        norm, void = m.norm().item(), None
        if not math.isfinite(norm):
            try:
                self.dense.check(m, batch, job.source_tick)
            except NotFinite as error:
                void = list(error.args)
        computed = time.perf_counter()
        least = max(job.least_seconds, self.config.slowdown * (computed - start))
        time.sleep(max(0.0, least - (computed - start)))
        report = {
            "version": job.version,
            "source_tick": job.source_tick,
            "first_tick": job.first_tick,
            "perf/max_memory_gb": peak_memory_gb(self.dense.device),
            "timing_s/anchor_pull": pulled - start,
            "timing_s/anchor_compute": computed - pulled,
            "timing_s/anchor_total": (seconds := time.perf_counter() - start),
            "seconds": seconds,
        }
        report |= {"anchor/grad_norm": norm} if void is None else {VOID: void}
        return report, m.to("cpu", copy=True).numpy()

    def publish(self, report: dict[str, Any], m: np.ndarray, m_bar: np.ndarray | None) -> list[Any]:
        """Report, M̄, then a correction frame a stage, behind its head if the merger looks (each its own object: a stage
        fetches only its shard, and of that the frame only if it wants it).

        M̄ ← beta_anc·M̄ + (1-beta_anc)·M. The last M̄ is an argument, so that fires of several anchor
        workers enter it in the order of their versions, whoever computed them. An M that is not finite leaves it as it was.
        """
        if VOID in report:
            parts, error = 1 if self.stride is None else 2, NotFinite(*report[VOID])
            stages = range(len(self.dense.stages))
            return _published(report, m_bar, [[pack_void(error, report["version"], p)] * parts for p in stages])
        start = time.perf_counter()
        alone = new = torch.from_numpy(m.copy())
        if m_bar is not None:
            new = torch.from_numpy(m_bar.copy()).lerp_(alone, 1 - self.config.beta_anc)
        version, source, first = (report[k] for k in ("version", "source_tick", "first_tick"))
        corrections: list[list[np.ndarray]] = []
        for p in range(len(self.dense.stages)):
            whole = pack_correction(self.dense.shard(new, p), self.payload, version, source, first, p)
            heads = [] if self.stride is None else [pack_head(self.dense.look(alone, p, self.stride), whole)]
            corrections.append([*heads, whole])
        norm = new.norm().item()
        report = report | {
            NORM: norm,
            "anchor/m_norm": norm,
            "timing_s/anchor_publish": (seconds := time.perf_counter() - start),
            "seconds": report["seconds"] + seconds,
        }
        return _published(report, new.numpy(), corrections)

    def follow(self, tick: int, *parts: np.ndarray) -> None:
        """Weights before any job wants them: the first of all, or with anchor.weights = "shared" those of the engines."""
        self.dense.load(list(parts), tick)

    def catch_up(self, tick: int, *frames: np.ndarray) -> None:
        """Weights of a newcomer: whole frames after `tick` ticks, and deltas before it, newest first, that are taken back."""
        self.dense.catch_up(list(frames), tick)

    def _pull(self, job: FireJob) -> tuple[list[np.ndarray], np.ndarray]:
        calls = [(SWARM, reference) for reference in [*job.snapshot, *job.replay]]
        what = f"the snapshot of tick {job.source_tick} or its replay"
        *snapshot, replay = gather(calls, what, self.config.timeout_s, "anchor.timeout_s")
        return snapshot, replay


def _published(report: dict[str, Any], m_bar: np.ndarray | None, corrections: list[list[np.ndarray]]) -> list[Any]:
    """The report, with what it says of the frames of each stage; M̄; then the frames."""
    frames = [frame for parts in corrections for frame in parts]
    found = {
        "digest": digest(*(content_digest(frame).encode() for frame in frames)),
        "stage_bytes": [[frame.nbytes for frame in parts] for parts in corrections],
    }
    return [report | found, m_bar, *frames]
