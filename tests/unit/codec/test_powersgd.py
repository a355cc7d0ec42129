"""Laws of the boundary codec. Oracles: float64 SVD and QR, plain matrix products, counted bytes."""

from __future__ import annotations

import itertools

import pytest
import torch

from codec.boundary import Boundary
from codec.config import CodecConfig
from codec.interface import CodecError, Room, as_bytes
from codec.ledger import Ledger
from codec.powersgd import PowerSGD, orthonormalise, random_basis
from codec.rows import Rows, pack_rows, unpack_rows

EPS = torch.finfo(torch.float32).eps


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def decaying(rows: int, hidden: int, seed: int = 0) -> torch.Tensor:
    """X with singular values 1, 0.8, 0.64, …: a spectrum with a best rank-r part and something left over."""
    u, _ = torch.linalg.qr(normal(rows, hidden, seed=seed, dtype=torch.float64))
    v, _ = torch.linalg.qr(normal(hidden, hidden, seed=seed + 1, dtype=torch.float64))
    return ((u * 0.8 ** torch.arange(hidden)) @ v.T * rows**0.5).float()


def codec(hidden: int = 32, rank: int = 6, seed: int = 3) -> PowerSGD:
    return PowerSGD(hidden, rank, seed=seed)


def sketch(c: PowerSGD, x: torch.Tensor, observe: bool = False) -> torch.Tensor:
    """Y as it crosses."""
    return c.encode(x, Room(len(x)), observe)[0].view(x.dtype).view(len(x), -1)


def through(c: PowerSGD, x: torch.Tensor) -> torch.Tensor:
    return c.decode(as_bytes(sketch(c, x)), len(x), x.dtype)


def apart(n: int) -> Rows:
    """n rows that have nothing to do with each other."""
    return Rows(torch.zeros(n, dtype=torch.bool), torch.arange(n), torch.arange(n))


FORTY = apart(40)


def boundary(hidden: int = 32, rank: int = 6, kind: str = "powersgd", ledger: Ledger | None = None) -> Boundary:
    return Boundary(
        CodecConfig(kind=kind, rank=rank if kind == "powersgd" else None),
        index=0,
        hidden=hidden,
        seed=3,
        ledger=ledger or Ledger(),
    )


def departure_from_orthonormal(q: torch.Tensor) -> float:
    q = q.double()
    return (q.T @ q - torch.eye(q.shape[1], dtype=torch.float64)).abs().max().item()


# --- orthonormalise ----------------------------------------------------------------------------


NEARLY_DEPENDENT = torch.cat([normal(64, 1), normal(64, 1) + 1e-6 * normal(64, 7, seed=1)], dim=1)
NEEDLES = {
    "random": normal(64, 8),
    "square": normal(16, 16),
    "one column": normal(5, 1),
    "nearly dependent columns": NEARLY_DEPENDENT,
    "the same column four times": normal(64, 1).expand(-1, 4),
    "all zero": torch.zeros(64, 4),
    "fewer tokens than the rank": normal(64, 3) @ normal(3, 8, seed=1),
    "columns of very unequal size": normal(64, 8) * 10.0 ** torch.arange(-12, 12, 3),
}


@pytest.mark.parametrize("v", NEEDLES.values(), ids=NEEDLES)
def test_the_basis_is_orthonormal_whatever_the_columns(v: torch.Tensor):
    q = orthonormalise(v)
    assert q.dtype == torch.float32 and q.shape == v.shape
    assert departure_from_orthonormal(q) < 20 * EPS


def test_one_pass_of_gram_schmidt_would_fail_on_the_nearly_dependent_columns():
    """The input above is hard: the naive method loses orthogonality on it, so the test above means something."""
    q = NEARLY_DEPENDENT.clone()
    for j in range(q.shape[1]):
        q[:, j] -= q[:, :j] @ (q[:, :j].T @ q[:, j])
        q[:, j] /= q[:, j].norm()
    assert departure_from_orthonormal(q) > 1e-3


