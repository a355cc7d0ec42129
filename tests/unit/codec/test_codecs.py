"""The contract of a codec: every kind and variant passes it, a third party's too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from codec.boundary import CODECS, Boundary
from codec.config import KINDS, CodecConfig
from codec.interface import Codec, CodecError, Room, as_bytes, as_numbers
from codec.ledger import Ledger
from codec.rows import Rows, rows_of

HIDDEN = 32
CPU = torch.device("cpu")


class Halved(Codec):
    """Somebody else's codec: sends every number as float16."""

    def __init__(self, hidden: int):
        self.hidden = hidden

    def encode(self, x: Tensor, room: Room, observe: bool) -> tuple[Tensor, Tensor | None]:
        half = x.half()
        return as_bytes(half), half.to(x.dtype) if observe else None

    def decode(self, payload: Tensor, n: int, dtype: torch.dtype) -> Tensor:
        return as_numbers(payload, (n, self.hidden), torch.float16, "halves").to(dtype)

    def limits(self, n: int, dtype: torch.dtype) -> tuple[int, int]:
        return 2 * n * self.hidden, 2 * n * self.hidden


def halved(config: CodecConfig, hidden: int, seed: int) -> tuple[Codec, Codec]:
    return Halved(hidden), Halved(hidden)


def lacking(config: CodecConfig, hidden: int, seed: int):
    """Codecs of a class that knows nothing of ours, and has forgotten two methods."""
    theirs = {name: getattr(Halved, name) for name in vars(Codec) if not name.startswith("_")}
    theirs = {name: value for name, value in theirs.items() if name not in ("limits", "restore")}
    return Halved(hidden), type("Theirs", (), theirs)()


def lacking_in_its_tables(config: CodecConfig, hidden: int, seed: int):
    codec = Halved(hidden)
    codec.tables = object()
    return codec, Halved(hidden)


def only_one(config: CodecConfig, hidden: int, seed: int):
    return Halved(hidden)


CONFIGS = {
    "none": CodecConfig(kind="none"),
    "powersgd as published": CodecConfig(kind="powersgd", rank=6),
    "powersgd, own basis for dX": CodecConfig(kind="powersgd", rank=6, backward_basis="own"),
    "powersgd, first token exact": CodecConfig(kind="powersgd", rank=6, first_token="exact"),
    "powersgd, shared prefixes": CodecConfig(kind="powersgd", rank=6, share_prefixes=True),
    "random_k": CodecConfig(kind="random_k", rank=6),
    "random_k, first token exact": CodecConfig(kind="random_k", rank=6, first_token="exact"),
    "random_k, shared prefixes": CodecConfig(kind="random_k", rank=6, share_prefixes=True),
    "transform fixed": CodecConfig(kind="transform", coder="fixed", total_rate=0.2),
    "transform entropy": CodecConfig(kind="transform", coder="entropy", total_rate=0.2),
    "transform dithered": CodecConfig(kind="transform", dither=True, total_rate=0.2),
    "transform, every row for itself": CodecConfig(kind="transform", share_prefixes=False, first_token="coded"),
    "a third party's": CodecConfig(kind="tests.unit.codec.test_codecs:halved"),
    "the example's": CodecConfig(kind="examples.own_codec:eight_bits"),
}
kinds = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
coded = pytest.mark.parametrize("config", [c for c in CONFIGS.values() if c.kind == "transform"], ids=lambda c: c.coder)


def boundary(config: CodecConfig, seed: int = 3) -> Boundary:
    return Boundary(config, 0, HIDDEN, seed, Ledger())


