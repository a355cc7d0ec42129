"""Sums of two replicas' gradients beside what torch and zstd make of them: `make bench`, or python -m benchmarks.gradient_sums.

Gradients have the shapes of four decoder layers of SmolLM2: a part of rank 8 that both replicas share, from columns that stay, and
noise of each. Time of torch's hooks is that of the hook alone, of ours and zstd's that of the call; all in turn in every round, by
gloo over the loopback. Seconds at 16 Mbit/s are its own and those of its bytes. `what arrived`: cosine of the sum of all rounds'
results with that of their true sums, so that error feedback counts.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.multiprocessing.spawn import spawn

from codec.config import GradientConfig
from codec.gradient import gradient_sum
from codec.ledger import Ledger
from codec.planes import expand, shrink
from swarm.grid import Grid
from swarm.meeting import meeting

RANK, REPLICAS, ROUNDS = 4, 2, 20
WARM = 5  # rounds that do not count: torch's PowerSGD sums whole at first, and makes its memory in the third
LAYER = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536), (576,), (576,)]
SHAPES = LAYER * 4
PARAMETERS = sum(map(prod, SHAPES))
MBIT_S = 16
DENSE = "torch, allreduce_hook (fp32)"
CPU = torch.device("cpu")
Job = Callable[[Tensor], tuple[Tensor, float, float]]  # flat gradient -> the sum, seconds, bytes that this replica sent


class Row(NamedTuple):
    name: str
    seconds: float
    megabytes: float
    arrived: float


def gradient(rank: int, round: int) -> Tensor:
    """Flat [PARAMETERS]: of rank 8, its columns always the same, and alike on both replicas; and noise of this one, of a size with it."""
    always, both = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + round)
    own = torch.Generator().manual_seed(1000 * (rank + 1) + round)
    parts = []
    for shape in SHAPES:
        noise = torch.randn(*shape, generator=own)
        factors = [torch.randn(n, 8, generator=g) for n, g in zip(shape, (always, both))]
        shared = factors[0] @ factors[1].T / 8**0.5 if len(shape) == 2 else torch.randn(*shape, generator=both)
        parts.append((shared + noise).flatten())
    return torch.cat(parts)


class _Given(nn.Module):
    """A module whose gradient is what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in SHAPES])

    def forward(self, gradients: list[Tensor]) -> Tensor:
        return torch.stack([(p * g).sum() for p, g in zip(self.values, gradients)]).sum()


def by_hook(state: Any, hook: Callable[[Any, Any], Any], sent: Callable[[], float]) -> Job:
    """A hook of torch's DistributedDataParallel, all parameters in one bucket. Its result is a mean."""
    module = _Given()
    wrapped = nn.parallel.DistributedDataParallel(module, bucket_cap_mb=10_000)
    seconds = [0.0]

    @functools.wraps(hook)  # DDP reads its annotations
    def timed(state: Any, bucket: Any) -> Any:
        start = time.perf_counter()
        done = hook(state, bucket)
        value = done.wait()
        seconds[0] += time.perf_counter() - start
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(value[0] if isinstance(value, list) else value)
        return future

    wrapped.register_comm_hook(state, timed)

    def job(flat: Tensor) -> tuple[Tensor, float, float]:
        seconds[0] = 0.0
        wrapped.zero_grad()
        parts = [part.view(shape) for part, shape in zip(flat.split([prod(s) for s in SHAPES]), SHAPES)]
        wrapped(parts).backward()
        found = torch.cat([p.grad.flatten() for p in module.values if p.grad is not None])
        return found * REPLICAS, seconds[0], sent()

    return job


def by_zstd(grid: Grid) -> Job:
    """bf16, its two planes of bytes as zstd frames, to everybody: without loss beyond bf16."""

    def job(flat: Tensor) -> tuple[Tensor, float, float]:
        start = time.perf_counter()
        pairs = flat.bfloat16().view(torch.uint8).numpy().reshape(-1, 2)
        planes = [shrink(np.ascontiguousarray(pairs[:, i])) for i in (0, 1)]
        total, limits = torch.zeros(flat.numel(), 2, dtype=torch.uint8), [(0, flat.numel())] * REPLICAS
        came = [grid.replicas.gather(torch.from_numpy(plane.copy()), limits) for plane in planes]
        found = torch.zeros_like(flat)
        for k in range(REPLICAS):
            for i in (0, 1):
                total[:, i] = torch.from_numpy(expand(came[i][k].numpy(), flat.numel(), "bench").copy())
            found += total.view(torch.bfloat16).view(-1).float()
        return found, time.perf_counter() - start, float(sum(plane.size for plane in planes))

    return job


