"""Where a NaN or an infinity came from: looked for once the norm of a gradient shows that there is one.

    weights ─▶ samples ─▶ forward, layer by layer ─▶ log-probs ─▶ backward ─▶ gradient ─▶ correction

The first of these that is not finite is named. The passes are done again for it, watched: the weights are still
those of the tick, and a healthy tick pays nothing.

With swarm.on_nan = "skip" the ranks look before any gradient is summed: weights, Adam, error feedback and what is held
are untouched then, and the codecs go back to what they were before the tick.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anchor_service.errors import NotFinite
from rl.batch import Batch
from rl.grpo import PG_LOSS
from rl.objective import MicroBatch
from swarm.messages import TickPlan, TickReport
from swarm.pipeline import Loss
from swarm.rank import MiniBatch, Rank

Tensors = tuple[Tensor, ...] | Tensor
POSITIONS = 1 << 12  # more than twice the layers of any model
MOST_SKIPPED = 5  # ticks in a row: more than two steps of the presets, so it is not their samples


class Kind(IntEnum):
    """In the order of cause and effect."""

    WEIGHTS = 1
    ADVANTAGES = 2
    ENGINE = 3
    REFERENCE = 4
    FORWARD = 5
    OLD = 6
    LOSS = 7
    BACKWARD = 8
    GRADIENT = 9
    CORRECTION = 10
    CODEC = 11


RANGE = 'model.dtype = "float32" has the range for it, or the model itself is broken'
CLUES = {
    Kind.WEIGHTS: "the weights of {where}, before the tick",
    Kind.ADVANTAGES: "the advantages of the samples",
    Kind.ENGINE: "the log-probs that the engine recorded",
    Kind.REFERENCE: "the log-probs of the reference policy",
    Kind.FORWARD: "the forward pass: {where}",
    Kind.OLD: "the log-probs from the start of the step",
    Kind.LOSS: "the loss, all that it is made of being finite",
    Kind.BACKWARD: "the backward pass: {where}",
    Kind.GRADIENT: "the gradient of {where}, all that flows through the layers being finite",
    Kind.CORRECTION: "the anchor's correction",
    Kind.CODEC: "what a codec was to encode",
}
FIXES = {
    Kind.WEIGHTS: "the checkpoint that was loaded holds them (model.path), or the tick before made them: lower grpo.lr",
    Kind.ADVANTAGES: "a reward is not a number, or too large: look at task.reward",
    Kind.ENGINE: "look at rollout.engine and rollout.temperature",
    Kind.REFERENCE: "look at the model; grpo.kl_loss_coef = 0 does without them",
    Kind.FORWARD: RANGE,
    Kind.OLD: RANGE,
    Kind.LOSS: RANGE,
    Kind.BACKWARD: "lower grpo.lr if the run was well so far; " + RANGE,
    Kind.GRADIENT: "lower grpo.lr if the run was well so far; " + RANGE,
    Kind.CORRECTION: "look at the anchor: its weights, its device, anchor.beta_anc",
    Kind.CODEC: "look at codec.kind and its rates",
}


def left_out(rank: Rank, plan: TickPlan, mini: MiniBatch, loss: Loss, sums: dict[str, float]) -> TickReport | None:
    """The report of a tick that all ranks skip, as one of them has bad numbers; None if they go on."""
    kind, what = _bad(rank, mini, sums) if rank.skips else (None, "")
    if rank.held.agree(plan, kind is None):
        return None
    what = f"{what or 'something of another rank'} in tick {plan.tick}"
    known = (
        [] if kind in (None, Kind.GRADIENT) else [code(kind, 0)]
    )  # of a gradient the layer is found, by another pass
    error = first_seen(rank, what, mini, loss, known)
    rank.rollback()
    if rank.bases.due(plan.tick):  # that is not the tick's: the schedule of Q holds
        rank.bases.refresh(plan.tick)
    outcome = rank.held.skip(plan)
    return TickReport({}, {"actor/skipped": 1.0}, rank.times(), rank.grid.ledger.drain(), outcome, error)


def _bad(rank: Rank, mini: MiniBatch, sums: dict[str, float]) -> tuple[Kind | None, str]:
    """Whether this rank's part of a tick is not finite, and in words what of it."""
    if refused := rank.refusal() or mini.refused:
        return Kind.CODEC, refused
    if not math.isfinite(sums.get(PG_LOSS, 0.0)):
        return Kind.LOSS, f"{PG_LOSS} is {sums[PG_LOSS]}"
    if not all(micro.rollout_logprobs.isfinite().all() for micro in mini.micros):  # the anchor's loss is made of them
        return Kind.ENGINE, "a log-prob of the engine is not finite"
    largest = max(abs(edge.item()) for edge in rank.stage.weights.grad.aminmax())
    return (None, "") if math.isfinite(largest) else (Kind.GRADIENT, f"the largest entry of the gradient is {largest}")


