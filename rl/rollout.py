"""Rollout engines: sample answers from the uncompressed weights, score them, return batches.

Same answers for any number of replicas and any split in batches: every sample has its own random
numbers, a function of (seed, step, prompt, sample) alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache

from rl.batch import Batch, Prompts
from rl.config import GrpoConfig, ModelConfig, RolloutConfig, SnapshotConfig, TaskConfig
from rl.grpo import group_advantages, token_logprobs
from rl.memory import peak_memory_gb
from rl.model_files import resolve
from rl.policy import Weights, whole_model
from rl.reward import make_reward
from rl.snapshot import Receiver
from rl.tasks import make_task

SPLITS = {"train": 0, "val": 1}


class PromptTooLong(ValueError):
    """A prompt has more tokens than `grpo.max_prompt_length`."""


@dataclass(frozen=True)
class Samples:
    """What an engine returns for one list of prompts, in order: prompt-major, then sample."""

    tokens: list[np.ndarray]  # int32, response tokens with the EOS if there was one
    logprobs: list[np.ndarray]  # float32, under the sampling distribution
    truncated: list[bool]  # no EOS within the limit


class Engine(Protocol):
    """Holds a full copy of the weights and samples from it."""

    weights: Weights

    def sample(self, prompts: list[list[int]], uniforms: np.ndarray, temperature: float) -> Samples: ...


class TransformersEngine:
    """Batched sampling with transformers and a KV cache: one prefill a prompt, finished rows leave the batch."""

    def __init__(self, folder: Path, model: ModelConfig, rollout: RolloutConfig):
        self.device = torch.device(rollout.device)
        self.model, self.weights = whole_model(folder, getattr(torch, model.dtype), self.device, model.attention)
        eos = self.model.generation_config.eos_token_id
        self.eos = torch.tensor(eos if isinstance(eos, list) else [eos], device=self.device)

    @torch.inference_mode()
    def sample(self, prompts: list[list[int]], uniforms: np.ndarray, temperature: float) -> Samples:
        """`uniforms` [P, n, max_new] in [0, 1): one number for each token that may be sampled."""
        _, n, max_new = uniforms.shape
        uniforms = torch.from_numpy(uniforms.reshape(-1, max_new)).to(self.device)
        cache, logits, mask = self._prefill(prompts, n)
        rows = torch.arange(len(uniforms), device=self.device)  # which samples are still running
        tokens = torch.zeros(len(uniforms), max_new, dtype=torch.int64, device=self.device)
        logprobs = torch.zeros(len(uniforms), max_new, device=self.device)
        lengths = torch.full((len(uniforms),), max_new, device=self.device)
        finished = torch.zeros(len(uniforms), dtype=torch.bool, device=self.device)
        position = torch.tensor([len(p) for p in prompts], device=self.device).repeat_interleave(n)
        for t in range(max_new):
            chosen, logp = _draw(logits, uniforms[rows, t], temperature)
            tokens[rows, t], logprobs[rows, t] = chosen, logp
            done = torch.isin(chosen, self.eos)
            lengths[rows[done]] = t + 1
            finished[rows[done]] = True
            if done.any():
                keep = (~done).nonzero().squeeze(1)
                rows, chosen, position = rows[keep], chosen[keep], position[keep]
                mask = None if mask is None else mask[keep]
                if len(rows) and t + 1 < max_new:
                    cache.batch_select_indices(keep)
            if len(rows) == 0 or t + 1 == max_new:
                break
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            logits = self._forward(chosen[:, None], position[:, None], mask, cache)
            position = position + 1
        return _ragged(tokens, logprobs, lengths, finished)

    def _prefill(self, prompts: list[list[int]], n: int) -> tuple[DynamicCache, Tensor, Tensor | None]:
        """Left-padded prompts once each, then the cache repeated for the n samples of each prompt."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=self.device)
        pad = torch.tensor([longest - len(p) for p in prompts], device=self.device)
        columns = torch.arange(longest, device=self.device)[None]
        mask = (columns >= pad[:, None]).long() if pad.any() else None
        cache = DynamicCache(config=self.model.config)
        logits = self._forward(ids, (columns - pad[:, None]).clamp_min(0), mask, cache)
        cache.batch_repeat_interleave(n)
        mask = None if mask is None else mask.repeat_interleave(n, dim=0)
        return cache, logits.repeat_interleave(n, dim=0), mask

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: DynamicCache) -> Tensor:
        out = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

    @torch.inference_mode()
    def score(self, prompts: list[list[int]], responses: list[np.ndarray], temperature: float) -> list[np.ndarray]:
        """Log-probs of given responses under the present weights."""
        found = []
        for prompt, response in zip(prompts, responses):
            ids = torch.tensor([[*prompt, *response.tolist()]], device=self.device)
            logits = self.model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature
            found.append(token_logprobs(logits, ids[0, len(prompt) :], with_entropy=False)[0].cpu().numpy())
        return found


