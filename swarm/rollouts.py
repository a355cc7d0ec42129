"""The samples of a run: what the engines are asked for step by step, and what comes of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from rl import mismatch
from rl.aggregation import of_one_reward, out_of_loss
from rl.batch import Batch, Parts, Prompts, concat, concat_parts, of_validation
from rl.config import GrpoConfig
from rl.engine import EngineFailed
from rl.packing import OPTIONAL
from rl.problems import Problems
from rl.rollout import FAILED, UNDECIDED
from rl.shaping import KL_PENALTY, OVERLONG, SCORE
from rl.val_config import OWN
from swarm.engine_line import EngineLine
from swarm.lookahead import Asked, Lookahead, Result
from swarm.progress import Progress
from swarm.run_config import RunConfig
from swarm.sample_file import Reader
from swarm.validation import Answered

SAMPLED_S = "timing_s/gen"
UPDATE_S = "timing_s/update_weights"
FURTHER = 1 << 32  # prompts of a run are fewer
STALENESS, WEIGHTS = "training/staleness", "rollout/weights_digest"


class Rollouts:
    """Samples of one run."""

    def __init__(self, config: RunConfig, progress: Progress, engines: EngineLine):
        self.config, self.progress, self.engines = config, progress, engines
        self.ahead = Lookahead(config.rollout, config.run.steps)
        self._reader = Reader(config.model.path, config.task.skip_special_tokens)
        self._lacking = 0  # steps ahead that the checkpoint lacks with which this run goes on
        self._endless = False  # no answer of the last step came to an end
        self.sets = config.val.asked(config.rollout.validation_temperature)
        self._problems = Problems()  # what the engines have

    def begin(self) -> Problems:
        """Before the first samples: what problems the engines have, said where they are fewer than were asked for.

        Raises EngineFailed if one has others than the first.
        """
        found, *others = self.engines.problems()
        for i, other in enumerate(others, 1):
            if other != found:
                reason = f"engine {i} has {_names(other)}, engine 0 {_names(found)}"
                raise EngineFailed("the problems of the task", reason, "put the same files on the nodes of all engines")
        self._problems = found
        self._say_what_is_missing(found)
        if self._lacking:
            reason = f"the saved run was to end before: {self._lacking} steps ahead are sampled of newer weights"
            self.progress.event("samples ahead not saved", reason=reason, steps=self._lacking)
        return found

    def _say_what_is_missing(self, problems: Problems) -> None:
        for source in problems.read:
            if source.left_out:
                reason = f"{source.left_out} of {source.rows} of {source.name}, longer than grpo.max_prompt_length"
                self.progress.event("rows left out", reason=reason, left_out=source.left_out, rows=source.rows)
        for split, one in self.sets.items():
            there = self._of(split).validation
            if there is not None and one.size != "all" and there < one.size:
                reason = f"{there} where {one.key}.size is {one.size}: each is asked once"
                self.progress.event("fewer validation problems", reason=reason, problems=there, asked=one.size)

    def _of(self, split: str) -> Problems:
        """Of one set that is validated on."""
        return self._problems if split == OWN else self._problems.sets[split]

    def _count(self, split: str) -> int:
        there, size = self._of(split).validation, self.sets[split].size
        return min(x for x in (there, None if size == "all" else size) if x is not None)

    def train(self) -> tuple[Batch, dict[str, Any]]:
        """Samples of the present step, and metrics of it. Those of steps ahead are asked for, and not waited for."""
        start = time.perf_counter()
        for step in self.ahead.missing(self.progress.step):
            self.ahead.asked.append(self._ask_for(step))
        due = self.ahead.asked[0]
        results = self._delivered(due)
        del self.ahead.asked[0]
        batch, found = self._taken("train", results)
        batch, again = self._filtered(batch, due.step)
        found |= again | {STALENESS: due.staleness, WEIGHTS: due.weights.digest}
        self._judge_ends(batch)
        return batch, found | {SAMPLED_S: time.perf_counter() - start}

    def _filtered(self, batch: Batch, step: int) -> tuple[Batch, dict[str, float]]:
        """Groups of one reward replaced by others of further prompts, the first that differ, in the order of sampling."""
        grpo = self.config.grpo
        each, wanted, most = grpo.group_size, grpo.train_batch_size, grpo.filter_groups.max_num_gen_batches
        if most == 1:
            return batch, {}
        sampled, alike = 1, of_one_reward(batch, each)
        while sampled < most and (~alike).sum() < wanted:
            asked = self._ask_for(step, sampled)
            more, _ = self._taken("train", self._delivered(asked), shown=False)
            batch, sampled = concat([batch, more]), sampled + 1
            alike = of_one_reward(batch, each)
        groups = np.sort(np.argsort(alike, kind="stable")[:wanted])
        found = {"training/num_gen_batches": sampled, "training/one_reward_ratio": float(alike.mean())}
        return batch.pick((groups[:, None] * each + np.arange(each)).reshape(-1)), found

    def _ask_for(self, step: int, again: int = 0) -> Asked:
        """Of the weights that were sent last. What is sampled `again` is of prompts beyond those of all steps."""
        grpo = self.config.grpo
        first = again * FURTHER + (step - 1) * grpo.train_batch_size
        indices = range(first, first + grpo.train_batch_size)
        return self._ask("train", step, indices, grpo.group_size, self.config.rollout.temperature)

    def _delivered(self, asked: Asked) -> list[Result]:
        return self.engines.deliver(asked, f"train samples of step {asked.step}")

    def _judge_ends(self, batch: Batch) -> None:
        """Said once, until an answer ends again: a model whose end is not known never stops, and has no reward."""
        endless = bool(batch.truncated.all())
        if endless and not self._endless:
            limit = self.config.grpo.max_response_length
            fix = "raise it, or name in the model's generation_config.json the token that ends its answers"
            self.progress.event("every answer was cut at grpo.max_response_length", limit=limit, fix=fix)
        self._endless = endless

    def validation(self) -> tuple[dict[str, Answered], dict[str, float]]:
        """By split, on the weights that were sent last: the same prompts and random numbers each time, so that runs are
        paired."""
        start, answered, found = time.perf_counter(), dict[str, Answered](), dict[str, float]()
        asked = {
            split: self._ask(split, 0, range(self._count(split)), one.samples, one.temperature)
            for split, one in self.sets.items()
        }
        self._deliver_all()  # they stand before it in the queues
        for split, one in asked.items():
            batch, measured = self._taken(split, self.engines.deliver(one, f"{split} samples of step 0"))
            answered[split] = Answered(self.sets[split], batch, self._of(split).groups)
            found |= measured
        return answered, found | {SAMPLED_S: time.perf_counter() - start}

    def _keep(self, batch: Batch, parts: Parts, split: str) -> None:
        """The answers to the first prompts of a step, or all of a validation, to be read."""
        step, tick, grpo = self.progress.step, self.progress.tick, self.config.grpo
        at: dict[str, Any] = {"kind": split, "step": step, "tick": tick}
        if split == "train":
            first, each = (step - 1) * grpo.train_batch_size, grpo.group_size
            most = min(len(batch), self.config.samples.prompts * each)
        else:
            one = self.sets[split]
            first, each, most = 0, one.samples, len(batch)
            at |= {"kind": OWN} | ({"set": one.name} if one.name else {})
        self.progress.telemetry.samples(
            step, tick, lambda: self._reader.read(at, batch.take(0, most), parts, first, each)
        )

    def _deliver_all(self) -> None:
        for asked in self.ahead.asked:
            self._delivered(asked)

    def _ask(self, split: str, step: int, indices: range, n: int, temperature: float) -> Asked:
        """Batches of one number of samples, whatever the number of engines: so results do not depend on it."""
        size = max(1, self.config.rollout.batch_size * self.config.grpo.group_size // n)
        chosen = [tuple(indices[i : i + size]) for i in range(0, len(indices), size)]
        wanted = OPTIONAL if split == "train" else of_validation(self.config.samples.kept)
        return self.engines.ask(step, [Prompts(split, step, c, n, temperature, wanted) for c in chosen])

    def _taken(self, split: str, results: list[Result], shown: bool = True) -> tuple[Batch, dict[str, Any]]:
        """Samples as one batch, and what was measured of them; counted here, when they are used. `shown`: to be read."""
        told = [Batch.with_parts(frame, "an engine") for frame, *_ in results]
        batch, parts = concat([batch for _, batch, _ in told]), concat_parts([(len(b), p) for _, b, p in told])
        self.progress.control(
            sum(frame.nbytes for frame, *_ in results), batch.nbytes + sum(values.nbytes for values in parts.values())
        )
        self._say_what_failed(split, [header[FAILED] for header, *_ in told if FAILED in header])
        if shown:
            self._keep(batch, parts, split)
        self.progress.remember("engine", max(peak for _, peak, _ in results))
        undecided = sum(sums.pop(UNDECIDED, 0) for *_, sums in results)
        if undecided:
            self.progress.event("answers undecided", split=split, count=undecided)
        measured = [sums for *_, sums in results]
        taken = {name for name in (SCORE, OVERLONG, KL_PENALTY) if name in measured[0]}
        found = {name: sum(sums.pop(name) for sums in measured) / len(batch) for name in taken}
        return batch, mismatch.dense_metrics(measured) | found | part_means(split, parts)

    def _say_what_failed(self, split: str, failed: list[dict[str, Any]]) -> None:
        """Of the reward function."""
        if failed:
            first, count = failed[0], sum(each["count"] for each in failed)
            fields = {name: first[name] for name in ("reason", "prompt", "response")}
            self.progress.event("reward failed", reward=self.config.task.reward, split=split, count=count, **fields)

    def sync(self) -> dict[str, Any]:
        """Give the engines the newest weights, in seconds by verl's name for them. Waits until they hold them, and
        returns their digest as a metric, unless engines sample ahead."""
        start, at_once = time.perf_counter(), self.config.rollout.max_staleness == 0
        sent = self.engines.send(wait=at_once)
        took = {UPDATE_S: time.perf_counter() - start}
        return took | {WEIGHTS: sent.digest} if at_once else took

    # --- checkpoints ----------------------------------------------------------------------------

    def save(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What a checkpoint keeps: samples of the steps ahead, which it waits for. Plain numbers, and frames."""
        self._deliver_all()
        return self.ahead.save()

    def restore(self, folder: Path, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; the engines get whole weights in the next `sync`. Raises CheckpointError."""
        self._lacking = self.ahead.restore(folder, state)


def _names(problems: Problems) -> str:
    return ", ".join(f"{s.rows} rows of {s.name} (digest {s.digest})" for s in problems.sources) or "none of a file"


def part_means(split: str, parts: Parts) -> dict[str, float]:
    """Of each part of the rewards, over the samples that have it."""
    prefix = "critic" if split == "train" else split.replace(OWN, "val-aux", 1)
    return {f"{prefix}/rewards/{name}/mean": float(np.nanmean(values)) for name, values in parts.items()}


def sample_metrics(batch: Batch, grpo: GrpoConfig) -> dict[str, float]:
    """verl's names for rewards and lengths of one step's samples."""
    lengths, leaves_out = batch.own_lengths, grpo.overlong_filter or grpo.zero_variance == "drop"
    found = {"training/left_out_ratio": float(out_of_loss(batch, grpo).mean())} if leaves_out else {}
    return (
        found
        | _turn_metrics(batch)
        | {
            "critic/rewards/mean": float(batch.rewards.mean()),
            "response_length/mean": float(lengths.mean()),
            "response_length/max": int(lengths.max()),
            "response_length/clip_ratio": float(batch.truncated.mean()),
            "prompt_length/mean": float(batch.prompt.mean()),
            "training/zero_advantage_ratio": float((batch.advantages == 0).mean()),
        }
    )


def _turn_metrics(batch: Batch) -> dict[str, float]:
    """Where an environment has spoken: its tokens, and how often the policy did."""
    if not batch.own.size:
        return {}
    turns = batch.turns
    return {
        "response_length/env/mean": float((batch.response_lengths - batch.own_lengths).mean()),
        "num_turns/mean": float(turns.mean()),
        "num_turns/max": int(turns.max()),
        "num_turns/min": int(turns.min()),
    }
