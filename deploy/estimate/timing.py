"""How long things take on assumed links and machines: the durations that `simulate` puts on its clock.

Everything is vectorised over replicas; what is random comes from the given generator, in a fixed order
and scaled by bandwidth only at the end, so that the same seed on faster links is never slower.
"""

from __future__ import annotations

from functools import cache, cached_property, partial
from math import ceil, log2
from typing import NamedTuple

import numpy as np

from codec.costs import FP32, CodecCost, GradientCost, gradient_cost
from deploy.estimate.batches import answers, dealt, replay_bytes
from deploy.estimate.bytes import correction_bytes, cost_of_codec, snapshot_bytes
from deploy.estimate.parameters import check_fits, copy_groups, own_shapes, parameters, stage_parameters
from deploy.estimate.workload import (
    agreed_on,
    engine_nodes,
    microbatch_count,
    prompt_tokens,
    recomputed,
    replica_nodes,
    response_tokens,
    samples_per_tick,
    tokens_per_tick,
)
from rl.spans import spans
from swarm.run_config import RunConfig
from swarm.schedule import schedule

Rounds = list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]  # (stages, microbatches) of F, then of B


class Work(NamedTuple):
    """Seconds of a tick up to the merge, from there to its end, and what of both is computing."""

    before: float
    after: float
    compute: float


def rounds(pp: int, count: int, backward: bool = True) -> Rounds:
    """1F1B of all stages as rounds: no operation of a round needs another one of the same round."""
    orders = [[op for op in schedule(p, pp, count) if backward or op[0] == "F"] for p in range(pp)]
    position, done, found = [0] * pp, set(), []
    while any(position[p] < len(orders[p]) for p in range(pp)):
        ready: dict[str, list[tuple[int, int]]] = {"F": [], "B": []}
        for p in range(pp):
            if position[p] < len(orders[p]):
                step, i = orders[p][position[p]]
                neighbour = p - 1 if step == "F" else p + 1
                if not 0 <= neighbour < pp or (step, neighbour, i) in done:
                    ready[step].append((p, i))
        for step, ops in ready.items():
            for p, i in ops:
                position[p] += 1
                done.add((step, p, i))
        pairs = [np.array(ready[step], np.intp).reshape(-1, 2) for step in "FB"]
        found.append((pairs[0][:, 0], pairs[0][:, 1], pairs[1][:, 0], pairs[1][:, 1]))
    return found


def pipeline_ends(
    order: Rounds, forward: np.ndarray, backward: np.ndarray, up: np.ndarray, down: np.ndarray, latency: float
) -> np.ndarray:
    """When each stage of each replica is done, [pp, dp].

    `forward`, `backward`: seconds of computing [pp, m]; `up`, `down`: seconds on the wire between stages
    p and p+1 [pp-1, m, dp]. A wire carries one message at a time each way, beside the computing.
    """
    (stages, count), replicas = forward.shape, up.shape[-1]
    free, wire_up, wire_down = (np.zeros((stages, replicas), up.dtype) for _ in range(3))
    arrived_up, arrived_down = (np.zeros((stages, count, replicas), up.dtype) for _ in range(2))
    forward, backward = forward.astype(up.dtype), backward.astype(up.dtype)
    latency = up.dtype.type(latency)
    for pf, i, pb, j in order:
        if len(pf):
            end = np.maximum(free[pf], arrived_up[pf, i]) + forward[pf, i, None]
            free[pf] = end
            go = pf < stages - 1
            if go.any():
                p, k = pf[go], i[go]
                sent = np.maximum(end[go], wire_up[p]) + up[p, k]
                wire_up[p] = sent
                arrived_up[p + 1, k] = sent + latency
        if len(pb):
            end = np.maximum(free[pb], arrived_down[pb, j]) + backward[pb, j, None]
            free[pb] = end
            go = pb > 0
            if go.any():
                p, k = pb[go], j[go]
                sent = np.maximum(end[go], wire_down[p]) + down[p - 1, k]
                wire_down[p] = sent
                arrived_down[p - 1, k] = sent + latency
    return free


