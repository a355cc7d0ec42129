"""One tick: the circuit in one function. Start here.

    coordinator ── plan ──▶ rank (d, p)                                       anchor
                            │ refresh Q if due      V summed over d, orth once, sent up the pipeline
                            │ forward / backward    Y ─▶ next stage, dY ◀─ next stage
                            │ correction            waits only in the tick that first merges it ◀── M̄
                            │ agree                 MIN of the versions held, over all ranks; and are all numbers finite?
                            │ G_comp                summed over d (waits for the slowest replica), and over tied copies
                            │ G = merge(G_comp, correction, age)
                            │ clip (norm over p), Adam
                            └ compare digests       over d

A rank waits for its pipeline neighbours, for its replicas, and for a correction that is due; each
wait ends at `swarm.timeout_s` or `anchor.timeout_s` with an error that names who was late.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from anchor_service.errors import WaitTimeout
from anchor_service.messages import Correction
from rl import mismatch
from rl.grpo import LossTerms
from rl.objective import MicroBatch, loss_terms
from swarm.grid import PeerLost
from swarm.messages import GRAD_NORM, TickPlan, TickReport
from swarm.nonfinite import first_seen, left_out
from swarm.pipeline import Loss
from swarm.rank import MiniBatch, Rank


def tick(rank: Rank, plan: TickPlan, mini: MiniBatch, fetch: Callable[[object], Correction]) -> TickReport:
    """θ_{T-1} -> θ_T. `fetch` resolves the plan's references to a correction."""
    weights, every, rank.begun = rank.stage.weights, rank.setup.swarm.check_every, time.perf_counter()
    rank.seal.check(plan, weights.master)
    if rank.skips or not rank.grid.alone:
        rank.mark()
    with rank.timed("q_refresh"):
        values = rank.bases.refresh(plan.tick)
    loss = _loss(rank, plan, mini)
    with rank.timed("forward_backward"):
        weights.grad.zero_()
        sums = rank.pipeline.train(mini.micros, loss)
    values |= rank.bases.close()
    if plan.correction is not None:
        with rank.timed("anchor_wait"):
            rank.held.receive(plan.version, lambda: fetch(plan.correction))
    skipped = left_out(rank, plan, mini, loss, sums)
    if skipped is not None:
        return skipped
    with rank.timed("reduce"):
        rank.reducer(weights.grad)
    if plan.record:
        rank.keep(before=weights.master, g_comp=weights.grad)
    with rank.timed("merge"):
        outcome = rank.held.merge(plan, weights.grad, rank.norm)
        if plan.record and outcome.merged:
            rank.keep(merged=weights.grad, **rank.held.stand_in())
    with rank.timed("optimizer"):
        values[GRAD_NORM] = _clip(rank, plan, mini, loss)
        values["actor/lr"] = rank.set_lr(plan.tick)
        rank.optimizer.step()
        weights.publish()
    report = TickReport(sums, values, {}, {}, outcome)
    if every and plan.tick % every == 0:
        _compare(rank, plan, report)
    return _told(rank, report)


def _compare(rank: Rank, plan: TickPlan, report: TickReport) -> None:
    """The step is taken by now: it stands, also where a replica is lost before it has told its digest."""
    try:
        with rank.timed("check"):
            rank.seal.compare(plan, rank.stage.weights.master)
    except (PeerLost, WaitTimeout):
        rank.taken = _told(rank, report)
        raise


def _told(rank: Rank, report: TickReport) -> TickReport:
    return replace(report, peaks=rank.times(), ledger=rank.grid.ledger.drain())


def _loss(rank: Rank, plan: TickPlan, mini: MiniBatch) -> Loss:
    """The step's first mini-batch still has the weights that sampled it: only the codec sets the two policies apart."""
    grpo, temperature = rank.setup.grpo, rank.setup.temperature
    compares = plan.mini_batch == 0 and (mini.old_logprobs is None or grpo.old_logprobs == "rollout")

    def loss(hidden: Tensor, micro: MicroBatch, i: int) -> LossTerms:
        old = None if mini.old_logprobs is None else mini.old_logprobs[i]
        terms = loss_terms(rank.stage, hidden, micro, old, mini.denominator, grpo, temperature)
        if compares:
            terms.sums |= mismatch.sums(micro.rollout_logprobs, terms.logprobs)
        return terms

    return loss


def _clip(rank: Rank, plan: TickPlan, mini: MiniBatch, loss: Loss) -> float:
    norm = rank.norm(rank.stage.weights.grad)
    if not math.isfinite(norm):
        raise first_seen(rank, f"the gradient norm of tick {plan.tick} is {norm}", mini, loss)
    scale = rank.setup.grpo.grad_clip / (norm + 1e-6)
    if scale < 1:
        rank.stage.weights.grad.mul_(scale)
    return norm
