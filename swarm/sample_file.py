"""samples.jsonl of a run's folder: answers of the policy, to be read. A line is a sample.

The file is bounded, and always about the whole run: when it is full, steps between the first and the last go, so that
those that stay are evenly far apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, cast

import numpy as np

from rl.batch import Batch, Parts
from rl.model_files import resolve
from rl.tokenizer import load_tokenizer
from swarm.json_lines import keep_records, read_records, replace_text
from swarm.manifest import writing

NAME = "samples.jsonl"
Sample = dict[str, Any]  # as `Reader.read` makes it
_Key = tuple[str, int]  # kind and step
_ROOMY = 0.75  # a full file is thinned to this share of its bound, so that it is not written anew at every step


class SampleFile:
    """Samples in the order of steps, `max_bytes` of them at most. Raises NotWritten."""

    def __init__(self, run: Path, max_bytes: int):
        self.path, self.max_bytes = run / NAME, max_bytes

    def add(self, samples: list[Sample]) -> None:
        """Those of one step or of one validation; where they alone are more than fits, the first of them."""
        lines = [json.dumps(sample) + "\n" for sample in samples]
        size = sum(map(len, lines))
        if self._size() + size > self.max_bytes:
            self._thin(self.max_bytes - size)
        room = self.max_bytes - self._size()
        fits = [line for line, end in zip(lines, accumulate(map(len, lines))) if end <= room]
        with writing(self.path), self.path.open("a") as file:
            file.write("".join(fits))

    def drop(self, step: int) -> None:
        """Keep what was sampled up to `step`, and no line that a death has cut."""
        if self.path.exists():
            keep_records(self.path, lambda sample: sample["step"] <= step)

    def _thin(self, room: int) -> None:
        """Down to `room` bytes, or to the first and the last step and validation."""
        records = groupby(read_records(self.path), lambda pair: (pair[0]["kind"], pair[0]["step"]))
        groups: list[tuple[_Key, str]] = [(key, "".join(line for _, line in group)) for key, group in records]
        gap, longest = 1, max((step for (_, step), _ in groups), default=0)
        while sum(len(text) for _, text in groups) > min(room, _ROOMY * self.max_bytes) and gap <= longest:
            gap *= 2
            kept = {key for kind in ("train", "val") for key in _apart([k for k, _ in groups if k[0] == kind], gap)}
            groups = [group for group in groups if group[0] in kept]
        replace_text(self.path, "".join(text for _, text in groups))

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0


def _apart(keys: list[_Key], gap: int) -> list[_Key]:
    """The first and the last, and between them those that are `gap` steps or more from the one before."""
    kept = keys[:1]
    for key in keys[1:]:
        if key == keys[-1] or key[1] - kept[-1][1] >= gap:
            kept.append(key)
    return kept


class Reader:
    """Makes text of tokens: a prompt as the policy is shown it, an answer as the reward is."""

    def __init__(self, model: str, skip_special_tokens: bool):
        self._model, self._skip = model, skip_special_tokens

    @cached_property
    def _decode(self) -> Callable[..., Any]:
        return load_tokenizer(resolve(self._model)).decode

    def read(self, at: Sample, batch: Batch, parts: Parts, first: int, each: int) -> list[Sample]:
        """`batch`: `each` answers to each of the problems from `first` on, with the first of `parts`; `at`: what all have."""
        prompts, responses = batch.split()
        marks = np.split(batch.own, np.cumsum(batch.response_lengths)[:-1]) if batch.own.size else []
        lengths = batch.own_lengths
        return [
            at
            | {
                "problem": first + i // each,
                "sample": i % each,
                "prompt": self._text(prompts[i], skip_special_tokens=False),
                "response": self._text(responses[i], self._skip),
                "reward": _shortest(batch.rewards[i]),
                "length": int(lengths[i]),
                "truncated": bool(batch.truncated[i]),
            }
            | _parts(parts, i)
            | (self._turns(responses[i], marks[i]) if marks else {})
            for i in range(len(batch))
        ]

    def _turns(self, tokens: np.ndarray, own: np.ndarray) -> Sample:
        """What policy and environment said, one after the other, where the latter did."""
        if own.all():
            return {}
        turns = np.split(tokens, np.flatnonzero(np.diff(own)) + 1)
        return {"turns": [self._text(turn, self._skip) for turn in turns]}

    def _text(self, tokens: np.ndarray, skip_special_tokens: bool) -> str:
        return cast(str, self._decode(tokens, skip_special_tokens=skip_special_tokens))


def _shortest(value: np.float32) -> float:
    """The shortest number that is this float32: 0.1, not 0.10000000149011612."""
    return float(str(value))


def _parts(parts: Parts, i: int) -> Sample:
    found = {name: _shortest(values[i]) for name, values in parts.items() if not np.isnan(values[i])}
    return {"parts": found} if found else {}
