"""Errors of X counted by what the gradients say they cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from codec.boundary import Boundary
from codec.config import CodecConfig
from codec.ledger import Ledger
from codec.rows import Rows, rows_of
from codec.transform.directions import pack_directions, unpack_directions
from codec.transform.metric import Metric

HIDDEN, ROWS = 24, 400
CPU = torch.device("cpu")
coders = pytest.mark.parametrize("coder", ["fixed", "entropy"])


def gradients(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Axes [H, H] and deviations [H] of dX, out of line with X's."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator))[0], 0.7 ** torch.arange(HIDDEN)


def metric(share: float = 0.5, k: int = 10) -> Metric:
    axes, deviations = gradients()
    raw = pack_directions(torch.zeros(HIDDEN), axes[:, :k], deviations[:k])
    found = unpack_directions(raw, HIDDEN, CPU)
    return Metric(found.basis, found.deviations, found.raw, share)


class Link:
    """A boundary, and rows of which X and dX have different axes."""

    def __init__(self, seed: int = 0, **config: object):
        settings = {"rate": 0.1, "backward_rate": 0.1, "first_token": "coded", "share_prefixes": False}
        self.boundary = Boundary(CodecConfig.model_validate(settings | config), 0, HIDDEN, 3, Ledger())
        self.generator = torch.Generator().manual_seed(seed)
        ids = np.arange(ROWS).reshape(ROWS // 8, 8)
        self.rows: Rows = rows_of(ids, np.ones_like(ids, dtype=bool), CPU)

    def x(self) -> Tensor:
        return torch.randn(ROWS, HIDDEN, generator=self.generator) * 0.9 ** torch.arange(HIDDEN)

    def dx(self, seed: int = 0) -> Tensor:
        axes, deviations = gradients(seed)
        return (torch.randn(ROWS, HIDDEN, generator=self.generator) * deviations) @ axes.T

    def tick(self, dx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows there and back -> x, what arrives of it, and the payload."""
        b, x = self.boundary, self.x()
        b.begin_tick()
        payload = b.encode(x, self.rows, observe=True)
        x_hat = b.decode(payload, self.rows, x.dtype)
        b.decode_backward(b.encode_backward(dx, self.rows), self.rows, dx.dtype)
        for way in (b.forward, b.backward):
            way.rate.steer(way.rate.spent())
        return x, x_hat, payload

    def refresh(self) -> None:
        for way in ("bwd", "fwd"):
            self.boundary.refresh_alone(way)


def test_the_metric_is_the_covariance_of_the_gradients_beside_the_identity():
    m = metric(share=0.3)
    basis, deviations = m.basis.double(), m.deviations.double()
    covariance = sum(deviations[i] ** 2 * torch.outer(basis[:, i], basis[:, i]) for i in range(len(deviations)))
    eye = torch.eye(HIDDEN, dtype=torch.float64)
    expected = 0.7 * eye + 0.3 * HIDDEN * covariance / covariance.trace()
    torch.testing.assert_close(m.times(eye), expected)
    assert expected.trace().item() == pytest.approx(HIDDEN)
    root, back = m.roots()
    torch.testing.assert_close(root @ root, expected)
    torch.testing.assert_close(root @ back, eye)


def test_the_sender_solves_for_the_least_error_in_the_metric():
    m, axes = metric(), gradients(seed=5)[0][:, :9]
    raw = pack_directions(torch.zeros(HIDDEN), axes, torch.ones(9))
    directions = unpack_directions(raw, HIDDEN, CPU, m)
    x, root = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(1)), m.roots()[0]
    expected = torch.linalg.lstsq(root @ directions.basis.double(), root @ x.double().T).solution.T
    torch.testing.assert_close(directions.analyse(x), expected.float(), rtol=1e-4, atol=1e-5)


@coders
def test_at_equal_bytes_errors_cost_less(coder: str):
    """The mean of (dX · e)², over rows whose gradients are not those of the tables."""
    cost, spent = {}, {}
    for share in (0.0, 0.5):
        link = Link(coder=coder, sensitivity=share)
        for _ in range(3):
            link.tick(link.dx())
            link.refresh()
        found = [link.tick(link.dx()) for _ in range(12)][6:]
        cost[share] = sum(((x - x_hat) * link.dx()).sum(1).square().mean().item() for x, x_hat, _ in found)
        spent[share] = sum(payload.numel() for _, _, payload in found)
    assert spent[0.5] < 1.02 * spent[0.0]
    assert cost[0.5] < 0.8 * cost[0.0]


@coders
def test_without_gradients_all_errors_count_alike(coder: str):
    """All rewards equal: nothing is known of what errors cost, and payloads are those of sensitivity 0, to the bit."""
    sent = []
    for share in (0.0, 0.5):
        link = Link(coder=coder, sensitivity=share)
        payloads = []
        for _ in range(4):
            payloads.append(link.tick(torch.zeros(ROWS, HIDDEN))[2])
            link.refresh()
        sent.append(torch.cat(payloads))
    assert torch.equal(*sent)


@coders
def test_tables_keep_the_gradients_that_they_were_made_with_also_through_a_checkpoint(coder: str):
    """dX's own tables go on changing; a row is sent alike until X's change too."""
    link, copy = Link(coder=coder, sensitivity=0.5), Link(coder=coder, sensitivity=0.5)
    for _ in range(3):
        link.tick(link.dx())
        link.refresh()
    b, x = link.boundary, link.x()
    axes = b.forward.axes
    assert axes.directions.metric is not None
    before = axes.directions.analyse(x)
    for _ in range(4):
        link.tick(link.dx(seed=9))
        b.refresh_alone("bwd")
    assert not torch.equal(b.backward.axes.directions.raw, axes.directions.metric.raw)
    assert torch.equal(axes.directions.analyse(x), before)
    copy.boundary.restore({k: v.clone() for k, v in b.state().items()})
    copy.generator.set_state(link.generator.get_state())
    assert torch.equal(copy.boundary.forward.axes.directions.analyse(x), before)
    for _ in range(3):
        assert torch.equal(link.tick(link.dx())[2], copy.tick(copy.dx())[2])
        link.refresh(), copy.refresh()


def test_forged_tables_of_the_gradients_leave_a_metric_that_can_be_used():
    raw = pack_directions(torch.zeros(HIDDEN), torch.zeros(HIDDEN, 3), torch.ones(3))
    found = unpack_directions(raw, HIDDEN, CPU)
    m = Metric(found.basis, found.deviations, found.raw, 0.5)
    assert all(torch.isfinite(root).all() for root in m.roots())
