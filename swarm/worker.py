"""The actor around one rank: fetches references, builds the rank, calls the tick."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import cast

import numpy as np
import ray
import torch
from torch import Tensor

from anchor_service.calls import gather
from anchor_service.messages import Correction, pack_record, unpack_correction
from codec.ledger import Ledger
from rl import mismatch
from rl.config import SnapshotConfig
from rl.device import peak_memory_gb, prefer_determinism
from rl.objective import MicroBatch, microbatches
from rl.snapshot import Sender
from swarm import checkpoint
from swarm.grid import Grid, meeting
from swarm.manifest import Entry
from swarm.messages import ENGINES_STREAM, Report, TickPlan, TickReport
from swarm.nonfinite import explained
from swarm.rank import MiniBatch, RankSetup, build_rank
from swarm.replicas import weights_digest
from swarm.shares import mini_batches
from swarm.tick import tick


@dataclass(frozen=True)
class WorkerSetup:
    """coordinator -> worker: which rank it is, and everything that is built from."""

    index: int
    rank: RankSetup
    snapshot: SnapshotConfig


def ordinal(gpu: str, visible: str) -> int:
    """torch's number of the GPU that Ray calls `gpu`: its place in the mask that the node was started with, if any.

    As in Ray Train's `get_devices`; with a mask Ray's names are the mask's own, numbers or UUIDs.
    """
    return visible.split(",").index(gpu) if visible else int(gpu)


class Worker:
    """One process of the swarm."""

    def __init__(self, setup: WorkerSetup):
        self.setup = setup
        torch.set_num_threads(setup.rank.swarm.threads)
        self.minis: list[MiniBatch] = []
        self.compared: defaultdict[str, float] = defaultdict(float)
        self.senders: dict[str, Sender] = {}

    def address(self) -> str:
        """Where the process groups of this swarm meet; asked of rank 0."""
        self.store, address = meeting(ray.util.get_node_ip_address())
        return address

    def build(self, init: str) -> None:
        """Join the grid and load this stage's part of the model. A worker that is used again leaves its old grid."""
        Grid.leave()
        setup, swarm = self.setup.rank, self.setup.rank.swarm
        device = torch.device(swarm.device)
        if device.type == "cuda":
            # Ray's masking is off (it makes NCCL slow or hang), so the GPU is chosen here
            device = torch.device(
                "cuda", ordinal(str(ray.get_gpu_ids()[0]), os.environ.get("CUDA_VISIBLE_DEVICES", ""))
            )
            torch.cuda.set_device(device)
        prefer_determinism(device)
        grid = Grid(self.setup.index, swarm.dp, swarm.pp, device, Ledger(), swarm.timeout_s, init)
        self.rank = build_rank(setup, grid)

    def begin_step(self, tick: int, frame: np.ndarray) -> Report:
        """Take this rank's share of the mini-batches of the step whose first tick is `tick`.

        Old log-probs are recomputed where asked for, and where the tick's own are not the same.
        """
        rank, device = self.rank, self.rank.grid.device
        self.minis, self.compared = [], defaultdict(float)
        start, refreshed = time.perf_counter(), rank.bases.due(tick)
        for index, (batch, denominator) in enumerate(mini_batches(frame)):
            micros = microbatches(batch, np.arange(len(batch)), rank.setup.swarm.micro_batch_size, device)
            old = self._old_logprobs(index, micros, refreshed)
            self.minis.append(MiniBatch(micros, old, denominator, self.rank.refusal()))
        peaks = {"timing_s/old_log_prob": time.perf_counter() - start, "perf/max_memory_gb": peak_memory_gb(device)}
        sums = {} if self.minis[0].old_logprobs is None else self._take_compared()
        return Report(sums, {}, peaks, rank.grid.ledger.drain())

    def _old_logprobs(self, index: int, micros: list[MicroBatch], refreshed: bool) -> list[Tensor] | None:
        """One a microbatch, on the last stage; None: those of the tick itself. Recomputed ones are compared."""
        rank, grpo = self.rank, self.rank.setup.grpo
        if grpo.old_logprobs == "rollout":
            return [micro.rollout_logprobs for micro in micros]
        if not grpo.recomputes(index, refreshed):
            return None
        with explained(rank, micros):
            old = rank.pipeline.logprobs(micros, rank.setup.temperature)
        for trainer, micro in zip(old, micros):  # none but on the last stage
            for name, value in mismatch.sums(micro.rollout_logprobs, trainer).items():
                self.compared[name] += value.item()
        return old

    def _take_compared(self) -> dict[str, float]:
        """Sums of `mismatch` that nobody has been told yet."""
        found, self.compared = dict(self.compared), defaultdict(float)
        return found

    def tick(self, plan: TickPlan) -> TickReport:
        """A step is compared once: what was before its first tick is told with what that tick compares."""
        mini = self.minis[plan.mini_batch]
        with explained(self.rank, mini.micros):
            report = tick(self.rank, plan, mini, self._fetch_correction)
        compared = self._take_compared()
        for name, value in compared.items() if report.skipped is None else ():
            report.sums[name] = report.sums.get(name, 0.0) + value
        return report

    def deliver(self, version: int, reference: list[object]) -> None:
        """Fetch a correction into the inbox, beside whatever tick is running; its rank merges it when all hold it."""
        self.rank.held.receive(version, lambda: self._fetch_correction(reference), waits=False)

    def _fetch_correction(self, reference: object) -> Correction:
        what = f"a correction that is due to {self.rank.grid.name}"
        (one,) = cast("list[object]", reference)  # in a list Ray leaves it a reference: it is waited for here
        (frame,) = gather([("the anchor", one)], what, self.rank.setup.anchor.timeout_s, "anchor.timeout_s")
        return unpack_correction(frame, self.rank.grid.p, self.rank.stage.weights.numel, self.rank.held.looked)

    def weights(self, tick: int, stream: str, whole: bool, exact: bool) -> tuple[np.ndarray, int]:
        """Frame of this stage's weights after `tick` ticks, and its size; a tied copy is left to its owner.

        Each stream has a sender of its own, which knows what its receivers hold. The engines' alone may have a rate.
        """
        weights = self.rank.stage.weights
        if stream not in self.senders:
            snapshot = self.setup.snapshot
            bf16 = snapshot.is_bf16(self.setup.rank.model)
            self.senders[stream] = Sender(snapshot, bf16, snapshot.rate if stream == ENGINES_STREAM else None)
        sender, stage = self.senders[stream], self.rank.grid.p
        frame = sender.frame(weights.master[: weights.owned], tick, stage, whole, exact)
        return frame, frame.nbytes

    def release_cache(self) -> None:
        """Leave what torch only keeps for later to an engine on the same GPU."""
        torch.cuda.empty_cache()

    def record(self, tick: int) -> np.ndarray:
        """This stage's weights after `tick` ticks, fp32, with what that tick kept if it is diagnosed."""
        weights, kept = self.rank.stage.weights, self.rank.kept
        self.rank.kept = {}
        after = weights.master[: weights.owned].detach().cpu().numpy()
        return pack_record(kept | {"after": after}, tick, self.rank.grid.p)

    def digest(self) -> int:
        return weights_digest(self.rank.stage.weights.master)

    def save(self, folder: str, step: int) -> dict[str, Entry]:
        return checkpoint.save_rank(self.rank, folder, step)

    def restore(self, folder: str) -> None:
        checkpoint.restore_rank(self.rank, folder)
