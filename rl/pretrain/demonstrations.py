"""Worked answers that a base policy is trained on, by task.

Each is right on average often enough to start reinforcement learning near even odds, and each may
re-check its last step any number of times, so that a policy can run away re-checking for ever.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from typing import Protocol

from rl.examples import Example
from rl.sums_task import EOS
from rl.task_config import TaskConfig
from rl.tasks import Task, make_task

RECHECK = 0.3  # chance of one more look at the last step
HARD, HARD_SLIP, EASY_SLIP = 0.36, 0.55, 0.02  # share of hard steps, and how often a hard and an easy one go wrong
CARE = 0.7  # a re-check slips this many times as often as the first try


class Lesson(Protocol):
    """A task with somebody who shows how it is done. Characters outside `alphabet` are not read."""

    task: Task
    alphabet: str

    def __init__(self, seed: int, val_size: int): ...

    def demonstrate(self, example: Example, rng: random.Random) -> str: ...


def _worked(
    first: int, terms: Sequence[int], attempt: Callable[[int, int, float], int], rng: random.Random
) -> tuple[str, int]:
    """`6,4?5` and 5: the value after each term, with what the last step gave again at each re-check, and the result.

    `attempt(running, term, care)` takes one step. A slip is carried on: the next step starts from what was written.
    """
    values = [first]
    for term in terms:
        values.append(attempt(values[-1], term, 1.0))
    answer, result = ",".join(map(str, values[1:])), values[-1]
    while rng.random() < RECHECK:
        result = attempt(values[-2], terms[-1], CARE)
        answer += f"?{result}"
    return answer, result


def _slip_table() -> dict[tuple[int, int], tuple[int, float]]:
    """(running sum, digit) -> the wrong value written for it, and how often."""
    rng = random.Random("slips")
    pairs = [(running, digit) for running in range(10) for digit in range(10)]
    hard = set(rng.sample(pairs, round(HARD * len(pairs))))
    return {pair: ((sum(pair) + rng.choice((1, 9))) % 10, HARD_SLIP if pair in hard else EASY_SLIP) for pair in pairs}


class SumsLesson:
    """The built-in task. Slips by a fixed table: the right value of every step is known as an alternative."""

    alphabet = "0123456789+=,?#"
    slips = _slip_table()

    def __init__(self, seed: int, val_size: int):
        self.task = make_task(TaskConfig.model_validate({"name": "sums"}), seed, val_size)

    def demonstrate(self, example: Example, rng: random.Random) -> str:
        def attempt(running: int, digit: int, care: float) -> int:
            wrong, chance = self.slips[running, digit]
            return wrong if rng.random() < chance * care else (running + digit) % 10

        first, *digits = example.metadata["digits"]
        answer, result = _worked(first, digits, attempt, rng)
        return f"{answer}#{result}{EOS}"


class ChainLesson:
    """reasoning_gym's chain_sum with one digit a term: `4-1-7+2=` is worked out as `3,-4,-2####-2$`.

    What goes wrong is fixed by the term: `HARD` of the terms (sign and digit) are misread by one in `HARD_SLIP` of the
    attempts, the others hardly ever. Slips by (running result, term), ten times as many facts, are too many to
    unlearn in a run of 75 steps: nothing is gained then, however exact the gradient.
    """

    alphabet = "0123456789+-=,?#"
    config = {  # noqa: RUF012
        "name": "reasoning_gym:chain_sum",
        "params": {"min_terms": 4, "max_terms": 4, "min_digits": 1, "max_digits": 1},
    }

    def __init__(self, seed: int, val_size: int):
        self.task = make_task(TaskConfig.model_validate(self.config), seed, val_size)

    def demonstrate(self, example: Example, rng: random.Random) -> str:
        def attempt(running: int, term: int, care: float) -> int:
            drawn = hashlib.sha256(f"{term}".encode()).digest()
            chance = HARD_SLIP if drawn[0] < 256 * HARD else EASY_SLIP
            wrong = 1 if drawn[1] % 2 else -1
            return running + term + (wrong if rng.random() < chance * care else 0)

        first, *terms = [int(t.replace(" ", "")) for t in re.findall(r"-? ?\d+", example.text)]
        answer, result = _worked(first, terms, attempt, rng)
        return f"{answer}####{result}{EOS}"


LESSONS: dict[str, type[Lesson]] = {"sums": SumsLesson, "chain_sum": ChainLesson}
