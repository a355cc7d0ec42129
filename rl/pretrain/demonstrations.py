"""Worked answers that a base policy is trained on, by task.

Each is right on average often enough to start reinforcement learning near even odds, and each may
re-check its last step any number of times, so that a policy can run away re-checking for ever.
"""

from __future__ import annotations

import hashlib
import random
import re
from typing import Protocol

from rl.config import TaskConfig
from rl.examples import Example
from rl.sums import EOS, demonstration
from rl.tasks import Task, make_task


class Lesson(Protocol):
    """A task with somebody who shows how it is done. Characters outside `alphabet` are not read."""

    task: Task
    alphabet: str

    def demonstrate(self, example: Example, rng: random.Random) -> str: ...


class SumsLesson:
    """The built-in task."""

    alphabet = "0123456789+=,?#"

    def __init__(self, seed: int, val_size: int):
        self.task = make_task(TaskConfig(name="sums"), seed, val_size)

    def demonstrate(self, example: Example, rng: random.Random) -> str:
        return demonstration(example.metadata["digits"], rng)


class ChainLesson:
    """reasoning_gym's chain_sum with one digit a term: `4-1-7+2=` is worked out as `3,-4,-2####-2$`.

    What goes wrong is fixed by the term: `HARD` of the terms (sign and digit) are misread by one in `SLIP` of the
    attempts, the others hardly ever. Slips by (running result, term), ten times as many facts, are too many to
    unlearn in a run of 75 steps: nothing is gained then, however exact the gradient.
    """

    alphabet = "0123456789+-=,?#"
    params = {"min_terms": 4, "max_terms": 4, "min_digits": 1, "max_digits": 1}  # noqa: RUF012
    RECHECK, HARD, SLIP, EASY, CARE = 0.3, 0.36, 0.55, 0.02, 0.7

    def __init__(self, seed: int, val_size: int):
        self.task = make_task(TaskConfig(name="reasoning_gym:chain_sum", params=self.params), seed, val_size)

    def demonstrate(self, example: Example, rng: random.Random) -> str:
        first, *terms = [int(t.replace(" ", "")) for t in re.findall(r"-? ?\d+", example.prompt)]
        running, values = first, []
        for term in terms:
            start, running = running, self._attempt(running, term, rng)
            values.append(running)
        answer = ",".join(map(str, values))
        while rng.random() < self.RECHECK:
            running = self._attempt(start, terms[-1], rng, self.CARE)
            answer += f"?{running}"
        return f"{answer}####{running}{EOS}"

    def _attempt(self, running: int, term: int, rng: random.Random, care: float = 1.0) -> int:
        drawn = hashlib.sha256(f"{term}".encode()).digest()
        chance = self.SLIP if drawn[0] < 256 * self.HARD else self.EASY
        wrong = 1 if drawn[1] % 2 else -1
        return running + term + (wrong if rng.random() < chance * care else 0)


LESSONS: dict[str, type[Lesson]] = {"sums": SumsLesson, "chain_sum": ChainLesson}
