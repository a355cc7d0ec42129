"""M: the dense, full-coverage gradient of an old snapshot on its own batch, without any codec."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anchor_service.config import AnchorConfig
from anchor_service.errors import NotFinite
from merger.look import looked_at
from rl.batch import Batch, grouped
from rl.config import GrpoConfig, ModelConfig, SnapshotConfig
from rl.device import prefer_determinism
from rl.lora import NO_LORA
from rl.lora_config import LoraConfig
from rl.model_files import resolve
from rl.objective import loss_terms, microbatches
from rl.policy import EMBEDDING, Stage
from rl.snapshot import Receiver
from rl.spans import Span


@dataclass(frozen=True)
class DenseSetup:
    """What an actor that computes dense gradients beside a run is built from. `stages`: the swarm's spans."""

    anchor: AnchorConfig
    model: ModelConfig
    grpo: GrpoConfig
    snapshot: SnapshotConfig
    stages: list[Span]
    temperature: float
    checkpointing: bool
    threads: int
    share: bool = False  # what samples have in common is computed once


class DenseGradient:
    """The whole model on the anchor's device.

    `stages` are the spans of the swarm's pipeline: snapshots arrive, and corrections leave, by stage.
    """

    def __init__(
        self,
        folder: Path,
        stages: list[Span],
        dtype: torch.dtype,
        device: torch.device,
        micro_batch_size: int,
        grpo: GrpoConfig,
        temperature: float,
        snapshot: SnapshotConfig,
        attention: str = "sdpa",
        checkpointing: bool = False,
        share: bool = False,
        lora: LoraConfig = NO_LORA,
    ):
        whole = Span(0, stages[0].total, stages[0].total)
        self.model = Stage(folder, whole, dtype, device, attention=attention, checkpointing=checkpointing, lora=lora)
        self.stages, self.device, self.size = stages, device, micro_batch_size
        self.grpo, self.temperature = grpo, temperature
        self.share = share
        self.receiver = Receiver(snapshot)
        self.tied = bool(self.model.config.tie_word_embeddings) and not lora.rank  # frozen ones have no gradient

    @classmethod
    def beside(cls, setup: DenseSetup) -> DenseGradient:
        """As the config of a run asks for it, on the anchor's device in the anchor's microbatches."""
        anchor, model = setup.anchor, setup.model
        numbers, device = getattr(torch, model.dtype), torch.device(anchor.device)
        prefer_determinism(device)
        rest = anchor.micro_batch_size, setup.grpo, setup.temperature, setup.snapshot
        how = model.attention, setup.checkpointing, setup.share, model.lora
        return cls(resolve(model.path), setup.stages, numbers, device, *rest, *how)

    def load(self, parts: list[np.ndarray], tick: int) -> None:
        """Weights frames, one a stage, all of `tick`. Raises FrameError on a mix-up, BaseLost if a delta does not fit."""
        self.receiver.load(parts, tick, self.model.weights.master)
        self.model.weights.publish()

    def catch_up(self, frames: list[np.ndarray], tick: int) -> None:
        """Whole frames after `tick` ticks, one a stage, and deltas before it, newest first, that are taken back."""
        self.receiver.catch_up(frames, tick, len(self.stages), self.model.weights.master)
        self.model.weights.publish()

    def gradient(self, batch: Batch, denominator: float | np.ndarray, grpo: GrpoConfig | None = None) -> Tensor:
        """∇L at the loaded weights on `batch`, fp32 [numel], divided by `denominator`: one number, or one a sample [N].

        For a whole mini-batch that is `Batch.loss_tokens`, so that M is normalised as the swarm's
        gradient is; samples have the weights that they have there; for a share f of its samples f times that, which keeps M unbiased; for samples of n
        mini-batches n times that of each (`anchor_service/replay.py`).
        The ratio is taken to the log-probs that the rollout engine recorded: its model is the
        uncompressed one too. `grpo` asks for another objective than the run's. The result is
        overwritten by the next call.
        """
        weights, grpo = self.model.weights, grpo or self.grpo
        weights.grad.zero_()
        order = grouped(batch) if self.share else np.argsort(-batch.total, kind="stable")
        for i, micro in enumerate(microbatches(batch, order, self.size, self.device, share=self.share)):
            hidden = self.model(micro.ids, micro.real, {}, micro.distinct)
            over = self._of_tokens(denominator, batch, order[i * self.size : (i + 1) * self.size])
            terms = loss_terms(self.model, hidden, micro, micro.rollout_logprobs, over, grpo, self.temperature)
            terms.loss.backward()
            weights.collect()
        return weights.grad

    def _of_tokens(self, denominator: float | np.ndarray, batch: Batch, samples: np.ndarray) -> float | Tensor:
        """One number as it is; else that of each response token of `samples`."""
        if not isinstance(denominator, np.ndarray):
            return denominator
        return torch.from_numpy(np.repeat(denominator[samples], batch.response_lengths[samples])).to(self.device)

    def check(self, m: Tensor, batch: Batch, tick: int) -> None:
        """Raises NotFinite if M holds a NaN or an infinity, naming what brought it: all that follows would hide it."""
        if m.isfinite().all():
            return
        pieces = {
            "the weights that it was given": (self.model.weights.master, "the swarm's are not finite: lower grpo.lr"),
            "the advantages of the samples": (batch.advantages, "look at task.reward"),
        }
        bad = [(first, fix) for first, (held, fix) in pieces.items() if not torch.as_tensor(held).isfinite().all()]
        own = (
            "its own passes, which have no codec",
            'model.dtype = "float32" has the range, or anchor.device is broken',
        )
        raise NotFinite(f"the anchor: its gradient at the weights of tick {tick} is not finite", *(bad or [own])[0])

    def shard(self, m: Tensor, stage: int) -> Tensor:
        """The part of flat `m` that stage `stage` holds; its tied embedding, if any, comes last."""
        span, part = self.stages[stage], self._own(m, stage)
        if self.tied and span.last and not span.first:
            part = torch.cat([part, m[self.model.weights.slice_of(EMBEDDING)]])
        return part

    def look(self, m: Tensor, stage: int, stride: int) -> Tensor:
        """Flat `m` at the coordinates of stage `stage` at which a merger looks."""
        weights = self.model.weights
        sizes = [math.prod(s) for n, s in zip(weights.names, weights.shapes) if self._owner(n) == stage]
        return self._own(m, stage)[torch.from_numpy(looked_at(sizes, stride))]

    def _own(self, m: Tensor, stage: int) -> Tensor:
        """What stage `stage` alone trains."""
        weights = self.model.weights
        names = [n for n in weights.names if self._owner(n) == stage]
        return m[weights.slice_of(names[0]).start : weights.slice_of(names[-1]).stop]

    def _owner(self, name: str) -> int:
        """Which stage trains the parameter `name`."""
        if name.startswith("model.layers."):
            layer = int(name.split(".")[2])
            return next(p for p, span in enumerate(self.stages) if span.lo <= layer < span.hi)
        return 0 if name == EMBEDDING else len(self.stages) - 1
