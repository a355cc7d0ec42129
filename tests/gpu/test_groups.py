"""Process groups of nccl: who leaves after a failure is held up by nobody, and all meet again."""

from __future__ import annotations

import multiprocessing
import os
import time
from typing import Any

import pytest
import torch

from anchor_service.errors import WaitTimeout
from codec.ledger import Ledger
from deploy.cluster.placement import BLOCKING
from swarm.grid import Grid, PeerLost
from swarm.meeting import meeting

TIMEOUT_S = 10.0
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def fail_and_meet_again(rank: int, device: str, first: str, second: str, told: Any) -> None:
    """Rank 0 leaves while rank 1 waits for it in a sum: seconds that leaving took, and a sum in new groups."""
    os.environ |= BLOCKING | {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    here = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(here)
    grid, value = Grid(rank, 2, 1, here, Ledger(), TIMEOUT_S, first), torch.full((4,), rank + 1.0, device=here)
    if rank == 1:
        with pytest.raises((WaitTimeout, PeerLost)):
            grid.sum_dp(value.clone(), "grad_dp")
    start = time.monotonic()
    grid.part()
    left = time.monotonic() - start
    grid.join(rank, 2, second)
    grid.sum_dp(value, "grad_dp")
    told.put((rank, left, value.tolist()))


def two_ranks(device: str) -> list[tuple[int, float, list[float]]]:
    context = multiprocessing.get_context("spawn")  # CUDA does not live on in a fork
    told, stores = context.Queue(), [meeting("127.0.0.1") for _ in range(2)]
    inits = [init for _, init in stores]
    ranks = [context.Process(target=fail_and_meet_again, args=(rank, device, *inits, told)) for rank in range(2)]
    try:
        for rank in ranks:
            rank.start()
        return sorted(told.get(timeout=90 + 2 * TIMEOUT_S) for _ in ranks)
    finally:
        for rank in ranks:
            rank.kill()


def test_a_rank_leaves_at_once_and_all_meet_again():
    found = two_ranks("cuda")
    assert [rank for rank, _, _ in found] == [0, 1]
    assert all(left < TIMEOUT_S for _, left, _ in found)
    assert all(total == [3.0] * 4 for _, _, total in found)