def by_ours(grid: Grid, **settings: Any) -> Job:
    reduce = gradient_sum(GradientConfig(**settings), SHAPES, grid.replicas, 0, CPU)

    def job(flat: Tensor) -> tuple[Tensor, float, float]:
        found = flat.clone()
        grid.ledger.drain()
        start = time.perf_counter()
        reduce(found)
        return found, time.perf_counter() - start, grid.ledger.drain()["grad_dp"][0]

    return job


def jobs_of(grid: Grid) -> dict[str, Job]:
    state = powerSGD_hook.PowerSGDState(None, RANK, start_powerSGD_iter=2)

    def factors() -> float:
        """As the state counts it: numbers that it sends of those it was given, after the rounds that are summed whole."""
        return 4.0 * state.total_numel_after_compression / max(1, state.total_numel_before_compression) * PARAMETERS

    powersgd = {"kind": "powersgd", "rank": RANK}
    return {
        DENSE: by_hook(None, default_hooks.allreduce_hook, lambda: 4.0 * PARAMETERS),
        "torch, fp16_compress_hook": by_hook(None, default_hooks.fp16_compress_hook, lambda: 2.0 * PARAMETERS),
        "zstd of bf16": by_zstd(grid),
        f"torch, powerSGD_hook, rank {RANK}": by_hook(state, powerSGD_hook.powerSGD_hook, factors),
        f"powersgd, rank {RANK}": by_ours(grid, **powersgd),
        f"powersgd, rank {RANK}, 4 bits": by_ours(grid, **powersgd, bits=4.0),
        "sign": by_ours(grid, kind="sign"),
        "sparse, 0.5 bits": by_ours(grid, kind="sparse", bits=0.5),
    }


def _rows(rank: int, grid: Grid) -> list[Row]:
    jobs = jobs_of(grid)
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    sums = {name: torch.zeros(PARAMETERS) for name in jobs}
    sent, true = dict.fromkeys(jobs, 0.0), torch.zeros(PARAMETERS)
    for round in range(ROUNDS + WARM):
        given = [gradient(k, round) for k in range(REPLICAS)]
        true += sum(given) if round >= WARM else 0.0
        for name, job in jobs.items():
            dist.barrier()
            found, took, sent[name] = job(given[rank].clone())
            if round >= WARM:
                seconds[name].append(took)
                sums[name] += found
    cosine = torch.nn.functional.cosine_similarity
    return [
        Row(name, statistics.median(seconds[name]), sent[name] / 1e6, cosine(sums[name], true, dim=0).item())
        for name in jobs
    ]


def _replica(rank: int, init: str) -> None:
    torch.set_num_threads(1)
    rows = _rows(rank, Grid(rank, REPLICAS, 1, CPU, Ledger(), 120, init))
    if rank == 0:
        dense = next(row for row in rows if row.name == DENSE)
        baseline = f"{DENSE}, {1e3 * dense.seconds:.0f} ms"
        print(f"gradients of {PARAMETERS:,} parameters, {REPLICAS} replicas (baseline: {baseline})")
        for row in rows:
            ratio, on_a_link = row.seconds / dense.seconds, row.seconds + 8 * row.megabytes / MBIT_S
            print(
                f"  {row.name:36} {ratio:7.2f} x  {row.megabytes:8.3f} MB  {on_a_link:7.2f} s at {MBIT_S} Mbit/s  "
                f"what arrived {row.arrived:6.3f}"
            )
    Grid.leave()


def main() -> None:
    _store, init = meeting("127.0.0.1")
    spawn(_replica, (init,), REPLICAS)


if __name__ == "__main__":
    main()