class Skips:
    """Ticks in a row that all ranks have skipped."""

    in_a_row = 0

    def judge(self, reports: Sequence[TickReport]) -> NotFinite | None:
        """Why this tick was; None if it took its step. Raises it where they are MOST_SKIPPED in a row."""
        errors = [report.skipped for report in reports if report.skipped is not None]
        self.in_a_row = self.in_a_row + 1 if errors else 0
        if not errors:
            return None
        error = next((error for error in errors if not error.secondhand), errors[0])
        if self.in_a_row == MOST_SKIPPED:
            error.add_note(
                f"{MOST_SKIPPED} ticks in a row could not be used: nothing was trained since before the first"
            )
            raise error
        return error


def first_seen(rank: Rank, what: str, mini: MiniBatch, loss: Loss, found: Sequence[int] = ()) -> NotFinite:
    """The error to raise; every rank of the replica calls this. The gradient is lost by it. `found`: known already."""
    with torch.no_grad():
        seen = [*found, *held(rank, mini.micros, mini.old_logprobs or [])]
    watch = Watch(rank)
    rank.stage.weights.grad.zero_()
    with suppress(Exception), watch:  # a codec may refuse what it is to encode: what was seen until then counts
        rank.pipeline.train(mini.micros, loss)
    seen += watch.found
    seen += [code(Kind.GRADIENT, layer) for layer in bad_layers(rank, rank.stage.weights.grad)]
    first = _first_of_replica(rank, seen)
    if first is None:
        return _elsewhere(rank, what)
    return _named(rank, what, first)