def test_the_basis_spans_the_columns():
    v = normal(64, 8)
    q = orthonormalise(v)
    assert (q @ (q.T @ v) - v).norm() < 20 * EPS * v.norm()


@pytest.mark.parametrize("seed", range(5))
def test_the_sign_of_each_basis_vector_is_fixed_by_a_positive_diagonal_of_r(seed: int):
    v = normal(64, 8, seed=seed)
    r = orthonormalise(v).double().T @ v.double()
    assert (r.diagonal() > 0).all()
    assert r.tril(-1).abs().max() < 1e-4


@pytest.mark.parametrize("seed", range(5))
def test_the_basis_is_unique_it_depends_on_the_flag_of_subspaces_alone(seed: int):
    """V and V·U with U upper triangular, positive diagonal, have one QR factor Q between them."""
    v = normal(64, 8, seed=seed)
    u = normal(8, 8, seed=seed + 100).triu(1) + torch.diag(normal(8, seed=seed + 200).abs() + 0.5)
    torch.testing.assert_close(orthonormalise(v @ u), orthonormalise(v), atol=2e-5, rtol=0)


def test_flipping_columns_flips_exactly_their_basis_vectors_and_leaves_the_projection():
    v, flips = normal(64, 6), torch.tensor([1.0, -1, -1, 1, -1, 1])
    q, flipped = orthonormalise(v), orthonormalise(v * flips)
    torch.testing.assert_close(flipped, q * flips, atol=4 * EPS, rtol=0)
    torch.testing.assert_close(flipped @ flipped.T, q @ q.T, atol=10 * EPS, rtol=0)


def test_an_orthonormal_basis_is_its_own_basis():
    q = random_basis(64, 8, seed=5)
    torch.testing.assert_close(orthonormalise(q), q, atol=10 * EPS, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_nan_or_an_infinity_is_refused(bad: float):
    v = normal(8, 3)
    v[5, 1] = bad
    with pytest.raises(ValueError, match="NaN or an infinity"):
        orthonormalise(v)


@pytest.mark.parametrize("shape", [(3, 4), (5,), (2, 5, 3)])
def test_more_columns_than_rows_and_other_shapes_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="r <= H"):
        orthonormalise(torch.ones(shape))


def test_the_first_basis_depends_on_the_seed_and_on_nothing_else():
    torch.manual_seed(0)
    first = random_basis(32, 4, seed=9)
    torch.manual_seed(1)
    assert torch.equal(first, random_basis(32, 4, seed=9))
    assert not torch.allclose(first, random_basis(32, 4, seed=10))


def test_boundaries_of_one_model_start_from_different_bases():
    low, high = (Boundary(CodecConfig(kind="powersgd", rank=4), index, 32, seed=3, ledger=Ledger()) for index in (0, 1))
    assert not torch.allclose(low.forward.basis.q, high.forward.basis.q)


# --- the projection ----------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 6, 32])
def test_x_is_the_reconstruction_plus_an_error_orthogonal_to_the_basis(rank: int):
    c, x = codec(rank=rank), decaying(40, 32)
    x_hat = through(c, x)
    error = x - x_hat
    assert sketch(c, x).shape == (40, rank) and c.limits(40, x.dtype) == (160 * rank, 160 * rank)
    assert (error @ c.basis.q).abs().max() < 20 * EPS * x.abs().max()
    energy = (x_hat.square().sum() + error.square().sum()).item()
    assert energy == pytest.approx(x.square().sum().item(), rel=1e-5)  # Pythagoras


def test_the_full_rank_loses_nothing():
    c, x = codec(rank=32), normal(40, 32)
    torch.testing.assert_close(through(c, x), x, atol=1e-5, rtol=0)


def test_projecting_twice_is_projecting_once():
    c, x = codec(), normal(40, 32)
    once = through(c, x)
    torch.testing.assert_close(through(c, once), once, atol=1e-5, rtol=0)
    assert not torch.allclose(once, x, atol=0.1)


