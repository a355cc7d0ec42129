"""The launch gate: a codec that changes the policy is found out in the run's second step, not in its result."""

from __future__ import annotations

from codec.config import CodecConfig
from rl.mismatch import COMFORT

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


class LaunchGate:
    """Judges the first measurement made with refreshed statistics: the first Q of a run is random and says nothing."""

    def __init__(self, codec: CodecConfig):
        self.max_kl = codec.max_kl
        self.open = codec.kind == "none"

    def judge(self, metrics: dict[str, float], tick: int) -> float | None:
        """The KL if it deserves a warning. `tick`: ticks begun so far. Raises PolicyChanged above `codec.max_kl`."""
        kl = metrics.get("codec/logprob_kl")
        if self.open or kl is None or tick < WARM:
            return None
        self.open = True
        if self.max_kl is None:
            return kl if kl > COMFORT else None
        if kl > self.max_kl:
            raise PolicyChanged(kl, self.max_kl)
        return None