def _named(rank: Rank, what: str, first: int) -> NotFinite:
    kind, position = Kind(first // POSITIONS), first % POSITIONS
    where, codecs = _where(kind, position, rank.stage.span.total)
    fix = "look at codec.kind and its rates" if codecs else FIXES[kind]
    return NotFinite(f"{rank.grid.name}: {what}", CLUES[kind].format(where=where), fix)


def _elsewhere(rank: Rank, what: str) -> NotFinite:
    """Nothing of this replica: another one knows better, if there is one."""
    what = f"{rank.grid.name}: {what}"
    if rank.grid.dp == 1:
        return NotFinite(what, "the merge, gradient and correction being finite", "look at merger.*")
    error = NotFinite(what, "the share of another replica, their sum, or the merge", "look at codec.gradient, merger.*")
    error.secondhand = True
    return error


def judge_loss(loss: float, batch: Batch, tick: int) -> None:
    """Raises NotFinite for a loss that is no number: where the ratio is clamped its gradient is 0, which would hide it."""
    if math.isfinite(loss):
        return
    pieces = {
        Kind.ADVANTAGES: batch.advantages,
        Kind.ENGINE: batch.rollout_logprobs,
        Kind.REFERENCE: batch.ref_logprobs,
    }
    kind = next((kind for kind, values in pieces.items() if not np.isfinite(values).all()), Kind.FORWARD)
    clue = CLUES[kind].format(where="a log-prob of the trainer")
    raise NotFinite(f"{PG_LOSS} of tick {tick} is {loss}", clue, FIXES[kind])


@contextmanager
def explained(rank: Rank, micros: list[MicroBatch]) -> Generator[None]:
    """A codec that refuses what is not finite says so before there is a gradient: then what this rank holds is named."""
    try:
        yield
    except ValueError as error:
        found = held(rank, micros, [])
        if found:
            raise _named(rank, str(error), min(found)) from error
        span = rank.stage.span
        error.add_note(f"in {rank.grid.name}, which has layers {span.lo} to {span.hi - 1}; its weights are finite")
        raise


def held(rank: Rank, micros: list[MicroBatch], old_logprobs: list[Tensor]) -> list[int]:
    """Codes of what this rank holds that is not finite."""
    found = [code(Kind.WEIGHTS, layer) for layer in bad_layers(rank, rank.stage.weights.master)]
    pieces = [(Kind.ADVANTAGES, micro.advantages) for micro in micros]
    pieces += [(Kind.ENGINE, micro.rollout_logprobs) for micro in micros]
    pieces += [(Kind.REFERENCE, micro.ref_logprobs) for micro in micros if micro.ref_logprobs is not None]
    pieces += [(Kind.OLD, old) for old in old_logprobs]
    if rank.held.correction is not None and isinstance(rank.held.correction.values, Tensor):  # packed signs are finite
        pieces.append((Kind.CORRECTION, rank.held.correction.values))
    return found + [code(kind, 0) for kind, values in pieces if not values.isfinite().all()]


def code(kind: Kind, position: int) -> int:
    """One number for a place: the smaller one is the cause of the larger."""
    return kind * POSITIONS + position


def bad_layers(rank: Rank, flat: Tensor) -> list[int]:
    """Of flat [numel], what is not finite: 0 the embedding, i + 1 layer i, total + 1 the norm or the head."""
    weights, total = rank.stage.weights, rank.stage.span.total
    found = []
    for i, name in enumerate(weights.names):
        if not weights.view(i, flat).isfinite().all():
            parts = name.split(".")
            found.append(int(parts[2]) + 1 if parts[1] == "layers" else 0 if "embed" in name else total + 1)
    return found


class Watch:
    """Codes of what is not finite in the passes of one rank, by hooks on its layers."""

    def __init__(self, rank: Rank):
        self.stage, self.found, self._hooks = rank.stage, [], []
        self.total = rank.stage.span.total

    def __enter__(self) -> None:
        stage = self.stage
        if stage.embed is not None:
            self._after(stage.embed, 0)
        for i, layer in enumerate(stage.layers, stage.span.lo):
            self._hooks.append(layer.register_forward_pre_hook(self._before_layer(2 * i + 1)))
            self._after(layer, 2 * i + 2)
            self._hooks.append(layer.register_full_backward_hook(self._backward(i)))
        if stage.lm_head is not None:
            self._after(stage.lm_head, 2 * self.total + 1)

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, kind: Kind, position: int, values: Any) -> None:
        first = values[0] if isinstance(values, tuple) else values
        if isinstance(first, Tensor) and not first.isfinite().all():
            self.found.append(code(kind, position))

    def _after(self, module: nn.Module, position: int) -> None:
        self._hooks.append(
            module.register_forward_hook(lambda m, given, made: self._note(Kind.FORWARD, position, made))
        )

    def _before_layer(self, position: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda m, given: self._note(Kind.FORWARD, position, given)

    def _backward(self, layer: int) -> Callable[[nn.Module, Tensors, Tensors], None]:
        from_top = 2 * (self.total - layer)

        def hook(m: nn.Module, made: Tensors, given: Tensors) -> None:
            self._note(Kind.BACKWARD, from_top, given)
            self._note(Kind.BACKWARD, from_top + 1, made)

        return hook


def _first_of_replica(rank: Rank, found: list[int]) -> int | None:
    """The smallest code of all stages of this replica."""
    mine = torch.zeros(rank.grid.pp, dtype=torch.float64, device=rank.grid.device)
    mine[rank.grid.p] = min(found, default=0)
    codes = [int(each) for each in rank.grid.sum_pp(mine).tolist() if each]
    return min(codes, default=None)


def _where(kind: Kind, position: int, total: int) -> tuple[str, bool]:
    """In words: the place of that kind at `position`, of a model of `total` layers; and whether a codec made it."""
    if kind in (Kind.WEIGHTS, Kind.GRADIENT):
        ends = {0: "the embedding", total + 1: "the norm or the head"}
        return ends.get(position, f"layer {position - 1}"), False
    if kind == Kind.FORWARD:
        ends = {0: "what the embedding gives", 2 * total + 1: "the logits"}
        if position in ends:
            return ends[position], False
        layer, codecs = (position - 1) // 2, position % 2 == 1
        return (f"what the codec gives to layer {layer}", True) if codecs else (f"what layer {layer} gives", False)
    if kind == Kind.BACKWARD:
        layer, below = total - position // 2, position % 2 == 1
        if below:
            return f"what layer {layer} passes down", False
        if layer == total - 1:
            return "what the loss and the head give", False
        return f"what the codec gives back to layer {layer}", True
    return "", False
