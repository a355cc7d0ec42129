"""Config of the codec. No torch: a config is read and refused before anything heavy is imported."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

KINDS = ("none", "powersgd", "random_k", "transform")
_RANKED = ("powersgd", "random_k")  # kinds that have a rank
GRADIENT_KINDS = ("none", "powersgd", "sign", "sparse")
NODE_TAG = r"^[a-z][a-z0-9_-]*$"  # a custom Ray resource that some nodes have; CPU, GPU and node:… are none


class Section(BaseModel):
    """Base of every config section: unknown keys are errors, values are never coerced silently."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class When(NamedTuple):
    """What must hold for a setting to be read: `key` has one of `values`, or one for which `also` holds."""

    key: str
    values: tuple[Any, ...]
    also: Callable[[Any], bool] = lambda value: False

    def holds(self, value: Any) -> bool:
        return value in self.values or self.also(value)


Reading = dict[str, tuple[tuple[When, ...], ...]]  # key: alternatives, each all that must hold. Others are always read


def known_kind(kind: str, kinds: tuple[str, ...]) -> str:
    """One of ours, or a name of the user's own. Raises ValueError."""
    if kind not in kinds and ":" not in kind:
        near = difflib.get_close_matches(kind, kinds, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{kind!r} must be one of {', '.join(map(repr, kinds))}, or 'package.module:function'{hint}")
    return kind


class GradientConfig(Section):
    """Compression of weight gradients, with error feedback: between replicas, and between the ends of a tied embedding."""

    kind: str = Field(
        default="none",
        description="`powersgd`: rank-r factors; `sign`: a bit a value; `sparse`: entropy-coded values, most of them 0; "
        "`package.module:function`: your own",
    )
    rank: int = Field(default=4, ge=1, description="powersgd: rank of each weight matrix's factors")
    bits: float | None = Field(
        default=None,
        ge=0.05,
        le=6,
        description="entropy-coded bits of a number of powersgd's factors (default: fp32), or of a value of `sparse`",
    )

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        return known_kind(kind, GRADIENT_KINDS)

    @model_validator(mode="after")
    def _fits(self) -> GradientConfig:
        if self.kind == "sparse" and self.bits is None:
            raise ValueError("sparse needs bits: set bits, 0.5 for example")
        return self


class CodecConfig(Section):
    """What crosses a boundary between layers."""

    kind: str = Field(
        default="transform",
        description="`transform`: few bits for every direction, by importance; `powersgd`: few directions, as "
        "published; `random_k`: few coordinates, drawn for each token, without bias; `none`: the dense control; `package.module:function`: your own",
    )
    rank: int | None = Field(
        default=None, ge=1, description="powersgd, random_k: numbers sent for each token; this or `rank_ratio`"
    )
    rank_ratio: float | None = Field(
        default=None, gt=0, le=1, description="powersgd, random_k: rank as a share of the hidden size"
    )
    backward_basis: Literal["forward", "own"] = Field(
        default="forward", description="powersgd: dX through X's basis, as published, or through one of its own"
    )
    rate: float | None = Field(
        default=None, gt=0, le=1, description="transform: bytes of the forward, all included, as a share of dense bf16"
    )
    backward_rate: float | None = Field(default=None, gt=0, le=1, description="transform: the same for the backward")
    total_rate: float | None = Field(
        default=None, gt=0, le=0.5, description="transform: both together, split 3:1; default 0.05 if no rate is given"
    )
    coder: Literal["fixed", "entropy"] = Field(
        default="entropy", description="transform: a fixed number of bits for each coefficient, or an entropy coder"
    )
    dither: bool = Field(
        default=False,
        description="transform, entropy coder: random numbers, drawn for each token, added before rounding and subtracted "
        "after it, so that rounding has no bias; more variance at equal bytes",
    )
    side_share: float = Field(
        default=0.1, gt=0, le=1, description="transform: tables may cost this share of the bytes; else they wait"
    )
    sensitivity: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="transform: share of the gradients' covariance in how errors of X are counted; 0: all alike",
    )
    first_token: Literal["coded", "exact"] | None = Field(
        default=None, description="token 0 of a sample in the forward; default: exact for transform, else coded"
    )
    share_prefixes: bool | None = Field(
        default=None, description="rows that samples have in common cross once; default: on for transform, else off"
    )
    q_cadence: int | None = Field(
        default=None, ge=1, description="refresh Q, or the transform, every so many ticks; default: `anchor.cadence`"
    )
    max_kl: float | None = Field(
        default=None,
        gt=0,
        description="a run stops at its second step if `codec/logprob_kl` is above it, nats a token; default: it only warns",
    )
    gradient: GradientConfig = GradientConfig()

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        return known_kind(kind, KINDS)

    @model_validator(mode="after")
    def _fits(self) -> CodecConfig:
        if self.rank is not None and self.rank_ratio is not None:
            raise ValueError(f"rank {self.rank} and rank_ratio {self.rank_ratio} are both set: remove one of them")
        if self.kind in _RANKED and self.rank is None and self.rank_ratio is None:
            raise ValueError(f"{self.kind} needs a rank: set rank or rank_ratio (0.05 is the published share)")
        if self.dither and self.kind == "transform" and self.coder == "fixed":
            raise ValueError(
                'dither true needs coder "entropy": dither takes the bias from steps of one size, and those of "fixed" '
                'are of many; set coder = "entropy", or dither = false'
            )
        single = self.rate is not None or self.backward_rate is not None
        if single and self.total_rate is not None:
            raise ValueError("total_rate is set beside rate or backward_rate: remove one or the other")
        if single and None in (self.rate, self.backward_rate):
            raise ValueError("rate and backward_rate belong together: set both, or total_rate alone")
        return self

    @property
    def rates(self) -> tuple[float, float]:
        """Share of dense bf16 for the forward and the backward: the forward is the bottleneck, so it gets more."""
        if self.rate is not None and self.backward_rate is not None:
            return self.rate, self.backward_rate
        total = self.total_rate or 0.05
        return 1.5 * total, 0.5 * total

    @property
    def sends_first_exactly(self) -> bool:
        return self.kind == "transform" if self.first_token is None else self.first_token == "exact"

    @property
    def shares_prefixes(self) -> bool:
        return self.kind == "transform" if self.share_prefixes is None else self.share_prefixes

    @property
    def codes_copies_alike(self) -> bool:
        """Whether one copy of a row can stand for all: there is but one, or the codec is linear in each row."""
        return self.shares_prefixes or self.kind in ("none", "powersgd")

    @property
    def is_lossless(self) -> bool:
        """Whether every number arrives as it was sent; nobody knows that of a codec that is not ours."""
        return self.kind == "none"

    def check_hidden(self, hidden: int) -> None:
        """Raises ValueError if this codec cannot cut a model of hidden size `hidden`."""
        if self.kind in _RANKED:
            self.rank_for(hidden)

    def rank_for(self, hidden: int) -> int:
        """The rank r at hidden size `hidden`. Raises ValueError if r > hidden, or if none is set."""
        rank = self.rank
        if rank is None:
            if self.rank_ratio is None:
                raise ValueError("there is no rank: set rank or rank_ratio")
            rank = max(1, round(self.rank_ratio * hidden))
        if rank > hidden:
            raise ValueError(f"rank {rank} is larger than the hidden size {hidden}: set rank to at most {hidden}")
        return rank


