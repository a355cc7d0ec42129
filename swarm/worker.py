"""The actor around one rank: fetches references, builds the rank, calls the tick."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from anchor_service.calls import gather
from anchor_service.messages import Correction, TickPlan, pack_record, unpack_correction
from codec.boundary import Boundary
from codec.config import CodecConfig
from codec.gradient import DenseSum, PowerSGDSum
from codec.ledger import Ledger
from rl import mismatch
from rl.batch import Batch
from rl.config import ModelConfig, SnapshotConfig
from rl.device import peak_memory_gb, prefer_determinism
from rl.model_files import model_shape, resolve
from rl.objective import deal, microbatches
from rl.policy import Stage
from rl.snapshot import Sender
from rl.spans import spans
from swarm import checkpoint
from swarm.config import SwarmConfig
from swarm.grid import Grid, meeting
from swarm.manifest import Entry
from swarm.nonfinite import explained
from swarm.tick import MiniBatch, Rank, Rules, tick, weights_digest


@dataclass(frozen=True)
class WorkerSetup:
    """coordinator -> worker: everything a rank is built from."""

    rank: int
    seed: int
    model: ModelConfig
    codec: CodecConfig
    snapshot: SnapshotConfig
    swarm: SwarmConfig
    rules: Rules


def ordinal(gpu: str, visible: str) -> int:
    """torch's number of the GPU that Ray calls `gpu`: its place in the mask that the node was started with, if any.

    As in Ray Train's `get_devices`; with a mask Ray's names are the mask's own, numbers or UUIDs.
    """
    return visible.split(",").index(gpu) if visible else int(gpu)


class Worker:
    """One process of the swarm."""

    def __init__(self, setup: WorkerSetup):
        self.setup = setup
        torch.set_num_threads(setup.swarm.threads)
        self.minis: list[MiniBatch] = []
        self.senders: dict[str, Sender] = {}

    def address(self) -> str:
        """Where the process groups of this swarm meet; asked of rank 0."""
        self.store, address = meeting(ray.util.get_node_ip_address())
        return address

    def build(self, init: str) -> None:
        """Join the grid and load this stage's part of the model. A worker that is used again leaves its old grid."""
        Grid.leave()
        setup, swarm = self.setup, self.setup.swarm
        device = torch.device(swarm.device)
        if device.type == "cuda":
            # Ray's masking is off (it makes NCCL slow or hang), so the GPU is chosen here
            device = torch.device(
                "cuda", ordinal(str(ray.get_gpu_ids()[0]), os.environ.get("CUDA_VISIBLE_DEVICES", ""))
            )
            torch.cuda.set_device(device)
        prefer_determinism(device)
        ledger = Ledger()
        grid = Grid(setup.rank, swarm.dp, swarm.pp, device, ledger, swarm.timeout_s, init)
        folder = resolve(setup.model.path)
        dtype = getattr(torch, setup.model.dtype)
        layers = model_shape(str(folder)).layers
        span = spans(layers, swarm.boundaries, swarm.pp)[grid.p]
        options = {"attention": setup.model.attention, "checkpointing": swarm.activation_checkpointing}
        stage = Stage(folder, span, dtype, device, **options)
        cuts = self._boundaries(stage, ledger, device)
        self.rank = Rank(stage, cuts, grid, setup.rules, self._reducer(stage, grid))

    def _boundaries(self, stage: Stage, ledger: Ledger, device: torch.device) -> dict[int, Boundary]:
        """Boundaries inside the stage and at its two ends."""
        hidden, span = stage.config.hidden_size, stage.span
        cuts = {}
        for index, layer in enumerate(self.setup.swarm.boundaries):
            if span.lo <= layer <= span.hi:
                cuts[layer] = Boundary(self.setup.codec, index, hidden, self.setup.seed, ledger)
                cuts[layer].to(device)
        return cuts

    def _reducer(self, stage: Stage, grid: Grid) -> DenseSum | PowerSGDSum:
        def sum_dp(tensor: torch.Tensor, dense_bytes: float) -> None:
            grid.sum_dp(tensor, "grad_dp", dense_bytes)

        config = self.setup.codec.gradient
        if config.kind == "none" or grid.dp == 1:
            return DenseSum(sum_dp)
        return PowerSGDSum(stage.weights.shapes, config.rank, grid.dp, self.setup.seed, sum_dp, grid.device)

    def begin_step(self, *frames: np.ndarray) -> dict[str, Any]:
        """Take this rank's share of a step's mini-batches; recompute old log-probs if asked to."""
        rank, grid = self.rank, self.rank.grid
        self.minis = []
        sums: dict[str, float] = defaultdict(float)
        start = time.perf_counter()
        for frame in frames:
            _, batch = Batch.from_frame(frame, "the coordinator")
            mine = deal(batch, grid.dp, grid.d)
            micros = microbatches(batch, mine, self.setup.swarm.micro_batch_size, grid.device)
            old = [micro.rollout_logprobs for micro in micros]
            if rank.rules.grpo.old_logprobs == "trainer":
                with explained(rank, micros):
                    old = rank.pipeline.logprobs(micros, rank.rules.temperature)
                for trainer, micro in zip(old, micros):  # none but on the last stage
                    for name, value in mismatch.sums(micro.rollout_logprobs, trainer).items():
                        sums[name] += value.item()
            self.minis.append(MiniBatch(micros, old, batch.response_tokens))
        peaks = {
            "timing_s/old_log_prob": time.perf_counter() - start,
            "perf/max_memory_gb": peak_memory_gb(grid.device),
        }
        return {"sums": dict(sums), "values": {}, "peaks": peaks, "ledger": grid.ledger.drain()}

    def tick(self, plan: TickPlan) -> dict[str, Any]:
        mini = self.minis[plan.mini_batch]
        with explained(self.rank, mini.micros):
            return tick(self.rank, plan, mini, self._fetch_correction)

    def deliver(self, reference: list[Any]) -> None:
        """Fetch a correction into the inbox, beside whatever tick is running; its rank merges it when all hold it."""
        self.rank.inbox.put(self._fetch_correction(reference))

    def _fetch_correction(self, reference: list[Any]) -> Correction:
        what = f"a correction that is due to {self.rank.grid.name}"
        calls = [("the anchor", one) for one in reference]
        (frame,) = gather(calls, what, self.rank.rules.anchor.timeout_s, "anchor.timeout_s")
        return unpack_correction(frame, self.rank.grid.p, self.rank.stage.weights.numel)

    def weights(self, tick: int, stream: str, whole: bool) -> tuple[np.ndarray, int]:
        """Frame of this stage's weights after `tick` ticks, and its size; a tied copy is left to its owner.

        Each stream has its own base of deltas; `whole` sends none.
        """
        weights = self.rank.stage.weights
        if stream not in self.senders:
            snapshot = self.setup.snapshot
            bf16 = (snapshot.dtype or self.setup.model.dtype) == "bfloat16"
            self.senders[stream] = Sender(snapshot, bf16)
        frame = self.senders[stream].frame(weights.master[: weights.owned], tick, self.rank.grid.p, whole)
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
        return weights_digest(self.rank)

    def save(self, folder: str, step: int) -> dict[str, Entry]:
        return checkpoint.save_rank(self.rank, folder, step)

    def restore(self, folder: str) -> None:
        checkpoint.restore_rank(self.rank, folder)