class Stream:
    """Microbatches whose rows are a causal function of their tokens, with a spectrum that decays and drifts."""

    def __init__(self, seed: int = 0, drift: float = 0.0):
        self.rng = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.mix = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=self.generator))[0] * 0.8 ** torch.arange(
            HIDDEN
        )
        self.drift = drift

    def micro(self, samples: int = 12) -> tuple[Tensor, Tensor, Rows]:
        """x [N, H], dx [N, H] and which rows they are."""
        ids = self.rng.integers(0, 9, (samples, 10))
        ids[: samples // 2, :4], ids[samples // 2 :, :4] = ids[0, :4], ids[-1, :4]
        real = np.arange(10) < self.rng.integers(5, 11, samples)[:, None]
        rows = rows_of(ids, real, CPU)
        x = self._draw(len(rows)) @ self.mix.T + 1
        x[rows.first] = x[rows.first] * 100
        x = x[rows.keeper]
        dx = self._draw(len(rows)) @ self.mix * 1e-3 * self._draw(len(rows))[:, :1].exp()
        self.mix = self.mix + self.drift * torch.randn(self.mix.shape, generator=self.generator) / HIDDEN**0.5
        return x, dx, rows

    def _draw(self, n: int) -> Tensor:
        return torch.randn(n, HIDDEN, generator=self.generator)


@kinds
def test_what_crosses_does_not_depend_on_whether_rows_that_samples_share_are_held_once(config: CodecConfig):
    """Forward the same bytes and tables; backward too where prefixes cross once, else a linear codec's sums."""
    plain, once, stream = boundary(config), boundary(config), Stream()
    for tick in range(3):
        x, dx, rows = stream.micro()
        held = replace(rows, distinct=True)
        sum_dx = torch.zeros(len(rows.kept), HIDDEN).index_add_(0, rows.source, dx)
        for b in (plain, once):
            b.begin_tick()
        sent, same = plain.encode(x, rows, True), once.encode(x[rows.kept], held, True)
        assert torch.equal(sent, same)
        assert torch.equal(plain.decode(sent, rows, x.dtype)[rows.kept], once.decode(same, held, x.dtype))
        back, again = plain.encode_backward(dx, rows), once.encode_backward(sum_dx, held)
        found = once.decode_backward(again, held, dx.dtype)
        expected = plain.decode_backward(back, rows, dx.dtype)
        if plain.share_prefixes:
            assert torch.equal(back, again) and torch.equal(found, expected[rows.kept])
            assert plain.ledger.state() == once.ledger.state()
        elif config.codes_copies_alike and (tick == 0 or config.backward_basis != "own"):
            sums = torch.zeros_like(found).index_add_(0, rows.source, expected)
            torch.testing.assert_close(found, sums, rtol=1e-3, atol=1e-6)
            assert plain.ledger.state() == once.ledger.state()
        for way in ("fwd", "bwd"):
            tables = [b.refresh_alone(way) for b in (plain, once)]
            assert way == "bwd" or torch.equal(*tables)


def refresh(sender: Boundary, receiver: Boundary, way: str) -> None:
    """What `swarm.tick` does between ticks, on one replica."""
    tables = sender.refresh_alone(way)
    if receiver is not sender and sender.way(way).tables is not None:
        receiver.way(way).tables.load(tables.clone())


def ticks(up: Boundary, down: Boundary, stream: Stream, count: int, every: int = 2) -> Iterator[dict[str, Tensor]]:
    """Ticks of two microbatches each: rows forward (once for log-probs, once to train), gradients back."""
    for tick in range(1, count + 1):
        micros = [stream.micro() for _ in range(2)]
        for x, _, rows in micros:
            payload = up.encode(x, rows, observe=False)
            yield {"logprobs": down.decode(payload, rows, x.dtype), "sent": payload}
        if tick % every == 0 or tick == 2:
            refresh(down, up, "bwd"), refresh(up, down, "fwd")
        for b in {id(up): up, id(down): down}.values():
            b.begin_tick()
        for x, dx, rows in micros:
            payload = up.encode(x, rows, observe=True)
            back = down.encode_backward(dx, rows)
            yield {
                "x": down.decode(payload, rows, x.dtype),
                "dx": up.decode_backward(back, rows, dx.dtype),
                "sent": payload,
                "back": back,
            }
        for b, way in ((up, "fwd"), (down, "bwd")):
            if (rate := b.way(way).rate) is not None:
                rate.steer(rate.spent())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_every_kind_is_under_contract():
    assert set(CODECS) == set(KINDS) == {c.kind for c in CONFIGS.values() if ":" not in c.kind}


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("lacking", "backward Theirs lacks limits, restore; class Codec in codec/interface.py"),
        ("lacking_in_its_tables", "forward object lacks statistics, absorb, refresh, limit, load; class Tables"),
        ("only_one", "gives a Halved, not a tuple of two codecs"),
        ("nobody", "cannot be imported here: .*has no attribute 'nobody'"),
    ],
)
def test_a_codec_of_another_face_is_refused_by_what_it_lacks(function: str, said: str):
    with pytest.raises(ValueError, match=rf"codec\.kind = '{__name__}:{function}'.*{said}"):
        boundary(CodecConfig(kind=f"{__name__}:{function}"))