def test_what_crosses_is_in_the_dtype_of_the_hidden_states():
    c, x = codec(), normal(40, 32).bfloat16()
    assert len(c.encode(x, Room(40), False)[0]) == 40 * 6 * 2 and through(c, x).dtype == torch.bfloat16
    torch.testing.assert_close(sketch(c, x).float(), x.float() @ c.basis.q, atol=0.1, rtol=0.02)


# --- the boundary in autograd ------------------------------------------------------------------


def test_the_virtual_boundary_gives_the_two_products_forward_and_backward():
    b, x, g = boundary(), normal(40, 32), normal(40, 32, seed=1)
    q = b.forward.basis.q
    leaf = x.clone().requires_grad_()
    out = b.virtual(leaf, FORTY, observe=False)
    out.backward(g)
    assert torch.equal(out, (x @ q) @ q.T)
    assert torch.equal(leaf.grad, (g @ q) @ q.T)


def test_the_virtual_backward_is_the_derivative_of_the_forward():
    """Plain autograd through (xQ)Qᵀ is the oracle: the projection is symmetric, so its adjoint is itself."""
    b, g = boundary(), normal(40, 32, seed=1)
    ours, plain = (normal(40, 32).requires_grad_() for _ in range(2))
    b.virtual(ours, FORTY, observe=False).backward(g)
    (plain @ b.forward.basis.q @ b.forward.basis.q.T).backward(g)
    torch.testing.assert_close(ours.grad, plain.grad, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["none", "powersgd"])
def test_virtual_and_wire_give_the_same_numbers_bit_for_bit(kind: str):
    b, x, g = boundary(kind=kind), normal(40, 32), normal(40, 32, seed=1)
    leaf = x.clone().requires_grad_()
    out = b.virtual(leaf, FORTY, observe=False)
    out.backward(g)
    assert torch.equal(out, b.decode(b.encode(x, FORTY, observe=False), FORTY, x.dtype))
    assert torch.equal(leaf.grad, b.decode_backward(b.encode_backward(g, FORTY), FORTY, g.dtype))


def test_codec_kind_none_is_the_identity_both_ways_and_has_nothing_to_refresh():
    b, g = boundary(kind="none"), normal(40, 32, seed=1)
    leaf = normal(40, 32).requires_grad_()
    out = b.virtual(leaf, FORTY, observe=True)
    out.backward(g)
    assert torch.equal(out, leaf) and torch.equal(leaf.grad, g)
    assert b.forward.tables is None and b.forward.rate is None and b.state() == {}


def test_rows_of_real_tokens_are_packed_in_order_and_padding_comes_back_as_zeros():
    hidden = normal(3, 5, 4).requires_grad_()
    real = torch.arange(5)[None] < torch.tensor([5, 2, 3])[:, None]
    rows = pack_rows(hidden, real)
    assert torch.equal(rows, torch.stack([hidden[b, t] for b in range(3) for t in range(5) if real[b, t]]))
    back = unpack_rows(rows, real)
    assert torch.equal(back, hidden * real[..., None])
    weight = normal(3, 5, 4, seed=1)
    (back * weight).sum().backward()
    assert torch.equal(hidden.grad, weight * real[..., None])


# --- statistics and refresh --------------------------------------------------------------------


def test_statistics_are_summed_over_microbatches():
    c, x = codec(), decaying(48, 32)
    for part in x.split([7, 1, 40]):
        sketch(c, part, observe=True)
    expected = x.double().T @ (x.double() @ c.basis.q.double())
    torch.testing.assert_close(c.basis.v.double(), expected, atol=1e-4, rtol=1e-4)