def _draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling, one uniform number a row: independent of which rows are in the batch."""
    logp = torch.log_softmax(logits.float() / temperature, dim=-1)
    cdf = logp.double().exp().cumsum(-1)
    chosen = torch.searchsorted(cdf, (uniform.double() * cdf[:, -1])[:, None], right=True).squeeze(1)
    chosen = chosen.clamp_max(logits.shape[-1] - 1)
    return chosen, logp.gather(1, chosen[:, None]).squeeze(1)


def _ragged(tokens: Tensor, logprobs: Tensor, lengths: Tensor, finished: Tensor) -> Samples:
    cut = lengths.tolist()
    tokens, logprobs = tokens.to(torch.int32).cpu().numpy(), logprobs.cpu().numpy()
    return Samples(
        tokens=[row[:n] for row, n in zip(tokens, cut)],
        logprobs=[row[:n] for row, n in zip(logprobs, cut)],
        truncated=[not f for f in finished.tolist()],
    )


ENGINES = {"transformers": TransformersEngine}


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
        val_size: int,
        threads: int,
    ):
        torch.set_num_threads(threads)
        folder = resolve(model.path)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.task, self.task_config = make_task(task, seed, val_size), task
        self.reward = make_reward(task.reward, self.task)
        self.grpo, self.seed = grpo, seed
        self.receiver = Receiver(snapshot)
        self.engine: TransformersEngine = ENGINES[rollout.engine](folder, model, rollout)
        self.reference = ENGINES[rollout.engine](folder, model, rollout) if grpo.kl_loss_coef else None

    def load_weights(self, tick: int, *parts: np.ndarray) -> None:
        """One weights frame a stage, all of `tick`. Raises FrameError on a mix-up, BaseLost if a delta does not fit."""
        self.receiver.load(list(parts), tick, self.engine.weights.master)
        self.engine.weights.publish()

    def generate(self, ask: Prompts) -> tuple[np.ndarray, float]:
        """Samples, scored, as a batch frame, and the peak memory in GB. Groups are whole, so advantages are final."""
        examples = [self.task.example(ask.split, i) for i in ask.indices]
        prompts = [self._encode(example.prompt) for example in examples]
        limit = self.grpo.max_response_length
        keys = [[self.seed, SPLITS[ask.split], ask.step, i, s] for i in ask.indices for s in range(ask.n)]
        uniforms = np.stack(
            [np.random.Generator(np.random.Philox(np.random.SeedSequence(k))).random(limit) for k in keys]
        )
        samples = self.engine.sample(prompts, uniforms.reshape(len(prompts), ask.n, limit), ask.temperature)
        prompts = [p for p in prompts for _ in range(ask.n)]
        examples = [e for e in examples for _ in range(ask.n)]
        ref = self.reference.score(prompts, samples.tokens, ask.temperature) if self.reference else []
        rewards = [
            self.reward(example, self.tokenizer.decode(tokens, skip_special_tokens=True), cut)
            for example, tokens, cut in zip(examples, samples.tokens, samples.truncated)
        ]
        batch = Batch(
            tokens=np.concatenate([np.concatenate([p, t]) for p, t in zip(prompts, samples.tokens)]).astype(np.int32),
            prompt=np.array([len(p) for p in prompts], np.int32),
            total=np.array([len(p) + len(t) for p, t in zip(prompts, samples.tokens)], np.int32),
            rollout_logprobs=np.concatenate(samples.logprobs),
            ref_logprobs=np.concatenate(ref) if ref else np.zeros(0, np.float32),
            rewards=np.array(rewards, np.float32),
            advantages=self._advantages(rewards, ask.n),
            truncated=np.array(samples.truncated, bool),
        )
        return batch.to_frame(split=ask.split, step=ask.step), peak_memory_gb(self.engine.device)

    @staticmethod
    def _advantages(rewards: list[float], n: int) -> np.ndarray:
        return group_advantages(torch.tensor(rewards), n).numpy() if n > 1 else np.zeros(len(rewards), np.float32)

    def _encode(self, prompt: str) -> list[int]:
        text = self.task_config.instruction + prompt
        if self.task_config.chat:
            message = [{"role": "user", "content": text}]
            ids = self.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        else:
            ids = self.tokenizer(text)["input_ids"]
        if not ids:
            raise ValueError(f"the model's tokenizer knows no character of the prompt {prompt[:60]!r}")
        if len(ids) > self.grpo.max_prompt_length:
            raise PromptTooLong(
                f"a prompt has {len(ids)} tokens, grpo.max_prompt_length is {self.grpo.max_prompt_length}: "
                f"raise it, or give the task shorter problems ({prompt[:60]!r})"
            )
        return list(ids)
