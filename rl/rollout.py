"""Rollouts: an engine samples answers from the uncompressed weights, a task scores them, batches come back.

Same answers for any number of replicas, at one `rollout.batch_size`: every sample has its own random numbers, a function of
(seed, split, step, prompt, sample) and its turn alone. How many rows are multiplied together shows in the last bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b

import numpy as np
import torch

from codec.frames import digest
from rl import mismatch
from rl.batch import Batch, Prompts
from rl.config import GrpoConfig, ModelConfig, RolloutConfig, SnapshotConfig
from rl.device import peak_memory_gb
from rl.engine import Engine, Key, PlainModel
from rl.environment import OwnEnvironment
from rl.examples import Example
from rl.grpo import group_advantages
from rl.model_files import resolve
from rl.problems import Problems
from rl.prompts import PromptEncoder
from rl.reward import Judged, Reward, make_reward, parts_of
from rl.shaping import shaped
from rl.snapshot import Receiver
from rl.table import Table
from rl.task_config import TaskConfig
from rl.task_sets import TaskSets
from rl.transformers_engine import TransformersEngine
from rl.turns import Conversations, Environment, Talks, conversation_id
from rl.val_config import ValConfig
from rl.vllm_engine import VllmEngine

SPLITS = {"train": 0, "val": 1}
UNDECIDED = "task/undecided"  # answers that the library for formulas was not done with in time: they score 0
_SHOWN = 500  # characters of what is quoted
FAILED = "failed"  # in a frame's header: on how many answers the reward failed; of the first why, prompt and response

ENGINES: dict[str, Callable[[PlainModel, RolloutConfig, int], Engine]] = {
    "transformers": TransformersEngine,
    "vllm": VllmEngine,
}


class RolloutWorker:
    """An engine with its task and tokenizer. The coordinator runs several as actors."""

    def __init__(
        self,
        model: ModelConfig,
        task: TaskConfig,
        grpo: GrpoConfig,
        rollout: RolloutConfig,
        snapshot: SnapshotConfig,
        seed: int,
        val: ValConfig,
        threads: int,
    ):
        torch.set_num_threads(threads)
        folder = resolve(model.path)
        self.encoder = PromptEncoder(folder, task, grpo.max_prompt_length)
        self.tokenizer = self.encoder.tokenizer
        judge = self.encoder.judge if task.overlong == "drop" else None  # else no row is too long: it was checked
        self.tasks = TaskSets(task, val, seed, judge)
        self.rewards = make_rewards(task, self.tasks)
        self.grpo, self.seed = grpo, seed
        self.receiver = Receiver(snapshot)
        self.rollout, plain = rollout, PlainModel(folder, model, rollout)
        plain.stops = self.encoder.stops
        self.engine: Engine = ENGINES[rollout.engine](plain, rollout, grpo.max_prompt_length + grpo.max_response_length)
        own = None if task.environment is None else OwnEnvironment(task.environment, task.environment_timeout_s)
        self.conversations: dict[str, Conversations] = {}
        for split in (*SPLITS, *self.tasks.asked):
            environment = own or self.tasks.of(split)
            environment = environment if isinstance(environment, Environment) else None
            self.conversations[split] = Conversations(self.engine, self.encoder, environment, task.max_turns)
        self.reference = PlainModel(folder, model, rollout) if grpo.needs_reference else None

    def load_weights(self, tick: int, *parts: np.ndarray) -> str:
        """One weights frame a stage, all of `tick`. Returns the digest of all weights, fp32, as they are now in use.

        Raises FrameError on a mix-up, BaseLost if a delta does not fit, EngineFailed if the engine does not take them.
        """
        self.receiver.load(list(parts), tick, self.engine.plain.weights.master)
        return self._in_use()

    def catch_up(self, tick: int, stages: int, *frames: np.ndarray) -> str:
        """Whole frames after `tick` ticks, one a stage, and deltas before it, newest first, that are taken back."""
        self.receiver.catch_up(list(frames), tick, stages, self.engine.plain.weights.master)
        return self._in_use()

    def _in_use(self) -> str:
        self.engine.publish()
        return digest(self.engine.plain.weights.master.cpu().numpy())

    def problems(self) -> Problems:
        """What this engine has read, on its node."""
        return self.tasks.problems()

    def sleep(self) -> None:
        """Leave the GPU to the trainer until the next weights."""
        self.engine.sleep()

    def generate(self, ask: Prompts) -> tuple[np.ndarray, float, dict[str, float]]:
        """Samples, scored, as a batch frame, the peak memory in GB, and how far the engine is from a plain forward.

        Groups are whole, so advantages are final. The last also holds `UNDECIDED`, where there are any.
        """
        examples = [self.tasks.example(ask.split, i) for i in ask.indices]
        prompts = self.encoder.encode([example.prompt for example in examples])
        limit = self.grpo.max_response_length
        keys = [(self.seed, split_key(ask.split), ask.step, i, s) for i in ask.indices for s in range(ask.n)]
        samples = self.conversations[ask.split].hold(prompts, examples, keys, limit, ask.temperature)
        compared = self._compare(ask, prompts, samples)
        prompts = [p for p in prompts for _ in range(ask.n)]
        examples = self._told([e for e in examples for _ in range(ask.n)], keys, samples)
        ref = self._reference_logprobs(ask, prompts, samples)
        judged = self.rewards[ask.split]([*zip(examples, samples.texts, samples.truncated)])
        rewards, taken = [each.reward for each in judged], {}
        if ask.split == "train":
            lengths = np.array([len(t) for t in samples.tokens])
            rewards, taken = shaped(rewards, lengths, self.grpo, samples.logprobs, ref)
        batch = Batch(
            tokens=np.concatenate([np.concatenate([p, t]) for p, t in zip(prompts, samples.tokens)]).astype(np.int32),
            prompt=np.array([len(p) for p in prompts], np.int32),
            total=np.array([len(p) + len(t) for p, t in zip(prompts, samples.tokens)], np.int32),
            rollout_logprobs=np.concatenate(samples.logprobs),
            ref_logprobs=np.concatenate(ref) if ref and self.grpo.kl_loss_coef else np.zeros(0, np.float32),
            rewards=np.array(rewards, np.float32),
            advantages=self._advantages(rewards, ask.n),
            truncated=np.array(samples.truncated, bool),
            own=samples.marks,
        )
        said = {FAILED: failed} if (failed := _failed(judged, examples, samples.texts)) else {}
        frame = batch.only(*ask.wanted).to_frame(parts_of(judged), split=ask.split, step=ask.step, **said)
        return frame, peak_memory_gb(self.engine.device), compared | taken | self._undecided(ask.split)

    def _reference_logprobs(self, ask: Prompts, prompts: list[list[int]], samples: Talks) -> list[np.ndarray]:
        """Of the base policy, where a loss will read them; of greedy answers at temperature 1."""
        if self.reference is None or "ref_logprobs" not in ask.wanted:
            return []
        return samples.of_own(self.reference.score(prompts, samples.tokens, ask.temperature or 1.0))

    def _told(self, examples: list[Example], keys: list[Key], samples: Talks) -> list[Example]:
        """With what was said in several turns, for a reward."""
        if self.conversations["train"].most == 1:
            return examples
        said = [
            {"conversation": messages, "conversation_id": conversation_id(key)}
            for messages, key in zip(samples.messages, keys, strict=True)
        ]
        return [replace(e, metadata=e.metadata | told) for e, told in zip(examples, said, strict=True)]

    def _undecided(self, split: str) -> dict[str, float]:
        task = self.tasks.of(split)
        count = task.formulas.take_undecided() if isinstance(task, Table) else 0
        return {UNDECIDED: count} if count else {}

    def _compare(self, ask: Prompts, prompts: list[list[int]], samples: Talks) -> dict[str, float]:
        """`mismatch.sums` of each prompt's first sample: the engine's log-probs against an uncompressed forward's.

        Both here, at the same weights, so nothing crosses a link for it; one sample a prompt keeps it cheap.
        """
        if ask.split != "train" or not self.rollout.compares(ask.step):
            return {}
        plain = samples.of_own(self.engine.plain.score(prompts, samples.tokens[:: ask.n], ask.temperature), ask.n)
        both = (torch.from_numpy(np.concatenate(logprobs)) for logprobs in (samples.logprobs[:: ask.n], plain))
        return {name: value.item() for name, value in mismatch.sums(*both).items()}

    def _advantages(self, rewards: list[float], n: int) -> np.ndarray:
        return (
            group_advantages(torch.tensor(rewards, dtype=torch.float64), n, self.grpo.norm_adv_by_std).numpy()
            if n > 1
            else np.zeros(len(rewards), np.float32)
        )


def split_key(split: str) -> int:
    """What the random numbers of a split's samples depend on; of a set of its own by its name, wherever it stands."""
    return SPLITS[split] if split in SPLITS else 2 + int.from_bytes(blake2b(split.encode(), digest_size=4).digest())


def make_rewards(config: TaskConfig, tasks: TaskSets) -> dict[str, Reward]:
    """Of every split: each task's own score, or the one function of the user's, in one process."""
    own = make_reward(config, tasks.task)
    of_sets = {split: own if config.reward else make_reward(config, tasks.of(split)) for split in tasks.asked}
    return dict.fromkeys(SPLITS, own) | of_sets


def _failed(judged: list[Judged], examples: list[Example], texts: list[str]) -> dict[str, str | int]:
    """Empty if there is a judgement of every answer."""
    which = [i for i, each in enumerate(judged) if each.failed]
    if not which:
        return {}
    first = which[0]
    shown = {"reason": judged[first].failed, "prompt": examples[first].text, "response": texts[first]}
    # half a surrogate pair, as the name of an undecodable file has, is no text that travels
    return {"count": len(which)} | {
        what: text[:_SHOWN].encode(errors="backslashreplace").decode() for what, text in shown.items()
    }
