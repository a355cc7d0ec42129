"""Where a run is, and what it has sent and used so far: one object, shared by the parts of the coordinator."""

from __future__ import annotations

from typing import Any

from anchor_service.clock import paced
from codec.ledger import Ledger
from swarm.telemetry import Telemetry


class Progress:
    """Position, bytes by channel and peak memory of one run."""

    def __init__(self, telemetry: Telemetry):
        self.telemetry, self.ledger = telemetry, Ledger()
        self.step = self.tick = 0
        self.tick_seconds = 0.0  # running mean over steps, rollouts included: ticks pass at this pace
        self.peaks: dict[str, float] = {}  # peak memory of the largest process of a role, GB
        self._logged: dict[str, float] = {}

    def event(self, name: str, **fields: Any) -> None:
        self.telemetry.event(self.step, self.tick, name, **fields)

    def remember(self, role: str, gigabytes: float) -> None:
        self.peaks[role] = max(self.peaks.get(role, 0.0), gigabytes)

    def paced(self, seconds: float) -> None:
        """A tick of the last step took so long."""
        self.tick_seconds = paced(self.tick_seconds, seconds)

    def control(self, sent: int, dense: int) -> None:
        self.ledger.add("control", sent, dense)

    def bytes_since_last_tick(self) -> dict[str, float]:
        """Bytes by channel since the last call, whoever counted them."""
        now = {channel: sent for channel, (sent, _) in self.ledger.state().items()}
        before, self._logged = self._logged, now
        return {f"comm/{channel}_bytes": sent - before.get(channel, 0.0) for channel, sent in now.items()}

    def ratios(self) -> dict[str, float]:
        """The run so far against one that sends everything dense; without those that nothing was sent for."""
        found = {"comm/bytes_ratio": self.ledger.bytes_ratio(), "comm/total_ratio": self.ledger.total_ratio()}
        return {name: ratio for name, ratio in found.items() if ratio is not None}

    def summary(self) -> dict[str, Any]:
        """What summary.json says of it."""
        channels = {c: {"sent": sent, "dense": dense} for c, (sent, dense) in self.ledger.state().items()}
        return {
            "steps": self.step,
            "ticks": self.tick,
            "peak_memory_gb": self.peaks,
            "bytes": channels,
            "bytes_total": sum(c["sent"] for c in channels.values()),
            "bytes_total_dense": sum(c["dense"] for c in channels.values()),
            "comm/bytes_ratio": self.ledger.bytes_ratio(),
            "comm/total_ratio": self.ledger.total_ratio(),
        }

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "step": self.step,
            "tick": self.tick,
            "ledger": self.ledger.state(),
            "telemetry": self.telemetry.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, once all else of it is in place: what was written beyond it is dropped."""
        self.step, self.tick = state["step"], state["tick"]
        self.ledger.merge({channel: tuple(counted) for channel, counted in state["ledger"].items()})
        self.bytes_since_last_tick()  # what was logged before
        self.telemetry.restore(state["telemetry"], self.step, state["merged"])

    def begin_anew(self) -> None:
        """What was written of a run that was stopped before its first checkpoint is dropped."""
        self.telemetry.restore({"validations": [], "seconds": {}}, -1, 0)
