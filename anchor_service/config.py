"""Config of the anchor. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from codec.config import NODE_TAG, Reading, Section, When
from merger import merger_class
from merger.config import MERGING, TAKES_SIGNS, MergerConfig
from merger.interface import Payload

_MEAN = "mean lag in ticks; default: anchor.delay_k"


class FixedLag(Section):
    """Always `anchor.delay_k`."""

    kind: Literal["fixed"] = Field(default="fixed", description="the contract's lag")


class UniformLag(Section):
    """Uniform between two bounds."""

    kind: Literal["uniform"] = Field(default="uniform", description="uniform lag")
    low: float = Field(default=1, ge=1, description="smallest lag in ticks")
    high: float = Field(default=10, ge=1, description="largest lag in ticks")

    @model_validator(mode="after")
    def _ordered(self) -> UniformLag:
        if self.high < self.low:
            raise ValueError(f"high {self.high:g} is below low {self.low:g}")
        return self


class LognormalLag(Section):
    """A log-normal lag: mostly near the mean, sometimes several times it."""

    kind: Literal["lognormal"] = Field(default="lognormal", description="log-normal lag")
    mean: float | None = Field(default=None, ge=1, description=_MEAN)
    sigma: float = Field(default=0.5, ge=0, le=3, description="standard deviation of the lag's logarithm")


class ParetoLag(Section):
    """A heavy tail: rare, very late corrections."""

    kind: Literal["pareto"] = Field(default="pareto", description="Pareto lag")
    mean: float | None = Field(default=None, ge=1, description=_MEAN)
    shape: float = Field(default=2.0, gt=1, description="tail exponent; the smaller, the heavier")


class MarkovLag(Section):
    """An anchor that is healthy or slow, and stays so for a while."""

    kind: Literal["markov"] = Field(default="markov", description="two states")
    healthy: float | None = Field(default=None, ge=1, description="lag in ticks while healthy; default: anchor.delay_k")
    slow: float = Field(default=40, ge=1, description="lag in ticks while slow")
    p_slow: float = Field(default=0.1, ge=0, le=1, description="chance, each fire, that a healthy anchor becomes slow")
    p_heal: float = Field(default=0.3, ge=0, le=1, description="chance, each fire, that a slow anchor heals")


class OutageLag(Section):
    """Windows without an anchor."""

    kind: Literal["outage"] = Field(default="outage", description="no fires in the last `length` ticks of each `every`")
    lag: float | None = Field(default=None, ge=1, description="lag in ticks otherwise; default: anchor.delay_k")
    every: int = Field(default=100, ge=2, description="period in ticks")
    length: int = Field(default=40, ge=1, description="ticks of each period without an anchor")

    @model_validator(mode="after")
    def _some_time_left(self) -> OutageLag:
        if self.length >= self.every:
            raise ValueError(f"length {self.length} leaves no tick of every {self.every} with an anchor")
        return self


class DiurnalLag(Section):
    """A lag that swings with the time of day."""

    kind: Literal["diurnal"] = Field(default="diurnal", description="sine around the mean")
    mean: float | None = Field(default=None, ge=1, description=_MEAN)
    amplitude: float = Field(default=0.5, ge=0, lt=1, description="swing as a share of the mean")
    period: float = Field(default=200, gt=1, description="period in ticks")


class TraceLag(Section):
    """Lags from a file: a run's corrections.jsonl, or a CSV with source_tick and first_tick."""

    kind: Literal["trace"] = Field(default="trace", description="recorded lags")
    path: str = Field(description="the file")

    @field_validator("path")
    @classmethod
    def _exists(cls, path: str) -> str:
        if not Path(path).expanduser().is_file():
            raise ValueError(f"no such file: {path!r}")
        return path


LagConfig = Annotated[
    FixedLag | UniformLag | LognormalLag | ParetoLag | MarkovLag | OutageLag | DiurnalLag | TraceLag,
    Field(discriminator="kind"),
]