def test_a_boundary_gathers_statistics_only_when_it_observes():
    b, x = boundary(), normal(40, 32)
    b.virtual(x, FORTY, observe=False)
    assert not b.forward.basis.v.any() and b.health("fwd") == {}
    b.virtual(x, FORTY, observe=True)
    assert b.forward.basis.v.any()
    b.begin_tick()
    assert not b.forward.basis.v.any() and b.health("fwd") == {}


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_warm_started_refreshes_on_a_fixed_x_approach_the_best_rank_r_and_never_turn_back(rank: int):
    x = decaying(64, 32)
    best = torch.linalg.svd(x.double())[1][:rank].square().sum().item()
    c, captured = codec(rank=rank), []
    for _ in range(30):
        c.begin_tick()
        captured.append(sketch(c, x, observe=True).double().square().sum().item())
        c.tables.load(c.tables.refresh())
    assert all(later >= earlier * (1 - 1e-6) for earlier, later in itertools.pairwise(captured))
    assert captured[0] < 0.9 * best
    assert best * (1 - 1e-4) < captured[-1] < best * (1 + 1e-6)


def test_at_convergence_the_basis_spans_the_leading_right_singular_vectors():
    x, c = decaying(64, 32), codec(rank=4)
    for _ in range(60):
        c.begin_tick()
        sketch(c, x, observe=True)
        c.tables.load(c.tables.refresh())
    leading = torch.linalg.svd(x)[2][:4].T
    assert torch.linalg.svdvals(leading.T @ c.basis.q).min() > 1 - 1e-4  # cosines of the principal angles


def test_refresh_alone_changes_nothing_until_the_basis_is_loaded():
    c, x = codec(), decaying(48, 32)
    before = c.basis.q.clone()
    sketch(c, x, observe=True)
    new = c.tables.refresh()
    assert torch.equal(c.basis.q, before)
    c.tables.load(new)
    assert torch.equal(as_bytes(c.basis.q), new) and not torch.equal(c.basis.q, before)


@pytest.mark.parametrize("observed_in", [1, 3])
def test_q_error_is_the_relative_reconstruction_error(observed_in: int):
    c, x = codec(), decaying(48, 32)
    for part in x.chunk(observed_in):
        sketch(c, part, observe=True)
    x, q = x.double(), c.basis.q.double()
    expected = ((x - x @ q @ q.T).norm() / x.norm()).item()
    assert c.health()["codec/q_error"] == pytest.approx(expected, rel=1e-4)
    assert 0.1 < expected < 1


def test_q_error_is_zero_when_x_lies_in_the_basis():
    c = codec()
    x = normal(48, 6) @ c.basis.q.T
    sketch(c, x, observe=True)
    assert c.health()["codec/q_error"] < 1e-3


def test_q_drift_is_the_mean_squared_sine_of_the_angles_between_old_and_new_basis():
    c = codec(hidden=8, rank=2)
    c.basis.q = torch.eye(8)[:, :2].contiguous()
    assert c.tables.load(as_bytes(c.basis.q))["codec/q_drift"] == 0
    tilt = torch.eye(8)[:, :2].contiguous()
    tilt[:, 1] = 0
    tilt[1, 1], tilt[5, 1] = 0.6, 0.8  # the second vector turns by an angle of sine 0.8
    assert c.tables.load(as_bytes(tilt))["codec/q_drift"] == pytest.approx(0.8**2 / 2, rel=1e-5)
    assert c.tables.load(as_bytes(torch.eye(8)[:, 6:]))["codec/q_drift"] == 1


def test_condition_is_the_ratio_of_the_largest_to_the_smallest_singular_value_of_v():
    c = codec(hidden=16, rank=3)
    c.basis.v = orthonormalise(normal(16, 3)) * torch.tensor([10.0, 2.0, 0.5])
    assert c.tables.load(c.tables.refresh())["codec/q_condition"] == pytest.approx(20, rel=1e-4)


