"""Would an anchor be worth its bytes? What a probe measured, put through `calibrated`'s own rule at a config's delay and cadence. No torch.

    f, a of a few mini-batches ──▶ merger.calibrated ──▶ w after all fires of the run ──▶ a sentence

Of independent estimates of one direction the best mixture weighs them by what they tell: where w is not bounded,
w/(1-w) is what the correction adds to what the codec's own gradients tell.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from anchor_service.config import correction_payload
from codec.ledger import ANCHOR
from deploy.config import ConfigError
from deploy.estimate.bytes import tick_bytes
from deploy.estimate.workload import expected_fires
from merger.calibrated import Agreements, Calibrated, Mean, pairs
from merger.holds import Holds
from swarm.run_config import RunConfig

WORTH = 1 / 2  # the share from which on an anchor is expected to change the outcome: docs/experiments.md has why


class ProbeMismatch(ConfigError):
    """A probe's file says nothing about this config."""

    def __init__(self, file: Path, field: str, problem: str):
        super().__init__(f"--probe {file}: {field} {problem}")


@dataclass(frozen=True)
class Measured:
    """Of `batches` mini-batches; errors are standard errors over them."""

    batches: int
    samples: int  # of one mini-batch
    coordinates: int  # looked at
    f: float  # of G and M of one mini-batch
    f_error: float
    a: float  # of M of two
    a_error: float

    @property
    def chance(self) -> float:
        """Standard deviation of a mean of so many fair signs."""
        return 1 / sqrt(self.coordinates)


def settings_of(config: RunConfig) -> dict[str, Any]:
    """What agreements are of, flat. The gradients' own codec is not looked at; delay and cadence change nothing."""
    codec = config.codec.model_dump(exclude={"gradient"}, exclude_none=True, mode="json")
    found = {"model.path": config.model.path, "swarm.boundaries": config.swarm.boundaries}
    return (
        found | {f"codec.{name}": value for name, value in codec.items()} | {"anchor.beta_anc": config.anchor.beta_anc}
    )


def read_measured(file: Path, config: RunConfig) -> Measured:
    """What `northstar probe --json` left in `file`. Raises ProbeMismatch if it is no such file, or of another config."""
    try:
        found = json.loads(file.read_text())["worth"]
        of, numbers = dict(found["of"]), dict(found["measured"])
        measured = Measured(**{f.name: _number(numbers[f.name]) for f in fields(Measured)})
    except OSError as error:
        raise ProbeMismatch(file, "the file", f"cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        problem = "is not there: make the file with `northstar probe … --json`, on enough answers"
        raise ProbeMismatch(file, "'worth'", problem) from error
    ours = settings_of(config)
    for key in [*ours, *of]:
        if of.get(key) != ours.get(key):
            raise ProbeMismatch(file, key, f"is {of.get(key)!r} there and {ours.get(key)!r} here: probe this config")
    return measured


def _number(value: Any) -> Any:
    if type(value) not in (int, float) or not isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return value


@dataclass(frozen=True)
class Worth:
    """Of a config's anchor; of `calibrated` where the config merges nothing."""

    config: RunConfig
    measured: Measured

    @cached_property
    def _config(self) -> RunConfig:
        config = self.config
        if correction_payload(config.anchor, config.merger) is not None:
            return config
        anchor = config.anchor.model_copy(update={"enabled": True})
        merger = config.merger.model_copy(update={"kind": "calibrated", "placebo": None})
        return config.model_copy(update={"anchor": anchor, "merger": merger})

    @cached_property
    def _merger(self) -> Calibrated:
        """As it is at the end of the run, had all fires agreed as the mini-batches do."""
        return self._after(0)

    def _after(self, errors: float) -> Calibrated:
        """With agreements that speak more for the anchor by so many of their standard errors."""
        ticks, seen = self._config.ticks, self.measured
        due = [d for d in expected_fires(self._config, ticks) if d.first_tick and d.first_tick <= ticks]
        found = Calibrated(self.config.merger)
        found.holds = Holds(self.config.anchor.cadence, self.config.anchor.beta_anc)
        firsts = sorted({d.first_tick for d in due if d.first_tick})
        for tick in firsts:
            found.holds.fire(tick)
        compared = sum(pairs(sum(first <= d.source_tick for first in firsts)) for d in due)
        own = _constant(len(due), len(due) * seen.coordinates, seen.f - errors * seen.f_error)
        others = _constant(len(due), compared, seen.a + errors * seen.a_error)
        found.seen = Agreements(own, others)
        return found

    @property
    def share(self) -> float:
        """w"""
        return self._merger.share(0)

    @property
    def between(self) -> tuple[float, float]:
        """w with both agreements a standard error worse for the anchor, and better."""
        return self._after(-1).share(0), self._after(1).share(0)

    @property
    def tau(self) -> float:
        return self._merger.holds.tau()

    @property
    def bound(self) -> float:
        return self._merger.holds.bound(self.config.merger.cap)

    @property
    def uncalibrated(self) -> float:
        """The share of signed_ema under the same settings."""
        merger = self.config.merger
        full = merger.dose * (1 - merger.alpha)
        return min(full, self.bound) if merger.hold_cap else full

    @cached_property
    def sent(self) -> tuple[float, float]:
        """A mean tick: of the anchor's channels, and of all."""
        channels = {name: sent for name, (sent, _) in tick_bytes(self._config).items()}
        return sum(channels[name] for name in ANCHOR), sum(channels.values())

    @property
    def verdict(self) -> int:
        """1: worth it; 0: no difference; -1: none, and harmful without the calibration."""
        if self.share >= WORTH:
            return 1
        return -1 if self.uncalibrated > self.bound else 0

    def numbers(self) -> dict[str, Any]:
        """For --json; `read_measured` reads it."""
        anchor, everything = self.sent
        return {
            "of": settings_of(self.config),
            "measured": asdict(self.measured),
            "tau": self.tau,
            "bound": self.bound,
            "share": self.share,
            "share_range": self.between,
            "uncalibrated_share": self.uncalibrated,
            "bytes_per_tick": {"anchor": anchor, "all": everything},
            "verdict": self.verdict,
            "words": prediction_in_words(self),
        }


def _constant(n: int, weight: float, value: float) -> Mean:
    return Mean(n, weight, weight * value, weight * value * value)


def prediction_in_words(found: Worth) -> str:
    """The verdict, what it rests on, and what limits it."""
    from experiments.anchor_worth import AnchorBytes, share_in_words  # with matplotlib, which takes a second to import

    says = {
        1: "The anchor is expected to be worth its bytes",
        0: "No difference is to be expected of the anchor",
        -1: "No difference is to be expected of the anchor, which may be harmful without the calibration",
    }
    low, high = found.between
    seen, cap = found.measured, found.config.merger.cap
    sure = (low >= WORTH) == (found.share >= WORTH) == (high >= WORTH)
    unsure = "" if sure else ", so that the verdict may be the other one: probe more --tokens"
    return (
        f"{says[found.verdict]}: {AnchorBytes(*found.sent)} a tick; {share_in_words(found.share, found.bound, found.uncalibrated, cap)}. "
        f"From {low:.2g} to {high:.2g} by the noise of {seen.batches} mini-batches of {seen.samples} answers{unsure}. "
        f"They are of the weights that the run starts from: as the policy learns, agreements change."
    )