def test_a_codec_that_forgets_to_say_its_limits_cannot_be_made():
    class Endless(Halved):
        limits = Codec.limits

    with pytest.raises(TypeError, match=r"abstract method '?limits"):
        Endless(HIDDEN)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_come_back_in_their_shape_and_dtype(config: CodecConfig, dtype: torch.dtype):
    b, (x, dx, rows) = boundary(config), Stream().micro()
    x, dx = x.to(dtype), dx.to(dtype)
    x_hat = b.decode(b.encode(x, rows, observe=True), rows, dtype)
    dx_hat = b.decode_backward(b.encode_backward(dx, rows), rows, dtype)
    for original, found in ((x, x_hat), (dx, dx_hat)):
        assert found.shape == original.shape and found.dtype == dtype and torch.isfinite(found).all()


@kinds
def test_two_processes_and_one_give_the_same_numbers_and_bytes_over_many_ticks(config: CodecConfig):
    virtual, up, down = boundary(config), boundary(config), boundary(config)
    one, two = list(ticks(virtual, virtual, Stream(), 7)), list(ticks(up, down, Stream(), 7))
    assert len(one) == 28 and all(same(a, b) for a, b in zip(one, two))
    entries = virtual.ledger.drain()
    assert entries["boundary_fwd"] == up.ledger.drain()["boundary_fwd"]
    assert entries["boundary_bwd"] == down.ledger.drain()["boundary_bwd"]
    assert virtual.health("fwd") == up.health("fwd") and virtual.health("bwd") == down.health("bwd")


@kinds
def test_the_sender_knows_what_arrives(config: CodecConfig):
    """FVU and cosine come from the sender's own reconstruction: it must be the receiver's, bit for bit."""
    b, stream = boundary(config), Stream()
    for _ in range(3):
        x, _, rows = stream.micro()
        x_hat = b.decode(b.encode(x, rows, observe=True), rows, x.dtype)
        kept = rows.kept if b.share_prefixes else torch.arange(len(rows))
        error = (x - x_hat)[kept][~rows.first[kept]].square().sum().item()
        assert b.seen["fwd"].error == pytest.approx(error, rel=1e-5, abs=1e-12)
        b.begin_tick()


@kinds
def test_a_payload_keeps_the_limits_that_the_receiver_allocates_by(config: CodecConfig):
    b, stream = boundary(config), Stream()
    for _ in range(3):
        x, dx, rows = stream.micro()
        for way, payload in (("fwd", b.encode(x, rows, True)), ("bwd", b.encode_backward(dx, rows))):
            least, most = b.limits(way, rows, x.dtype)
            assert least <= payload.numel() <= most


@kinds
def test_a_checkpoint_goes_on_bit_for_bit(config: CodecConfig):
    b, stream = boundary(config), Stream()
    list(ticks(b, b, stream, 5))
    saved = {k: v.clone() for k, v in b.state().items()}
    copy = boundary(config, seed=99)
    copy.restore(saved)
    rest = []
    for one in (b, copy):
        again = Stream(seed=5)
        rest.append(list(ticks(one, one, again, 5)))
    assert all(same(a, c) for a, c in zip(*rest)) and len(rest[0]) == 20


@kinds
def test_nothing_but_zeros_comes_back_as_zeros(config: CodecConfig):
    """All rewards of a microbatch were equal: no gradient flows, and none may appear."""
    b, stream = boundary(config), Stream()
    for _ in range(2):  # before the first tables, and after
        _, dx, rows = stream.micro()
        zero = torch.zeros_like(dx)
        assert not b.decode_backward(b.encode_backward(zero, rows), rows, dx.dtype).any()
        b.decode_backward(b.encode_backward(dx, rows), rows, dx.dtype)


@pytest.mark.parametrize("share", [False, True])
def test_sharing_prefixes_is_exact(share: bool):
    """Equal rows come back equal; the gradient of the tokens' own parameters is that of all rows."""
    b = boundary(CodecConfig(kind="none", share_prefixes=share))
    stream = Stream()
    x, dx, rows = stream.micro()
    table = torch.randn(len(rows), HIDDEN, generator=stream.generator).requires_grad_()
    out = b.virtual(table[rows.keeper], rows, observe=False)
    out.backward(dx)
    assert torch.equal(out, table[rows.keeper])
    expected = torch.zeros_like(table).index_add(0, rows.keeper, dx)
    torch.testing.assert_close(table.grad, expected, atol=1e-8, rtol=1e-6)
    sent, dense = b.ledger.drain()["boundary_fwd"]
    assert sent == 4 * HIDDEN * (len(rows.kept) if share else len(rows)) and dense == x.nbytes


