"""What codecs are said to cost is what they send, and nothing is sent that has no cost."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch

from codec.boundary import CODECS, Boundary
from codec.config import GRADIENT_KINDS, CodecConfig, GradientConfig
from codec.costs import COSTS, GRADIENTS, BoundaryShape, CodecCost, Tokens, codec_cost, gradient_cost
from codec.gradient import GRADIENT_SUMS, gradient_sum
from codec.ledger import Ledger
from codec.rows import rows_of
from tests.replicas import ByThreads, on_threads

HIDDEN, SAMPLES, LENGTH = 32, 6, 10
EXACT = {
    "none": CodecConfig(kind="none"),
    "powersgd": CodecConfig(kind="powersgd", rank=6),
    "own basis": CodecConfig(kind="powersgd", rank=6, backward_basis="own"),
    "first token exact": CodecConfig(kind="powersgd", rank=6, first_token="exact"),
    "random_k": CodecConfig(kind="random_k", rank=6),
    "random_k, first token exact": CodecConfig(kind="random_k", rank=6, first_token="exact"),
}


def cost(config: CodecConfig, itemsize: int = 4) -> CodecCost:
    return codec_cost(config, BoundaryShape(HIDDEN, itemsize), Tokens(1e6, LENGTH))


def test_every_codec_has_a_cost():
    assert set(COSTS) == set(CODECS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", EXACT.values(), ids=EXACT)
def test_a_token_costs_what_it_sends(config: CodecConfig, dtype: torch.dtype):
    rng, ledger = torch.Generator().manual_seed(0), Ledger()
    ids = torch.randint(0, 9, (SAMPLES, LENGTH), generator=rng).numpy()
    rows = rows_of(ids, ids >= 0, torch.device("cpu"))
    tokens = SAMPLES * LENGTH
    boundary, x = Boundary(config, 0, HIDDEN, 3, ledger), torch.randn(tokens, HIDDEN, generator=rng).to(dtype)
    boundary.encode(x, rows, observe=True)
    boundary.encode_backward(x, rows)
    found = cost(config, dtype.itemsize)
    assert ledger.sent["boundary_fwd"] == pytest.approx(tokens * found.forward, rel=1e-12)
    assert ledger.sent["boundary_bwd"] == tokens * found.backward
    itemsize = 2 if config.kind == "random_k" else dtype.itemsize  # its rates are shares of bf16, as its values are
    assert found.dense == HIDDEN * itemsize and ledger.dense["boundary_fwd"] == x.nbytes
    tables = [boundary.refresh_alone(way).numel() for way in ("fwd", "bwd")]
    assert [n for n in tables if n] == [found.tables] * found.ways


@pytest.mark.parametrize("coder", ["fixed", "entropy"])
def test_a_transform_costs_its_rate_tables_included(coder: str):
    config = CodecConfig(kind="transform", coder=coder, rate=0.1, backward_rate=0.05)
    found = cost(config)
    assert found.dense == 2 * HIDDEN  # of bf16, whatever the model's dtype
    assert found.forward + found.tables / 1e6 == pytest.approx(0.1 * found.dense)
    assert found.backward + found.tables / 1e6 == pytest.approx(0.05 * found.dense)
    assert found.once and found.ways == 2 and found.books == 40


SHAPES = [(8, 12), (12,), (3, 4), (40, 20), (20,)]


GRADIENT_CASES = {
    "none": {},
    "r=1": {"kind": "powersgd", "rank": 1},
    "r=2": {"kind": "powersgd", "rank": 2},
    "r=30": {"kind": "powersgd", "rank": 30},
    "r=2, 4 bits": {"kind": "powersgd", "rank": 2, "bits": 4.0},
    "sign": {"kind": "sign"},
    "sparse": {"kind": "sparse", "bits": 0.5},
}


@pytest.mark.parametrize("case", GRADIENT_CASES.values(), ids=GRADIENT_CASES)
def test_a_gradient_costs_what_is_sent_and_kept(case: dict[str, Any]):
    """Two replicas: each sends all of it once, by a ring or coded in two halves."""
    config, shapes = GradientConfig(**case), [(120 * a, *b) for a, *b in SHAPES] if "bits" in case else SHAPES
    n = sum(map(prod, shapes))

    def work(replicas: ByThreads) -> tuple[float, int, int]:
        reduce = gradient_sum(config, shapes, replicas, 0, torch.device("cpu"))
        reduce(torch.randn(n, generator=torch.Generator().manual_seed(replicas.index)))
        kept = sum(t.nbytes for name, t in reduce.state().items() if name == "error")
        return replicas.sent, replicas.rounds, kept

    found = gradient_cost(config, shapes, 2)
    for sent, rounds, kept in on_threads(2, work):
        assert sent == pytest.approx(found.sent, rel=0.02)
        assert rounds <= found.sums and kept == found.kept


def test_the_registries_have_the_kinds_of_the_config():
    assert set(GRADIENTS) == set(GRADIENT_SUMS) == set(GRADIENT_KINDS)
