"""Samples with their rewards, ragged and flat, as they travel: engines -> coordinator -> swarm and anchor."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from codec import frames

_DTYPES = {
    "tokens": "int32",
    "prompt": "int32",
    "total": "int32",
    "rollout_logprobs": "float32",
    "ref_logprobs": "float32",
    "rewards": "float32",
    "advantages": "float32",
    "truncated": "bool",
}


@dataclass(frozen=True)
class Prompts:
    """coordinator -> engine: the prompts `indices` of a split, `n` samples each, seeded by `step`."""

    split: str
    step: int
    indices: tuple[int, ...]
    n: int
    temperature: float


@dataclass(frozen=True)
class Batch:
    """N samples; token arrays are flat, one sample after the other."""

    tokens: np.ndarray  # int32 [sum of total], prompt then response
    prompt: np.ndarray  # int32 [N], prompt lengths
    total: np.ndarray  # int32 [N], prompt + response lengths
    rollout_logprobs: np.ndarray  # float32 [sum of responses], of the engine's sampling distribution
    ref_logprobs: np.ndarray  # float32 [sum of responses] or [0]: of the base policy
    rewards: np.ndarray  # float32 [N]
    advantages: np.ndarray  # float32 [N], zeros for validation
    truncated: np.ndarray  # bool [N]

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def response_lengths(self) -> np.ndarray:
        return self.total - self.prompt

    @property
    def response_tokens(self) -> int:
        return int(self.response_lengths.sum())

    def take(self, start: int, stop: int) -> Batch:
        """Samples [start, stop)."""
        token = np.concatenate([[0], np.cumsum(self.total)])
        response = np.concatenate([[0], np.cumsum(self.response_lengths)])
        cut = {f.name: getattr(self, f.name)[start:stop] for f in fields(self)}
        cut["tokens"] = self.tokens[token[start] : token[stop]]
        for name in ("rollout_logprobs", "ref_logprobs"):
            cut[name] = getattr(self, name)[response[start] : response[stop]]
        return Batch(**cut)

    def pick(self, samples: np.ndarray) -> Batch:
        """The given samples, in that order."""
        return concat([self.take(int(i), int(i) + 1) for i in samples])

    def to_frame(self, **header: Any) -> np.ndarray:
        return frames.pack(header, {f.name: getattr(self, f.name) for f in fields(self)})

    @staticmethod
    def from_frame(frame: np.ndarray, sender: str) -> tuple[dict[str, Any], Batch]:
        """Raises FrameError if an array is missing or the lengths do not add up."""
        header, arrays = frames.unpack(frame, sender)
        if set(arrays) != {f.name for f in fields(Batch)}:
            raise frames.FrameError(sender, "arrays", f"a batch does not have the arrays {sorted(arrays)}")
        for name, array in arrays.items():
            if array.ndim != 1 or array.dtype != _DTYPES[name]:
                raise frames.FrameError(sender, name, f"is {array.dtype} {array.shape}, not a row of {_DTYPES[name]}")
        batch = Batch(**arrays)
        for name in ("total", "rewards", "advantages", "truncated"):
            if len(arrays[name]) != len(batch):
                raise frames.FrameError(sender, name, f"has {len(arrays[name])} entries for {len(batch)} samples")
        if (batch.prompt < 1).any() or (batch.total < batch.prompt).any():
            raise frames.FrameError(sender, "prompt", "a length is below 1 or above the total")
        tokens, responses = len(batch.tokens), len(batch.rollout_logprobs)
        if tokens != batch.total.sum() or responses != batch.response_tokens:
            raise frames.FrameError(sender, "total", "token arrays and lengths do not add up")
        if len(batch.ref_logprobs) not in (0, responses):
            raise frames.FrameError(sender, "ref_logprobs", f"{len(batch.ref_logprobs)} for {responses} tokens")
        return header, batch


def concat(batches: list[Batch]) -> Batch:
    return Batch(**{f.name: np.concatenate([getattr(b, f.name) for b in batches]) for f in fields(Batch)})