@pytest.mark.parametrize("cut", [-4, -1, 1, 400])
def test_a_payload_of_another_size_is_refused_with_both_sizes(cut: int):
    c = codec()
    with pytest.raises(CodecError, match=f"sketch Y has {960 + cut} bytes.*needs 960"):
        c.decode(torch.zeros(960 + cut, dtype=torch.uint8), 40, torch.float32)


def test_a_basis_of_its_own_catches_what_the_forwards_basis_misses_of_dx():
    """X and dX have no directions in common here; after a refresh each way knows its own."""
    config = CodecConfig(kind="powersgd", rank=6, backward_basis="own")
    own, shared = Boundary(config, 0, 32, 3, Ledger()), boundary()
    x, dx = decaying(40, 32), decaying(40, 32, seed=7)
    for b in (own, shared):
        for _ in range(10):
            b.begin_tick()
            b.encode(x, FORTY, observe=True), b.encode_backward(dx, FORTY)
            for way in (b.forward, b.backward):
                if way.tables is not None:
                    way.tables.load(way.tables.refresh())
    assert own.health("bwd")["codec/dx_cosine"] > shared.health("bwd")["codec/dx_cosine"] + 0.3
    assert own.health("fwd")["codec/fvu"] == shared.health("fwd")["codec/fvu"]


# --- rank and bytes ----------------------------------------------------------------------------


def test_the_rank_is_given_or_a_share_of_the_hidden_size_and_never_larger_than_it():
    assert CodecConfig(kind="powersgd", rank=77).rank_for(1536) == 77
    assert CodecConfig(kind="powersgd", rank_ratio=0.05).rank_for(1536) == 77
    assert CodecConfig(kind="powersgd", rank_ratio=1e-9).rank_for(1536) == 1
    assert CodecConfig(kind="powersgd", rank_ratio=1.0).rank_for(1536) == 1536
    with pytest.raises(ValueError, match="rank 33 is larger than the hidden size 32"):
        CodecConfig(kind="powersgd", rank=33).rank_for(32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_published_bytes_ratio_is_77_of_1536_plus_the_amortised_basis(dtype: torch.dtype):
    hidden, rank, tokens, ticks = 1536, 77, 24, 5
    ledger = Ledger()
    b = boundary(hidden, rank, ledger=ledger)
    for tick in range(ticks):
        leaf = normal(tokens, hidden, seed=tick, dtype=dtype).requires_grad_()
        b.virtual(leaf, apart(tokens), observe=True).sum().backward()
    assert ledger.bytes_ratio() == pytest.approx(77 / 1536, rel=1e-12)
    assert round(ledger.bytes_ratio(), 4) == 0.0501
    ledger.add("basis", b.forward.basis.q.nbytes, 0)  # one refresh in these ticks, in fp32
    width = dtype.itemsize
    dense = 2 * ticks * tokens * hidden * width
    assert ledger.bytes_ratio() == pytest.approx(77 / 1536 + 1536 * 77 * 4 / dense, rel=1e-12)


def test_a_dense_boundary_counts_what_it_sends_as_dense():
    ledger = Ledger()
    b = boundary(kind="none", ledger=ledger)
    b.virtual(normal(40, 32).requires_grad_(), FORTY, observe=True).sum().backward()
    assert ledger.drain() == {"boundary_fwd": (40 * 32 * 4, 40 * 32 * 4), "boundary_bwd": (40 * 32 * 4, 40 * 32 * 4)}


def test_only_the_sender_of_a_payload_counts_it():
    ledger = Ledger()
    b = boundary(ledger=ledger)
    y = b.encode(normal(40, 32), FORTY, observe=False)
    dy = b.encode_backward(normal(40, 32), FORTY)
    sent = ledger.drain()
    b.decode(y, FORTY, torch.float32), b.decode_backward(dy, FORTY, torch.float32)
    assert sent == {"boundary_fwd": (40 * 6 * 4, 40 * 32 * 4), "boundary_bwd": (40 * 6 * 4, 40 * 32 * 4)}
    assert ledger.drain() == {}
