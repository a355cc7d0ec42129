"""`northstar plan`: what a config will send, hold and wait for, before anything is started. No Ray; torch for a `snapshot.rate` alone.

Bytes are those of the ledger (`deploy/estimate/bytes.py`), times are first-order over `links` (`deploy/estimate/phases.py`),
memory is what the code allocates (`deploy/estimate/memory.py`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anchor_service.config import correction_payload
from codec.ledger import ANCHOR, PUBLISHED, Ledger
from deploy.config import load, names_in, own_settings
from deploy.estimate.bytes import tick_bytes
from deploy.estimate.cadences import Affordable, affordable
from deploy.estimate.memory import EXPECTED, Part, largest, memory, peak
from deploy.estimate.parameters import Params, check_fits, parameters, stage_parameters
from deploy.estimate.phases import FireTime, Phases, StepTime, TickTime, first_lag, sustainable_cadence
from deploy.estimate.workload import fires_per_tick, refresh_share, replica_nodes, response_tokens, tokens_per_tick
from deploy.estimate.worth import Worth, read_measured
from swarm.run_config import RunConfig

OUTWEIGH = {  # channels that should not outweigh the boundary, and what to do about it
    "correction": "the correction broadcast: leave anchor.payload at auto and use a merger that needs only signs, "
    "or raise anchor.cadence",
    "snapshot": "the snapshot: snapshot.dtype=bfloat16 with snapshot.encoding=delta, or anchor.weights=shared",
    "tied": "the tied embedding's gradient, between first and last stage in each tick, in no published ratio: "
    "codec.gradient.kind=powersgd sends factors",
    "grad_dp": "the gradient's sum over replicas: codec.gradient.kind=powersgd, with codec.gradient.bits=4",
}

CURES = {
    "logits": ": lower the micro_batch_size of that role, it sets their number",
    "scratch of a draw": ": lower rollout.batch_size",
    "gradients of source ticks": ": raise anchor.cadence, or lower anchor.delay_k",
}


@dataclass(frozen=True)
class Scheme:
    """One way to send M, in bytes a tick of all links together."""

    name: str
    cadence: int
    channels: dict[str, tuple[float, float]]

    @property
    def bytes_ratio(self) -> float | None:
        return _ledger(self.channels).bytes_ratio()

    @property
    def total_ratio(self) -> float | None:
        return _ledger(self.channels).total_ratio()

    def sent(self, *channels: str) -> float:
        return sum(self.channels[c][0] for c in channels)

    @property
    def circuit_ratio(self) -> float | None:
        """Boundary and anchor over the dense boundary: what the published ratio left out."""
        dense = sum(self.channels[c][1] for c in PUBLISHED)
        return self.sent(*PUBLISHED, *ANCHOR) / dense if dense else None


@dataclass(frozen=True)
class AnchorPlan:
    """Can the anchor keep up, and how late is it if nothing waits for it?"""

    fire: FireTime
    tick_s: float  # a step's seconds over its ticks: rollouts give the anchor time too
    cadence: int  # smallest sustainable
    delay_k: int  # ticks from the source weights to the first merge
    affordable: Affordable


@dataclass(frozen=True)
class Plan:
    """Everything that `plan` prints."""

    config: RunConfig
    params: Params
    configured: Scheme
    schemes: list[Scheme]
    parts: list[Part]
    tick: TickTime
    step: StepTime
    anchor: AnchorPlan | None
    worth: Worth | None  # by a probe's file, if one was given
    warnings: list[str]

    def numbers(self) -> dict[str, Any]:
        """For --json: bytes, seconds and ratios as plain numbers."""
        config, step_ticks = self.config, self.config.grpo.ticks_per_step
        return {
            "name": config.run.name,
            "model": {"path": config.model.path, "parameters": self.params.total, "tied": self.params.tied},
            "tokens_per_tick": tokens_per_tick(config),
            "response_tokens": response_tokens(config),
            "ticks_per_step": step_ticks,
            "bytes_per_tick": _bytes(self.configured),
            "comm/bytes_ratio": self.configured.bytes_ratio,
            "comm/total_ratio": self.configured.total_ratio,
            "schemes": [
                {
                    "name": s.name,
                    "cadence": s.cadence,
                    "bytes_per_tick": _bytes(s),
                    "comm/bytes_ratio": s.bytes_ratio,
                    "comm/total_ratio": s.total_ratio,
                    "circuit_ratio": s.circuit_ratio,
                }
                for s in self.schemes
            ],
            "memory": [asdict(part) for part in self.parts],
            "tick_s": asdict(self.tick) | {"total": self.tick.total},
            "step_s": asdict(self.step) | {"total": self.step.total},
            "anchor": self.anchor and asdict(self.anchor) | {"fire_s": self.anchor.fire.total},
            "worth": self.worth and self.worth.numbers(),
            "warnings": self.warnings,
        }


def load_for_planning(source: str, overrides: list[str]) -> RunConfig:
    """A config whose task and loggers are not looked at: `plan` needs neither here. Raises ConfigError."""
    given = [key for key in own_settings(source, overrides) if not key.startswith("task.")]
    sets = [f"val.sets.{name}" for name in names_in(source, overrides, "val", "sets")]
    unseen = [f"{one}.{key}" for one in sets for key in ("task=sums", "params={}")]
    return load(source, [*overrides, "task.name=sums", "run.loggers=[]", *unseen], given=given)


def make_plan(config: RunConfig, anchor_bytes: float | None = None, probe: Path | None = None) -> Plan:
    """`anchor_bytes`: what the anchor may send in a mean tick, to find a cadence for; default: what it sends now.
    `probe`: a file of `northstar probe --json`, to say whether the anchor is worth its bytes.

    Raises ProbeMismatch if that file is of another config, ModelNotFound or ValueError if the model's shape cannot be
    known or does not fit the config.
    """
    worth = Worth(config, read_measured(probe, config)) if probe else None
    params = parameters(config)
    check_fits(config, params)
    configured = Scheme("as configured", config.anchor.cadence, tick_bytes(config))
    phases = Phases(config)
    tick = phases.tick_time(refresh_share(config))
    step = phases.step_time(tick)
    budget = configured.sent(*ANCHOR) if anchor_bytes is None else anchor_bytes
    anchor = anchor_plan(config, phases.fire_time(), step, budget)
    parts = memory(config, params)
    warnings = _warnings(config, params, configured, parts, anchor)
    schemes = compared_schemes(config, params)
    return Plan(config, params, configured, schemes, parts, tick, step, anchor, worth, warnings)


def _ledger(channels: dict[str, tuple[float, float]]) -> Ledger:
    found = Ledger()
    found.merge(channels)
    return found


# --- ways to send M ------------------------------------------------------------------------------


def compared_schemes(config: RunConfig, params: Params) -> list[Scheme]:
    """Dense bf16 M, as published, and sign planes: at the config's cadence, at K=5 and at K=20."""
    settings = {config.anchor.cadence: config.anchor.delay_k, 5: 5, 20: 20}
    return [scheme(config, params, delay, c, way) for c, delay in settings.items() for way in ("bf16 M", "signs")]


