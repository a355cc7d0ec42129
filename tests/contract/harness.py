"""One rank of a swarm without Ray: the same Rank and tick that the actor runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from anchor_service.config import AnchorConfig
from anchor_service.messages import Correction
from codec.config import CodecConfig
from codec.ledger import Ledger
from merger import merger_class
from merger.config import MergerConfig
from rl.aggregation import weighted
from rl.batch import Batch, deal, deal_together
from rl.config import GrpoConfig, ModelConfig
from rl.lora_config import LoraConfig
from rl.objective import microbatches
from swarm.config import SwarmConfig
from swarm.grid import Grid
from swarm.messages import TickPlan
from swarm.rank import MiniBatch, Rank, RankSetup, build_rank
from swarm.tick import tick

LAYERS = 4


def make_rank(
    folder: Path,
    rank: int = 0,
    dp: int = 1,
    pp: int = 1,
    boundaries: tuple[int, ...] = (2,),
    codec: CodecConfig | None = None,
    merger: MergerConfig | None = None,
    grpo: GrpoConfig | None = None,
    anchor: AnchorConfig | None = None,
    q_cadence: int = 2,
    init: str = "",
    timeout_s: float = 30.0,
    check_every: int = 1,
    dtype: str = "float32",
    checkpointing: bool = False,
    on: str = "cpu",
    on_nan: Literal["stop", "skip"] = "skip",
    lora: int = 0,
) -> Rank:
    grid = Grid(rank, dp, pp, torch.device(on), Ledger(), timeout_s, init)
    layout: dict[str, Any] = {"dp": dp, "pp": pp, "boundaries": list(boundaries)}
    swarm = SwarmConfig(**layout, check_every=check_every, activation_checkpointing=checkpointing, on_nan=on_nan)
    setup = RankSetup(
        model=ModelConfig(path=str(folder), dtype=dtype, lora=LoraConfig(rank=lora)),
        codec=codec or CodecConfig(kind="powersgd", rank=8),
        swarm=swarm,
        grpo=grpo or GrpoConfig(lr=1e-3),
        anchor=anchor or AnchorConfig(),
        stride=1 if merger and merger_class(merger.kind).looks else None,
        merger=merger or MergerConfig(kind="none"),
        q_cadence=q_cadence,
        temperature=1.0,
        seed=3,
        ticks=100,
    )
    return build_rank(setup, grid)


def mini_batch(
    rank: Rank, batch: Batch, size: int = 3, trainer_logprobs: bool = False, share: bool = False
) -> MiniBatch:
    grid, hand, batch = rank.grid, deal_together if share else deal, weighted(batch, rank.setup.grpo)
    micros = microbatches(batch, hand(batch, grid.dp)[grid.d], size, grid.device, share=share)
    old = [m.rollout_logprobs for m in micros]
    if trainer_logprobs:
        old = rank.pipeline.logprobs(micros, 1.0)
    return MiniBatch(micros, old, batch.loss_tokens)


def run_ticks(rank: Rank, batches: list[Batch], corrections: dict[int, Correction] | None = None, **kw: Any) -> dict:
    """Ticks 1.. over `batches`; losses, the first gradient and the final weights by name."""
    corrections, version, losses, reports = corrections or {}, 0, [], []
    first_grad: dict[str, np.ndarray] = {}
    optimizer_step = rank.optimizer.step

    def step() -> None:
        if not first_grad:
            first_grad.update(by_name(rank, rank.stage.weights.grad))
        optimizer_step()

    rank.optimizer.step = step
    for t, batch in enumerate(batches, start=1):
        correction = corrections.get(t)
        version = correction.version if correction else version
        plan = TickPlan(t, 0, correction, version)
        mini = mini_batch(rank, batch, **kw)
        report = tick(rank, plan, mini, lambda c: c)
        losses.append(report.sums.get("actor/pg_loss", 0.0) / mini.denominator)
        reports.append(report)
    return {
        "losses": losses,
        "grad": first_grad,
        "weights": by_name(rank, rank.stage.weights.master),
        "reports": reports,
        "flat": rank.stage.weights.master.detach().cpu().numpy().copy(),
    }


def by_name(rank: Rank, flat: torch.Tensor) -> dict[str, np.ndarray]:
    weights = rank.stage.weights
    return {n: weights.view(i, flat).detach().cpu().numpy().copy() for i, n in enumerate(weights.names)}


def signs_by_name(state: Rank) -> Correction:
    """A sign for every parameter that depends on its name alone, so that every layout gets the same."""
    weights = state.stage.weights
    signs = torch.empty(weights.numel, dtype=torch.int8)
    for i, name in enumerate(weights.names):
        generator = torch.Generator().manual_seed(sum(name.encode()))
        weights.view(i, signs).copy_(torch.randint(-1, 2, weights.shapes[i], generator=generator))
    return Correction(1, 0, None, signs, "")
