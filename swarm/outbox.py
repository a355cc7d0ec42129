"""The streams of weights that leave a stage, and weights that are kept to be sent beside the tick that changes them."""

from __future__ import annotations

from queue import Empty, SimpleQueue

import numpy as np
from torch import Tensor

from anchor_service.errors import WaitTimeout
from rl.config import ModelConfig, SnapshotConfig
from rl.snapshot import BaseLost, Sender
from swarm import twin


class Outbox:
    """Each stream has a sender of its own, which knows what its receivers hold."""

    def __init__(self, snapshot: SnapshotConfig, model: ModelConfig):
        self.snapshot, self.model = snapshot, model
        self.senders: dict[str, Sender] = {}
        self._kept: SimpleQueue[tuple[int, Tensor]] = SimpleQueue()  # in the order in which they are asked for

    def frame(
        self, weights: Tensor, tick: int, stage: int, stream: str, done: int, whole: bool, exact: bool = True
    ) -> tuple[np.ndarray, tuple[int, bool]]:
        """Frame of a stage's `weights` [owned] after `tick` ticks, its size and whether it is whole; `stage` has made `done`.

        Raises BaseLost if they are earlier weights of a stream that another has sent: whoever was here before knew them.
        """
        if stream not in self.senders:
            if tick < done:
                raise BaseLost(stage, tick, None)
            self.senders[stream] = twin.sender_of(stream, self.snapshot, self.model)
        sender = self.senders[stream]
        frame = sender.frame(weights, tick, stage, whole, exact)
        return frame, (frame.nbytes, sender.whole)

    def keep(self, weights: Tensor, tick: int) -> None:
        """A copy of `weights` after `tick` ticks, for `take`."""
        self._kept.put((tick, weights.to("cpu", copy=True)))

    def take(self, tick: int, seconds: float) -> Tensor:
        """What was kept after `tick` ticks, within `seconds`: whoever keeps it was asked first.

        Raises WaitTimeout.
        """
        kept, weights = -1, None
        while kept < tick or weights is None:  # earlier ones nobody asked for
            try:
                kept, weights = self._kept.get(timeout=seconds)
            except Empty:
                what = f"the weights of tick {tick}"
                raise WaitTimeout("a worker", what, seconds, "swarm.timeout_s") from None
        return weights
