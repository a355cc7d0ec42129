"""The engines' part in a run: they are given weights and asked for samples, and started anew when one fails."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from anchor_service.actor import AnchorLine
from anchor_service.calls import gather
from anchor_service.errors import ActorLost, described
from rl import mismatch
from rl.batch import Batch, Prompts, concat
from rl.engine import EngineFailed
from rl.model_files import parameter_count
from rl.snapshot import BaseLost
from swarm.fleet import Fleet
from swarm.progress import Progress


class Rollouts:
    """Samples of one run. `line`: the anchor workers, where they share the engines' stream of weights."""

    def __init__(self, config: Any, fleet: Fleet, progress: Progress, line: AnchorLine | None):
        self.config, self.fleet, self.progress = config, fleet, progress
        self.line = line if config.anchor.weights == "shared" else None
        self._parameters = parameter_count(config.model.path)
        self._resync = True  # the first frames of a run are whole ones
        self._endless = False  # no answer of the last step came to an end

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
        rollout = self.config.rollout
        temperature = rollout.val_temperature or rollout.temperature
        return self._samples("val", 0, range(self.config.val.size), 1, temperature)

    def _samples(self, split: str, step: int, indices: range, n: int, temperature: float) -> tuple[Batch, dict]:
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
        compared = mismatch.dense_metrics([sums for *_, sums in results])
        return batch, {"timing_s/gen": time.perf_counter() - start} | compared

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

    def _weights(self) -> tuple[list[Any], int]:
        whole, self._resync = self._resync, False
        return self.fleet.weights(self.progress.tick, "engines", whole)

    def _load(self, references: list[Any], nbytes: int) -> str:
        tick, engines, ledger = self.progress.tick, self.fleet.engines, self.progress.ledger
        calls = [(f"engine {i}", engine.load_weights.remote(tick, *references)) for i, engine in enumerate(engines)]
        if self.line:
            self.line.follow(tick, references)
            if self.config.anchor.resource != self.config.rollout.resource:  # the engines' copy is on other nodes
                ledger.add("snapshot", nbytes * len(self.fleet.anchors), 0)
        digests = gather(calls, f"loading the weights of tick {tick}", *self.fleet.engine_limit)
        if len(set(digests)) > 1:
            raise EngineFailed(f"the weights of tick {tick}", f"engines hold {digests}", "start the run anew")
        dense = self._parameters * (2 if self.config.model.dtype == "bfloat16" else 4)  # what a dense system sends
        ledger.add("rollout_sync", nbytes * len(engines), dense * len(engines))
        return digests[0]

    def _renew(self, failure: Exception) -> None:
        """All of them: they follow one stream, and the new ones begin it with a whole snapshot."""
        self.progress.event("engines started anew", reason=described(failure))
        self.fleet.engines[:] = self.fleet.new_engines()
        self.resync()


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
