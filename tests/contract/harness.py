"""One rank of a swarm without Ray: the same Rank and tick that the actor runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from anchor_service.config import AnchorConfig
from anchor_service.messages import Correction, TickPlan
from codec.boundary import Boundary
from codec.config import CodecConfig
from codec.gradient import DenseSum
from codec.ledger import Ledger
from merger.config import MergerConfig
from rl.batch import Batch
from rl.config import GrpoConfig
from rl.objective import deal, microbatches
from rl.policy import Stage
from rl.spans import spans
from swarm.grid import Grid
from swarm.tick import MiniBatch, Rank, Rules, tick

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
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
    on: str = "cpu",
) -> Rank:
    ledger, device = Ledger(), torch.device(on)
    grid = Grid(rank, dp, pp, device, ledger, timeout_s, init)
    span = spans(LAYERS, list(boundaries), pp)[grid.p]
    stage = Stage(folder, span, dtype, device, checkpointing=checkpointing)
    codec = codec or CodecConfig(kind="powersgd", rank=8)
    cuts = {
        layer: Boundary(codec, i, stage.config.hidden_size, 3, ledger).to(device)
        for i, layer in enumerate(boundaries)
        if stage.span.lo <= layer <= stage.span.hi
    }
    rules = Rules(
        grpo=grpo or GrpoConfig(lr=1e-3),
        anchor=anchor or AnchorConfig(),
        merger=merger or MergerConfig(kind="none"),
        q_cadence=q_cadence,
        temperature=1.0,
        check_every=check_every,
        seed=7,
    )
    reducer = DenseSum(lambda t, dense: grid.sum_dp(t, "grad_dp", dense))
    return Rank(stage, cuts, grid, rules, reducer)


def mini_batch(rank: Rank, batch: Batch, size: int = 3, trainer_logprobs: bool = False) -> MiniBatch:
    grid = rank.grid
    micros = microbatches(batch, deal(batch, grid.dp, grid.d), size, grid.device)
    old = [m.rollout_logprobs for m in micros]
    if trainer_logprobs:
        old = rank.pipeline.logprobs(micros, 1.0)
    return MiniBatch(micros, old, batch.response_tokens)


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
        report = tick(rank, plan, mini_batch(rank, batch, **kw), lambda c: c)
        losses.append(report["sums"].get("actor/pg_loss", 0.0) / batch.response_tokens)
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