def test_the_gradients_of_a_shared_row_are_summed_in_fp32():
    """512 ones are 512 in bf16; added one by one in bf16 they stay at 256."""
    count = 512
    rows = Rows(torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.int64), torch.arange(count))
    b = boundary(CodecConfig(kind="none", share_prefixes=True))
    payload = b.encode_backward(torch.ones(count, HIDDEN, dtype=torch.bfloat16), rows)
    back = b.decode_backward(payload, rows, torch.bfloat16)
    assert (back[0] == count).all() and (back[1:] == 0).all()


def test_the_rows_that_stand_for_others_are_those_of_a_dictionary_of_prefixes():
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = rng.integers(0, 3, (16, 12))
        lengths = rng.integers(1, 13, 16)
        rows = rows_of(ids, np.arange(12) < lengths[:, None], CPU)
        seen: dict[tuple, int] = {}
        every = [tuple(ids[b, : t + 1]) for b in range(16) for t in range(lengths[b])]
        expected = [seen.setdefault(prefix, i) for i, prefix in enumerate(every)]
        assert rows.keeper.tolist() == expected
        assert torch.equal(rows.kept[rows.source], rows.keeper)
        assert rows.first.tolist() == [len(prefix) == 1 for prefix in every]


@kinds
def test_a_payload_of_another_size_is_refused(config: CodecConfig):
    b, (x, _, rows) = boundary(config), Stream().micro()
    payload = b.encode(x, rows, observe=True)
    for damaged in (payload[:-1], torch.cat([payload, payload[:1]]), payload[:0], payload[:5]):
        with pytest.raises(CodecError):
            boundary(config).decode(damaged, rows, x.dtype)


# --- transform ---------------------------------------------------------------------------------


@coded
def test_a_flipped_bit_anywhere_is_a_named_error(config: CodecConfig):
    up, down, stream = boundary(config), boundary(config), Stream()
    rng = np.random.default_rng(0)
    for _ in range(200):
        _, dx, rows = stream.micro()
        payload = down.encode_backward(dx, rows)
        damaged = payload.clone()
        damaged[rng.integers(len(payload))] ^= 1 << int(rng.integers(8))
        with pytest.raises(CodecError):
            up.decode_backward(damaged, rows, dx.dtype)
        up.decode_backward(payload, rows, dx.dtype)  # nothing of the damaged one was kept


@coded
def test_a_side_with_other_tables_is_caught_by_digest(config: CodecConfig):
    up, down, stream = boundary(config), boundary(config), Stream()
    list(ticks(up, down, stream, 3))
    stranger = boundary(config)
    other = Stream(seed=8)
    list(ticks(stranger, stranger, other, 3))
    x, _, rows = stream.micro()
    with pytest.raises(CodecError, match="other tables"):
        stranger.decode(up.encode(x, rows, observe=False), rows, x.dtype)


@coded
def test_ticks_of_nothing_but_zeros_do_not_move_the_knob(config: CodecConfig):
    """A model that solves nothing for a while sends no gradients; the first one after that must keep the rate."""
    b, stream = boundary(config), Stream()
    list(ticks(b, b, stream, 4))
    before = b.backward.rate.knob
    for _ in range(20):
        b.begin_tick()
        _, dx, rows = stream.micro()
        b.decode_backward(b.encode_backward(torch.zeros_like(dx), rows), rows, dx.dtype)
        b.backward.rate.steer(b.backward.rate.spent())
    assert b.backward.rate.knob == before > 0


@coded
def test_a_refresh_before_any_tick_has_ended_keeps_the_directions_that_the_rate_pays_for(config: CodecConfig):
    b, stream = boundary(config), Stream()
    for _ in range(2):
        x, _, rows = stream.micro(samples=40)
        b.encode(x, rows, observe=True)
        directions = len(b.forward.axes.directions.deviations)
        b.refresh_alone("fwd")
        assert len(b.forward.axes.directions.deviations) > 0.7 * directions > 4


