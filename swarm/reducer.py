"""The gradient of a stage, summed over all who hold a copy of its parameters.

Replicas of a stage sum all of it but a tied embedding that lies on two stages: that one is summed over both of its ends and all
replicas at once, as the one matrix that it is. So nobody's copy can differ, and it is coded once.
"""

from __future__ import annotations

from torch import Tensor

from codec.config import GradientConfig
from codec.gradient import GradientSum, gradient_sum
from codec.state import prefixed, under
from rl.policy import EMBEDDING, Stage
from swarm.grid import Grid


class Reducer:
    """A sum for each part of the flat gradient, by name."""

    def __init__(self, config: GradientConfig, seed: int, stage: Stage, grid: Grid):
        weights = stage.weights
        whole, tied = slice(0, weights.numel), None
        if grid.pp > 1 and stage.config.tie_word_embeddings and (grid.first or grid.last):
            at = weights.names.index(EMBEDDING)
            tied = slice(weights.offsets[at], weights.offsets[at + 1])
            # it comes first where it is looked up, and last where it is the head
            whole = slice(tied.stop, weights.numel) if grid.first else slice(0, tied.start)
        shapes = [s for s, start in zip(weights.shapes, weights.offsets) if whole.start <= start < whole.stop]
        self.parts: dict[str, tuple[slice, GradientSum]] = {
            "own": (whole, gradient_sum(config, shapes, grid.replicas, seed, grid.device))
        }
        if tied is not None:
            assert grid.ends is not None  # of the first and the last stage
            shape = weights.shapes[weights.names.index(EMBEDDING)]
            self.parts["tied"] = tied, gradient_sum(config, [shape], grid.ends, seed, grid.device)

    def __call__(self, grad: Tensor) -> None:
        """In place, [numel of the stage]; the same on all copies to the bit."""
        for where, add in self.parts.values():
            add(grad[where])

    def state(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, (_, add) in self.parts.items():
            found |= prefixed(name, add.state())
        return found

    def restore(self, state: dict[str, Tensor]) -> None:
        """A part of which nothing was saved, as it was summed by one alone, begins anew."""
        for name, (_, add) in self.parts.items():
            if saved := under(name, state):
                add.restore(saved)
