"""`northstar simulate`: a run's schedule on a virtual clock. No tensors, no Ray; torch for the coder of a `snapshot.rate` alone.

    engines  [load ─▶ sample] one after the other, `rollout.max_staleness` steps ahead
                          ▼
    driver   wait for samples ─▶ old log-probs ─▶ [dispatch what is done ─▶ offer θ_s ─▶ tick] × ticks a step ─▶ weights
                                             │             ▲                      ▲ merge: newest version that all hold
    anchor                                   └─ wait for a worker, pull, compute, publish in order of versions

Which fires start and when they are due comes from `anchor_service/clock.py` and `lag.py`, the same code
that a run uses; the order of events in a tick is that of `swarm/coordinator.py`. How long things take
comes from `deploy/estimate/timing.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import simpy
from simpy.events import ProcessGenerator

from anchor_service.clock import Lockstep, make_clock, next_worker, paced
from anchor_service.config import correction_payload
from anchor_service.lag import Due
from codec.schedule import q_should_refresh
from deploy.estimate.bytes import sync_bytes, tick_bytes
from deploy.estimate.simulation import Simulation
from deploy.estimate.timing import Durations
from deploy.estimate.workload import forward_passes
from swarm.run_config import RunConfig


@dataclass
class SimulatedFire:
    """A fire under way, or done and not merged yet."""

    due: Due
    published: simpy.Event
    pulled: float = 0.0  # when its snapshot was there
    computed: float = 0.0  # when M was there
    held: float | None = None  # when all ranks hold it; None: not on its way yet


def simulate(config: RunConfig, ticks: int | None = None) -> Simulation:
    """Run `config` for `ticks` ticks (default: all of its own) on a virtual clock."""
    return _Run(config, ticks or config.ticks).result()


class _Run:
    """The driver of one simulated run."""

    def __init__(self, config: RunConfig, ticks: int):
        self.config, self.last_tick = config, ticks
        self.durations = Durations(config, np.random.default_rng([config.run.seed, 0x51A]))
        self.syncs = sync_bytes(config, self.durations.params, ticks)  # bytes after each step
        corrects = correction_payload(config.anchor, config.merger) is not None
        each = config.grpo.ticks_per_step
        self.clock = make_clock(config.anchor, config.run.seed, ticks, each) if corrects else Lockstep([])
        self.env = simpy.Environment()
        self.anchors = [simpy.Resource(self.env) for _ in range(config.anchor.workers)]
        self.sources: dict[int, int] = {}  # anchor worker -> the tick of its last snapshot
        self.fires: dict[int, SimulatedFire] = {}
        self.newest: SimulatedFire | None = None  # M̄ goes through all fires in the order in which they started
        self.last_held = 0.0
        self.seen = 0
        self.held: Due | None = None
        self.tick_seconds = 0.0  # a running mean, as the coordinator's
        self.weights_at = self.engines_at = (
            0.0  # when the newest weights are with the engines; when those have nothing to do
        )
        self.anchor_seconds = 0.0
        swarm = config.swarm
        self.found = Simulation(config.run.name, swarm.dp * swarm.pp, ticks)

    def result(self) -> Simulation:
        self.env.run(self.env.process(self._steps()))
        found, config = self.found, self.config
        found.seconds = self.env.now
        # each worker computes its own stage of its replica's samples: forward one part, backward two
        parts = 2 + forward_passes(config, self.durations.has_tables, self.last_tick)
        busy = self.durations.computing.sum() / self.durations.pp * parts / 3 * self.last_tick
        found.swarm_utilisation = float(busy / found.seconds)
        found.anchor_utilisation = self.anchor_seconds / (config.anchor.workers * found.seconds)
        merges = len(found.corrections) / self.last_tick
        each = tick_bytes(config, self.last_tick, found.started / self.last_tick, merges)
        found.bytes = {c: (sent * self.last_tick, dense * self.last_tick) for c, (sent, dense) in each.items()}
        return found

    # --- the driver ------------------------------------------------------------------------------

    def _steps(self) -> ProcessGenerator:
        grpo, durations = self.config.grpo, self.durations
        steps = -(-self.last_tick // grpo.ticks_per_step)
        sampled: list[float] = []  # when the samples of a step are there
        self._send_weights(0)
        yield self._engines_until(self._validate())
        for step in range(1, steps + 1):
            start = self.env.now
            while len(sampled) < self.config.rollout.ahead_of(step, steps):
                sampled.append(self._sample(grpo.train_batch_size, grpo.group_size))
            yield self._engines_until(sampled[step - 1])
            yield self._spend("swarm links", durations.deal())
            first = (step - 1) * grpo.ticks_per_step + 1
            ticks = range(first, min(first + grpo.ticks_per_step, self.last_tick + 1))
            for _ in range(min(durations.recomputed(first), len(ticks))):
                old = durations.old_logprobs()
                yield self._spend("swarm compute", old.compute)
                yield self._spend("swarm links", old.before - old.compute)
            for tick in ticks:
                yield from self._tick(tick)
            self._send_weights(step)
            if not self.config.rollout.max_staleness:
                yield self._engines_until(self.weights_at)
            seconds = (self.env.now - start) / len(ticks)
            self.tick_seconds = paced(self.tick_seconds, seconds)
            if step % self.config.val.every == 0 or step == steps:
                yield self._engines_until(self._validate())

    def _send_weights(self, step: int) -> None:
        """Those after `step`, beside whatever the engines do: they take them after what they were asked for before."""
        seconds = self.durations.weight_sync(self.syncs[min(step, len(self.syncs) - 1)])
        self.weights_at = max(self.env.now, self.weights_at) + seconds
        self.engines_at = max(self.engines_at, self.weights_at)

    def _sample(self, prompts: int, samples: int) -> float:
        """When the engines are done with it, after all that they were asked for before."""
        self.engines_at = max(self.env.now, self.engines_at) + self.durations.rollout(prompts, samples)
        return self.engines_at

    def _validate(self) -> float:
        """The same of all sets that are validated on."""
        return max(self._sample(one.count, one.samples) for one in self.config.val.asked().values())

    def _engines_until(self, when: float) -> simpy.Event:
        return self._spend("engines", max(0.0, when - self.env.now))

    def _tick(self, tick: int) -> ProcessGenerator:
        """In the coordinator's order: dispatch, offer, work, merge, the rest."""
        start = self.env.now
        self._dispatch()
        self._offer(tick - 1)
        refresh = q_should_refresh(tick, self.config.q_cadence)
        work = self.durations.tick(refresh)
        yield self._spend("swarm compute", work.compute)
        yield self._spend("swarm links", max(0.0, work.before - work.compute))
        due = self.clock.due(tick)
        if due is not None:
            yield from self._wait(self.fires[due.version])
        self._merge(tick)
        yield self._spend("swarm links", work.after)
        self.found.tick_seconds.append(self.env.now - start)

    def _spend(self, part: str, seconds: float) -> simpy.Event:
        self.found.critical[part] += seconds
        return self.env.timeout(seconds)

    def _offer(self, source_tick: int) -> None:
        for due in self.clock.to_start(source_tick):
            fire = SimulatedFire(due, self.env.event())
            self.fires[due.version] = fire
            self.env.process(self._fire(fire, self.newest, self.clock.least_ticks(due) * self.tick_seconds))
            self.newest = fire
            self.found.started += 1

    # --- the anchor ------------------------------------------------------------------------------

    def _rng(self, version: int, what: int) -> np.random.Generator:
        """Each fire has numbers of its own, so that they do not depend on when it runs."""
        return np.random.default_rng([self.config.run.seed, 0xF12E, version, what])

    def _fire(self, fire: SimulatedFire, earlier: SimulatedFire | None, least: float) -> ProcessGenerator:
        """One job on its anchor worker, chosen as in `FireLine`."""
        env, version, source = self.env, fire.due.version, fire.due.source_tick
        worker = next_worker([anchor.count + len(anchor.queue) for anchor in self.anchors], version)
        rng = self._rng(version, 0)
        with self.anchors[worker].request() as turn:
            yield turn
            start = env.now
            apart = max(0, source - self.sources.get(worker, 0))
            self.sources[worker] = source
            yield env.timeout(self.durations.pull(rng, apart))
            fire.pulled = env.now
            yield env.timeout(self.durations.anchor_compute)
            self.anchor_seconds += self.durations.anchor_compute
            own = env.now - start
            yield env.timeout(max(0.0, max(least, self.config.anchor.slowdown * own) - own))
            fire.computed = env.now
            if earlier is not None:
                if not earlier.published.processed:
                    yield earlier.published
                yield env.timeout(self.durations.pass_m_bar(rng))
            fire.published.succeed(env.now)

    def _dispatch(self) -> None:
        """On the wall clock: what is done goes to all ranks, in order."""
        if self.clock.waits:
            return
        for version in sorted(self.fires):
            fire = self.fires[version]
            if fire.published.processed and fire.held is None:
                self.clock.finished(version)
                start = max(self.env.now, self.last_held)
                fire.held = self.last_held = start + self.durations.deliver(self._rng(version, 1))

    def _wait(self, fire: SimulatedFire) -> ProcessGenerator:
        """In lockstep: until every rank has fetched the correction that is due."""
        if not fire.published.processed:
            start = self.env.now
            yield fire.published
            waited = self.env.now - start
            link = min(waited, self.env.now - fire.computed)  # M̄ on its way from another worker
            slow = min(waited - link, fire.computed - fire.pulled)
            self.found.critical["anchor link"] += waited - slow
            self.found.critical["anchor compute"] += slow
        yield self._spend("anchor link", self.durations.deliver(self._rng(fire.due.version, 1)))
        fire.held = self.env.now

    def _merge(self, tick: int) -> None:
        """The newest version that every rank holds (the MIN of what each holds) is merged from now on."""
        found, anchor = self.found, self.config.anchor
        held = [v for v, fire in self.fires.items() if fire.held is not None and fire.held <= self.env.now]
        version = max(held, default=0)
        if version > self.seen:
            self.seen = version
            source = self.fires[version].due.source_tick
            merged = anchor.max_lag is None or tick - source <= anchor.max_lag
            for v in sorted(v for v in self.fires if v <= version):
                due = self.fires.pop(v).due
                found.corrections.append(Due(v, due.source_tick, tick if merged and v == version else None))
            if merged:
                self.held = found.corrections[-1]
                found.lags.append(tick - source)
        if self.held is not None and self.held.first_tick is not None:  # what is held has been merged
            age = tick - self.held.first_tick
            found.ages.append(age)
            found.expired += anchor.max_age is not None and age > anchor.max_age
