"""What answers are worth: the task's own score, or a function of the user's. No torch.

A user's function, or what a task judges with, runs in a process of its own (`rl.child`, `rl.reward_function`). An answer
on which it hangs, exits, crashes or raises scores 0 and is named; several in a row end the run, for a bug must not train
as if it were a judgement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from rl.batch import Parts
from rl.child import IMPORT_S, ChildFailed, Service
from rl.examples import Example
from rl.messages import Prompt, as_text
from rl.reward_function import LARGEST, Asked, Said, late
from rl.task_config import TaskConfig

Answer = tuple[Example, str, bool]  # with the policy's text, and whether it was cut at the length limit
_GRACE_S = 1.0  # an async function is stopped at its deadline by its own process


class Judged(NamedTuple):
    """`failed`: why there is no judgement, and the reward is 0; "" where there is one."""

    reward: float
    parts: Mapping[str, float] = {}
    failed: str = ""


Reward = Callable[[Sequence[Answer]], list[Judged]]


class Scorer(Protocol):
    """A task, as far as its rewards go."""

    def score(self, example: Example, text: str) -> float: ...


@runtime_checkable
class Judges(Protocol):
    """What judges answers in a process of its own. `together`: it is asked about all at once."""

    together: bool

    def judge(self, asked: list[Asked], seconds: float) -> list[Said]:
        """Raises ChildFailed; and ValueError if there is no process that could be asked."""
        ...


class RewardError(RuntimeError):
    """A reward function that does not judge: the run stops."""

    def __init__(self, name: str, reason: str, prompt: Prompt, response: str, answer: str):
        """`name`: of the setting with its value, `task.reward 'a:b'`."""
        super().__init__(name, reason, prompt, response, answer)
        self.name, self.reason, self.prompt, self.response, self.answer = name, reason, prompt, response, answer

    def __str__(self) -> str:
        sample = (
            f"prompt {as_text(self.prompt)[:200]!r}, response {self.response[:200]!r}, answer {self.answer[:200]!r}"
        )
        return f"{self.name} {self.reason}; {sample}"


def make_reward(config: TaskConfig, task: Scorer) -> Reward:
    """The task's score, 0 for an answer that was cut; or the function `config.reward`, or a task that judges by itself.

    These also judge answers that were cut. Raises ValueError if the function cannot be imported in time or takes other
    arguments; the reward raises RewardError.
    """
    if config.reward is not None:
        name = f"task.reward {config.reward!r}"
        return OwnReward(name, config, OwnFunction(name, config.reward, config.reward_timeout_s))
    if isinstance(task, Judges):
        return OwnReward(f"task.name {config.name!r}", config, task)
    return lambda answers: [Judged(0.0 if cut else task.score(example, text)) for example, text, cut in answers]


def parts_of(judged: Sequence[Judged]) -> Parts:
    """Of all names that there are; NaN where an answer has no such part."""
    names = dict.fromkeys(name for each in judged for name in each.parts)
    return {name: np.array([each.parts.get(name, math.nan) for each in judged], np.float32) for name in names}


class OwnFunction:
    """The user's function, with the process that it runs in."""

    def __init__(self, what: str, name: str, timeout_s: float):
        self._service = Service(what, "task.reward_timeout_s", timeout_s, "rl.reward_function:judge", name)
        self.together = bool(self._service.ask(IMPORT_S, None, 0.0))

    def judge(self, asked: list[Asked], seconds: float) -> list[Said]:
        return self._service.ask(seconds + _GRACE_S * self.together, asked, seconds)


class OwnReward:
    """What another process says of answers, and how often it may fail. `name`: of the setting, with its value."""

    def __init__(self, name: str, config: TaskConfig, judges: Judges):
        self.name, self.config, self.judges = name, config, judges
        self._in_a_row = 0

    def __call__(self, answers: Sequence[Answer]) -> list[Judged]:
        """Raises RewardError at the last of `reward_failures` in a row, or of as many in one call that hang."""
        asked = [(e.prompt, text, e.answer, dict(e.metadata) | {"truncated": cut}) for e, text, cut in answers]
        found, hung = list[Judged](), 0
        for sample, (said, hangs) in zip(asked, self._said(asked)):
            judged = self._judged(said)
            self._in_a_row = self._in_a_row + 1 if judged.failed else 0
            hung += hangs
            self._check(judged, hung, sample)
            found.append(judged)
        return found

    def _check(self, judged: Judged, hung: int, sample: Asked) -> None:
        most = self.config.reward_failures
        if max(self._in_a_row, hung) < most:
            return
        where = "in a row" if self._in_a_row >= most else "of one request"
        many = f"failed on {most} answers {where} (task.reward_failures), the last time it " if most > 1 else ""
        raise RewardError(self.name, f"{many}{judged.failed}", *sample[:3])

    def _said(self, asked: list[Asked]) -> Iterator[tuple[Said, bool]]:
        """Of each answer, and whether it hung. An async function is asked about all at once."""
        for chunk in [asked] if self.judges.together and asked else [[sample] for sample in asked]:
            try:
                told = self.judges.judge(chunk, self.config.reward_timeout_s)
            except ChildFailed as failure:
                yield from self._alone(chunk, failure)
            except ValueError as error:
                raise RewardError(self.name, str(error), *chunk[0][:3]) from None
            else:
                yield from ((said, False) for said in told)

    def _alone(self, chunk: list[Asked], failure: ChildFailed) -> Iterator[tuple[Said, bool]]:
        """Whose fault it was: one by one, unless it was one."""
        if len(chunk) == 1:
            yield {"failed": late(self.config.reward_timeout_s) if failure.late else failure.reason}, failure.late
            return
        for sample in chunk:
            yield from self._said([sample])

    def _judged(self, said: Said) -> Judged:
        weights = self.config.reward_weights
        if "failed" in said:
            return Judged(0.0, failed=said["failed"])
        if "number" in said:
            wrong = f"returned a number, and task.reward_weights weighs {', '.join(weights)}" if weights else ""
            return Judged(0.0 if wrong else said["number"], said.get("parts", {}), wrong)
        parts = said.get("parts", {})
        if lacking := [name for name in weights if name not in parts]:
            return Judged(0.0, failed=f"returned no {', '.join(lacking)}, which task.reward_weights weighs")
        total = math.fsum(weights.get(name, 1.0) * part for name, part in parts.items())
        if abs(total) > LARGEST:
            return Judged(0.0, failed=f"returned {parts}, weighed {total:g}: rewards may be {LARGEST:g} at most")
        return Judged(total, parts)
