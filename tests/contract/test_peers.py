"""Peers' implementations as oracles: torch.distributed.pipelining and PyTorch's PowerSGD hook."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as hook
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from codec.boundary import Boundary
from codec.config import CodecConfig
from codec.ledger import Ledger
from codec.powersgd_sum import PowerSGDSum
from rl.policy import Stage
from rl.spans import spans
from swarm.grid import Grid
from swarm.meeting import join
from swarm.pipeline import Pipeline
from tests.conftest import make_batch, on_ranks
from tests.contract.harness import make_rank, mini_batch

SAMPLES, LENGTH, MICROS = 8, 7, 4


class _Half(nn.Module):
    """A stage for torch's pipelining: the boundary is an ordinary matrix product at its edge."""

    def __init__(self, folder: Path, p: int, q: torch.Tensor):
        super().__init__()
        self.stage = Stage(folder, spans(4, [2], 2)[p], torch.float32, torch.device("cpu"))
        self.p, self.q = p, q

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        real = torch.ones(x.shape[:2], dtype=torch.bool)
        if self.p == 0:
            return self.stage(x, real, {}) @ self.q
        return self.stage.logits(self.stage(x @ self.q.T, real, {}))


def _torch_pipeline(rank: int, init: str, folder: Path, ids: torch.Tensor) -> dict[str, np.ndarray]:
    dist.init_process_group("gloo", store=join(init, timedelta(seconds=30)), rank=rank, world_size=2)
    q = Boundary(CodecConfig(kind="powersgd", rank=8), 0, 32, 3, Ledger()).forward.basis.q
    half = _Half(folder, rank, q)
    micro = ids[: SAMPLES // MICROS]
    example = micro if rank == 0 else torch.zeros(*micro.shape, 8, requires_grad=True)
    stage = PipelineStage(half, rank, 2, torch.device("cpu"), input_args=(example,))

    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logp = torch.log_softmax(logits[:, 2:-1], -1)
        return -logp.gather(2, target[:, 3:, None]).sum()

    schedule = ScheduleGPipe(stage, MICROS, loss_fn=loss, scale_grads=False)
    schedule.step(ids) if rank == 0 else schedule.step(target=ids)
    dist.barrier()  # leave together; the process ends at once, so the group is not taken down
    weights = half.stage.weights
    return {n: weights.view(i, weights.grad).numpy().copy() for i, n in enumerate(weights.names)}


def _our_pipeline(rank: int, init: str, folder: Path, ids: torch.Tensor) -> dict[str, np.ndarray]:
    state = make_rank(folder, rank, pp=2, init=init)
    batch = make_batch(SAMPLES)
    fixed = {
        "tokens": ids.numpy().astype(np.int32).reshape(-1),
        "prompt": np.full(SAMPLES, 3, np.int32),
        "total": np.full(SAMPLES, LENGTH, np.int32),
        "rollout_logprobs": np.zeros(SAMPLES * (LENGTH - 3), np.float32),
    }
    mini = mini_batch(state, type(batch)(**(vars(batch) | fixed)), SAMPLES // MICROS)

    def loss(hidden, micro, i):
        from rl.grpo import LossTerms, token_logprobs

        logp, _ = token_logprobs(state.stage.logits(hidden[micro.predicts]), micro.targets, 1.0, False)
        return LossTerms(-logp.sum(), {}, logp.detach())

    Pipeline(state.stage, state.cuts, state.grid).train(mini.micros, loss)
    weights = state.stage.weights
    return {n: weights.view(i, weights.grad).numpy().copy() for i, n in enumerate(weights.names)}


def test_the_wire_boundary_equals_torch_pipelining(untied_model: Path):
    ids = torch.randint(2, 48, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))
    expected = on_ranks(2, _torch_pipeline, untied_model, ids)
    found = on_ranks(2, _our_pipeline, untied_model, ids)
    for e, f in zip(expected, found):
        for name in e:
            scale = np.abs(e[name]).max()
            np.testing.assert_allclose(f[name], e[name], rtol=1e-4, atol=1e-5 * scale, err_msg=name)


def _gradients(rank: int, rounds: int) -> list[list[torch.Tensor]]:
    """Low-rank gradients plus noise, different on each rank: a matrix, a vector and another matrix."""
    g = torch.Generator().manual_seed(100 + rank)
    return [
        [
            torch.randn(24, 4, generator=g) @ torch.randn(4, 18, generator=g),
            torch.randn(18, generator=g),
            torch.randn(12, 20, generator=g),
        ]
        for _ in range(rounds)
    ]


class _Sum(nn.Module):
    """A module whose gradient is what it is called with."""

    def __init__(self, parameters: nn.ParameterList):
        super().__init__()
        self.values = parameters

    def forward(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        return sum((p * g).sum() for p, g in zip(self.values, gradients))


def test_rounds_equal_pytorchs_hook_from_the_same_start():
    expected, found = on_ranks(2, _hook_round), on_ranks(2, _our_round)
    for e, f in zip(expected, found):
        np.testing.assert_allclose(f, e, rtol=1e-3, atol=1e-4)


START = 9


def _hook_round(rank: int, init: str) -> np.ndarray:
    """Three rounds of PyTorch's hook on one matrix, its Q set by hand before the first."""
    dist.init_process_group("gloo", store=join(init, timedelta(seconds=30)), rank=rank, world_size=2)
    state = hook.PowerSGDState(None, 3, start_powerSGD_iter=2, min_compression_rate=1.0, warm_start=True)
    parameter = nn.Parameter(torch.zeros(24, 18))
    wrapped = nn.parallel.DistributedDataParallel(_Sum(nn.ParameterList([parameter])))
    wrapped.register_comm_hook(state, hook.powerSGD_hook)
    found = []
    for i in range(5):
        if i == 3:  # the hook made its memory in round 2, the first compressed one; restart it from our Q and no error
            q = torch.randn(18, 3, generator=torch.Generator().manual_seed(START))
            (bucket,) = state.q_memory_dict
            state.q_memory_dict[bucket].copy_(q.flatten())
            state.error_dict[bucket].zero_()
        wrapped.zero_grad()
        wrapped([_matrix(rank, i)]).backward()
        found.append(parameter.grad.numpy().copy() * 2)  # the hook's is a mean, ours a sum
    dist.barrier()  # leave together; the process ends at once, so the group is not taken down
    return np.stack(found[3:])


def _our_round(rank: int, init: str) -> np.ndarray:
    grid = Grid(rank, 2, 1, torch.device("cpu"), Ledger(), 30, init)
    reduce = PowerSGDSum([(24, 18)], 3, grid.replicas, START, grid.device)
    found = []
    for i in (3, 4):
        flat = _matrix(rank, i).flatten()
        reduce(flat)
        found.append(flat.view(24, 18).numpy().copy())
    grid.min_world(0, 0)  # leave together
    return np.stack(found)


def _matrix(rank: int, i: int) -> torch.Tensor:
    return torch.randn(24, 18, generator=torch.Generator().manual_seed(1000 + 10 * i + rank))
