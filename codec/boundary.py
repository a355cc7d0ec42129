"""A boundary: where the decoder is cut and a codec stands in for the link.

    virtual   x ──encode──▶ payload ──decode──▶ x̂        both ends in one process
    wire      x ──encode──▶ payload ═══link═══▶ payload ──decode──▶ x̂        (and dx back the same way)

Both run the very same encode and decode on the same rows, so their numbers are identical. Rows are
real tokens only: padding is never encoded, sent or counted. Which rows reach the codec is decided here:

    all N rows ──(samples that share a prefix send it once)──▶ kept ──(token 0 goes as it is)──▶ coded
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from codec.config import CodecConfig
from codec.dense import dense
from codec.fidelity import Fidelity
from codec.interface import Codec, CodecError, Room, as_bytes, checked_codecs
from codec.ledger import Ledger
from codec.named import imported
from codec.powersgd import powersgd
from codec.random_k import random_k
from codec.rows import Rows
from codec.state import prefixed, under
from codec.transform.way import transform

Factory = Callable[[CodecConfig, int, int], tuple[Codec, Codec]]  # of a config, the hidden size and a seed
CODECS: dict[str, Factory] = {
    "none": dense,
    "powersgd": powersgd,
    "random_k": random_k,
    "transform": transform,
}


def make_codec(config: CodecConfig, hidden: int, seed: int) -> tuple[Codec, Codec]:
    """The two ways of `config.kind`: one of CODECS, or anybody's "package.module:function" of the same face.

    Raises ValueError if that cannot be imported, or if what it makes lacks a part of the face.
    """
    if config.kind in CODECS:
        return CODECS[config.kind](config, hidden, seed)
    make = cast("Factory", imported(config.kind, "codec.kind"))
    return checked_codecs(config.kind, make(config, hidden, seed))


class Boundary:
    """One boundary's codec and its bytes. `index` numbers the boundaries from the embedding upwards."""

    def __init__(self, config: CodecConfig, index: int, hidden: int, seed: int, ledger: Ledger):
        self.index, self.hidden, self.ledger = index, hidden, ledger
        self.make = lambda: make_codec(config, hidden, seed + index)
        self.device = torch.device("cpu")
        self.forward, self.backward = self.make()
        self.lenient, self.refused = False, ""  # what a codec would not encode, and whether zeros go in its place
        self.exact_first, self.share_prefixes = config.sends_first_exactly, config.shares_prefixes
        self.begin_tick()

    def begin_tick(self) -> None:
        self.seen = {"fwd": Fidelity(), "bwd": Fidelity()}
        self.forward.begin_tick()
        self.backward.begin_tick()

    def to(self, device: torch.device) -> Boundary:
        self.device = device
        self.forward.to(device)
        self.backward.to(device)
        return self

    @property
    def keyed(self) -> bool:
        """Whether what comes out depends on the keys of the rows."""
        return self.forward.keyed or self.backward.keyed

    def way(self, name: str) -> Codec:
        return self.forward if name == "fwd" else self.backward

    def encode(self, x: Tensor, rows: Rows, observe: bool) -> Tensor:
        """Hidden states as `rows` hold them -> payload, upstream side. `observe` adds x to the statistics of the next refresh."""
        kept = rows.leaving(x, self.share_prefixes)
        coded, exact = self._split(rows)
        sent = kept.index_select(0, coded) if exact.numel() else kept
        room = Room(len(rows), 2 * exact.numel() * self.hidden)
        self._rekey("fwd", rows)
        payload, x_hat = self._coded(self.forward, sent, room, observe)
        if observe:
            assert x_hat is not None  # an observer is told what arrives
            self._note(sent, x_hat, rows)
        if exact.numel():  # in bf16, as a dense system of our kind would send it
            payload = torch.cat([payload, as_bytes(kept[exact].bfloat16())])
        self.ledger.add("boundary_fwd", payload.numel(), len(rows) * x[:1].nbytes)
        return payload

    def decode(self, payload: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
        """Payload -> hidden states as `rows` hold them, downstream side. Raises CodecError."""
        coded, exact = self._split(rows)
        self._rekey("fwd", rows)
        if not exact.numel():
            kept = self.forward.decode(payload, len(coded), dtype)
        else:
            body = payload.numel() - 2 * exact.numel() * self.hidden
            if body < 0:
                raise CodecError(f"a payload of {payload.numel()} bytes has no room for {len(exact)} exact rows")
            first = payload[body:].clone().view(torch.bfloat16).view(-1, self.hidden)
            kept = torch.empty(len(coded) + len(exact), self.hidden, dtype=dtype, device=payload.device)
            kept[coded] = self.forward.decode(payload[:body], len(coded), dtype)
            kept[exact] = first.to(dtype)
        return rows.arrived(kept, self.share_prefixes)

    def encode_backward(self, dx: Tensor, rows: Rows) -> Tensor:
        """Gradient -> payload, downstream side. Rows that share a prefix send the sum of their gradients."""
        self._rekey("bwd", rows)
        kept = rows.leaving_back(dx, self.share_prefixes)
        payload, dx_hat = self._coded(self.backward, kept, Room(len(rows)), observe=True)
        assert dx_hat is not None  # as above
        self.seen["bwd"].add(kept, dx_hat)
        self.ledger.add("boundary_bwd", payload.numel(), len(rows) * dx[:1].nbytes)
        return payload

    def decode_backward(self, payload: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
        """Payload -> gradient, upstream side. Raises CodecError."""
        self._rekey("bwd", rows)
        count = len(rows.kept) if self.share_prefixes else len(rows)
        return rows.arrived_back(self.backward.decode(payload, count, dtype), self.share_prefixes)

    def _rekey(self, name: str, rows: Rows) -> None:
        """Of the rows that the codec will be given, those that go as they are left out."""
        codec = self.way(name)
        if codec.keyed:
            keys = rows.keys[rows.kept] if self.share_prefixes else rows.keys
            codec.rekey(keys[self._split(rows)[0]] if name == "fwd" else keys)

    def _coded(self, codec: Codec, x: Tensor, room: Room, observe: bool) -> tuple[Tensor, Tensor | None]:
        """A codec that refuses numbers must not keep others waiting, if they will agree that the tick is void."""
        try:
            return codec.encode(x, room, observe)
        except ValueError as error:
            if not self.lenient:
                raise
            self.refused = self.refused or str(error)
            return codec.encode(torch.zeros_like(x), room, observe)

    def _note(self, sent: Tensor, x_hat: Tensor, rows: Rows) -> None:
        """Fidelity of coded rows, token 0 left out also where it is coded: it would hide all others."""
        if not self.exact_first:
            others = ~self._first(rows)
            sent, x_hat = sent[others], x_hat[others]
        self.seen["fwd"].add(sent, x_hat)

    def limits(self, name: str, rows: Rows, dtype: torch.dtype) -> tuple[int, int]:
        """The least and the most bytes of an honest payload."""
        if name == "bwd":
            return self.backward.limits(len(rows.kept) if self.share_prefixes else len(rows), dtype)
        coded, exact = self._split(rows)
        least, most = self.forward.limits(len(coded), dtype)
        raw = 2 * exact.numel() * self.hidden
        return least + raw, most + raw

    def _split(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Indices, among the kept rows, of the coded ones and of the ones sent exactly."""
        if not self.exact_first:
            first = self._first(rows)
            return torch.arange(len(first), device=first.device), first.new_empty(0, dtype=torch.int64)
        return rows.kept_parted if self.share_prefixes else rows.parted

    def _first(self, rows: Rows) -> Tensor:
        """Which of the kept rows are token 0 of a sample, bool [n]."""
        return rows.first[rows.kept] if self.share_prefixes else rows.first

    def virtual(self, x: Tensor, rows: Rows, observe: bool) -> Tensor:
        """Both ends at once, differentiable: hidden states -> hidden states, as `rows` hold them."""
        return _Virtual.apply(x, self, rows, observe)

    def cut(self, rows: Rows, observe: bool) -> Callable[[Tensor], Tensor]:
        """`virtual` of these rows, for a stage to call at the layer."""
        return partial(self.virtual, rows=rows, observe=observe)

    def refresh_alone(self, name: str) -> Tensor:
        """A refresh where there is one replica; `swarm.bases` does it for all others. Returns the tables, if any are new."""
        codec, raw = self.way(name), torch.empty(0, dtype=torch.uint8)
        statistics = None if codec.tables is None else codec.tables.statistics()
        if codec.tables is not None and statistics is not None:
            codec.tables.absorb(statistics)
            raw = codec.tables.refresh()
            if codec.rate is not None:
                codec.rate.count_side(raw.numel())
            codec.tables.load(raw)
        return raw

    def health(self, name: str) -> dict[str, float]:
        """What the sender of a way saw in this tick."""
        found = self.way(name).health()
        seen = self.seen[name]
        return found | (seen.fvu("codec/fvu") if name == "fwd" else seen.cosine("codec/dx_cosine"))

    def state(self) -> dict[str, Tensor]:
        return prefixed("fwd", self.forward.state()) | prefixed("bwd", self.backward.state())

    def summed(self) -> list[str]:
        """Names in `state` of what replicas are still to sum."""
        return [f"{name}.{key}" for name in ("fwd", "bwd") for key in self.way(name).summed]

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from `state()`, with codecs made anew: what they learnt since is forgotten."""
        self.forward, self.backward = self.make()
        self.to(self.device)
        for name in ("fwd", "bwd"):
            self.way(name).restore(under(name, state))


class _Virtual(torch.autograd.Function):
    """Straight through a quantiser: its own derivative is zero almost everywhere and says nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, boundary: Boundary, rows: Rows, observe: bool) -> Tensor:
        ctx.boundary, ctx.rows = boundary, rows
        return boundary.decode(boundary.encode(x, rows, observe), rows, x.dtype).clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (dx,), boundary, rows = grad_outputs, ctx.boundary, ctx.rows
        return boundary.decode_backward(boundary.encode_backward(dx, rows), rows, dx.dtype), None, None, None