class Durations:
    """Seconds of each part of a run of `config`."""

    def __init__(self, config: RunConfig, rng: np.random.Generator):
        self.config, self.rng, self.links = config, rng, config.links
        self.params = parameters(config)
        check_fits(config, self.params)
        self.spans = spans(self.params.layers, config.swarm.boundaries, config.swarm.pp)
        self.stages = stage_parameters(config, self.params)
        self.snapshot_bytes = cache(partial(snapshot_bytes, config, self.params))
        self.swarm_rate = self.links.swarm_mbit * 1e6 / 8
        self.anchor_rate = self.links.anchor_mbit * 1e6 / 8
        self.latency = self.links.swarm_latency_ms / 1e3
        self.anchor_latency = self.links.anchor_latency_ms / 1e3
        swarm = config.swarm
        self.dp, self.pp, self.count = swarm.dp, swarm.pp, microbatch_count(config)
        self.order, self.forward_order = rounds(self.pp, self.count), rounds(self.pp, self.count, backward=False)

    def jitter(self, rng: np.random.Generator, *shape: int) -> np.ndarray:
        """Log-normal factors of mean 1."""
        sigma = self.links.jitter
        if not sigma:
            return np.ones(shape, np.float32)
        factors = rng.standard_normal(shape, np.float32)
        return np.exp(factors * np.float32(sigma) - np.float32(sigma**2 / 2), out=factors)

    # --- computing -------------------------------------------------------------------------------

    @cached_property
    def shares(self) -> np.ndarray:
        """Share of the model's arithmetic by stage [pp]: its layers' and the head's parameters; a look-up is free."""
        model = self.params.model
        layers = [(span.hi - span.lo) * model.per_layer for span in self.spans]
        layers[-1] += model.embedding  # the head, tied or not
        return np.array(layers) / sum(layers)

    @cached_property
    def micro_tokens(self) -> np.ndarray:
        """Real tokens of each microbatch of a replica [m]; the last may be smaller."""
        samples, size = samples_per_tick(self.config) // self.dp, self.config.swarm.micro_batch_size
        counts = np.full(self.count, size)
        counts[-1] = samples - size * (self.count - 1)
        return counts * (prompt_tokens(self.config) + response_tokens(self.config))

    @cached_property
    def computing(self) -> np.ndarray:
        """Forward and backward seconds of each stage and microbatch [pp, m]; the forward is a third."""
        return self.shares[:, None] * self.micro_tokens / self.links.worker_tokens_s

    @cached_property
    def payload(self) -> np.ndarray:
        """Bytes of each microbatch at a boundary, upwards and downwards [2, m]."""
        return np.outer([self.codec.forward, self.codec.backward], self.micro_tokens)

    @cached_property
    def codec(self) -> CodecCost:
        return cost_of_codec(self.config, self.params.hidden)

    def _pipeline(self, order: Rounds, ways: int) -> np.ndarray:
        """Ends of all stages [pp, dp]; on `ways` = 0 links cost nothing, 1: only upwards, 2: both ways."""
        forward = self.computing / 3
        if not ways:
            nothing = np.zeros((self.pp - 1, self.count, 1), np.float32)
            return pipeline_ends(order, forward, 2 * forward, nothing, nothing, 0.0)
        # float32: a microsecond in ten seconds, and twice as fast
        seconds = (self.payload[:ways, None, :, None] / self.swarm_rate).astype(np.float32)
        wires = self.jitter(self.rng, ways, self.pp - 1, self.count, self.dp)
        wires *= seconds
        return pipeline_ends(order, forward, 2 * forward, wires[0], wires[-1], self.latency)

    @cached_property
    def bare_tick(self) -> float:
        """A tick on links that cost nothing."""
        return float(self._pipeline(self.order, ways=0).max())

    @cached_property
    def bare_old_logprobs(self) -> float:
        return float(self._pipeline(self.forward_order, ways=0).max())

    # --- the swarm -------------------------------------------------------------------------------

    def tick(self, refresh: bool) -> Work:
        """One tick of the swarm; `refresh`: Q is refreshed before its forward."""
        ends = self._pipeline(self.order, ways=2)
        ring = self._reduce(self.jitter(self.rng, self.pp, self.dp).max(axis=1))
        reduced = ends.max(axis=1) + ring  # a stage's ring begins when all its replicas are there
        before = reduced.max()
        for shapes, copies in copy_groups(self.config, self.params)[1]:
            cost = gradient_cost(self.config.codec.gradient, shapes, copies)
            slowest = self.jitter(self.rng, copies).max()
            tied = 2 * (copies - 1) * (cost.sent / copies / self.swarm_rate * slowest + cost.sums * self.latency)
            before = max(before, max(reduced[0], reduced[-1]) + tied)
        before += self._refresh() if refresh and self.codec.ways else 0.0
        agreed = self._tree(self.dp * self.pp) if agreed_on(self.config) else 0.0
        after = agreed + self._tree(self.pp) + self._tree(self.dp)  # version, norm, digests
        return Work(float(before), after, self.bare_tick)

    def recomputed(self, first: int) -> int:
        """Passes for old log-probs before tick `first`, a step's first."""
        return recomputed(self.config, first, self.has_tables)

    @property
    def has_tables(self) -> bool:
        """Whether anything is refreshed between ticks."""
        return self.codec.ways > 0 and bool(self.config.swarm.boundaries)

    def old_logprobs(self) -> Work:
        """The forward pass of one tick's samples before a step's first tick, where there is one."""
        seconds = self._pipeline(self.forward_order, ways=1).max()
        return Work(float(seconds), 0.0, self.bare_old_logprobs)

    def _ring(self, nbytes: np.ndarray, factor: np.ndarray, sums: int) -> np.ndarray:
        """A ring all-reduce over dp goes at the speed of its slowest link."""
        if self.dp == 1:
            return np.zeros(len(nbytes))
        steps = 2 * (self.dp - 1)
        return steps / self.dp * nbytes / self.swarm_rate * factor + sums * steps * self.latency

    def _tree(self, ranks: int) -> float:
        """A few bytes agreed on by `ranks` ranks."""
        return 2 * ceil(log2(ranks)) * self.latency if ranks > 1 else 0.0

    @cached_property
    def _gradients(self) -> list[GradientCost]:
        """By stage."""
        return [gradient_cost(self.config.codec.gradient, s, self.dp) for s in own_shapes(self.config, self.params)]

    def _reduce(self, factor: np.ndarray) -> np.ndarray:
        """Seconds of the gradient's sum over replicas, by stage [pp]; `factor` [pp] of its slowest link."""
        nbytes = np.array([cost.sent for cost in self._gradients], np.float64)
        return self._ring(nbytes, factor, self._gradients[0].sums)

    def _refresh(self) -> float:
        """Statistics summed and tables sent for one boundary after the other: a stage waits for its upstream's first."""
        cuts = len(self.config.swarm.boundaries)
        if not cuts:
            return 0.0
        statistics, factor = np.full(cuts, self.codec.statistics), self.jitter(self.rng, cuts, self.dp).max(axis=1)
        seconds = float(self._ring(statistics, factor, 1).sum())
        hop = self.codec.tables / self.swarm_rate + self.latency
        hops = cuts * ceil(log2(self.dp)) if self.dp > 1 else 0
        return self.codec.ways * (seconds + (hops + self.pp - 1) * hop)

    # --- engines ---------------------------------------------------------------------------------

    def rollout(self, prompts: int, samples: int) -> float:
        """`prompts` prompts with `samples` answers each: chunks dealt over the engines, then fetched."""
        size, engines = self.config.rollout.batch_size, self.config.rollout.replicas
        chunks = [min(size, prompts - i) for i in range(0, prompts, size)]
        most = max(sum(chunks[k::engines]) for k in range(min(engines, len(chunks))))
        answered = most * samples * response_tokens(self.config) / self.links.engine_tokens_s
        return answered + self._to_anchor(self.rng, answers(self.config, most, samples, samples == 1).sent, 1)

    def deal(self) -> float:
        """A step's samples on their way to every worker, each its share."""
        jitter = self.jitter(self.rng, self.dp * self.pp).max()
        return float(max(share.sent for share in dealt(self.config)) / self.swarm_rate * jitter + self.latency)

    def weight_sync(self, nbytes: float) -> float:
        """New weights to every node that has engines."""
        return self._to_anchor(self.rng, nbytes, engine_nodes(self.config))

    # --- the anchor ------------------------------------------------------------------------------

    def pull(self, rng: np.random.Generator, apart: float) -> float:
        """A snapshot, `apart` ticks after what that worker holds, and the batch to replay."""
        anchor = self.config.anchor
        snapshot = 0.0 if anchor.weights == "shared" else self.snapshot_bytes(apart)
        window = max(1, round(apart / anchor.workers))  # workers take turns
        return self._to_anchor(rng, snapshot + replay_bytes(self.config, window), 1)

    @property
    def anchor_compute(self) -> float:
        """Forward and backward of the replay."""
        samples = samples_per_tick(self.config)
        return (
            self.config.anchor.replayed(samples) / samples * tokens_per_tick(self.config) / self.links.anchor_tokens_s
        )

    def pass_m_bar(self, rng: np.random.Generator) -> float:
        """fp32 M̄ from the last anchor worker to the next, if there are several."""
        several = self.config.anchor.workers > 1
        return self._to_anchor(rng, FP32 * self.params.total, 1) if several else 0.0

    def deliver(self, rng: np.random.Generator) -> float:
        """A correction to all ranks: each its own stage's, the last to arrive counts."""
        nbytes = np.array(correction_bytes(self.config, self.stages))[:, None]
        seconds = nbytes / self.anchor_rate * self.jitter(rng, self.pp, replica_nodes(self.config))
        return float(seconds.max()) + self.anchor_latency

    def _to_anchor(self, rng: np.random.Generator, nbytes: float, receivers: int) -> float:
        return float(nbytes / self.anchor_rate * self.jitter(rng, receivers).max()) + self.anchor_latency
