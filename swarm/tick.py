"""One tick: the circuit in one function. Start here.

    coordinator ── plan ──▶ rank (d, p)                                       anchor
                            │ refresh Q if due      V summed over d, orth once, sent up the pipeline
                            │ forward / backward    Y ─▶ next stage, dY ◀─ next stage
                            │ G_comp                summed over d (waits for the slowest replica)
                            │ correction            waits only in the tick that first merges it ◀── M̄
                            │ agree                 MIN of the versions held, over all ranks
                            │ G = merge(G_comp, correction, age)
                            │ clip (norm over p), Adam
                            └ compare digests       over d

A rank waits for its pipeline neighbours, for its replicas, and for a correction that is due; each
wait ends at `swarm.timeout_s` or `anchor.timeout_s` with an error that names who was late.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from anchor_service.config import AnchorConfig
from anchor_service.errors import ReplicaMismatch
from anchor_service.inbox import Inbox
from anchor_service.messages import Correction, TickPlan
from anchor_service.ring import anchor_should_fire
from codec.boundary import Boundary
from codec.interface import Tables
from codec.schedule import q_should_refresh
from merger import MERGERS
from merger.config import MergerConfig
from merger.placebo import PLACEBOS
from rl import mismatch
from rl.config import GrpoConfig
from rl.objective import MicroBatch, loss_terms
from rl.policy import EMBEDDING, Stage
from swarm.grid import Grid
from swarm.nonfinite import first_seen
from swarm.pipeline import Loss, Pipeline

NORM_BLOCK = 1 << 22  # elements: a norm in float64 without a float64 copy of the gradient
MERGE_BLOCK = 1 << 16  # elements: temporaries of a merge stay in the second-level cache


@dataclass
class MiniBatch:
    """This rank's share of one tick's samples, and what all ranks divide by."""

    micros: list[MicroBatch]
    old_logprobs: list[Tensor]  # one a microbatch, on the last stage
    denominator: int  # response tokens of the global mini-batch


@dataclass
class Rules:
    """The sections of the config that a tick reads."""

    grpo: GrpoConfig
    anchor: AnchorConfig
    merger: MergerConfig
    q_cadence: int
    temperature: float
    check_every: int
    seed: int  # of what a rank draws itself


class Rank:
    """State of one rank between ticks."""

    def __init__(self, stage: Stage, cuts: dict[int, Boundary], grid: Grid, rules: Rules, reducer: Any):
        self.stage, self.cuts, self.grid, self.rules, self.reducer = stage, cuts, grid, rules, reducer
        self.pipeline = Pipeline(stage, cuts, grid)
        self.merger = MERGERS[rules.merger.kind](rules.merger)
        self.placebo = self._placebo()
        self.inbox = Inbox()
        self.correction: Correction | None = None
        self.seen = 0  # newest version agreed on, merged or refused
        self.first_tick = 0  # in which `correction` was first merged
        # G_comp of the ticks that started a fire still under way, by source tick; only `delta` needs them
        self.sources: dict[int, Tensor] = {}
        parameter = torch.nn.Parameter(stage.weights.master)
        parameter.grad = stage.weights.grad
        grpo = rules.grpo
        self.optimizer = torch.optim.AdamW(
            [parameter], lr=grpo.lr, betas=grpo.betas, weight_decay=grpo.weight_decay, fused=True
        )
        self.kept: dict[str, np.ndarray] = {}  # of a tick that is diagnosed, until `Worker.record` takes it away
        self.sealed: int | None = None  # digest of the weights at the end of the last checked tick
        self.timing: dict[str, float] = defaultdict(float)

    def _placebo(self) -> Any:
        """What stands in for the anchor, if anything does."""
        rules, weights = self.rules, self.stage.weights
        sizes = {name: math.prod(shape) for name, shape in zip(weights.names, weights.shapes)}
        kind = PLACEBOS.get(rules.merger.placebo)
        return kind and kind(rules.anchor.beta_anc, rules.seed, sizes)

    def norm(self, flat: Tensor) -> float:
        """Norm over all stages' parameters, a tied embedding counted once."""
        owned = flat[: self.stage.weights.owned]
        square = torch.stack([block.double().square().sum() for block in owned.split(NORM_BLOCK)]).sum()
        return self.grid.sum_pp(square).sqrt().item()

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.timing[f"timing_s/{phase}"] += time.perf_counter() - start


