"""The anchor as a Ray actor. It runs fires one after the other, in the background of the swarm's ticks."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError
from safetensors.torch import load_file, save_file

from anchor_service.config import AnchorConfig
from anchor_service.dense_gradient import DenseGradient
from anchor_service.errors import WaitTimeout
from anchor_service.messages import FireJob, pack_correction
from codec.frames import digest, digest_of
from rl.batch import Batch
from rl.config import GrpoConfig
from rl.memory import peak_memory_gb
from rl.model_files import resolve
from rl.policy import Span


class Anchor:
    """Holds M̄ and the newest snapshot; nothing else stays between fires."""

    def __init__(
        self,
        config: AnchorConfig,
        model_path: str,
        dtype: str,
        stages: list[Span],
        grpo: GrpoConfig,
        temperature: float,
        payload: str,
        threads: int,
    ):
        torch.set_num_threads(threads)
        self.config, self.payload = config, payload
        self.dense = DenseGradient(
            resolve(model_path),
            stages,
            getattr(torch, dtype),
            torch.device(config.device),
            config.micro_batch_size,
            grpo,
            temperature,
        )
        self.m_bar: torch.Tensor | None = None

    def ready(self) -> bool:
        return True

    def fire(self, job: FireJob) -> list[Any]:
        """A report, then one correction frame a stage (each its own object: a stage fetches only its shard)."""
        start = time.perf_counter()
        snapshot, replay = self._pull(job)
        pulled = time.perf_counter()
        self.dense.load(snapshot, job.source_tick)
        _, batch = Batch.from_frame(replay, f"replay of tick {job.source_tick + 1}")
        m = self.dense.gradient(batch)
        self.m_bar = m.clone() if self.m_bar is None else self.m_bar.lerp_(m, 1 - self.config.beta_anc)
        computed = time.perf_counter()
        corrections = [
            pack_correction(
                self.dense.shard(self.m_bar, p), self.payload, job.version, job.source_tick, job.first_tick, p
            )
            for p in range(len(self.dense.stages))
        ]
        if self.config.slowdown > 1:
            time.sleep((self.config.slowdown - 1) * (time.perf_counter() - start))
        report = {
            "version": job.version,
            "source_tick": job.source_tick,
            "first_tick": job.first_tick,
            "digest": digest(*(digest_of(c).encode() for c in corrections)),
            "bytes": sum(c.nbytes for c in corrections),
            "bytes_by_stage": [c.nbytes for c in corrections],
            "anchor/grad_norm": m.norm().item(),
            "anchor/m_norm": self.m_bar.norm().item(),
            "perf/max_memory_gb": peak_memory_gb(self.dense.device),
            "timing_s/anchor_pull": pulled - start,
            "timing_s/anchor_compute": computed - pulled,
            "timing_s/anchor_total": time.perf_counter() - start,
        }
        return [report, *corrections]

    def _pull(self, job: FireJob) -> tuple[list[np.ndarray], np.ndarray]:
        try:
            found = ray.get([*job.snapshot, *job.replay], timeout=self.config.timeout_s)
        except GetTimeoutError as error:
            what = f"the snapshot of tick {job.source_tick} or its replay"
            raise WaitTimeout("the swarm", what, self.config.timeout_s, "anchor.timeout_s") from error
        return found[:-1], found[-1]

    def save(self, path: str) -> None:
        """M̄ as safetensors. Fires are run in order, so this comes after all that were submitted before it."""
        save_file({} if self.m_bar is None else {"m_bar": self.m_bar.cpu()}, path)

    def restore(self, path: str) -> None:
        self.m_bar = load_file(path, device=self.config.device).get("m_bar")
