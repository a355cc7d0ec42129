"""Tasks: prompts by seed and a score for an answer. One small interface, one registry. No torch.

Train and validation prompts never overlap, whatever the seed: `sums` and `jsonl` split by a hash of
the problem itself, `reasoning_gym` rejects any training problem that is in the validation set.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from rl.config import TaskConfig
from rl.examples import Example
from rl.sums import Sums


class Task(Protocol):
    """`example` is a pure function of (seed, split, index); `score` is 1.0 for right, 0.0 for wrong."""

    def example(self, split: str, index: int) -> Example: ...

    def score(self, example: Example, text: str) -> float: ...


class ReasoningGym:
    """Every task of the reasoning_gym library, by its name."""

    def __init__(self, name: str, params: dict[str, Any], seed: int, val_size: int):
        import reasoning_gym

        def dataset(seed: int, size: int):
            return reasoning_gym.create_dataset(name, seed=seed, size=size, **params)

        # disjoint seed ranges: items are seeded by dataset seed + index
        self._val = dataset(1_000_003, val_size)
        self._train = dataset(2_000_003 + seed * 10_000_000, 10_000_000)
        self._held_out = {self._val[i]["question"] for i in range(val_size)}

    def example(self, split: str, index: int) -> Example:
        if split == "val":
            return _gym_example(self._val[index])
        for attempt in range(100):
            item = self._train[(index * 100 + attempt) % len(self._train)]
            if item["question"] not in self._held_out:
                return _gym_example(item)
        raise ValueError("100 training problems in a row are in the validation set: the task has too few problems")

    def score(self, example: Example, text: str) -> float:
        # the scorer wants the answer alone: what follows the last "####" if the model wrote one
        answer = text.rsplit("####", 1)[-1].strip()
        try:
            return float(self._val.score_answer(answer, example.metadata) >= 1.0)
        except Exception:  # some of the library's scorers raise on text that they do not expect: 1e999, {}
            return 0.0


def _gym_example(item: dict[str, Any]) -> Example:
    return Example(item["question"], str(item["answer"]), item)


class Jsonl:
    """A file of {"prompt" or "question", "answer"} lines; `#### N` answers are compared as numbers."""

    def __init__(self, path: str, seed: int):
        rows = [json.loads(line) for line in Path(path).expanduser().read_text().splitlines() if line.strip()]
        examples = [Example(row.get("prompt", row.get("question")), str(row["answer"])) for row in rows]
        self._splits = {"train": [], "val": []}
        for example in examples:
            self._splits["val" if _held_out(example.prompt) else "train"].append(example)
        for split, found in self._splits.items():
            if not found:
                raise ValueError(f"{path}: no problem falls in the {split} split; it needs more lines")
        self._seed = seed

    def example(self, split: str, index: int) -> Example:
        rows = self._splits[split]
        if split == "val":
            return rows[index % len(rows)]
        epoch, position = divmod(index, len(rows))
        return rows[_permutation(len(rows), self._seed, epoch)[position]]

    def score(self, example: Example, text: str) -> float:
        return float(final_answer(text) == final_answer(example.answer))


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> list[int]:
    import random

    order = list(range(n))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order


def _held_out(text: str) -> bool:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()[0] < 26  # about 10 %


def final_answer(text: str) -> str:
    """What follows the last `####` (else the last number, else all of it), as a plain number if it is one."""
    tail = text.rsplit("####", 1)[-1].strip() if "####" in text else text.strip()
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", tail)
    if not numbers:
        return tail
    value = float(numbers[0 if "####" in text else -1].replace(",", ""))
    return str(int(value)) if value.is_integer() else str(value)


def _build_sums(argument: str, config: TaskConfig, seed: int, val_size: int) -> Task:
    return Sums(seed)


def _build_gym(argument: str, config: TaskConfig, seed: int, val_size: int) -> Task:
    return ReasoningGym(argument, config.params, seed, val_size)


def _build_jsonl(argument: str, config: TaskConfig, seed: int, val_size: int) -> Task:
    return Jsonl(argument, seed)


TASKS = {"sums": _build_sums, "reasoning_gym": _build_gym, "jsonl": _build_jsonl}


def make_task(config: TaskConfig, seed: int, val_size: int) -> Task:
    kind, _, argument = config.name.partition(":")
    return TASKS[kind](argument, config, seed, val_size)


def check_task_name(name: str) -> None:
    """Raises ValueError, with what is allowed, if `name` is no task. Reads files, imports nothing heavy."""
    import difflib

    kind, _, argument = name.partition(":")
    if kind not in TASKS:
        near = difflib.get_close_matches(kind, TASKS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown task {name!r}: use sums, reasoning_gym:NAME or jsonl:PATH{hint}")
    if kind == "sums" and argument:
        raise ValueError(f"unknown task {name!r}: sums takes no argument")
    if kind == "jsonl" and not Path(argument).expanduser().is_file():
        raise ValueError(f"no such file: {argument!r}")
    if kind == "reasoning_gym" and argument not in gym_names():
        near = difflib.get_close_matches(argument, gym_names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"its tasks are {', '.join(sorted(gym_names()))}"
        raise ValueError(f"reasoning_gym has no task {argument!r}; {hint}")


@lru_cache(maxsize=1)
def gym_names() -> frozenset[str]:
    """Names of all reasoning_gym tasks, read from its sources: importing it takes two seconds."""
    spec = importlib.util.find_spec("reasoning_gym")
    names: set[str] = set()
    for file in Path(spec.origin).parent.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        constants = dict(re.findall(r'^(\w+)\s*=\s*"([a-z0-9_]+)"', text, re.M))
        for literal, constant in re.findall(r'register_dataset\(\s*(?:"(\w+)"|(\w+))\s*,', text):
            if literal or constant in constants:
                names.add(literal or constants[constant])
    return frozenset(names)
