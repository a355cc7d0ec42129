"""The engines' part in a run: they are given weights and asked for samples, and started anew when one fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from anchor_service.calls import done_of, gather
from anchor_service.errors import ActorLost, described
from anchor_service.line import FireLine, NoFires
from rl import mismatch
from rl.batch import Batch, Prompts, concat
from rl.engine import EngineFailed
from rl.model_files import parameter_count
from rl.problems import Problems
from rl.rollout import UNDECIDED
from rl.snapshot import BaseLost
from swarm.fleet import Fleet
from swarm.lookahead import Asked, Calls, Lookahead, Result, Sent
from swarm.messages import ENGINES_STREAM
from swarm.progress import Progress
from swarm.run_config import RunConfig

T = TypeVar("T")

SAMPLED_S = "timing_s/gen"
STALENESS, WEIGHTS = "training/staleness", "rollout/weights_digest"


class Rollouts:
    """Samples of one run. `line`: the anchor workers, which may share the engines' stream of weights."""

    def __init__(self, config: RunConfig, fleet: Fleet, progress: Progress, line: FireLine):
        self.config, self.fleet, self.progress = config, fleet, progress
        self.line = line if config.anchor.weights == "shared" else NoFires()
        self.ahead = Lookahead(config.rollout, config.run.steps)
        self._lacking = 0  # steps ahead that the checkpoint lacks with which this run goes on
        self._unsettled: list[Sent] = []  # weights of which engines have not said yet what they hold; oldest first
        self._parameters = parameter_count(config.model.path)
        self._resync = False
        self._endless = False  # no answer of the last step came to an end
        self._validated = config.val.size

    def begin(self) -> Problems:
        """Before the first samples: what problems the engines have, said where they are fewer than were asked for.

        Raises EngineFailed if one has others than the first.
        """
        try:
            found = self._problems()
        except ActorLost as failure:
            self._renew(failure)
            found = self._problems()
        self._say_what_is_missing(found)
        if self._lacking:
            reason = f"the saved run was to end before: {self._lacking} steps ahead are sampled of newer weights"
            self.progress.event("samples ahead not saved", reason=reason, steps=self._lacking)
        return found

    def _problems(self) -> Problems:
        calls = [(f"engine {i}", engine.problems.remote()) for i, engine in enumerate(self.fleet.engines)]
        first, *others = gather(calls, "its problems", *self.fleet.engine_limit)
        for i, other in enumerate(others, 1):
            if other != first:
                reason = f"engine {i} has {_names(other)}, engine 0 {_names(first)}"
                raise EngineFailed("the problems of the task", reason, "put the same files on the nodes of all engines")
        return first

    def _say_what_is_missing(self, problems: Problems) -> None:
        for source in problems.sources:
            if source.left_out:
                reason = f"{source.left_out} of {source.rows} of {source.name}, longer than grpo.max_prompt_length"
                self.progress.event("rows left out", reason=reason, left_out=source.left_out, rows=source.rows)
        there, asked = problems.validation, self.config.val.size
        if there is not None and there < asked:
            reason = f"{there} where val.size is {asked}: each is asked once"
            self.progress.event("fewer validation problems", reason=reason, problems=there, asked=asked)
            self._validated = there

    def train(self) -> tuple[Batch, dict[str, Any]]:
        """Samples of the present step, and metrics of it. Those of steps ahead are asked for, and not waited for."""
        start = time.perf_counter()
        due = self._mended(self._due)
        del self.ahead.asked[0]
        batch, found = self._taken("train", due.results or [])
        found |= {STALENESS: due.staleness, WEIGHTS: due.weights.digest}
        self._judge_ends(batch)
        return batch, found | {SAMPLED_S: time.perf_counter() - start}

    def _due(self) -> Asked:
        for step in self.ahead.missing(self.progress.step):
            self.ahead.asked.append(self._ask_for(step))
        return self._delivered(self.ahead.asked[0])

    def _ask_for(self, step: int) -> Asked:
        """Of the weights that were sent last."""
        grpo = self.config.grpo
        indices = range((step - 1) * grpo.train_batch_size, step * grpo.train_batch_size)
        calls = self._ask("train", step, indices, grpo.group_size, self.config.rollout.temperature)
        return Asked(step, self._newest, calls)

    def _delivered(self, asked: Asked) -> Asked:
        """Waits for it, and for the digests of the weights that sampled it."""
        if asked.results is None:
            self._agree(asked.weights)
            what = f"train samples of step {asked.step}"
            asked.results = self._gather(asked.calls, what, "generate train", asked.since)
        return asked

    def _judge_ends(self, batch: Batch) -> None:
        """Said once, until an answer ends again: a model whose end is not known never stops, and has no reward."""
        endless = bool(batch.truncated.all())
        if endless and not self._endless:
            limit = self.config.grpo.max_response_length
            fix = "raise it, or name in the model's generation_config.json the token that ends its answers"
            self.progress.event("every answer was cut at grpo.max_response_length", limit=limit, fix=fix)
        self._endless = endless

    def validation(self) -> tuple[Batch, dict[str, float]]:
        """The same prompts and random numbers each time, so that runs are paired. On the weights that were sent last."""
        start = time.perf_counter()
        batch, found = self._taken("val", self._mended(self._validation))
        return batch, found | {SAMPLED_S: time.perf_counter() - start}

    def _validation(self) -> list[Result]:
        since = time.monotonic()
        calls = self._ask("val", 0, range(self._validated), 1, self.config.rollout.validation_temperature)
        self._deliver_all()  # they stand before it in the queues
        self._agree(self._newest)
        return self._gather(calls, "val samples of step 0", "generate val", since)

    def _gather(self, calls: Calls, what: str, kind: str, since: float) -> list[Any]:
        return self.fleet.gather(calls, what, self.fleet.engine_limit, kind, since)

    def _deliver_all(self) -> None:
        for asked in self.ahead.asked:
            self._delivered(asked)

    def _ask(self, split: str, step: int, indices: range, n: int, temperature: float) -> Calls:
        """Batches of one number of samples, whatever the number of engines: so results do not depend on it."""
        size = self.config.rollout.batch_size * self.config.grpo.group_size // n
        engines, calls = self.fleet.engines, Calls()
        for i in range(0, len(indices), size):
            k = i // size % len(engines)
            chosen = tuple(indices[i : i + size])
            ask = Prompts(split, step, chosen, n, temperature, scores_only=split == "val")
            calls.append((f"engine {k}", engines[k].generate.remote(ask)))
        return calls

    def _taken(self, split: str, results: list[Result]) -> tuple[Batch, dict[str, Any]]:
        """Samples as one batch, and what was measured of them; counted here, when they are used."""
        batch = concat([Batch.from_frame(frame, "an engine")[1] for frame, *_ in results])
        self.progress.control(sum(frame.nbytes for frame, *_ in results), batch.nbytes)
        self.progress.remember("engine", max(peak for _, peak, _ in results))
        undecided = sum(sums.pop(UNDECIDED, 0) for *_, sums in results)
        if undecided:
            self.progress.event("answers undecided", split=split, count=undecided)
        return batch, mismatch.dense_metrics([sums for *_, sums in results])

    # --- weights --------------------------------------------------------------------------------

    def sync(self) -> dict[str, str]:
        """Give the engines, and an anchor that shares their stream, the newest weights.

        Waits until they hold them, and returns their digest as a metric, unless engines sample ahead.
        """
        at_once = self.config.rollout.max_staleness == 0
        weights = self._weights()
        try:
            self._send(*weights)
            self._settle(wait=at_once)
        except (BaseLost, EngineFailed, ActorLost) as failure:
            self._mend(failure)
        return {WEIGHTS: self._newest.digest} if at_once else {}

    def resync(self) -> None:
        """The next weights are whole ones: somebody has lost the base of a delta."""
        self._resync = True

    def _weights(self) -> tuple[list[object], int]:
        whole, self._resync = self._resync, False
        tick, config = self.progress.tick, self.config
        exact = config.exact_after(tick // config.grpo.ticks_per_step)
        self._kind = "load whole" if whole else "load exact" if exact else "load coded"
        return self.fleet.weights(tick, ENGINES_STREAM, whole, exact)

    def _send(self, references: list[object], nbytes: int) -> None:
        """Weights of this moment, into the queue of every engine; waits for nothing."""
        tick, fleet, engines, ledger = self.progress.tick, self.fleet, self.fleet.engines, self.progress.ledger
        nodes = fleet.nodes(engines)
        calls: Calls = [(f"engine {i}", e.load_weights.remote(tick, *references)) for i, e in enumerate(engines)]
        self.line.follow(tick, references)
        if apart := fleet.nodes(self.line.workers) - nodes:  # the engines' copies are elsewhere
            ledger.add("snapshot", nbytes * len(apart), 0)
        dense = self._parameters * self.config.model.itemsize  # what a dense system sends
        ledger.add("rollout_sync", nbytes * len(nodes), dense * len(nodes))
        self._newest = Sent(tick // self.config.grpo.ticks_per_step, tick, calls, kind=self._kind)
        self._unsettled.append(self._newest)

    def _agree(self, sent: Sent) -> None:
        """Waits until every engine holds these weights. Raises EngineFailed if one holds others."""
        if sent.digest:
            return
        digests = self._gather(sent.calls, f"loading the weights of tick {sent.tick}", sent.kind, sent.since)
        if len(set(digests)) > 1:
            raise EngineFailed(f"the weights of tick {sent.tick}", f"engines hold {digests}", "start the run anew")
        sent.digest = digests[0]

    def _settle(self, wait: bool) -> None:
        """`_agree` on all weights that were sent, or on those that have arrived: a failure is found early."""
        while self._unsettled and (wait or _over(self._unsettled[0].calls)):
            self._agree(self._unsettled[0])
            del self._unsettled[0]

    # --- failures -------------------------------------------------------------------------------

    def _mended(self, work: Callable[[], T]) -> T:
        """What `work` returns; if engines fail in it once more, with engines that are whole."""
        try:
            return work()
        except (BaseLost, EngineFailed, ActorLost) as failure:
            self._mend(failure)
        return work()

    def _mend(self, failure: Exception) -> None:
        """All engines get whole weights, of this moment, and what is in flight is asked of them again."""
        if isinstance(failure, BaseLost) and not self.ahead.in_flight:
            self.progress.event("weights resynchronised", reason=str(failure))
            self.resync()
        else:
            self._renew(failure)
        self._unsettled.clear()
        self._send(*self._weights())
        self._settle(wait=True)
        self.ahead.asked = [a if a.results is not None else self._ask_for(a.step) for a in self.ahead.asked]

    def _renew(self, failure: Exception) -> None:
        """All of them: they follow one stream, and the new ones begin it with a whole snapshot."""
        again = self.ahead.in_flight if self.config.rollout.max_staleness else []
        self.progress.event(
            "engines started anew", reason=described(failure), **({"asked_again": again} if again else {})
        )
        self.fleet.engines[:] = self.fleet.new_engines()
        self.resync()

    # --- checkpoints ----------------------------------------------------------------------------

    def save(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What a checkpoint keeps: samples of the steps ahead, which it waits for. Plain numbers, and frames."""
        self._mended(self._deliver_all)
        return self.ahead.save()

    def restore(self, folder: Path, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; the engines get whole weights in the next `sync`. Raises CheckpointError."""
        self._lacking = self.ahead.restore(folder, state)


def _over(calls: Calls) -> bool:
    """Whether nothing of it is still to come; waits for nothing."""
    return not done_of([reference for _, reference in calls])[1]


def _names(problems: Problems) -> str:
    return ", ".join(f"{s.rows} rows of {s.name} (digest {s.digest})" for s in problems.sources) or "none of a file"


def sample_metrics(batch: Batch) -> dict[str, float]:
    """verl's names for rewards and lengths of one step's samples."""
    lengths = batch.response_lengths
    return {
        "critic/rewards/mean": float(batch.rewards.mean()),
        "response_length/mean": float(lengths.mean()),
        "response_length/max": int(lengths.max()),
        "response_length/clip_ratio": float(batch.truncated.mean()),
        "prompt_length/mean": float(batch.prompt.mean()),
        "training/zero_advantage_ratio": float((batch.advantages == 0).mean()),
    }