def tick(rank: Rank, plan: TickPlan, mini: MiniBatch, fetch: Callable[[Any], Correction]) -> dict[str, Any]:
    """θ_{T-1} -> θ_T. `fetch` resolves the plan's reference to a correction. Returns what the tick measured."""
    weights, rules = rank.stage.weights, rank.rules
    _check_seal(rank, plan)
    values = _refresh_bases(rank, plan.tick)

    # the step's first mini-batch still has the weights that sampled it: only the codec sets the two policies apart
    compares = rules.grpo.old_logprobs == "rollout" and plan.mini_batch == 0

    def loss(hidden: Tensor, micro: MicroBatch, i: int):
        old = mini.old_logprobs[i]
        terms = loss_terms(rank.stage, hidden, micro, old, mini.denominator, rules.grpo, rules.temperature)
        if compares:
            terms.sums |= mismatch.sums(micro.rollout_logprobs, terms.logprobs)
        return terms

    with rank.timed("forward_backward"):
        weights.grad.zero_()
        sums = rank.pipeline.train(mini.micros, loss)
    values |= _close_ways(rank)
    with rank.timed("reduce"):
        rank.reducer(weights.grad)
        _sum_tied(rank)  # after the replicas: then both copies add the same two numbers, bit for bit
    _keep(rank, plan, before=weights.master, g_comp=weights.grad)
    if plan.correction is not None:
        with rank.timed("anchor_wait"):
            rank.inbox.put(fetch(plan.correction))
    with rank.timed("merge"):
        values |= _merge(rank, plan)
    with rank.timed("optimizer"):
        values["actor/grad_norm"] = _clip(rank, plan, mini, loss)
        values["actor/lr"] = rules.grpo.lr
        rank.optimizer.step()
        weights.publish()
    if rules.check_every and plan.tick % rules.check_every == 0:
        with rank.timed("check"):
            _compare_replicas(rank, plan)
    timing, rank.timing = dict(rank.timing), defaultdict(float)
    return {"sums": sums, "values": values, "peaks": timing, "ledger": rank.grid.ledger.drain()}


def _ways(rank: Rank) -> Iterator[tuple[Boundary, str]]:
    """Boundaries and ways that this rank sends on: the sender sees the rows and gathers their statistics."""
    pipeline = rank.pipeline
    for boundary in pipeline.virtual.values():
        yield boundary, "fwd"
        yield boundary, "bwd"
    if pipeline.downstream:
        yield pipeline.downstream, "fwd"
    if pipeline.upstream:
        yield pipeline.upstream, "bwd"


def _refresh_bases(rank: Rank, tick: int) -> dict[str, float]:
    """New tables on the Q schedule: statistics summed over replicas, one rank computes, the others receive."""
    grid, found = rank.grid, Means()
    refreshing = any(b.way(w).tables is not None for b in rank.cuts.values() for w in ("fwd", "bwd"))
    due = refreshing and q_should_refresh(tick, rank.rules.q_cadence)
    if refreshing:
        found.add({"codec/q_refreshed": float(due)})
    with rank.timed("q_refresh"):
        if due:
            for boundary, way in _ways(rank):
                if (tables := boundary.way(way).tables) is not None:
                    found.add(_refresh(rank, boundary, way, tables))
            for boundary, way in ((rank.pipeline.upstream, "fwd"), (rank.pipeline.downstream, "bwd")):
                if boundary and (tables := boundary.way(way).tables) is not None:
                    tables.load(grid.recv(way, 0, tables.limit()))
        for boundary in rank.cuts.values():
            boundary.begin_tick()
        grid.flush()
    return found.means()


