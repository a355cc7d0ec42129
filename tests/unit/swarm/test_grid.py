"""How a rank leaves its process groups: by whether its peers are there to wait for."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from codec.ledger import Ledger
from swarm.grid import Grid


@pytest.mark.parametrize(("device", "expected"), [("cuda", ["abort"]), ("cpu", ["destroy"])])
def test_a_rank_that_fails_waits_for_nothing_that_is_under_way(
    device: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
):
    """To destroy nccl's groups would: with a peer that is gone, for ever."""
    done: list[str] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: not done)
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: done.append("abort"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("destroy"))
    grid = Grid(0, 1, 1, torch.device(device), Ledger())
    grid.part()
    assert done == expected
    grid.part()
    assert done == expected