def _own(kind: str) -> bool:
    return ":" in kind


_CUT = When("swarm.boundaries", ([2],), bool)  # without one there is no codec
_POWERSGD = When("codec.kind", ("powersgd",), _own), _CUT
_RANK = When("codec.kind", _RANKED, _own), _CUT
_TRANSFORM = When("codec.kind", ("transform",), _own), _CUT
_REPLICAS = When("swarm.dp", (2,), lambda dp: dp > 1)
_STAGES = When("swarm.pp", (2,), lambda pp: pp > 1)  # the two ends of a tied embedding; an untied one has none
_FACTORS = When("codec.gradient.kind", ("powersgd",), _own)
_CODED = When("codec.gradient.kind", ("powersgd", "sparse"), _own)

READING: Reading = {
    "codec.kind": ((_CUT,), (When("codec.kind", ("none",)),)),
    "codec.rank": (_RANK,),
    "codec.rank_ratio": (_RANK,),
    "codec.backward_basis": (_POWERSGD,),
    "codec.rate": (_TRANSFORM,),
    "codec.backward_rate": (_TRANSFORM,),
    "codec.total_rate": (_TRANSFORM,),
    "codec.coder": (_TRANSFORM,),
    "codec.dither": ((*_TRANSFORM, When("codec.coder", ("entropy",))),),
    "codec.side_share": (_TRANSFORM,),
    "codec.sensitivity": (_TRANSFORM,),
    "codec.first_token": ((_CUT,),),
    "codec.share_prefixes": ((_CUT,),),
    "codec.q_cadence": ((When("codec.kind", ("powersgd", "transform"), _own), _CUT),),
    "codec.gradient.kind": ((_REPLICAS,), (_STAGES,)),
    "codec.gradient.rank": ((_FACTORS, _REPLICAS), (_FACTORS, _STAGES)),
    "codec.gradient.bits": ((_CODED, _REPLICAS), (_CODED, _STAGES)),
}
