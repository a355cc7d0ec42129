"""The correction that a rank holds: adopted when all ranks have it, merged at a growing age, or stood in for.

inbox ── agree: MIN of the versions held ──▶ adopt ──▶ merge, age 0 ─▶ merge, age 1 ─▶ … ─▶ the next version
  │                                            │ └─ of a head: learn, and fetch the whole if it is wanted
  └─ of bad form or source on a rank ────────▶ └─ refused by all; or beyond max_lag  └─ beyond max_age: left out
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from anchor_service.config import AnchorConfig, correction_payload
from anchor_service.errors import NotFinite, ReplicaMismatch
from anchor_service.inbox import Inbox
from anchor_service.messages import Correction
from anchor_service.norms import NormHistory
from anchor_service.ring import anchor_should_fire
from codec.frames import FrameError
from codec.state import prefixed, under
from merger import make_merger
from merger.config import MergerConfig
from merger.holds import Holds
from merger.look import looked_at
from merger.placebo import PLACEBOS, Placebo
from rl.weights import Weights
from swarm.grid import Grid
from swarm.merge_sweep import held_form, merge_in_place, restored, stored
from swarm.messages import MergeOutcome, TickPlan


class Held:
    """One rank's part in merging: what it holds, since when, and what it needs for what is to come."""

    def __init__(
        self,
        anchor: AnchorConfig,
        merger: MergerConfig,
        seed: int,
        weights: Weights,
        grid: Grid,
        stride: int | None = None,
    ):
        self.anchor, self.config, self.seed, self.grid = anchor, merger, seed, grid
        self.merging = bool(merger.placebo) or correction_payload(anchor, merger) is not None
        self.at = self._looks_at(weights, stride)
        self.sizes = {name: math.prod(shape) for name, shape in zip(weights.names, weights.shapes)}
        self.inbox, self.norms = Inbox(), NormHistory(anchor.norm_bound)
        self.skips = False  # whether a correction that is damaged is passed over, or ends the run
        self.agreed = 1  # twice the version that all ranks hold, and 1 if all of them can use it
        self._begin()

    def _begin(self) -> None:
        """Nothing is held, and nothing known of what was."""
        anchor, config = self.anchor, self.config
        self.merger = make_merger(config)
        self.merger.holds = Holds(anchor.cadence, anchor.beta_anc)
        self.merger.windows, self.merger.replayed = anchor.replay == "window", anchor.replay_fraction
        placebo = config.placebo
        self.placebo = PLACEBOS[placebo](anchor.beta_anc, self.seed, self.sizes) if placebo else None
        self.correction: Correction | None = None
        self.seen = 0  # newest version agreed on, merged or refused
        # G_comp of the ticks that started a fire still under way, by source tick, where the merger needs them
        self.sources: dict[int, Tensor] = {}

    def _looks_at(self, weights: Weights, stride: int | None) -> Tensor | None:
        """Coordinates [n] that a merger which looks is shown; the copy of another stage's embedding is not among them."""
        if stride is None or not self.merging:
            return None
        owned = [math.prod(s) for s, start in zip(weights.shapes, weights.offsets) if start < weights.owned]
        return torch.from_numpy(looked_at(owned, stride)).to(self.grid.device)

    @property
    def looked(self) -> int | None:
        return None if self.at is None else self.at.numel()

    # --- what comes, and what all ranks can use of it -------------------------------------------

    def receive(self, version: int | None, fetch: Callable[[], Correction], waits: bool = True) -> None:
        """Correction `version` into the inbox; or why it is none, where that does not end the run.

        `waits`: in lockstep, where M is what this very anchor has always computed. Else it is measured by those before it.
        """
        try:
            found = fetch()
            if found.version != version:
                raise FrameError("the anchor", "version", f"is {found.version}, {version} was to come")
        except (FrameError, NotFinite) as error:
            if version is None or not self.skips:
                raise
            self.inbox.refuse(version, str(error))
            return
        reason = ""
        if not waits and isinstance(found.values, Tensor) and found.values.is_floating_point():
            reason = self.norms.judge(found.values.norm().item(), found.source_tick)
        self.inbox.refuse(found.version, reason) if reason else self.inbox.put(found)

    def agree(self, plan: TickPlan, fine: bool = True) -> bool:
        """Whether every rank is `fine`. On the way all agree on a version: a MIN, of numbers that are odd if it can be used."""
        mine = self._usable(plan)
        if self.skips or (self.merging and self.placebo is None):
            all_fine, self.agreed = self.grid.min_world(int(fine), mine)
            return bool(all_fine)
        return fine

    def _usable(self, plan: TickPlan) -> int:
        """Of the newest version held; the oldest that must not be merged comes before it, so that all pass it over."""
        waiting = self.inbox.waiting()
        for version, correction in waiting.items():
            if version > self.seen and (reason := self._fault(correction, plan)):
                self.inbox.refuse(version, reason)
                return 2 * version
        return 2 * max(self.seen, *waiting, 0) + 1

    def _fault(self, correction: Correction | str, plan: TickPlan) -> str:
        """Why it must not be merged, by its source; "" if it may be."""
        if isinstance(correction, str):
            return correction
        source, oldest = correction.source_tick, self.correction.source_tick if self.correction else 0
        if oldest <= source < plan.tick:
            return ""
        reason = f"is {source}, of a correction that tick {plan.tick} merges after that of source {oldest}"
        error = FrameError("the anchor", "source_tick", reason)
        if not self.skips:
            raise error
        return str(error)

    # --- a tick -----------------------------------------------------------------------------------

    def skip(self, plan: TickPlan) -> MergeOutcome:
        """Instead of `merge`, in a tick without a gradient: what has come is taken over and ages."""
        if not self.merging or self.placebo is not None:
            return MergeOutcome()
        return self._standing(plan, self._adopt(plan))

    def merge(self, plan: TickPlan, g_comp: Tensor, norm: Callable[[Tensor], float]) -> MergeOutcome:
        """Merge the version that every rank holds, in place of the gradient [n]. All ranks decide alike."""
        if not self.merging:
            return MergeOutcome()
        starts = self._starts(plan)
        if self.merger.needs_source and starts:
            self.sources[plan.tick - 1] = g_comp.clone()
        if self.at is not None:
            self.merger.watch(g_comp[self.at], plan.tick - 1 if starts else None)
        reason = self._adopt(plan) if self.placebo is None else self._stand_in(self.placebo, plan, g_comp, starts)
        held, outcome = self.correction, self._standing(plan, reason)
        if held is None or outcome.expired:
            return outcome
        agree, flips = self._apply(g_comp, held, outcome.age, norm)
        merger, dose = self.merger.metrics(), self.merger.dose
        return replace(outcome, merged=True, dose=dose, merger=merger, sign_agreement=agree, flip_fraction=flips)

    def _apply(
        self, g_comp: Tensor, held: Correction, age: int, norm: Callable[[Tensor], float]
    ) -> tuple[float, float]:
        """In place of the gradient. Shares of coordinates whose signs agree, and that it has turned; of a head it leaves
        the gradient as it is, and signs of M alone where it was looked at stand for all of M̄'s."""
        if held.values is None:
            assert self.at is not None and held.look is not None
            self.merger.dose = 0.0
            return (held.look == g_comp[self.at].sign()).double().mean().item(), 0.0
        self.merger.prepare(g_comp, cast(Tensor, held.values), age, norm)  # of packed ones it asks the sign alone
        agree, flips = merge_in_place(self.merger, g_comp, held.values)
        return agree / g_comp.numel(), flips / g_comp.numel()

    def _standing(self, plan: TickPlan, reason: str) -> MergeOutcome:
        """What is held, if anything, and `reason`, if any, why the version that came was refused."""
        held, since, refused = self.correction, self.merger.holds.since, self.seen if reason else None
        if held is None or since is None:
            return MergeOutcome(refused=refused, reason=reason)
        age, max_age = plan.tick - since, self.anchor.max_age
        return MergeOutcome(
            held.version,
            held.source_tick,
            lag=plan.tick - held.source_tick,
            age=age,
            whole=held.values is not None,
            expired=max_age is not None and age > max_age,
            refused=refused,
            reason=reason,
        )

    def _adopt(self, plan: TickPlan) -> str:
        """Take over the newest version that all ranks hold; or why not, the same on all of them but in its wording."""
        mine = max(self.inbox.newest(), self.seen)
        version, usable = divmod(self.agreed, 2)
        if plan.version is not None and version != plan.version:
            held = f"{self.grid.name} holds {mine}, all ranks hold {version}"
            raise ReplicaMismatch(f"version {plan.version} is due but not held", plan.tick, version, [held])
        if version < self.seen:
            held = f"{self.grid.name} has merged {self.seen}, all ranks hold {version}"
            raise ReplicaMismatch("a rank lost a version it had merged", plan.tick, version, [held])
        if version == self.seen:
            return ""
        held, self.seen = self.inbox.adopt(version), version
        if isinstance(held, str) or not usable:
            return held if isinstance(held, str) else "another rank has refused it"
        source = self.sources.get(held.source_tick)
        self.sources = {s: g for s, g in self.sources.items() if s > held.source_tick}
        max_lag = self.anchor.max_lag
        if max_lag is not None and plan.tick - held.source_tick > max_lag:
            return f"it is {plan.tick - held.source_tick} ticks late, beyond anchor.max_lag {max_lag}"
        if self.merger.needs_source and source is None:  # the tick that started this fire keeps it
            return f"tick {held.source_tick + 1}, which it starts from, was skipped"
        self._learn(held, plan)
        self.correction = self._wanted(held, source)
        return ""

    def _learn(self, correction: Correction, plan: TickPlan) -> None:
        """From this tick on it is merged, with what it has taught."""
        self.merger.holds.fire(plan.tick)
        if correction.look is not None:
            self.merger.learn(correction.source_tick, correction.look.to(self.grid.device), self._total)

    def _wanted(self, held: Correction, source: Tensor | None) -> Correction:
        """What the merger wants of it: all ranks have learned the same, so they fetch alike."""
        device = self.grid.device
        if held.look is not None and not self.merger.wants():
            return replace(held, values=None, look=held.look.to(device), fetch=None)
        whole = held if held.fetch is None else held.fetch()
        assert whole.values is not None
        values = held_form(self.merger, whole.values, device.type)
        if self.merger.needs_source:
            assert source is not None  # the tick that started this fire has kept it
            values = cast(Tensor, values) - source  # of a dense M̄
        return replace(held, values=values, look=None, fetch=None)

    def _total(self, numbers: list[float]) -> list[float]:
        return self.grid.sum_pp(torch.tensor(numbers, dtype=torch.float64, device=self.grid.device)).tolist()

    def _starts(self, plan: TickPlan) -> bool:
        """Whether a fire starts from the weights before this tick; for a placebo the tick alone decides."""
        if self.placebo is None:
            return plan.keep_source
        anchor = self.anchor
        return anchor_should_fire(plan.tick - 1 + anchor.delay_k, anchor.cadence, anchor.delay_k)

    def _stand_in(self, placebo: Placebo, plan: TickPlan, g_comp: Tensor, starts: bool) -> str:
        """Take over the placebo's correction in the ticks in which an anchor's would come."""
        anchor = self.anchor
        if starts:
            placebo.keep(plan.tick - 1, g_comp)
        if anchor_should_fire(plan.tick, anchor.cadence, anchor.delay_k):
            source = plan.tick - anchor.delay_k
            fired = placebo.fire(source, g_comp)
            if fired is None:
                return ""
            self.seen += 1
            signs, alone = fired
            look = None if self.at is None else alone[self.at]
            signs = held_form(self.merger, signs, self.grid.device.type)
            self.correction = Correction(self.seen, source, plan.tick, signs, self.config.placebo or "", look)
            self._learn(self.correction, plan)
        return ""

    def stand_in(self) -> dict[str, Tensor]:
        """What a diagnosis cannot get from an anchor, as there is none: the placebo's correction."""
        values = self.correction.values if self.placebo and self.correction else None
        return {} if values is None else {"m_bar": values.sign()}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, and plain fields: all that the next tick needs of corrections."""
        tensors = {f"source.{s}": g for s, g in self.sources.items()}
        tensors |= prefixed("merger", self.merger.state())
        if self.placebo:
            tensors |= prefixed("placebo", self.placebo.state())
        fields: dict[str, Any] = {"seen": self.seen, "holds": self.merger.holds.fields()}
        if self.correction is not None:
            held = self.correction
            tensors |= stored("correction", held.values)
            tensors |= stored("look", held.look if held.values is None else None)
            fields["correction"] = {k: getattr(held, k) for k in ("version", "source_tick", "first_tick", "digest")}
        return tensors, fields

    def restore(self, tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
        """Go on from `state()`; what was learnt since is forgotten."""
        self._begin()
        here = {name: value.to(self.grid.device) for name, value in tensors.items()}
        self.sources = {int(s): g for s, g in under("source", here).items()}
        self.merger.restore(under("merger", here))
        if self.placebo:
            self.placebo.restore(under("placebo", here))
        self.seen = fields["seen"]
        self.merger.holds.restore(fields["holds"])
        if "correction" in fields:
            values = restored("correction", here, sum(self.sizes.values()))
            values = None if values is None else held_form(self.merger, values, self.grid.device.type)
            self.correction = Correction(values=values, look=here.get("look"), **fields["correction"])
