"""Launch gates: an engine that computes something else than the model is found out in the run's first step, a codec
that changes the policy in its second, and not in the run's result. And a share that the hold's cap cuts, before them."""

from __future__ import annotations

import math
from typing import Any

from anchor_service.config import AnchorConfig, correction_payload
from anchor_service.errors import NotFinite
from codec.config import CodecConfig
from merger import merger_class
from merger.config import MergerConfig
from merger.holds import Holds
from rl import mismatch
from rl.config import RolloutConfig
from rl.mismatch import COMFORT
from swarm.progress import Progress
from swarm.run_config import RunConfig

WARM = 2  # ticks after which a basis made of the run's own statistics has been in use


class PolicyChanged(RuntimeError):
    """The trainer's policy, through the codec, is too far from the one that samples."""

    def __init__(self, kl: float, max_kl: float):
        super().__init__(kl, max_kl)
        self.kl, self.max_kl = kl, max_kl

    def __str__(self) -> str:
        return (
            f"codec/logprob_kl is {self.kl:.3g} nats a token and codec.max_kl {self.max_kl:g}: through this codec the "
            f"trainer's policy is not the one that samples. `northstar probe` shows what rate the model needs; "
            f"raise codec.rate, codec.rank or codec.rank_ratio, or codec.max_kl to run all the same"
        )


class EngineMismatch(RuntimeError):
    """The engine's policy is too far from that of a plain forward of the same model at the same weights."""

    def __init__(self, kl: float, max_kl: float):
        super().__init__(kl, max_kl)
        self.kl, self.max_kl = kl, max_kl

    def __str__(self) -> str:
        return (
            f"rollout_corr/dense_k3 is {self.kl:.3g} nats a token and rollout.max_mismatch_kl {self.max_kl:g}: without "
            f"any codec the engine's log-probs are not those of the model; set model.dtype=float32 or "
            f"rollout.engine=transformers, or raise rollout.max_mismatch_kl to run all the same "
            f"(grpo.rollout_is=token corrects a small one)"
        )


class EngineGate:
    """Judges the first measurement. By k3, which has little variance where the two are near: it is of few tokens."""

    def __init__(self, rollout: RolloutConfig):
        self.max_kl = rollout.max_mismatch_kl
        self.open = False

    def judge(self, kl: float | None) -> float | None:
        """The estimate if it deserves a warning. Raises EngineMismatch above `rollout.max_mismatch_kl`."""
        if self.open or kl is None:
            return None
        self.open = True
        if math.isnan(kl):
            first = "the engine's log-probs, or those of a plain forward at the same weights"
            raise NotFinite(
                "rollout_corr/dense_k3 is nan", first, "look at the weights in model.path and rollout.engine"
            )
        if self.max_kl is None:
            return kl if kl > COMFORT else None
        if not kl <= self.max_kl:
            raise EngineMismatch(kl, self.max_kl)
        return None


class LaunchGate:
    """Judges the first measurement made with refreshed statistics: the first Q of a run is random and says nothing."""

    def __init__(self, codec: CodecConfig):
        self.max_kl = codec.max_kl
        self.open = codec.is_lossless

    def judge(self, kl: float | None, tick: int) -> float | None:
        """The KL if it deserves a warning. `tick`: ticks begun so far. Raises PolicyChanged above `codec.max_kl`."""
        if self.open or kl is None or tick < WARM:
            return None
        self.open = True
        if math.isnan(kl):
            first = "the engine's log-probs, or the trainer's through the codec"
            raise NotFinite("codec/logprob_kl is nan", first, "look at the weights in model.path and at codec.kind")
        if self.max_kl is None:
            return kl if kl > COMFORT else None
        if kl > self.max_kl:
            raise PolicyChanged(kl, self.max_kl)
        return None


def capped_share(anchor: AnchorConfig, merger: MergerConfig) -> dict[str, Any] | None:
    """Fields of an event, if the settings ask for a larger share of a step than a hold of `anchor.cadence` ticks may have."""
    if not merger.placebo and correction_payload(anchor, merger) is None:
        return None
    holds = Holds(anchor.cadence, anchor.beta_anc)
    asked = merger_class(merger.kind).capped(merger, holds)
    if asked is None:
        return None
    cap, tau = holds.bound(merger.cap), holds.tau()
    reason = (
        f"merger.dose {merger.dose:g} asks for {asked:.3g} of a step, and merger.hold_cap keeps it to {cap:.3g} "
        f"(merger.cap / τ, τ = {tau:.3g} ticks); lower merger.dose or anchor.cadence, or raise merger.cap"
    )
    return {"share": asked, "cap": cap, "tau": tau, "reason": reason}


class RunGates:
    """All of one run's. What deserves a warning is an event."""

    def __init__(self, config: RunConfig, progress: Progress):
        self.config, self.progress = config, progress
        self._codec, self._engine = LaunchGate(config.codec), EngineGate(config.rollout)

    def codec(self, metrics: dict[str, float]) -> None:
        """Once, and early: does the codec leave the policy as it is? Stops the run above `codec.max_kl`."""
        kl = metrics.get(mismatch.LOGPROB_KL)
        if kl is not None and math.isnan(kl) and self.config.swarm.on_nan == "skip":
            return  # of samples whose tick is skipped
        kl = self._codec.judge(kl, self.progress.tick)
        if kl is not None:
            self.progress.event("codec changes the policy", **{mismatch.LOGPROB_KL: kl})

    def engine(self, metrics: dict[str, float]) -> None:
        """Once, at the first measurement: does the engine compute what a plain forward does?"""
        kl = self._engine.judge(metrics.get(mismatch.DENSE_K3))
        if kl is not None:
            self.progress.event("engine differs from the model", **{mismatch.DENSE_K3: kl})

    def share(self) -> None:
        """Once, before the first tick: does a cap keep the merger from the share that it is set to?"""
        capped = capped_share(self.config.anchor, self.config.merger)
        if capped is not None:
            self.progress.event("share of the correction is capped", **capped)
