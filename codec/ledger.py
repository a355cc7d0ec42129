"""The ledger: every byte that would cross a link, by channel, beside what a dense system would send.

A sender counts; a receiver does not. Virtual boundaries count as if they were wires. A ring
all-reduce of B bytes over n ranks is counted as the 2(n-1)/n·B that each rank sends.
"""

from __future__ import annotations

from collections import defaultdict

CHANNELS = (
    "boundary_fwd",
    "boundary_bwd",
    "basis",
    "grad_dp",
    "tied",
    "snapshot",
    "replay",
    "correction",
    "rollout_sync",
    "control",
)
PUBLISHED = ("boundary_fwd", "boundary_bwd", "basis")
ANCHOR = ("snapshot", "replay", "correction")  # what there would not be without an anchor


class Ledger:
    """Bytes sent and bytes that the dense system of the same shape would have sent, by channel."""

    def __init__(self) -> None:
        self.sent: dict[str, float] = defaultdict(float)
        self.dense: dict[str, float] = defaultdict(float)

    def add(self, channel: str, sent: float, dense: float) -> None:
        """Raises KeyError for a channel that is not in `CHANNELS`."""
        if channel not in CHANNELS:
            raise KeyError(f"unknown ledger channel {channel!r}; channels are {', '.join(CHANNELS)}")
        self.sent[channel] += sent
        self.dense[channel] += dense

    def drain(self) -> dict[str, tuple[float, float]]:
        """What was added since the last drain, as {channel: (sent, dense)}."""
        entries = {c: (self.sent[c], self.dense[c]) for c in CHANNELS if self.sent[c] or self.dense[c]}
        self.sent.clear()
        self.dense.clear()
        return entries

    def merge(self, entries: dict[str, tuple[float, float]]) -> None:
        """Add another ledger's drained entries."""
        for channel, (sent, dense) in entries.items():
            self.add(channel, sent, dense)

    def state(self) -> dict[str, list[float]]:
        """Totals so far, in the form that `merge` takes back."""
        return {c: [self.sent[c], self.dense[c]] for c in CHANNELS if self.sent[c] or self.dense[c]}

    def bytes_ratio(self) -> float | None:
        """The published ratio: Y, dY and amortised Q over the dense boundary. None before anything crossed."""
        dense = sum(self.dense[c] for c in PUBLISHED)
        return sum(self.sent[c] for c in PUBLISHED) / dense if dense else None

    def total_ratio(self) -> float | None:
        """Everything over everything."""
        dense = sum(self.dense[c] for c in CHANNELS)
        return sum(self.sent[c] for c in CHANNELS) / dense if dense else None