def _refresh(rank: Rank, boundary: Boundary, way: str, tables: Tables) -> dict[str, float]:
    """The sender's part of a refresh; over a wire its neighbour waits for the tables, though they may be empty."""
    grid, rate = rank.grid, boundary.way(way).rate
    before = grid.ledger.sent["basis"]
    raw, statistics = torch.empty(0, dtype=torch.uint8), tables.statistics()
    if statistics is not None:
        grid.sum_dp(statistics, "basis", dense_bytes=0)
        tables.absorb(statistics)
        raw = grid.bytes_from_first_replica(tables.refresh() if grid.d == 0 else None, "basis", tables.limit())
    if boundary is rank.pipeline.downstream or boundary is rank.pipeline.upstream:
        grid.send(way, raw.to(grid.device))
    grid.ledger.add("basis", raw.numel(), 0)  # to the other side of the boundary, wire or virtual
    if rate is not None:
        rate.count_side(grid.ledger.sent["basis"] - before)
    return tables.load(raw)


def _close_ways(rank: Rank) -> dict[str, float]:
    """After the last payload of a tick: what each way did, and its rate for the next."""
    found = Means()
    for boundary, way in _ways(rank):
        rate = boundary.way(way).rate
        if rate is not None:
            spent = rate.spent().to(rank.grid.device)
            rank.grid.sum_dp(spent, "control", dense_bytes=0)
            rate.steer(spent)
        found.add(boundary.health(way))
    return found.means()


