"""Triton's kernels on a GPU, and a rank's merge from the planes that they make."""

from __future__ import annotations

import pytest
import torch

from codec import signs
from merger import MERGERS
from merger.config import MergerConfig
from swarm.merge_sweep import held_form, merge_in_place

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
N = 3_000_017


def test_the_laws_hold():
    from tests.unit.codec import kernel_laws  # Triton is imported where there is a GPU

    kernel_laws.hold("cuda")


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("kind", ["signed_ema", "calibrated"])
def test_a_merge_is_that_of_a_cpu_to_the_bit(kind: str, zeros: bool):
    merger = MERGERS[kind](MergerConfig(kind=kind))
    merger.dose = 0.3
    g, m = (torch.randn(N, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    if zeros:
        g[::11], m[::7] = 0.0, 0.0
    found = g.cuda()
    counts = merge_in_place(merger, found, held_form(merger, m.cuda(), "cuda"))
    assert counts == merge_in_place(merger, g, m.sign().char())
    assert torch.equal(found.cpu().view(torch.int32), g.view(torch.int32))


def test_signs_of_a_gpu_are_encoded_as_those_of_a_cpu():
    m = torch.randn(N, generator=torch.Generator().manual_seed(2))
    there, here = signs.encode(m.cuda()), signs.encode(m)
    assert there.keys() == here.keys() and all((there[k] == here[k]).all() for k in here)
    assert torch.equal(signs.planes_of(m.cuda()).sign().cpu(), m.sign().char())
