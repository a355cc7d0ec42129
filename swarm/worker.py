"""The actor around one rank: fetches references, builds the rank, calls the tick."""

from __future__ import annotations

import os
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Concatenate, ParamSpec, TypeVar, cast

import numpy as np
import ray
import torch
from torch import Tensor

from anchor_service.calls import gather
from anchor_service.messages import Correction, joined, pack_record, unpack_correction, unpack_head
from codec.ledger import Ledger
from rl import mismatch
from rl.config import SnapshotConfig
from rl.device import ordinal, peak_memory_gb, prefer_determinism
from rl.objective import MicroBatch, microbatches, rows_per_token
from swarm import checkpoint, twin
from swarm.doing import Doing
from swarm.grid import Grid
from swarm.manifest import Entry
from swarm.meeting import meeting
from swarm.messages import Report, Standing, TickPlan, TickReport
from swarm.nonfinite import explained
from swarm.outbox import Outbox
from swarm.rank import MiniBatch, RankSetup, build_rank
from swarm.replicas import weights_digest
from swarm.shares import mini_batches
from swarm.tick import tick


@dataclass(frozen=True)
class WorkerSetup:
    """coordinator -> worker: which rank it is, and everything that is built from."""

    index: int
    rank: RankSetup
    snapshot: SnapshotConfig


P = ParamSpec("P")
T = TypeVar("T")


def _told(method: Callable[Concatenate[Worker, P], T]) -> Callable[Concatenate[Worker, P], T]:
    """While a worker is at it, `doing` says so."""

    @wraps(method)
    def told(self: Worker, *args: P.args, **kwargs: P.kwargs) -> T:
        self.task = method.__name__, time.monotonic()
        try:
            return method(self, *args, **kwargs)
        finally:
            self.task = None

    return told


