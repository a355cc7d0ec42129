"""Microbatches through the stages: forward payloads up, backward payloads down, one forward one backward (1F1B).

Both ends of a link know the microbatch, so shapes are never sent. A payload's size may depend on what is in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from codec.boundary import Boundary
from rl.grpo import LossTerms
from rl.objective import MicroBatch, logprobs
from rl.policy import Stage
from swarm.grid import Grid
from swarm.schedule import schedule

Loss = Callable[[Tensor, MicroBatch, int], LossTerms]


class Pipeline:
    """One rank's stage between its neighbours. `cuts` maps a layer number to the boundary in front of it."""

    def __init__(self, stage: Stage, cuts: dict[int, Boundary], grid: Grid):
        self.stage, self.grid = stage, grid
        span = stage.span
        self.upstream = cuts.get(span.lo)  # its sender is the previous stage
        self.downstream = cuts.get(span.hi)  # its sender is this stage
        self.virtual = {i: b for i, b in cuts.items() if span.lo < i < span.hi}
        self.dtype = stage.weights.compute.dtype

    @torch.no_grad()
    def logprobs(self, micros: list[MicroBatch], temperature: float) -> list[Tensor]:
        """Log-probs [R] of each microbatch through the codec, on the last stage; [] elsewhere."""
        found = []
        for micro in micros:
            _, hidden = self._up(micro, observe=False)
            if self.grid.last:
                found.append(logprobs(self.stage, hidden, micro, temperature)[0])
        self.grid.flush()
        return found

    def train(self, micros: list[MicroBatch], loss: Loss) -> dict[str, float]:
        """Forward and backward of all microbatches; gradients add up in the stage's weights.

        Returns the summed loss terms on the last stage, {} elsewhere.
        """
        alive: dict[int, tuple[Tensor | None, Tensor]] = {}
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64, device=self.grid.device))
        for step, i in schedule(self.grid.p, self.grid.pp, len(micros)):
            if step == "F":
                entry, out = self._up(micros[i], observe=True)
                if self.grid.last:
                    terms = loss(out, micros[i], i)
                    out = terms.loss
                    for name, value in terms.sums.items():
                        sums[name] += value
                alive[i] = (entry, out)
            else:
                self._down(*alive.pop(i), micros[i])
        self.grid.flush()
        return dict(zip(sums, torch.stack([*sums.values()]).tolist())) if sums else {}

    def _up(self, micro: MicroBatch, observe: bool) -> tuple[Tensor | None, Tensor]:
        """Forward of one microbatch: the rows that came in (to be differentiated), and what goes on."""
        entry, x = None, micro.ids
        if self.upstream:
            payload = self.grid.recv("fwd", *self.upstream.limits("fwd", micro.rows, self.dtype))
            entry = self.upstream.decode(payload, micro.rows, self.dtype).requires_grad_(torch.is_grad_enabled())
            x = micro.unpack(entry)
        cuts = {i: b.cut(micro.rows, observe) for i, b in self.virtual.items()}
        hidden = self.stage(x, micro.real, cuts, micro.distinct)
        if self.downstream is None:
            return entry, hidden
        rows = micro.pack(hidden)
        self.grid.send("fwd", self.downstream.encode(rows.detach(), micro.rows, observe))
        return entry, rows

    def _down(self, entry: Tensor | None, out: Tensor, micro: MicroBatch) -> None:
        """Backward of one microbatch, from the loss or from the next stage's payload."""
        if self.downstream is None:
            out.backward()
        else:
            payload = self.grid.recv("bwd", *self.downstream.limits("bwd", micro.rows, self.dtype))
            out.backward(self.downstream.decode_backward(payload, micro.rows, self.dtype))
        self.stage.weights.collect()
        if self.upstream:
            assert entry is not None and entry.grad is not None  # the rows that came in, and what flowed back to them
            self.grid.send("bwd", self.upstream.encode_backward(entry.grad, micro.rows))