@coded
def test_a_refresh_after_nothing_but_zeros_makes_no_tables(config: CodecConfig):
    """Tables of no rows would have one direction; the first gradient brings tables of its own instead."""
    b, stream = boundary(config), Stream()
    _, dx, rows = stream.micro()
    b.decode_backward(b.encode_backward(torch.zeros_like(dx), rows), rows, dx.dtype)
    assert not b.refresh_alone("bwd").numel()
    b.begin_tick()
    b.decode_backward(b.encode_backward(dx, rows), rows, dx.dtype)
    assert b.health("bwd")["codec/dx_cosine"] > 0.9


@coded
def test_a_nan_is_refused_by_the_sender(config: CodecConfig):
    _, dx, rows = Stream().micro()
    dx[3, 4] = float("nan")
    with pytest.raises(CodecError, match="NaN or an infinity"):
        boundary(config).encode_backward(dx, rows)


@pytest.mark.parametrize("coder", ["fixed", "entropy"])
@pytest.mark.parametrize("rate", [0.06, 0.1])
def test_the_rate_holds_all_included_while_the_distribution_moves(coder: str, rate: float):
    b = boundary(CodecConfig(coder=coder, rate=rate, backward_rate=rate))
    list(ticks(b, b, Growing(Stream(drift=0.02)), 60, every=3))
    for way, name in (("fwd", ""), ("bwd", "backward_")):
        found = b.health(way)
        assert found[f"codec/{name}rate"] == pytest.approx(rate, rel=0.03)
        assert found[f"codec/{name}side_share"] < 0.12


def test_a_rate_that_is_more_than_enough_is_not_spent():
    """Few rows that stand for many tokens: what the rate allows for each has no bound, what it takes has."""
    b = boundary(CodecConfig(rate=0.2, backward_rate=0.2, share_prefixes=True, first_token="coded"))
    ids = np.tile(np.arange(2, 12)[None], (64, 1))  # all samples alike: one in 64 rows crosses
    rows = rows_of(ids, np.ones_like(ids, dtype=bool), CPU, 0, False)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        b.begin_tick()
        x, dx = (torch.randn(10, HIDDEN, generator=generator).repeat(64, 1) for _ in range(2))
        found = b.decode(b.encode(x, rows, observe=True), rows, x.dtype)
        b.decode_backward(b.encode_backward(dx, rows), rows, dx.dtype)
        for way in (b.forward, b.backward):
            way.rate.steer(way.rate.spent())
    torch.testing.assert_close(found, x, rtol=0.02, atol=0.05)
    assert 0 < b.health("fwd")["codec/rate"] < 0.1


class Growing:
    """A stream with more and larger samples, whose spread doubles on the way."""

    def __init__(self, stream: Stream):
        self.stream, self.count = stream, 0

    def micro(self) -> tuple[Tensor, Tensor, Rows]:
        self.count += 1
        x, dx, rows = self.stream.micro(samples=60 + self.count)
        return x * (1 + self.count / 100), dx, rows


@pytest.mark.parametrize("coder", ["fixed", "entropy"])
def test_more_bytes_keep_more(coder: str):
    found = []
    for rate in (0.04, 0.06, 0.09, 0.14):
        b = boundary(CodecConfig(coder=coder, rate=rate, backward_rate=rate))
        list(ticks(b, b, Growing(Stream()), 6))
        found.append((b.health("fwd")["codec/fvu"], 1 - b.health("bwd")["codec/dx_cosine"]))
    assert all(later < 0.8 * earlier for pair in pairwise(found) for earlier, later in zip(*pair))


def test_at_equal_bytes_the_transform_keeps_more_than_the_sketch():
    bits = 16 * HIDDEN * 0.125  # r = 4 of 32 in bf16
    assert bits == 4 * 16
    sketch = boundary(CodecConfig(kind="powersgd", rank=4, backward_basis="own"))
    ours = boundary(
        CodecConfig(kind="transform", rate=0.125, backward_rate=0.125, share_prefixes=False, first_token="coded")
    )
    for b in (sketch, ours):
        list(ticks(b, b, Growing(Stream()), 8))
    assert ours.health("fwd")["codec/fvu"] < 0.6 * sketch.health("fwd")["codec/fvu"]
    assert ours.health("bwd")["codec/dx_cosine"] > sketch.health("bwd")["codec/dx_cosine"]
