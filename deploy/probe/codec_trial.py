"""One codec against none at equal weights, on the very samples: what `northstar probe` measures.

    ids ──▶ lower ──▶ entry ──▶ upper, no codec ───────────▶ rows ──▶ p      once a microbatch
                        ╰─────▶ [boundary] upper [boundary] ─▶ rows ──▶ q      once a trial

KL(p ‖ q) is exact, over the whole vocabulary; the gradient goes back the same way, compressed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from codec.boundary import Boundary
from codec.config import CodecConfig
from codec.ledger import Ledger
from codec.rows import Rows
from rl import mismatch
from rl.config import GrpoConfig
from rl.grpo import log_distribution, policy_loss
from rl.lora import NO_LORA
from rl.lora_config import LoraConfig
from rl.objective import MicroBatch
from rl.policy import Stage
from rl.spans import spans

HEAD_ROWS = 256  # rows of logits at a time: two of [HEAD_ROWS, V] are alive
KEPT = 1 << 21  # coordinates of a gradient that are compared, evenly spaced over it
REFRESHES = 2  # of the statistics on the calibration samples, as a run has made soon after its start
SETTLING = 4  # rounds in which a held rate finds its step
DRAWS = 8  # of the keys of a codec that has any: bias and variance of its gradient are told apart by them


class Halves:
    """The model cut at the first of its boundaries: below it every codec sees the same, so that half runs once for all.

    `boundaries`: all that any trial has, increasing. `lower` has gradients, for they show what the backward payloads are worth; `upper` has none.
    """

    def __init__(
        self,
        folder: Path,
        layers: int,
        boundaries: list[int],
        dtype: torch.dtype,
        device: torch.device,
        attention: str = "sdpa",
        lora: LoraConfig = NO_LORA,
    ):
        self.boundaries = boundaries
        low, high = spans(layers, boundaries[:1], 2)
        self.lower = Stage(folder, low, dtype, device, attention=attention, lora=lora)
        self.upper = Stage(folder, high, dtype, device, trainable=False, attention=attention, lora=lora)
        self.hidden = self.upper.config.hidden_size
        self.stride = -(-self.lower.weights.numel // KEPT)

    def above(self, entry: Tensor, micro: MicroBatch, cuts: Mapping[int, Callable[[Tensor], Tensor]]) -> Tensor:
        """Hidden states [B, L, H] at the first boundary -> last hidden states [R, H] that predict the responses."""
        return self.upper(entry, micro.real, cuts)[micro.predicts]

    def dense(
        self, hidden: Tensor, micro: MicroBatch, head: Head, taps: Mapping[int, Callable[[Tensor], Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Without codec: the last hidden states [R, H], and the gradient [B, L, H] at the first boundary."""
        entry = hidden.detach().requires_grad_()
        rows = self.above(entry, micro, taps)
        dense = rows.detach()
        _, gradient = head.compare(dense, dense, micro, with_gradient=True)
        rows.backward(gradient)
        assert entry.grad is not None  # of a leaf that the loss depends on
        return dense, entry.grad

    def weight_gradient(self, hidden: Tensor, dx: Tensor) -> Tensor:
        """Evenly spaced coordinates of the lower half's gradient, from that of its output; keeps the graph."""
        weights = self.lower.weights
        assert weights.grad is not None  # the lower half is trainable
        weights.grad.zero_()
        hidden.backward(dx, retain_graph=True)
        weights.collect()
        return weights.grad[:: self.stride].clone()


