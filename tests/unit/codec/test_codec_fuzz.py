"""100,000 damaged payloads: each is refused with a named error or decodes to rows of the right shape, within bounds."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

from codec.config import CodecConfig
from codec.interface import CodecError, Room
from codec.transform.payload import Payload, pack_payload, unpack_payload
from codec.transform.way import Transform, transform

HIDDEN, ROWS = 8, 6
CASES, WATCHED = 25_000, 3_000  # for each coder, of each sort; the last of them with an eye on memory


def pair(coder: str) -> tuple[Transform, torch.Tensor]:
    """A receiver with tables, and an honest payload that it would take next."""
    config = CodecConfig(coder=coder, rate=0.5, backward_rate=0.5)
    way, _ = transform(config, HIDDEN, 0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        x = torch.randn(ROWS, HIDDEN, generator=generator) * 2.0 ** -torch.arange(HIDDEN)
        payload, _ = way.encode(x, Room(ROWS), observe=True)
        receiver_state = {k: v.clone() for k, v in way.state().items()}
        way.decode(payload, ROWS, torch.float32)
    receiver, _ = transform(config, HIDDEN, 0)
    receiver.restore(receiver_state)
    return receiver, payload


def decoded(receiver: Transform, payload: torch.Tensor, state: dict[str, torch.Tensor]) -> bool:
    """Whether it was taken for good; the receiver is as before afterwards."""
    try:
        rows = receiver.decode(payload, ROWS, torch.float32)
    except CodecError as error:
        assert str(error)
        return False
    assert rows.shape == (ROWS, HIDDEN)
    receiver.receiver.restore({k.removeprefix("receiver."): v for k, v in state.items() if k.startswith("receiver.")})
    return True


@pytest.mark.parametrize("coder", ["fixed", "entropy"])
def test_bytes_damaged_on_the_way_never_pass_the_digest(coder: str):
    receiver, payload = pair(coder)
    state, rng = receiver.state(), np.random.default_rng(1)
    honest = payload.numpy()
    for case in range(CASES):
        raw = honest.copy()
        kind = case % 4
        if kind == 0:
            raw = raw[: rng.integers(len(raw))]
        elif kind == 1:
            raw[rng.integers(len(raw))] ^= np.uint8(1 << rng.integers(8))
        elif kind == 2:
            raw[rng.integers(len(raw), size=4)] = rng.integers(0, 256, 4, dtype=np.uint8)
        else:
            raw = np.concatenate([raw, rng.integers(0, 256, rng.integers(1, 9), dtype=np.uint8)])
        changed = not np.array_equal(raw, honest)
        assert decoded(receiver, torch.from_numpy(raw), state) == (not changed)


@pytest.mark.parametrize("coder", ["fixed", "entropy"])
def test_nonsense_under_a_right_digest_is_refused_or_stays_within_bounds(coder: str):
    """What a faulty sender could seal: any knob, scale, row count, tables and body."""
    receiver, payload = pair(coder)
    state, rng = receiver.state(), np.random.default_rng(2)
    honest, fresh = unpack_payload(payload, ROWS), Transform(CodecConfig(coder=coder), HIDDEN, 0.5, True)
    numbers = [0.0, 1.0, 3.0, 1e-38, 1e30, -1.0, float("nan"), float("inf")]
    for case in range(CASES):
        if case == CASES - WATCHED:
            tracemalloc.start()
        body = honest.body.numpy().copy()
        body[rng.integers(len(body), size=1 + case % 3)] = rng.integers(0, 256, 1 + case % 3, dtype=np.uint8)
        forged = replace(honest, body=torch.from_numpy(body[: rng.integers(len(body) + 1)] if case % 2 else body))
        if case % 5 == 0:
            forged = replace(forged, knob=numbers[rng.integers(8)], scale=numbers[rng.integers(8)])
        if case % 7 == 0:
            forged = replace(forged, rows=int(rng.integers(0, 2**31)))
        if case % 11 == 0:
            forged = replace(forged, tables=torch.from_numpy(rng.integers(0, 256, 200, dtype=np.uint8)))
            decoded(fresh, pack_payload(forged), {})
        decoded(receiver, pack_payload(forged), state)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_tables_of_any_bytes_are_refused_or_finite():
    rng, way = np.random.default_rng(3), Transform(CodecConfig(), HIDDEN, 0.5, True)
    for _ in range(2000):
        k = int(rng.integers(0, HIDDEN + 2))
        raw = rng.integers(0, 256, 4 + 2 * HIDDEN + 8 * k + HIDDEN * k, dtype=np.uint8)
        raw[:4] = np.array([k], "<i4").view(np.uint8)
        try:
            way.axes.load(torch.from_numpy(raw))
        except CodecError:
            continue
        assert torch.isfinite(way.axes.directions.basis).all() and (way.axes.directions.deviations > 0).all()


def test_a_payload_survives_packing():
    tables, body = torch.arange(7, dtype=torch.uint8), torch.arange(250, dtype=torch.uint8)
    sent = Payload(9, 0.5, 2.0, 77, tables, body)
    got = unpack_payload(pack_payload(sent), 9)
    assert (got.rows, got.knob, got.scale, got.agreement) == (9, 0.5, 2.0, 77)
    assert torch.equal(got.tables, tables) and torch.equal(got.body, body)