class Worker:
    """One process of the swarm."""

    def __init__(self, setup: WorkerSetup):
        self.setup = setup
        torch.set_num_threads(setup.rank.swarm.threads)
        self.minis: list[MiniBatch] = []
        self.marked = self.done = 0
        self.report: TickReport | None = None
        self.compared: defaultdict[str, float] = defaultdict(float)
        self.outbox = Outbox(setup.snapshot, setup.rank.model)
        self.task: tuple[str, float] | None = None  # what it was asked for, and when it began, on the monotonic clock

    def address(self) -> str:
        """Where the process groups of this swarm meet; asked of rank 0."""
        self.store, address = meeting(ray.util.get_node_ip_address())
        return address

    def adjourn(self) -> None:
        """Whoever still waits where the ranks meet fails at once. Asked beside that wait, of who keeps the store."""
        self.store = None

    def build(self, init: str, index: int | None = None, dp: int | None = None) -> None:
        """Join the grid and load this stage's part of the model. A worker that is used again leaves its old grid.

        `index`, `dp`: its place in a grid that is not as it was planned.
        """
        Grid.leave()
        self.setup = replace(self.setup, index=self.setup.index if index is None else index)
        setup, swarm = self.setup.rank, self.setup.rank.swarm
        device = torch.device(swarm.device)
        if device.type == "cuda":
            # Ray's masking is off (it makes NCCL slow or hang), so the GPU is chosen here
            device = torch.device(
                "cuda", ordinal(str(ray.get_gpu_ids()[0]), os.environ.get("CUDA_VISIBLE_DEVICES", ""))
            )
            torch.cuda.set_device(device)
        prefer_determinism(device)
        grid = Grid(self.setup.index, dp or swarm.dp, swarm.pp, device, Ledger(), swarm.timeout_s, init)
        self.rank = build_rank(setup, grid)

    @_told
    def begin_step(
        self, tick: int, frame: np.ndarray, known: twin.OldLogprobs | None = None
    ) -> tuple[Report, twin.OldLogprobs]:
        """Take this rank's share of the mini-batches of the step whose first tick is `tick`.

        Old log-probs are recomputed where asked for, and where the tick's own are not the same; `known`: what this
        returned beside its report to a rank that was lost since.
        """
        rank, device = self.rank, self.rank.grid.device
        self.minis, self.compared = [], defaultdict(float)
        start, refreshed = time.perf_counter(), rank.bases.due(tick)
        own = rank.setup.grpo.old_logprobs != "rollout"  # else they are among the samples
        with self._in_company():
            if known is None:
                self.marked, self.done = tick, tick - 1
                if not rank.grid.alone:
                    rank.mark()
            for index, (batch, denominator) in enumerate(mini_batches(frame)):
                size, own_order = rank.setup.swarm.micro_batch_size, np.arange(len(batch))
                micros = microbatches(batch, own_order, size, device, tick + index, rank.setup.shares_prompts)
                old = (
                    twin.tensors_of(known[index], device)
                    if known and own
                    else self._old_logprobs(index, micros, refreshed)
                )
                self.minis.append(MiniBatch(micros, old, denominator, rank.refusal()))
        peaks = {"timing_s/old_log_prob": time.perf_counter() - start, "perf/max_memory_gb": peak_memory_gb(device)}
        sums = {} if self.minis[0].old_logprobs is None else self._take_compared()
        rows = rows_per_token([micro for mini in self.minis for micro in mini.micros])
        old = [twin.arrays_of(mini.old_logprobs) if own else None for mini in self.minis]
        return Report(sums, rows, peaks, rank.grid.ledger.drain()), old

    def _old_logprobs(self, index: int, micros: list[MicroBatch], refreshed: bool) -> list[Tensor] | None:
        """One a microbatch, on the last stage; None: those of the tick itself. Recomputed ones are compared."""
        rank, grpo = self.rank, self.rank.setup.grpo
        if grpo.old_logprobs == "rollout":
            return [micro.rollout_logprobs for micro in micros]
        if not grpo.recomputes(index, refreshed):
            return None
        with explained(rank, micros):
            old = rank.pipeline.logprobs(micros, rank.setup.temperature)
        for trainer, micro in zip(old, micros):  # none but on the last stage
            for name, value in mismatch.sums(micro.rollout_logprobs, trainer).items():
                self.compared[name] += value.item()
        return old

    def _take_compared(self) -> dict[str, float]:
        """Sums of `mismatch` that nobody has been told yet."""
        found, self.compared = dict(self.compared), defaultdict(float)
        return found

    @_told
    def tick(self, plan: TickPlan) -> TickReport:
        """A step is compared once: what was before its first tick is told with what that tick compares."""
        mini = self.minis[plan.mini_batch]
        self.marked = plan.tick
        with self._in_company(), explained(self.rank, mini.micros):
            report = tick(self.rank, plan, mini, partial(self._due_correction, f"anchor {plan.anchor}"))
        compared = self._take_compared()
        for name, value in compared.items() if report.skipped is None else ():
            report.sums[name] = report.sums.get(name, 0.0) + value
        self.done, self.report = plan.tick, report
        return report

    # --- when others are lost -----------------------------------------------------------------

    @contextmanager
    def _in_company(self) -> Generator[None]:
        """A rank that fails leaves its process groups: whoever waits for it learns so at once, and not at a deadline."""
        try:
            yield
        except BaseException as error:
            seen: BaseException | None = error
            while seen:  # frames that are over hold groups too
                traceback.clear_frames(seen.__traceback__)
                seen = seen.__cause__
            self.rank.grid.part()
            raise

    def standing(self) -> Standing:
        """Where this rank is; it answers when whatever it was asked before is over, well or not."""
        if self.rank.taken is not None:
            self.done, self.report, self.rank.taken = self.marked, self.rank.taken, None
        before, after = self.rank.has_own(self.marked), self.rank.has_own(self.done + 1)
        return Standing(self.marked, self.done, before, after, self.report)

    def meet(self, index: int, dp: int, init: str, back: bool) -> None:
        """Take place `index` of a new grid, of `dp` replicas; `back`: take the tick that broke off back."""
        self.rank.grid.part()
        self.setup = replace(self.setup, index=index)
        if back:
            self.rank.rollback()
            self.marked = self.done
        self.rank.meet(index, dp, init)

    def copied(self, leaves: bool = False) -> np.ndarray:
        """All that the next tick depends on, as a frame, for another replica of this stage, or for whom it `leaves` its place."""
        return twin.pack_state(self.rank, self.outbox.senders if leaves else None)

    def become(self, frame: np.ndarray, done: int) -> int:
        """Go on after `done` ticks from another's `copied`; its bytes. Raises FrameError."""
        self.outbox.senders |= twin.take_state(self.rank, frame, self.setup.snapshot)
        self.marked = self.done = done
        return frame.nbytes

    def deliver(self, version: int, references: list[object], whole: bool) -> None:
        """Fetch a correction, or the head of it, into the inbox, beside whatever tick is running; its rank merges it when
        all hold it."""
        self.rank.held.receive(version, lambda: self._fetch_correction(references, whole), waits=False)

    def _due_correction(self, anchor: str, reference: object) -> Correction:
        """`tick` waits for it."""
        with self.rank.grid.awaits([anchor], "a correction"):
            return self._fetch_correction(reference)

    def _fetch_correction(self, references: object, whole: bool = False) -> Correction:
        """Of a head, unless the `whole` is asked for, the rest is left to who wants it."""
        first, *rest = cast("list[object]", references)  # in a list Ray leaves them references: waited for here
        place = self.rank.grid.p, self.rank.stage.weights.numel
        if not rest:
            return unpack_correction(self._frame(first), *place)
        looked = self.rank.held.looked
        assert looked is not None  # heads are published for a merger that looks
        head = unpack_head(self._frame(first), *place, looked)

        def fetch() -> Correction:
            return joined(head, unpack_correction(self._frame(rest[0]), *place))

        return fetch() if whole else replace(head, fetch=fetch)

    def _frame(self, reference: object) -> np.ndarray:
        what = f"a correction that is due to {self.rank.grid.name}"
        (frame,) = gather([("the anchor", reference)], what, self.rank.setup.anchor.timeout_s, "anchor.timeout_s")
        return frame

    @property
    def _own(self) -> Tensor:
        """This stage's weights; a tied copy is left to its owner."""
        return self.rank.stage.weights.master[: self.rank.stage.weights.owned].detach()

    @_told
    def weights(self, tick: int, stream: str, whole: bool, exact: bool) -> tuple[np.ndarray, tuple[int, bool]]:
        """Frame of this stage's weights after `tick` ticks, and what it is, as of `Outbox.frame`; raises BaseLost as that."""
        return self.outbox.frame(self._own, tick, self.rank.grid.p, stream, self.done, whole, exact)

    @_told
    def keep(self, tick: int) -> None:
        self.outbox.keep(self._own, tick)

    def kept(self, tick: int, stream: str, whole: bool) -> tuple[np.ndarray, tuple[int, bool]]:
        """`weights` as they were when they were kept, made beside the tick that changes them."""
        weights = self.outbox.take(tick, self.setup.rank.swarm.timeout_s)
        return self.outbox.frame(weights, tick, self.rank.grid.p, stream, tick, whole)

    def doing(self) -> Doing:
        """Asked in a thread of its own, beside whatever is going on: it reads, and takes no lock."""
        task, rank = self.task, getattr(self, "rank", None)
        if task is None:
            return Doing("nothing", 0.0)
        phase, wait = (rank.phase, rank.grid.wait) if rank else (None, None)
        what, since = (f"{task[0]}, {phase[0]}", phase[1]) if phase else task
        doing, since = (wait[0], wait[1]) if wait else (None, since)
        return Doing(what, time.monotonic() - since, doing)

    def release_cache(self) -> None:
        """Leave what torch only keeps for later to an engine on the same GPU."""
        torch.cuda.empty_cache()

    @_told
    def record(self, tick: int) -> np.ndarray:
        """This stage's weights after `tick` ticks, fp32, with what that tick kept if it is diagnosed."""
        kept, self.rank.kept = self.rank.kept, {}
        after = self._own.cpu().numpy()
        return pack_record(kept | {"after": after}, tick, self.rank.grid.p)

    @_told
    def digest(self) -> int:
        return weights_digest(self.rank.stage.weights.master)

    @_told
    def save(self, folder: str, step: int) -> dict[str, Entry]:
        return checkpoint.save_rank(self.rank, folder, step)

    @_told
    def restore(self, folder: str) -> None:
        checkpoint.restore_rank(self.rank, folder)
