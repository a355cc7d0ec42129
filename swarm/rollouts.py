"""The engines' part in a run: they are given weights and asked for samples, and started anew when one fails."""

from __future__ import annotations

import time

import numpy as np

from anchor_service.calls import gather
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
from swarm.messages import ENGINES_STREAM
from swarm.progress import Progress
from swarm.run_config import RunConfig

SAMPLED_S = "timing_s/gen"


class Rollouts:
    """Samples of one run. `line`: the anchor workers, which may share the engines' stream of weights."""

    def __init__(self, config: RunConfig, fleet: Fleet, progress: Progress, line: FireLine):
        self.config, self.fleet, self.progress = config, fleet, progress
        self.line = line if config.anchor.weights == "shared" else NoFires()
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

    def train(self) -> tuple[Batch, dict[str, float]]:
        """Samples of the present step, and metrics of it."""
        size, step = self.config.grpo.train_batch_size, self.progress.step
        indices = range((step - 1) * size, step * size)
        grpo = self.config.grpo
        batch, timing = self._samples("train", step, indices, grpo.group_size, self.config.rollout.temperature)
        self._judge_ends(batch)
        return batch, timing

    def _judge_ends(self, batch: Batch) -> None:
        """Said once, until an answer ends again: a model whose end is not known never stops, and has no reward."""
        endless = bool(batch.truncated.all())
        if endless and not self._endless:
            limit = self.config.grpo.max_response_length
            fix = "raise it, or name in the model's generation_config.json the token that ends its answers"
            self.progress.event("every answer was cut at grpo.max_response_length", limit=limit, fix=fix)
        self._endless = endless

    def validation(self) -> tuple[Batch, dict[str, float]]:
        """The same prompts and random numbers each time, so that runs are paired."""
        return self._samples("val", 0, range(self._validated), 1, self.config.rollout.validation_temperature)

    def _samples(
        self, split: str, step: int, indices: range, n: int, temperature: float
    ) -> tuple[Batch, dict[str, float]]:
        """Batches of one number of samples, whatever the number of engines: so results do not depend on it."""
        start = time.perf_counter()
        size = self.config.rollout.batch_size * self.config.grpo.group_size // n
        asks = [
            Prompts(split, step, tuple(indices[i : i + size]), n, temperature) for i in range(0, len(indices), size)
        ]
        what = f"{split} samples of step {step}"
        try:
            results = self._ask(asks, what)
        except (EngineFailed, ActorLost) as failure:
            self._renew(failure)
            self.sync()
            results = self._ask(asks, what)
        batch = concat([Batch.from_frame(frame, "an engine")[1] for frame, *_ in results])
        self.progress.control(sum(frame.nbytes for frame, *_ in results))
        self.progress.remember("engine", max(peak for _, peak, _ in results))
        undecided = sum(sums.pop(UNDECIDED, 0) for *_, sums in results)
        if undecided:
            self.progress.event("answers undecided", split=split, count=undecided)
        compared = mismatch.dense_metrics([sums for *_, sums in results])
        return batch, {SAMPLED_S: time.perf_counter() - start} | compared

    def _ask(self, asks: list[Prompts], what: str) -> list[tuple[np.ndarray, float, dict[str, float]]]:
        engines, calls = self.fleet.engines, []
        for i, ask in enumerate(asks):
            k = i % len(engines)
            calls.append((f"engine {k}", engines[k].generate.remote(ask)))
        return gather(calls, what, *self.fleet.engine_limit)

    # --- weights --------------------------------------------------------------------------------

    def sync(self) -> str:
        """Give the engines, and an anchor that shares their stream, the newest weights. Returns their digest."""
        weights = self._weights()
        try:
            return self._load(*weights)
        except BaseLost as lost:
            self.progress.event("weights resynchronised", reason=str(lost))
            self.resync()
        except (EngineFailed, ActorLost) as failure:
            self._renew(failure)
        return self._load(*self._weights())

    def resync(self) -> None:
        """The next weights are whole ones: somebody has lost the base of a delta."""
        self._resync = True

    def _weights(self) -> tuple[list[object], int]:
        whole, self._resync = self._resync, False
        tick, config = self.progress.tick, self.config
        return self.fleet.weights(
            tick, ENGINES_STREAM, whole, exact=config.exact_after(tick // config.grpo.ticks_per_step)
        )

    def _load(self, references: list[object], nbytes: int) -> str:
        tick, fleet, engines, ledger = self.progress.tick, self.fleet, self.fleet.engines, self.progress.ledger
        calls = [(f"engine {i}", engine.load_weights.remote(tick, *references)) for i, engine in enumerate(engines)]
        self.line.follow(tick, references)
        digests = gather(calls, f"loading the weights of tick {tick}", *fleet.engine_limit)
        nodes = fleet.nodes(engines)
        if apart := fleet.nodes(self.line.workers) - nodes:  # the engines' copies are elsewhere
            ledger.add("snapshot", nbytes * len(apart), 0)
        if len(set(digests)) > 1:
            raise EngineFailed(f"the weights of tick {tick}", f"engines hold {digests}", "start the run anew")
        dense = self._parameters * self.config.model.itemsize  # what a dense system sends
        ledger.add("rollout_sync", nbytes * len(nodes), dense * len(nodes))
        return digests[0]

    def _renew(self, failure: Exception) -> None:
        """All of them: they follow one stream, and the new ones begin it with a whole snapshot."""
        self.progress.event("engines started anew", reason=described(failure))
        self.fleet.engines[:] = self.fleet.new_engines()
        self.resync()


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
