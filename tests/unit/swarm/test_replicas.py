"""The digest of a stage's weights."""

from __future__ import annotations

import pytest
import torch
import xxhash

from swarm import replicas


@pytest.mark.parametrize("n", [0, 1, 99, 100, 101, 250])
def test_a_digest_made_block_by_block_is_that_of_the_whole(n: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(replicas, "BLOCK", 100)
    weights = torch.randn(n, generator=torch.Generator().manual_seed(n))
    whole = xxhash.xxh3_64_intdigest(weights.numpy().tobytes()) - (1 << 63)
    assert replicas.weights_digest(weights) == whole
    assert -(1 << 63) <= whole < 1 << 63
