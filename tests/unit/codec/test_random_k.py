"""`random_k` and dither: without bias over the keys, with the variance that arithmetic says, and nothing but values sent."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from codec.boundary import Boundary
from codec.config import CodecConfig
from codec.interface import CodecError
from codec.ledger import Ledger
from codec.rows import Rows, rows_of
from codec.transform.entropy import EntropyCoder
from tests.unit.codec.test_codecs import CPU, HIDDEN, Stream, boundary, ticks
from tests.unit.codec.test_coders import falling, gaussian

K = 4
RANDOM = CodecConfig(kind="random_k", rank=K)
DITHERED = CodecConfig(kind="transform", dither=True, rate=0.3, backward_rate=0.3)
KEYS = 2000


def samples(count: int = 4, length: int = 5, tick: int = 1) -> tuple[Tensor, Rows]:
    ids = np.random.default_rng(1).integers(0, 9, (count, length))
    ids[:, :2] = 3
    rows = rows_of(ids, np.ones_like(ids, bool), CPU, tick)
    x = torch.randn(len(rows), HIDDEN, generator=torch.Generator().manual_seed(2)).bfloat16().float()
    return x[rows.keeper], rows


def over_keys(b: Boundary, way: str, x: Tensor, rows: Rows, count: int = KEYS) -> Tensor:
    """What comes back under `count` other keys, [count, N, H]; all in one payload."""
    n = len(rows)
    keeper = (rows.keeper + n * torch.arange(count)[:, None]).flatten()
    keys = torch.cat([rows.redrawn(draw).keys for draw in range(count)])
    many, x = Rows(rows.first.repeat(count), keeper, keys), x.repeat(count, 1)
    if way == "fwd":
        found = b.decode(b.encode(x, many, observe=False), many, x.dtype)
    else:
        found = b.decode_backward(b.encode_backward(x, many), many, x.dtype)
    return found.view(count, n, HIDDEN)


def assert_mean(found: Tensor, expected: Tensor) -> None:
    """Each mean within 3 standard errors, but for as many of a hundred as chance lets stray; and all of them together."""
    error = found.std(0) / len(found) ** 0.5
    moved = error > 0
    away = (found.mean(0) - expected)[moved] / error[moved]
    torch.testing.assert_close(found[0][~moved], expected[~moved])
    assert (away.abs() > 3).float().mean() < 0.01
    assert abs(away.sum().item()) < 3 * away.numel() ** 0.5


# --- random_k ----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["fwd", "bwd"])
@pytest.mark.parametrize("share", [False, True])
def test_the_mean_over_keys_is_what_was_sent_and_the_variance_that_of_the_rule(way: str, share: bool):
    (x, rows), b = samples(), boundary(RANDOM.model_copy(update={"share_prefixes": share}))
    found = over_keys(b, way, x, rows)
    expected = x
    if share and way == "bwd":  # one row stands for all that share it
        expected = torch.zeros_like(x).index_add_(0, rows.keeper, x)
    assert_mean(found, expected)
    deviation = (found - expected).square().mean(0).sum().item()
    assert deviation == pytest.approx((HIDDEN / K - 1) * expected.square().sum().item(), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_payload_is_k_values_a_row_and_nothing_else(dtype: torch.dtype):
    (x, rows), b = samples(), boundary(RANDOM)
    x = x.to(dtype)
    payload = b.encode(x, rows, observe=False)
    assert payload.numel() == len(rows) * K * 2
    values, x_hat = payload.view(torch.bfloat16).view(-1, K), b.decode(payload, rows, dtype)
    for row, sent, arrived in zip(x, values, x_hat):
        at = arrived.nonzero().flatten()
        assert len(at) == K and torch.equal(arrived[at], (row[at].float() * HIDDEN / K).to(dtype))
        assert sorted(sent.tolist()) == sorted(row[at].bfloat16().tolist())
    assert b.encode_backward(x, rows).numel() == len(rows) * K * 2
    assert b.ledger.sent["boundary_fwd"] == b.ledger.sent["boundary_bwd"] == len(rows) * K * 2
    assert b.forward.tables is b.backward.tables is b.forward.rate is b.backward.rate is None


def crossing(b: Boundary, way: str, rows: Rows) -> list[tuple[int, ...]]:
    ones = torch.ones(len(rows), HIDDEN)
    if way == "fwd":
        out = b.decode(b.encode(ones, rows, observe=False), rows, ones.dtype)
    else:
        out = b.decode_backward(b.encode_backward(ones, rows), rows, ones.dtype)
    return [tuple(row.nonzero().flatten().tolist()) for row in out]


def test_every_row_way_boundary_seed_and_tick_has_coordinates_of_its_own_and_a_pass_before_the_update_the_same():
    (_, rows), (_, later) = samples(), samples(tick=2)
    first = crossing(boundary(RANDOM), "fwd", rows)
    assert len(set(first)) == len(rows)
    for other in (
        crossing(boundary(RANDOM), "bwd", rows),
        crossing(Boundary(RANDOM, 1, HIDDEN, 3, Ledger()), "fwd", rows),
        crossing(boundary(RANDOM, seed=4), "fwd", rows),
        crossing(boundary(RANDOM), "fwd", later),
    ):
        assert not set(first) & set(other)
    b = boundary(RANDOM)
    crossing(b, "fwd", later), crossing(b, "bwd", rows), b.begin_tick()  # whatever was drawn between
    assert crossing(b, "fwd", rows) == first


def test_rows_come_back_alike_on_every_grid_and_in_every_order_of_microbatches():
    ids = np.random.default_rng(0).integers(0, 9, (8, 6))
    x = torch.randn(8, 6, HIDDEN, generator=torch.Generator().manual_seed(0))

    def through(b: Boundary, which: list[int]) -> Tensor:
        rows = rows_of(ids[which], np.ones((len(which), 6), bool), CPU, tick=4)
        flat = x[which].reshape(-1, HIDDEN)
        forth = b.decode(b.encode(flat, rows, True), rows, x.dtype)
        return b.decode_backward(b.encode_backward(forth, rows), rows, x.dtype).view(len(which), 6, HIDDEN)

    whole, dealt = boundary(RANDOM), [boundary(RANDOM), boundary(RANDOM)]
    expected = through(whole, list(range(8)))
    for replica, micros in ((0, [[7, 0], [2]]), (1, [[5], [3, 1, 6, 4]])):
        for which in micros:
            assert torch.equal(through(dealt[replica], which), expected[which])


def test_nothing_is_kept_but_the_seed_and_any_replica_can_take_the_place_of_another():
    b = boundary(RANDOM)
    list(ticks(b, b, Stream(), 3))
    assert {name: value.ndim for name, value in b.state().items()} == {"fwd.seed": 0, "bwd.seed": 0}
    assert not b.forward.own(True) and not b.summed()


@pytest.mark.parametrize("size", [0, 1, 2 * K * 20 - 2, 2 * K * 20 + 2, 2 * K * 40])
def test_a_payload_of_another_size_is_refused_by_name(size: int):
    (x, rows), b = samples(), boundary(RANDOM)
    assert len(rows) == 20
    with pytest.raises(CodecError, match=rf"values has {size} bytes"):
        b.decode(torch.zeros(size, dtype=torch.uint8), rows, x.dtype)


def test_all_coordinates_are_the_rows_in_bf16():
    (x, rows), b = samples(), boundary(CodecConfig(kind="random_k", rank=HIDDEN))
    assert torch.equal(over_keys(b, "fwd", x, rows, 1)[0], x)


# --- dither ------------------------------------------------------------------------------------


def test_the_error_of_a_dithered_coefficient_is_uniform_whatever_the_coefficient():
    sigma = torch.tensor([4.0, 1.0, 0.1, 0.01])
    z, step = torch.tensor([[3.3, -0.7, 0.05, 0.002]]).repeat(20_000, 1), 1.5
    body, z_hat, _ = EntropyCoder(sigma, True).encode(z, step, torch.arange(len(z)))
    assert_mean(z_hat[None].transpose(0, 1), z[:1])
    torch.testing.assert_close((z_hat - z).var(0), torch.full((4,), step**2 / 12), rtol=0.05, atol=0)
    assert (z_hat - z).abs().max() <= step / 2 + 1e-5
    plain = EntropyCoder(sigma).encode(z, step)[1]
    assert not plain[:, 2:].any()  # without dither what is small never arrives
    assert body.size > 0


def test_both_ends_of_a_dithered_coder_learn_alike_and_a_row_of_zeros_stays_one():
    sigma = falling(12)
    sender, receiver = EntropyCoder(sigma, True), EntropyCoder(sigma.clone(), True)
    for seed in range(6):
        z, keys = gaussian(40, sigma, seed), torch.arange(40) + 100 * seed
        z[::7] = 0
        body, z_hat, _ = sender.encode(z, 9.0, keys)
        assert torch.equal(receiver.decode(body, 40, 9.0, keys), z_hat)
        assert not z_hat[::7].any() and z_hat[1::7].all()
        assert sender.digest() == receiver.digest()


def test_a_dithered_way_has_no_bias_in_the_directions_that_are_sent():
    """Of rows inside them: what lies outside is lost, as without dither."""
    b, stream = boundary(DITHERED), Stream()
    list(ticks(b, b, stream, 4))
    _, dx, rows = stream.micro(samples=4)
    directions = b.backward.axes.directions
    kept = torch.zeros_like(dx).index_add_(0, rows.keeper, dx)
    inside = directions.synthesise(directions.analyse(kept))[rows.kept]
    found = over_keys(b, "bwd", dx, rows, 200)[:, rows.kept]
    assert_mean(found, inside)
    plain = boundary(DITHERED.model_copy(update={"dither": False}))
    list(ticks(plain, plain, Stream(), 4))
    assert not over_keys(plain, "bwd", dx, rows, 8).std(0).any()


def test_without_dither_a_checkpoint_has_no_seed():
    names = [boundary(CodecConfig(dither=dither)).state() for dither in (False, True)]
    assert set(names[1]) - set(names[0]) == {"fwd.seed", "bwd.seed"}


def test_dither_of_steps_that_differ_is_refused_with_the_fix():
    with pytest.raises(ValidationError, match=r'dither true needs coder "entropy".*or dither = false'):
        CodecConfig(coder="fixed", dither=True)


def test_random_k_needs_a_rank_that_fits():
    with pytest.raises(ValidationError, match="random_k needs a rank: set rank or rank_ratio"):
        CodecConfig(kind="random_k")
    with pytest.raises(ValueError, match="rank 33 is larger than the hidden size 32"):
        CodecConfig(kind="random_k", rank=33).check_hidden(32)
    assert CodecConfig(kind="random_k", rank_ratio=0.05).rank_for(1536) == 77
