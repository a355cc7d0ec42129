"""Tasks of the library reasoning_gym, by name. No torch."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from rl.examples import Example
from rl.problems import Problems


class ReasoningGym:
    """Every task of the reasoning_gym library, by its name."""

    def __init__(
        self, name: str, params: dict[str, Any], seed: int, val_size: int, held_out: frozenset[str] = frozenset()
    ):
        import reasoning_gym

        def dataset(seed: int, size: int):
            return reasoning_gym.create_dataset(name, seed=seed, size=size, **params)

        # disjoint seed ranges: items are seeded by dataset seed + index
        self._val = dataset(1_000_003, val_size)
        self._train = dataset(2_000_003 + seed * 10_000_000, 10_000_000)
        self._held_out = held_out | {self._val[i]["question"] for i in range(val_size)}

    def example(self, split: str, index: int) -> Example:
        if split == "val":
            return _gym_example(self._val[index])
        for attempt in range(100):
            item = self._train[(index * 100 + attempt) % len(self._train)]
            if item["question"] not in self._held_out:
                return _gym_example(item)
        raise ValueError("100 training problems in a row are in the validation set: the task has too few problems")

    def problems(self) -> Problems:
        return Problems(len(self._val))

    def score(self, example: Example, text: str) -> float:
        # the scorer wants the answer alone: what follows the last "####" if the model wrote one
        answer = text.rsplit("####", 1)[-1].strip()
        try:
            return float(self._val.score_answer(answer, example.metadata) >= 1.0)
        except Exception:  # some of the library's scorers raise on text that they do not expect: 1e999, {}
            return 0.0


def _gym_example(item: dict[str, Any]) -> Example:
    return Example(item["question"], str(item["answer"]), item)


def check_gym(name: str, params: dict[str, Any]) -> None:
    """By making one problem: the library says in many ways what it does not take."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    try:
        reasoning_gym.create_dataset(name, seed=0, size=1, **params)[0]
    except Exception as error:
        allowed = ", ".join(f.name for f in fields(DATASETS[name][1]) if f.name not in ("seed", "size"))
        raise ValueError(f"reasoning_gym:{name} refuses {params}: {error} (it takes {allowed})") from None


@lru_cache(maxsize=1)
def gym_names() -> frozenset[str]:
    """Names of all reasoning_gym tasks, read from its sources: importing it takes two seconds."""
    spec = importlib.util.find_spec("reasoning_gym")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("reasoning_gym is not installed", name="reasoning_gym")
    names: set[str] = set()
    for file in Path(spec.origin).parent.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        constants = dict(re.findall(r'^(\w+)\s*=\s*"([a-z0-9_]+)"', text, re.M))
        for literal, constant in re.findall(r'register_dataset\(\s*(?:"(\w+)"|(\w+))\s*,', text):
            if literal or constant in constants:
                names.add(literal or constants[constant])
    return frozenset(names)