class AnchorConfig(Section):
    """The slow actor that computes the dense gradient M of old weights on their own batch."""

    enabled: bool = Field(default=True, description="run an anchor at all")
    delay_k: int = Field(default=5, ge=1, description="how many ticks old M's weights are when it is first merged")
    cadence: int = Field(default=5, ge=1, description="M is refreshed every so many ticks")
    beta_anc: float = Field(default=0.5, ge=0, lt=1, description="M̄ ← beta_anc·M̄ + (1-beta_anc)·M at each fire")
    clock: Literal["lockstep", "wall"] = Field(
        default="lockstep",
        description="`lockstep`: lags are ticks, exact, and a due correction is waited for; `wall`: nothing waits",
    )
    lag: LagConfig = FixedLag()
    max_lag: int | None = Field(default=None, ge=1, description="a correction later than this, in ticks, is refused")
    max_age: int | None = Field(
        default=None, ge=0, description="a correction held longer than this, in ticks, is dropped"
    )
    workers: int = Field(
        default=1, ge=1, description="fires that may be in flight at once, each on a worker of its own"
    )
    weights: Literal["swarm", "shared"] = Field(
        default="swarm",
        description="`shared`: snapshots are taken from the stream that feeds the engines, not sent again to a node that has "
        "an engine; with `snapshot.rate` M is then the gradient at what that stream holds",
    )
    replay_fraction: float = Field(
        default=1.0, gt=0, le=1, description="samples that a fire replays, as a share of a mini-batch's"
    )
    replay: Literal["tick", "window"] = Field(
        default="tick",
        description="what a fire replays: `tick`, the mini-batch that its weights were trained on; `window`, as many samples "
        "of all mini-batches since the last fire's, for the mean of their gradients",
    )
    payload: Literal["auto", "dense"] = Field(
        default="auto", description="`auto`: sign planes where the merger needs no more; `dense`: fp32 M̄ always"
    )
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="device of the anchor")
    placement: Literal["separate", "colocated"] = Field(
        default="separate",
        description="`colocated`: each anchor worker, and a diagnoser, shares a worker's GPU and keeps its weights there",
    )
    resource: str | None = Field(
        default=None,
        pattern=NODE_TAG,
        description="custom Ray resource of the node that the anchor must be on, e.g. `anchor`; default: any node",
    )
    micro_batch_size: int = Field(default=32, ge=1, description="samples in one backward of the anchor")
    slowdown: float = Field(default=1.0, ge=1, description="sleep until a fire took this many times its own time")
    norm_bound: float = Field(
        default=10.0,
        gt=1,
        description="on the wall clock, a correction whose norm is so many times the median of the last 20 is refused, once 5 "
        "were taken, and of signs so many times the swarm's own gradients that they replay; 1e30: only one that is not finite",
    )
    timeout_s: float = Field(
        default=600.0,
        gt=0,
        description="deadline of a correction that is due, on the wall clock of a fire beyond the lag that it is given: an "
        "anchor worker that misses it is renewed",
    )

    @model_validator(mode="after")
    def _can_share(self) -> AnchorConfig:
        if self.placement == "colocated" and (self.device != "cuda" or self.resource):
            raise ValueError(
                f"placement 'colocated' puts anchor workers on GPUs of the swarm's workers, with device {self.device!r} "
                f"and resource {self.resource!r}: set device=cuda and no resource, or placement=separate"
            )
        return self

    def replayed(self, samples: int) -> int:
        """How many samples a fire replays, where a mini-batch has `samples`."""
        return max(1, round(self.replay_fraction * samples))


def correction_payload(anchor: AnchorConfig, merger: MergerConfig) -> Payload | None:
    """What a correction carries: `sign`, `dense`, or None where nothing is merged.

    Raises ValueError if it is no merger, or if it takes M and the source tick's gradient for two of one mini-batch and
    they are not.
    """
    found = merger_class(merger.kind)
    if anchor.replay == "window" and found.needs_source:
        raise ValueError(
            f"anchor.replay 'window' is of several mini-batches, and merger.kind {merger.kind!r} subtracts the gradient "
            f"of the source tick's alone: set anchor.replay=tick"
        )
    payload = found.payload if anchor.enabled and found.has_effect(merger) else None
    return "dense" if payload and anchor.payload == "dense" else payload


_ENABLED = When("anchor.enabled", (True,))
_FIRES = _ENABLED, MERGING
_PLACEBO = (When("merger.placebo", ("own", "random")),)
_DIAGNOSER = (When("diagnostics.every", (7,), bool),)
_WITH_M = When("codec.q_cadence", (None,)), When("codec.kind", ("powersgd", "transform"), lambda kind: ":" in kind)
_DRAWN = When("anchor.lag.kind", ("fixed", "lognormal", "pareto", "markov", "outage", "diurnal"))
_LISTED = When("anchor.clock", ("lockstep",)), When("anchor.lag.kind", ("fixed",), lambda kind: kind != "trace")

READING: Reading = {  # not here: resource, which says where actors go, and which a cluster's scripts give to any config
    "anchor.delay_k": ((*_FIRES, _DRAWN), _PLACEBO),
    "anchor.cadence": ((*_FIRES, *_LISTED), _PLACEBO, _WITH_M),
    "anchor.beta_anc": (_FIRES, (When("merger.placebo", ("own",)),)),
    "anchor.clock": (_FIRES, _PLACEBO),
    "anchor.lag": (_FIRES, _PLACEBO),
    "anchor.max_lag": (_FIRES,),
    "anchor.max_age": (_FIRES, _PLACEBO),
    "anchor.workers": ((_ENABLED,),),
    "anchor.weights": (_FIRES,),
    "anchor.replay_fraction": (_FIRES,),
    "anchor.replay": (_FIRES,),
    "anchor.payload": ((_ENABLED, TAKES_SIGNS),),
    "anchor.device": ((_ENABLED,), _DIAGNOSER),
    "anchor.placement": ((_ENABLED,), _DIAGNOSER),
    "anchor.micro_batch_size": ((_ENABLED,), _DIAGNOSER),
    "anchor.slowdown": (_FIRES,),
    "anchor.norm_bound": ((*_FIRES, When("anchor.clock", ("wall",))),),
    "anchor.timeout_s": ((_ENABLED,), _DIAGNOSER),
}
