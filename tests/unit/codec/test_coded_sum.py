"""Sums of gradients in few bits: the same on all replicas, and nothing of what was put in is lost."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codec.coded_sum import coded_sum
from codec.config import GradientConfig
from codec.costs import SMALLEST, owners
from codec.gradient import GradientSum, gradient_sum
from codec.vector import EntropyVector, SignVector, VectorCoder
from tests.own_parts import write_parts
from tests.replicas import ByThreads, on_threads

SHAPES = [(24, 18), (18,), (12, 20), (60, 40)]
N = sum(map(prod, SHAPES))
KINDS: dict[str, dict[str, Any]] = {
    "powersgd": {"kind": "powersgd", "rank": 3},
    "powersgd, 4 bits": {"kind": "powersgd", "rank": 3, "bits": 4.0},
    "sign": {"kind": "sign"},
    "sparse": {"kind": "sparse", "bits": 0.5},
}
CPU = torch.device("cpu")


def gradient(replica: int, tick: int) -> torch.Tensor:
    """Low rank plus noise, different on each replica."""
    g = torch.Generator().manual_seed(100 * tick + replica)
    parts = [torch.randn(s, generator=g) if len(s) == 1 else low_rank(s, g) for s in SHAPES]
    return torch.cat([p.flatten() for p in parts])


def low_rank(shape: tuple[int, ...], g: torch.Generator) -> torch.Tensor:
    a, b = shape
    return torch.randn(a, 2, generator=g) @ torch.randn(2, b, generator=g) + 0.1 * torch.randn(shape, generator=g)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("coder", [SignVector(), EntropyVector(0.5), EntropyVector(4)], ids=["sign", "sparse", "fine"])
def test_what_is_lost_and_what_arrives_is_what_was_put_in(coder: VectorCoder, count: int):
    def work(replicas: ByThreads) -> tuple[torch.Tensor, torch.Tensor]:
        return coded_sum(gradient(replicas.index, 0), coder, replicas, 0.0)

    found = on_threads(count, work)
    assert all(torch.equal(total, found[0][0]) for total, _ in found)
    put_in = sum(gradient(k, 0).double() for k in range(count))
    left = sum(lost.double() for _, lost in found)
    torch.testing.assert_close(found[0][0].double() + left, put_in, rtol=1e-5, atol=1e-4)


def test_each_replica_sends_a_rings_share():
    """2 (n-1)/n of a coded vector, however many they are."""
    n, bits = 120_000, 1.0
    for count in (2, 3, 6):

        def work(replicas: ByThreads) -> float:
            x = torch.randn(n, generator=torch.Generator().manual_seed(replicas.index))
            coded_sum(x, EntropyVector(bits), replicas, 0.0)
            return replicas.sent

        for sent in on_threads(count, work):
            assert sent == pytest.approx(2 * (count - 1) / count * n * bits / 8, rel=0.03)


def ticks(config: GradientConfig, count: int, rounds: int, broken_at: int | None = None) -> list[dict[str, Any]]:
    """Sums of `rounds` ticks, with the error after them; `broken_at`: saved and restored there."""

    def work(replicas: ByThreads) -> dict[str, Any]:
        reduce: GradientSum = gradient_sum(config, SHAPES, replicas, 5, CPU)
        sums = []
        for t in range(rounds):
            if t == broken_at:
                state = {name: value.clone() for name, value in reduce.state().items()}
                reduce = gradient_sum(config, SHAPES, replicas, 5, CPU)
                reduce.restore(state)
            flat = gradient(replicas.index, t)
            reduce(flat)
            sums.append(flat.clone())
        return {"sums": torch.stack(sums), "error": reduce.state()["error"]}

    return on_threads(count, work)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_over_ticks_nothing_is_lost_but_what_is_still_to_be_sent(kind: dict[str, Any], count: int):
    rounds = 6
    found = ticks(GradientConfig(**kind), count, rounds)
    for other in found[1:]:
        assert torch.equal(other["sums"], found[0]["sums"])
    put_in = sum(gradient(k, t).double() for k in range(count) for t in range(rounds))
    came_out = found[0]["sums"].double().sum(0) + sum(rank["error"].double() for rank in found)
    torch.testing.assert_close(came_out, put_in, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_resumed_sum_goes_on_to_the_bit(kind: dict[str, Any]):
    config = GradientConfig(**kind)
    whole, broken = ticks(config, 2, 5), ticks(config, 2, 5, broken_at=3)
    for a, b in zip(whole, broken):
        assert torch.equal(a["sums"], b["sums"]) and torch.equal(a["error"], b["error"])


def test_factors_in_few_bits_are_nearly_those_in_fp32():
    shape = (2000, 500)
    m = low_rank(shape, torch.Generator().manual_seed(0)).flatten()

    def work(replicas: ByThreads, bits: float | None) -> torch.Tensor:
        reduce = gradient_sum(GradientConfig(kind="powersgd", rank=3, bits=bits), [shape], replicas, 5, CPU)
        for _ in range(3):
            flat = m.clone()
            reduce(flat)
        return flat

    exact, coded = (on_threads(2, lambda r, b=bits: work(r, b))[0] for bits in (None, 4.0))
    assert (exact - 2 * m).norm() < 0.2 * m.norm()  # but for the noise it is of rank 2
    assert (coded - exact).norm() < 0.2 * exact.norm()


def test_what_replicas_have_apart_does_not_pile_up():
    """Two replicas pull in opposite directions for ever: their sum is nothing, and so must be what they owe."""
    pull = gradient(0, 0)

    def work(replicas: ByThreads) -> float:
        reduce = gradient_sum(GradientConfig(kind="powersgd", rank=3, bits=4.0), SHAPES, replicas, 5, CPU)
        for _ in range(100):
            reduce(pull.clone() * (1 if replicas.index == 0 else -1))
        return float(reduce.state()["error"].norm() / pull.norm())

    assert max(on_threads(2, work)) < 40  # a rank of 3 sends them about once in 20 ticks; piled up they would be 100


def test_an_own_kind_is_imported_and_a_wrong_one_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_parts(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def work(replicas: ByThreads) -> torch.Tensor:
        flat = gradient(replicas.index, 0)
        gradient_sum(GradientConfig(kind="my_gradient:halves"), SHAPES, replicas, 0, CPU)(flat)
        return flat

    one, other = on_threads(2, work)
    assert torch.equal(one, other)
    torch.testing.assert_close(one, gradient(0, 0) + gradient(1, 0), rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match=r"codec\.gradient\.kind = 'my_gradient:no' cannot be imported"):
        on_threads(2, lambda r: gradient_sum(GradientConfig(kind="my_gradient:no"), SHAPES, r, 0, CPU))


def test_chunks_are_nearly_equal_and_few_where_there_is_little_to_sum():
    from codec.coded_sum import _chunks

    for n in (0, 1, 4095, 8192, 12_289, 100_000):
        for count in (1, 2, 3, 8):
            lengths = np.array([c.stop - c.start for c in _chunks(n, count)])
            filled = lengths[: owners(n, count)]
            assert lengths.sum() == filled.sum() == n and np.ptp(filled) <= 1 and len(lengths) == count
            assert len(filled) == 1 or filled.min() >= SMALLEST
