"""Weights that come from a GPU, or go to one: the frames of a CPU, byte for byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rl.config import SnapshotConfig
from rl.snapshot import Receiver, Sender

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
N = 1_000_003


@pytest.mark.parametrize("encoding", ["delta", "full"])
@pytest.mark.parametrize("bf16", [False, True])
def test_frames_and_what_comes_of_them_are_those_of_a_cpu(bf16: bool, encoding: str):
    config = SnapshotConfig(encoding=encoding)
    first = 0.02 * torch.randn(N, generator=torch.Generator().manual_seed(0))
    later = first + 5e-6 * torch.randn(N, generator=torch.Generator().manual_seed(1)).sign()
    here, there = Sender(config, bf16), Sender(config, bf16)
    to_cpu, to_gpu = Receiver(config), Receiver(config)
    held, held_there = first.clone(), first.cuda()
    for tick, weights in enumerate((first, later)):
        frame = here.frame(weights, tick, 0)
        assert np.array_equal(there.frame(weights.cuda(), tick, 0), frame)
        to_cpu.load([frame], tick, held), to_gpu.load([frame], tick, held_there)
        assert torch.equal(held_there.cpu(), held)
