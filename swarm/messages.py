"""What the coordinator and a rank tell each other of a tick. What is large travels as frames, by reference."""

from __future__ import annotations

from dataclasses import dataclass, field

from anchor_service.errors import NotFinite

ENGINES_STREAM = "engines"  # of weights: whoever follows it gets the same frames
GRAD_NORM = "actor/grad_norm"  # what a correction's is measured by on the wall clock
RANK_S = "timing_s/rank"  # of a tick on the rank that took longest, waits for others included
Entries = dict[str, tuple[float, float]]  # channel -> bytes sent, and what a dense system would have sent


@dataclass(frozen=True)
class TickPlan:
    """coordinator -> worker: what one tick needs. References are fetched by the worker itself."""

    tick: int
    mini_batch: int  # which of the step's mini-batches
    correction: object | None  # references to this stage's correction, in the tick that must first merge it
    version: int | None  # version that must be merged in this tick, 0 before the first fire; None: what all ranks hold
    keep_source: bool = False  # a fire starts from the weights before this tick: `delta` will need its G_comp
    record: bool = False  # this tick is diagnosed: keep what `record` will be asked for
    anchor: int = 0  # worker of the anchor that makes the correction


@dataclass(frozen=True)
class MergeOutcome:
    """What became of corrections in one tick. All ranks decide alike; the two shares are of this rank's coordinates."""

    version: int | None = None  # of the correction that is held; None: none yet
    source_tick: int = 0
    lag: int = 0  # ticks from its source weights to this tick
    age: int = 0  # ticks since it was first merged
    whole: bool = False  # ranks hold all of it; else its head alone, as nothing of it would be merged
    merged: bool = False  # whether this tick merged it, with a dose of 0 too
    expired: bool = False  # it was not, being older than `anchor.max_age`
    refused: int | None = None  # version that came in this tick and is not merged
    reason: str = ""  # why: damaged, of a wrong source, or beyond `anchor.max_lag`
    dose: float = 0.0  # with which it was merged
    # share of coordinates in which its sign is that of G_comp; of a head, M alone where it was looked at
    sign_agreement: float = 0.0
    flip_fraction: float = 0.0  # share of coordinates whose sign the merge has turned
    merger: dict[str, float] = field(default_factory=dict)  # what the merger has to say of itself

    @property
    def newest(self) -> int:
        """The newest version that ranks have agreed on, held or refused; 0 before the first."""
        return max(self.version or 0, self.refused or 0)

    def metrics(self) -> dict[str, float]:
        """Under the names that people read."""
        found: dict[str, float] = {}
        if self.refused is not None:
            found["anchor/refused"] = self.refused
        if self.version is not None:
            found |= {"anchor/version": self.version, "anchor/age": self.age, "anchor/lag": self.lag}
        if self.expired:
            found["anchor/expired"] = 1.0
        if self.merged:
            found |= {
                "anchor/sign_agreement": self.sign_agreement,
                "merger/dose": self.dose,
                "merger/flip_fraction": self.flip_fraction,
            } | self.merger
        return found


@dataclass(frozen=True)
class Report:
    """worker -> coordinator: what one rank measured."""

    sums: dict[str, float]  # over this rank's response tokens: they add up over ranks and become means
    values: dict[str, float]  # averaged over the ranks that have them
    peaks: dict[str, float]  # times and memory: the highest of all ranks counts
    ledger: Entries


@dataclass(frozen=True)
class TickReport(Report):
    """worker -> coordinator: the same of a tick, with what it merged."""

    merge: MergeOutcome
    skipped: NotFinite | None = None  # why all ranks left this tick out


@dataclass(frozen=True)
class Standing:
    """worker -> coordinator: where a rank stands after something failed."""

    marked: int  # the last tick that it began; it can go back to before it
    done: int  # the last tick that it ended
    own_before: bool  # whether the state before tick `marked` has what no other replica holds
    own_after: bool  # likewise after tick `done`
    report: TickReport | None  # of tick `done`
