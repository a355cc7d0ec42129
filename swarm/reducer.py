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
        self.config, self.seed, self.grid = config, seed, grid
        weights = stage.weights
        at: dict[str, slice] = {"own": slice(0, weights.numel)}
        if grid.pp > 1 and stage.config.tie_word_embeddings and EMBEDDING in weights.names:
            index = weights.names.index(EMBEDDING)
            at["tied"] = tied = slice(weights.offsets[index], weights.offsets[index + 1])
            # it comes first where it is looked up, and last where it is the head
            at["own"] = slice(tied.stop, weights.numel) if grid.first else slice(0, tied.start)
        starts = list(zip(weights.shapes, weights.offsets))
        self.shapes = {name: [s for s, at in starts if w.start <= at < w.stop] for name, w in at.items()}
        self.at = at
        self.join()

    def join(self) -> None:
        """Sum with those who are in the grid now; nothing is owed to anybody."""
        self.dp = self.grid.dp
        self.parts: dict[str, tuple[slice, GradientSum]] = {}
        for name, where in self.at.items():
            peers = self.grid.ends if name == "tied" else self.grid.replicas
            assert peers is not None  # the first and the last stage have the other end
            total = gradient_sum(self.config, self.shapes[name], peers, self.seed, self.grid.device)
            self.parts[name] = where, total

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
