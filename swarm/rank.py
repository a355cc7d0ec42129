"""One rank of the swarm: a stage of the model with all that belongs to it. Built alike by the actor and by tests."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anchor_service.config import AnchorConfig
from codec.boundary import Boundary
from codec.config import CodecConfig
from codec.state import prefixed, under
from merger.config import MergerConfig
from rl.config import GrpoConfig, ModelConfig
from rl.model_files import model_shape, resolve
from rl.objective import MicroBatch
from rl.policy import Stage
from rl.spans import spans
from swarm.bases import Bases
from swarm.config import SwarmConfig
from swarm.grid import Grid
from swarm.held import Held
from swarm.messages import RANK_S, TickReport
from swarm.pipeline import Pipeline
from swarm.reducer import Reducer
from swarm.replicas import Seal

# Elements: a norm in float64 without a float64 copy of the gradient. What stays in a CPU's cache is ten times as fast there
NORM_BLOCKS = {"cpu": 1 << 16, "cuda": 1 << 22}


@dataclass(frozen=True)
class RankSetup:
    """coordinator -> worker: the sections of a config that a rank is built from and that its ticks read."""

    model: ModelConfig
    codec: CodecConfig
    swarm: SwarmConfig
    grpo: GrpoConfig
    anchor: AnchorConfig
    merger: MergerConfig
    stride: int | None  # of the coordinates at which the merger looks, `merger.look`; None: it does not
    q_cadence: int
    temperature: float
    seed: int  # of the first Q, and of what a rank draws itself
    ticks: int  # of the whole run: what the learning rate falls over

    @property
    def shares_prompts(self) -> bool:
        return self.swarm.shares_prompts(self.model, self.codec)


@dataclass
class MiniBatch:
    """This rank's share of one tick's samples, and what all ranks divide by."""

    micros: list[MicroBatch]
    old_logprobs: list[Tensor] | None  # one a microbatch, on the last stage; None: those of the tick itself
    denominator: int  # response tokens of the global mini-batch that are in the loss
    refused: str = ""  # why a codec would not encode what was to become its old log-probs


class Rank:
    """State of one rank between ticks. Each part keeps, saves and restores its own."""

    def __init__(self, setup: RankSetup, stage: Stage, cuts: dict[int, Boundary], grid: Grid):
        self.setup, self.stage, self.cuts, self.grid = setup, stage, cuts, grid
        self.pipeline = Pipeline(stage, cuts, grid)
        self.bases = Bases(self.pipeline, cuts, grid, setup.q_cadence)
        self.reducer = Reducer(setup.codec.gradient, setup.seed, stage, grid)
        self.held = Held(setup.anchor, setup.merger, setup.seed, stage.weights, grid, setup.stride)
        self.seal = Seal(grid)
        self.optimizer = _optimizer(setup.grpo, stage)
        self.skips = self.held.skips = setup.swarm.on_nan == "skip"
        for boundary in cuts.values():
            boundary.lenient = self.skips
        self.kept: dict[str, np.ndarray] = {}  # of a tick that is diagnosed, until `Worker.record` takes it away
        self.timing: dict[str, float] = defaultdict(float)
        self.begun = time.perf_counter()  # the tick that is under way
        self.taken: TickReport | None = None  # of a tick that took its step and broke off after it
        self.phase: tuple[str, float] | None = None  # of the tick, and when it began, on the monotonic clock

    def norm(self, flat: Tensor) -> float:
        """Norm over all stages' parameters, a tied embedding counted once."""
        owned = flat[: self.stage.weights.owned]
        blocks = (block.double() for block in owned.split(NORM_BLOCKS[owned.device.type]))
        square = torch.stack([torch.dot(block, block) for block in blocks]).sum()
        return self.grid.sum_pp(square).sqrt().item()

    def keep(self, **vectors: Tensor) -> None:
        """For the diagnosis of this tick: copies on the host, a tied embedding left to its owner."""
        owned = self.stage.weights.owned
        self.kept |= {k: v[:owned].detach().to("cpu", copy=True).numpy() for k, v in vectors.items()}

    def set_lr(self, tick: int) -> float:
        """The learning rate of that tick: it depends on nothing else, so a run that goes on has it too."""
        grpo = self.setup.grpo
        rate = self.optimizer.param_groups[0]["lr"] = grpo.lr * grpo.lr_schedule.factor(tick, self.setup.ticks)
        return rate

    @contextmanager
    def timed(self, phase: str) -> Generator[None]:
        start = time.perf_counter()
        self.phase = phase, time.monotonic()
        try:
            yield
        finally:
            self.phase = None
        self.timing[f"timing_s/{phase}"] += time.perf_counter() - start

    def times(self) -> dict[str, float]:
        """Seconds by phase of the tick that is over, and of all of it."""
        found, self.timing = dict(self.timing), defaultdict(float)
        return found | {RANK_S: time.perf_counter() - self.begun}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, and plain fields: all that the next tick depends on."""
        tensors, fields = self._exchanged()
        tensors["weights"] = self.stage.weights.master.detach()
        return tensors | prefixed("adam", self.optimizer.state_dict()["state"].get(0, {})), fields

    def _exchanged(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a tick changes before its optimizer does."""
        held, fields = self.held.state()
        found: dict[str, Tensor] = {}
        for layer, boundary in self.cuts.items():
            found |= prefixed(f"codec.{layer}", boundary.state())
        return found | prefixed("reducer", self.reducer.state()) | held, fields

    def summed(self) -> list[str]:
        """Names in `state` of a replica's own part in sums to come: rows seen, and what it owes to the gradient's."""
        seen = [f"codec.{layer}.{name}" for layer, boundary in self.cuts.items() for name in boundary.summed()]
        return seen + [f"reducer.{part}.error" for part in self.reducer.parts]

    def restore(self, tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
        """Go on from `state()`. Raises ValueError if it is of another model or stage."""
        weights = self.stage.weights
        if tensors["weights"].shape != weights.master.shape:
            raise ValueError(f"holds {len(tensors['weights'])} weights, this stage has {weights.numel}")
        with torch.no_grad():
            weights.master.copy_(tensors["weights"])
        weights.publish()
        state = self.optimizer.state_dict()
        state["state"] = {0: under("adam", tensors)}
        self.optimizer.load_state_dict(state)
        self._restore_exchanged(tensors, fields)

    def _restore_exchanged(self, tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
        for layer, boundary in self.cuts.items():
            boundary.restore(under(f"codec.{layer}", tensors))
        self.reducer.restore(under("reducer", tensors))
        self.held.restore(tensors, fields)

    # --- a tick that breaks off, or is skipped -------------------------------------------------

    def mark(self) -> None:
        """Remember what a tick changes before its optimizer does: up to there it can be taken back."""
        tensors, fields = self._exchanged()
        self._mark = _copied(tensors), deepcopy(fields), self.held.inbox.waiting()

    def rollback(self) -> None:
        """Back to the mark, from wherever the tick broke off before its optimizer; again and again, if need be."""
        tensors, fields, inbox = self._mark
        self._restore_exchanged(_copied(tensors), deepcopy(fields))
        self.held.inbox.put_back(inbox)
        self.refusal()
        self.seal.digest, self.kept = None, {}

    def refusal(self) -> str:
        """What a codec would not encode since this was last asked; "" if there is nothing."""
        said = [boundary.refused for boundary in self.cuts.values() if boundary.refused]
        for boundary in self.cuts.values():
            boundary.refused = ""
        return said[0] if said else ""

    # --- a grid that is another ----------------------------------------------------------------

    def has_own(self, tick: int) -> bool:
        """Whether `tick` needs what no other replica holds: debts to the sum of gradients, statistics not summed yet."""
        due = self.bases.due(tick)
        ways = [boundary.way(way) for boundary in self.cuts.values() for way in ("fwd", "bwd")]
        return bool(self.reducer.state()) or any(way.own(due) for way in ways)

    def meet(self, index: int, dp: int, init: str) -> None:
        """Take place `index` of a grid with `dp` replicas. What this rank owes to others' gradients stays its own."""
        self.grid.join(index, dp, init)
        if self.reducer.dp != dp:  # the grid may have had that number before, in a meeting that broke off
            owed = self.reducer.state()
            self.reducer.join()
            if owed and self.reducer.state():
                self.reducer.restore(owed)


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of what a tick writes to: it never writes to a correction, nor to what `delta` keeps of a source."""
    return {k: v if k.startswith(("correction", "source.")) else v.clone() for k, v in tensors.items()}


def build_rank(setup: RankSetup, grid: Grid) -> Rank:
    """The stage of `grid`'s rank, loaded, with the boundaries inside it and at its two ends."""
    swarm, folder = setup.swarm, resolve(setup.model.path)
    shape = model_shape(str(folder))
    assert shape is not None  # `resolve` gives a folder that is on this machine
    span = spans(shape.layers, swarm.boundaries, swarm.pp)[grid.p]
    stage = Stage(
        folder,
        span,
        getattr(torch, setup.model.dtype),
        grid.device,
        attention=setup.model.attention,
        checkpointing=swarm.activation_checkpointing,
        lora=setup.model.lora,
    )
    cuts = {
        layer: Boundary(setup.codec, index, stage.config.hidden_size, setup.seed, grid.ledger).to(grid.device)
        for index, layer in enumerate(swarm.boundaries)
        if span.lo <= layer <= span.hi
    }
    return Rank(setup, stage, cuts, grid)


def _optimizer(grpo: GrpoConfig, stage: Stage) -> torch.optim.AdamW:
    """One for the whole stage: its weights and their gradient are one flat parameter."""
    parameter = torch.nn.Parameter(stage.weights.master)
    parameter.grad = stage.weights.grad
    return torch.optim.AdamW([parameter], lr=grpo.lr, betas=grpo.betas, weight_decay=grpo.weight_decay, fused=True)