class Means:
    """Metrics of several boundaries as one."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = defaultdict(list)

    def add(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.values[name].append(value)

    def means(self) -> dict[str, float]:
        return {name: sum(values) / len(values) for name, values in self.values.items()}


def _sum_tied(rank: Rank) -> None:
    """A tied embedding on two stages has two gradients; both copies take their sum."""
    stage = rank.stage
    if stage.tied_away:
        rank.grid.sum_ends(stage.weights.grad[stage.weights.owned :])
    elif stage.config.tie_word_embeddings and rank.grid.first and rank.grid.pp > 1:
        rank.grid.sum_ends(stage.weights.grad[stage.weights.slice_of(EMBEDDING)])


def _merge(rank: Rank, plan: TickPlan) -> dict[str, float]:
    """Merge the version that every rank holds, in place of the gradient. All ranks decide alike."""
    g_comp = rank.stage.weights.grad
    if rank.merger.payload is None:
        return {}
    if rank.merger.payload == "dense" and plan.keep_source:
        rank.sources[plan.tick - 1] = g_comp.clone()
    values = _adopt(rank, plan) if rank.placebo is None else _stand_in(rank, plan)
    correction = rank.correction
    if correction is None:
        return values
    age, max_age = plan.tick - rank.first_tick, rank.rules.anchor.max_age
    values |= {
        "anchor/version": correction.version,
        "anchor/age": age,
        "anchor/lag": plan.tick - correction.source_tick,
    }
    if max_age is not None and age > max_age:
        return values | {"anchor/expired": 1.0}
    rank.merger.prepare(g_comp, correction.values, age, rank.norm)
    agree, flips = _merge_in_place(rank.merger, g_comp, correction.values)
    _keep(rank, plan, merged=g_comp, **({"m_bar": correction.values} if rank.placebo else {}))
    return values | {
        "anchor/sign_agreement": agree / g_comp.numel(),
        "merger/dose": rank.merger.dose,
        "merger/flip_fraction": flips / g_comp.numel(),
    }


def _merge_in_place(merger: Any, g_comp: Tensor, correction: Tensor) -> tuple[int, int]:
    """One sweep over the gradient: merge, and count agreeing and flipped signs, while a block is in the cache."""
    agree, flips = g_comp.new_zeros((), dtype=torch.int64), g_comp.new_zeros((), dtype=torch.int64)
    block = MERGE_BLOCK if g_comp.device.type == "cpu" else NORM_BLOCK
    for g, c in zip(g_comp.split(block), correction.split(block)):
        merged = merger.apply(g, c)
        agree += (c.sign() == g.sign()).sum()
        flips += (merged * g < 0).sum()
        g.copy_(merged)
    return agree.item(), flips.item()


def _adopt(rank: Rank, plan: TickPlan) -> dict[str, float]:
    """Agree on the newest version that all ranks hold, and take it over unless it is too late."""
    mine = max(rank.inbox.newest(), rank.seen)
    version = rank.grid.min_world(mine)
    if plan.version is not None and version != plan.version:
        held = f"{rank.grid.name} holds {mine}, all ranks hold {version}"
        raise ReplicaMismatch(f"version {plan.version} is due but not held", plan.tick, version, [held])
    if version < rank.seen:
        held = f"{rank.grid.name} has merged {rank.seen}, all ranks hold {version}"
        raise ReplicaMismatch("a rank lost a version it had merged", plan.tick, version, [held])
    if version == rank.seen:
        return {}
    held, rank.seen = rank.inbox.adopt(version), version
    source = rank.sources.get(held.source_tick)
    rank.sources = {s: g for s, g in rank.sources.items() if s > held.source_tick}
    max_lag = rank.rules.anchor.max_lag
    if max_lag is not None and plan.tick - held.source_tick > max_lag:
        return {"anchor/refused": float(version)}
    values = held.values.to(rank.grid.device)
    if rank.merger.payload == "dense":
        values = values - source
    rank.correction = Correction(held.version, held.source_tick, held.first_tick, values, held.digest)
    rank.first_tick = plan.tick
    return {}


def _stand_in(rank: Rank, plan: TickPlan) -> dict[str, float]:
    """Take over the placebo's correction in the ticks in which an anchor's would come; the tick alone decides."""
    anchor, g_comp, before = rank.rules.anchor, rank.stage.weights.grad, plan.tick - 1
    if anchor_should_fire(before + anchor.delay_k, anchor.cadence, anchor.delay_k):
        rank.placebo.keep(before, g_comp)
    if anchor_should_fire(plan.tick, anchor.cadence, anchor.delay_k):
        source = plan.tick - anchor.delay_k
        rank.seen, rank.first_tick = rank.seen + 1, plan.tick
        values = rank.placebo.fire(source, g_comp)
        rank.correction = Correction(rank.seen, source, plan.tick, values, rank.rules.merger.placebo)
    return {}


def _keep(rank: Rank, plan: TickPlan, **vectors: Tensor) -> None:
    """For the diagnosis of this tick, if there is one: copies on the host, a tied embedding left to its owner."""
    if plan.record:
        owned = rank.stage.weights.owned
        rank.kept |= {k: v[:owned].detach().to("cpu", copy=True).numpy() for k, v in vectors.items()}


def _clip(rank: Rank, plan: TickPlan, mini: MiniBatch, loss: Loss) -> float:
    norm = rank.norm(rank.stage.weights.grad)
    if not math.isfinite(norm):
        raise first_seen(rank, f"the gradient norm of tick {plan.tick} is {norm}", mini, loss)
    rank.stage.weights.grad.mul_(min(1.0, rank.rules.grpo.grad_clip / (norm + 1e-6)))
    return norm


def weights_digest(rank: Rank) -> int:
    """64-bit digest of the stage's weights, signed so that it fits an int64 tensor."""
    raw = rank.stage.weights.master.detach().cpu().numpy()
    return xxhash.xxh3_64_intdigest(raw) - (1 << 63)


def _check_seal(rank: Rank, plan: TickPlan) -> None:
    """Nothing may touch the weights between two ticks."""
    if rank.sealed is not None and weights_digest(rank) != rank.sealed:
        who = f"{rank.grid.name} changed since tick {plan.tick - 1}"
        raise ReplicaMismatch("weights changed outside a tick", plan.tick, plan.version, [who])
    rank.sealed = None


def _compare_replicas(rank: Rank, plan: TickPlan) -> None:
    rank.sealed = weights_digest(rank)
    digests = rank.grid.gather_dp(rank.sealed)
    common = max(set(digests), key=digests.count)
    odd = [d for d, found in enumerate(digests) if found != common]
    if odd:
        p = rank.grid.p
        names = [f"worker d{d}p{p} holds {found:x}" for d, found in enumerate(digests)]
        raise ReplicaMismatch(f"replicas of stage {p} differ (odd: {odd})", plan.tick, plan.version, names)