class Head:
    """Norm and head over rows of the last hidden state, a block of rows at a time: logits are the largest tensors."""

    def __init__(self, upper: Stage, grpo: GrpoConfig, temperature: float, denominator: float):
        self.upper, self.temperature, self.denominator, self.grpo = upper, temperature, denominator, grpo

    def logprobs(self, rows: Tensor) -> Tensor:
        return log_distribution(self.upper.logits(rows), self.temperature)

    def compare(
        self, dense: Tensor, rows: Tensor, micro: MicroBatch, with_gradient: bool
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Sums over the response tokens, and the gradient [R, H] of the run's objective with respect to `rows`.

        `kl` is KL(p ‖ q) over the whole vocabulary, p from `dense` [R, H] and q from `rows`; the other sums
        are those of `rl.mismatch` on the sampled tokens.
        """
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64, device=rows.device))
        found: list[Tensor] = []
        for block in self._blocks(rows):
            with torch.no_grad():
                p, q = self.logprobs(dense[block]), self.logprobs(rows[block])
                old, new = (logp.gather(1, micro.targets[block, None]).squeeze(1) for logp in (p, q))
                sums["kl"] += (p.exp() * (p - q)).sum(dtype=torch.float64)
            found.append(new)
            for name, value in mismatch.sums(old, new).items():
                sums[name] += value
        return sums, self._gradient(rows, torch.cat(found), micro) if with_gradient else None

    def _gradient(self, rows: Tensor, new: Tensor, micro: MicroBatch) -> Tensor:
        """Through the log-probs `new` [R] of all blocks: an objective may look at whole samples, which a block cuts. Without the
        KL to the base policy, which is not here."""
        new, entropy = new.detach().requires_grad_(), torch.zeros_like(new).requires_grad_()  # linear in the latter
        old = micro.rollout_logprobs if self.grpo.old_logprobs == "rollout" else new.detach()
        known = None, micro.rollout_logprobs, micro.loss_weights, micro.samples
        policy_loss(new, old, micro.advantages, self.denominator, self.grpo, entropy, *known).loss.backward()
        assert new.grad is not None  # the loss depends on it
        gradient = torch.empty_like(rows)
        for block in self._blocks(rows):
            leaf = rows[block].detach().requires_grad_()
            q = self.logprobs(leaf)
            loss = (q.gather(1, micro.targets[block, None]).squeeze(1) * new.grad[block]).sum()
            if entropy.grad is not None:
                loss = loss - (entropy.grad[block, None] * q.exp() * q).sum()
            loss.backward()
            assert leaf.grad is not None
            gradient[block] = leaf.grad
        return gradient

    @staticmethod
    def _blocks(rows: Tensor) -> tuple[Tensor, ...]:
        return torch.arange(len(rows), device=rows.device).split(HEAD_ROWS)


@dataclass
class Calibration:
    """One microbatch of a pass without codec: which rows they are, and (X, dX) by boundary."""

    rows: Rows
    passed: dict[int, tuple[Tensor, Tensor]]


class Trial:
    """One codec at the boundaries `layers` (default: all of the halves'), and what has been measured of it so far."""

    def __init__(self, codec: CodecConfig, halves: Halves, seed: int, layers: list[int] | None = None):
        self.codec, self.halves = codec, halves
        self.layers = halves.boundaries if layers is None else layers
        self.ledger = Ledger()
        device = halves.lower.weights.master.device
        self.boundaries = {
            layer: Boundary(codec, i, halves.hidden, seed, self.ledger) for i, layer in enumerate(self.layers)
        }
        for boundary in self.boundaries.values():
            boundary.to(device)
        self.sums: dict[str, float] = defaultdict(float)
        draws = DRAWS if any(boundary.keyed for boundary in self.boundaries.values()) else 1
        self.gradients: list[Tensor | float] = [0.0] * draws  # of the lower half's weights, sampled; one for each draw
        self.side = {"fwd": 0.0, "bwd": 0.0}  # bytes of tables at all boundaries

    def calibrate(self, micros: list[Calibration], dense_of_run: dict[str, float]) -> None:
        """Refresh each boundary's statistics on rows of a pass without codec, and settle a rate that is held.

        `dense_of_run`: bytes that each way of one boundary would carry in the whole run, dense in bf16: tables
        are paid from them. A run's own statistics come from its compressed passes; they differ where a lossy
        boundary lies below.
        """
        for layer, boundary in self.boundaries.items():
            for _ in range(REFRESHES):
                self._pass(boundary, layer, micros)
                for way in ("bwd", "fwd"):  # in the order of a run: tables of X may ask those of dX
                    boundary.refresh_alone(way)
            rates = {name: rate for name in ("fwd", "bwd") if (rate := boundary.way(name).rate) is not None}
            left = {}  # for payloads
            for name, rate in rates.items():
                self.side[name] += rate.side
                left[name] = max(0.5 * rate.share, rate.share - rate.side / dense_of_run[name])
            for _ in range(SETTLING if rates else 0):
                for name, rate in rates.items():
                    rate.aim(left[name])
                self._pass(boundary, layer, micros)
                for rate in rates.values():
                    rate.steer(rate.spent())
            boundary.begin_tick()  # fidelity is that of what is scored
        self.ledger.drain()  # only what is scored is counted

    @staticmethod
    def _pass(boundary: Boundary, layer: int, micros: list[Calibration]) -> None:
        boundary.begin_tick()
        for micro in micros:
            x, dx = micro.passed[layer]
            boundary.decode(boundary.encode(x, micro.rows, observe=True), micro.rows, x.dtype)
            boundary.decode_backward(boundary.encode_backward(dx, micro.rows), micro.rows, dx.dtype)

    @property
    def fvu(self) -> float:
        """Of the worst boundary."""
        return max(b.seen["fwd"].fvu("fvu").get("fvu", 0.0) for b in self.boundaries.values())

    @property
    def dx_cosine(self) -> float:
        """Of the worst boundary."""
        return min(b.seen["bwd"].cosine("cosine").get("cosine", 0.0) for b in self.boundaries.values())

    def run(self, hidden: Tensor, dense: Tensor, micro: MicroBatch, head: Head, with_gradient: bool) -> None:
        """One microbatch: forward through the codec, and back through it if asked to, with every draw of its keys.

        `hidden` [B, L, H] is the lower half's output with its graph, `dense` [R, H] the upper half's without codec.
        """
        for draw in range(len(self.gradients) if with_gradient else 1):
            entry = hidden.detach().requires_grad_(with_gradient)
            with torch.set_grad_enabled(with_gradient):
                rows = self.halves.above(entry, micro, self._cuts(micro.rows.redrawn(draw) if draw else micro.rows))
            sums, gradient = head.compare(dense, rows.detach(), micro, with_gradient)
            for name, value in sums.items() if draw == 0 else ():
                self.sums[name] += value.item()
            if with_gradient:
                rows.backward(gradient)
                assert entry.grad is not None
                self.gradients[draw] = self.gradients[draw] + self.halves.weight_gradient(hidden, entry.grad)
        for boundary in self.boundaries.values():  # hold the rate as a run does, tick by tick
            for rate in (boundary.forward.rate, boundary.backward.rate):
                if rate is not None and (spent := rate.spent()).any():
                    rate.steer(spent)

    def _cuts(self, rows: Rows) -> dict[int, Callable[[Tensor], Tensor]]:
        """The statistics are those of the calibration, but fidelity is of the rows that are scored."""
        return {layer: b.cut(rows, observe=True) for layer, b in self.boundaries.items()}
