"""What a rollout engine is: a full copy of the weights that samples answers. Its kinds are in `rl.rollout.ENGINES`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.random import Generator, Philox, SeedSequence

from rl.config import ModelConfig, RolloutConfig
from rl.grpo import token_logprobs
from rl.policy import whole_model
from rl.stops import StopTexts, stop_tokens

# (seed, split, step, prompt, sample), and the turn from the second on: all that a sample's random numbers depend on
Key = tuple[int, ...]


class EngineFailed(RuntimeError):
    """An engine that must not be used again: after a failed update nobody knows which weights it holds."""

    def __init__(self, what: str, reason: str, fix: str):
        super().__init__(what, reason, fix)
        self.what, self.reason, self.fix = what, reason, fix

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}; {self.fix}"


@dataclass(frozen=True)
class Samples:
    """What an engine returns for one list of prompts, in order: prompt-major, then sample."""

    tokens: list[np.ndarray]  # int32, response tokens with the end, if there was one
    logprobs: list[np.ndarray]  # float32, under the sampling distribution
    truncated: list[bool]  # no end within the limit


class Engine(Protocol):
    """`plain.weights.master` is where new weights are written to; they are in use after `publish`."""

    plain: PlainModel
    device: torch.device

    def sample(
        self, prompts: list[list[int]], keys: list[Key], max_new: int | list[int], temperature: float
    ) -> Samples:
        """At most `max_new` tokens of len(keys) / len(prompts) samples a prompt, each drawn by its own key.

        `max_new` is one number for all samples, or one for each.
        """
        ...

    def publish(self) -> None:
        """Sample with what is now in `plain.weights.master`, wake up if asleep. Raises EngineFailed."""
        ...

    def sleep(self) -> None:
        """Leave the device's memory to others until `publish`."""
        ...


class PlainModel:
    """The model as transformers runs it, without any codec: the reference of every engine, and the base policy."""

    def __init__(self, folder: Path, model: ModelConfig, rollout: RolloutConfig):
        self.folder, self.device = folder, torch.device(rollout.device)
        numbers = getattr(torch, model.dtype)
        self.model, self.weights = whole_model(folder, numbers, self.device, model.attention, model.lora)
        self.eos = stop_tokens(folder)
        self.stops: StopTexts | None = None  # of the task

    @torch.inference_mode()
    def score(self, prompts: list[list[int]], responses: list[np.ndarray], temperature: float) -> list[np.ndarray]:
        """Log-probs of given responses under the present weights, one sample at a time."""
        found = []
        for prompt, response in zip(prompts, responses):
            ids = torch.tensor([[*prompt, *response.tolist()]], device=self.device)
            logits = self.model(input_ids=ids, logits_to_keep=len(response) + 1).logits[0, :-1]
            targets = ids[0, len(prompt) :]
            found.append(token_logprobs(logits, targets, temperature, with_entropy=False)[0].cpu().numpy())
        return found


def uniforms(keys: list[Key], max_new: int) -> np.ndarray:
    """[len(keys), max_new] in [0, 1): one number for each token that may be sampled, a function of its key alone."""
    return np.stack([Generator(Philox(SeedSequence(key))).random(max_new) for key in keys])


def request_seeds(keys: list[Key]) -> list[int]:
    """One seed a key, of 63 bits: for engines that draw their own random numbers."""
    return [int(SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1 for key in keys]