def scheme(config: RunConfig, params: Params, delay_k: int, cadence: int, way: str) -> Scheme:
    """`bf16 M` sends M and the snapshot whole in bf16, `signs` bit planes, and the snapshot as the config says."""
    anchor = {"enabled": True, "delay_k": delay_k, "cadence": cadence, "payload": "auto"}
    changed = config.model_copy(
        update={
            "anchor": config.anchor.model_copy(update=anchor),
            "merger": config.merger.model_copy(update={"kind": "signed_ema", "dose": config.merger.dose or 1.0}),
        }
    )
    channels = tick_bytes(changed)
    if way == "bf16 M":
        fires = fires_per_tick(changed)
        held = sum(stage_parameters(config, params))
        channels["correction"] = (fires * replica_nodes(config) * 2.0 * held, 0.0)
        channels["snapshot"] = (fires * 2.0 * params.total, 0.0)
    return Scheme(way, cadence, channels)


# --- the anchor ----------------------------------------------------------------------------------


def anchor_plan(config: RunConfig, fire: FireTime, step: StepTime, budget: float) -> AnchorPlan | None:
    """None where nothing is merged."""
    if correction_payload(config.anchor, config.merger) is None:
        return None
    tick_s = step.total / config.grpo.ticks_per_step
    cadence = sustainable_cadence(fire.total, fire.handover, tick_s, config.anchor.workers)
    delay_k = first_lag(fire.total, tick_s)
    if config.anchor.weights == "shared" and config.anchor.clock == "lockstep":
        each = config.grpo.ticks_per_step  # snapshots exist only at the end of a step
        cadence, delay_k = -(-cadence // each) * each, -(-delay_k // each) * each
    return AnchorPlan(fire, tick_s, cadence, delay_k, affordable(config, tick_s, cadence, budget))


# --- warnings ------------------------------------------------------------------------------------


def _warnings(
    config: RunConfig, params: Params, configured: Scheme, parts: list[Part], anchor: AnchorPlan | None
) -> list[str]:
    return [*_outweighed(configured), *_surprises(parts), *(_lateness(config, params, anchor) if anchor else [])]


def _outweighed(configured: Scheme) -> list[str]:
    boundary = configured.sent(*PUBLISHED)
    found = []
    for channel, cure in OUTWEIGH.items():
        sent = configured.sent(channel)
        if sent > boundary > 0:
            factor = sent / boundary
            found.append(f"{channel} sends {factor:,.1f} times the boundary's {mb(boundary)} a tick. It is {cure}.")
    return found


def _surprises(parts: list[Part]) -> list[str]:
    """Roles whose memory is dominated by something else than model, optimizer or activations."""
    found = []
    for role, part in sorted(largest(parts).items()):
        if part.name not in EXPECTED:
            share = part.bytes / peak(parts, role, "device")
            cure = CURES.get(part.name, "")
            found.append(
                f"{role}: the largest part of its memory is {part.name}, {human_bytes(part.bytes)} or {share:.0%}{cure}."
            )
    return found


def _lateness(config: RunConfig, params: Params, plan: AnchorPlan) -> list[str]:
    anchor, found = config.anchor, []
    if anchor.clock == "lockstep" and anchor.cadence < plan.cadence:
        found.append(
            f"anchor.cadence {anchor.cadence} is below the sustainable {plan.cadence}: a fire takes "
            f"{plan.fire.total:,.1f} s, a tick {plan.tick_s:,.1f} s, so the swarm will wait for the anchor."
        )
    if anchor.clock == "lockstep" and anchor.delay_k < plan.delay_k and anchor.lag.kind == "fixed":
        wait = plan.fire.total - (anchor.delay_k - 1) * plan.tick_s
        found.append(
            f"anchor.delay_k {anchor.delay_k} is below {plan.delay_k}: each fire is late by {wait:,.1f} s "
            f"and the tick that merges it waits."
        )
    if anchor.workers > 1:
        found.append(
            f"{anchor.workers} anchor workers hand M̄ on from one to the next, {mb(4 * params.total)} a fire in fp32, "
            f"counted as control: keep them on one machine."
        )
    return found


def _bytes(s: Scheme) -> dict[str, dict[str, float]]:
    return {channel: {"sent": sent, "dense": dense} for channel, (sent, dense) in s.channels.items()}


def mb(n: float) -> str:
    return f"{n / 1e6:,.2f} MB"


def human_bytes(n: float) -> str:
    return f"{n / 1e9:,.2f} GB" if n >= 1e9 else mb(n)
