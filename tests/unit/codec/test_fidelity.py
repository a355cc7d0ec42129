"""What a way keeps, summed over microbatches: the same as over all rows at once."""

from __future__ import annotations

import pytest
import torch

from codec.fidelity import Fidelity


def test_sums_over_microbatches_are_those_of_all_rows():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 8, generator=g) + 3
    x_hat = x + 0.1 * torch.randn(60, 8, generator=g)
    seen = Fidelity()
    for rows in torch.arange(60).split(17):
        seen.add(x[rows], x_hat[rows])
    error = (x - x_hat).double().square().sum() / (x.double() - x.double().mean(0)).square().sum()
    assert seen.fvu("fvu")["fvu"] == pytest.approx(error.item(), rel=1e-5)
    cosine = torch.nn.functional.cosine_similarity(x.double().view(1, -1), x_hat.double().view(1, -1)).item()
    assert seen.cosine("cosine")["cosine"] == pytest.approx(cosine, rel=1e-6)


def test_of_nothing_and_of_zeros_there_is_no_number():
    seen = Fidelity()
    assert seen.fvu("fvu") == seen.cosine("cosine") == {}
    seen.add(torch.zeros(3, 2), torch.zeros(3, 2))
    assert seen.fvu("fvu") == seen.cosine("cosine") == {}
