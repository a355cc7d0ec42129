"""What an answer is worth: the task's own score, or a function of the user's. No torch.

A user's function runs in a process of its own (`rl.child`), so that one that hangs, exits or crashes is named.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import math
from collections.abc import Callable
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any, Protocol

from rl.child import Child, ChildFailed
from rl.examples import Example
from rl.module_source import bound_names, find_module

Reward = Callable[[Example, str, bool], float]  # (example, answer, was it cut at the length limit)
FORM = "function(prompt: str | list, response: str, answer: str, metadata: dict) -> float"
LARGEST = 1e15  # squares of a whole batch still add up in float32, in which a batch keeps rewards


class Scorer(Protocol):
    """A task, as far as its rewards go."""

    def score(self, example: Example, text: str) -> float: ...


class RewardError(RuntimeError):
    """A reward function failed on one answer: the run stops, for a silent 0 would train on a bug."""

    def __init__(self, name: str, reason: str, prompt: str, response: str, answer: str):
        super().__init__(name, reason, prompt, response, answer)
        self.name, self.reason, self.prompt, self.response, self.answer = name, reason, prompt, response, answer

    def __str__(self) -> str:
        sample = f"prompt {self.prompt[:200]!r}, response {self.response[:200]!r}, answer {self.answer[:200]!r}"
        return f"task.reward {self.name!r} {self.reason}; {sample}"


def make_reward(name: str | None, task: Scorer, timeout_s: float = 60.0) -> Reward:
    """The task's score, 0 for an answer that was cut; or the function `name`, which also judges cut ones.

    Raises ValueError if the function cannot be imported within `timeout_s` or takes other arguments; the reward
    raises RewardError.
    """
    if name is None:
        return lambda example, text, cut: 0.0 if cut else task.score(example, text)
    child = _started(name, timeout_s)

    def reward(example: Example, text: str, cut: bool) -> float:
        sample = (example.text, text, example.answer)
        try:
            judged = child.ask(
                timeout_s, example.prompt, text, example.answer, dict(example.metadata) | {"truncated": cut}
            )
        except ChildFailed as failure:
            hint = " (task.reward_timeout_s)" if failure.late else ""
            raise RewardError(name, f"{failure.reason}{hint}", *sample) from None
        if isinstance(judged, str):
            raise RewardError(name, f"returned {judged}", *sample)
        return judged

    return reward


def _started(name: str, timeout_s: float) -> Child:
    child = Child("rl.reward:judge", name)
    try:
        child.started(timeout_s)
    except ChildFailed as failure:
        hint = ": raise task.reward_timeout_s" if failure.late else ""
        raise ValueError(f"task.reward {name!r} cannot be imported: its module {failure.reason}{hint}") from None
    return child


def judge(name: str) -> Callable[[str, str, str, dict[str, Any]], float | str]:
    """In the child: the user's function; it returns a reward, or what is wrong with what the user's returned."""
    function = _imported(name)
    return lambda *sample: _number(function(*sample))


def _number(value: Any) -> float | str:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        return f"{value!r}, not a finite number"
    if abs(number) > LARGEST:
        return f"{value!r}: rewards are kept in float32 and may be {LARGEST:g} at most, of either sign"
    return number


def _imported(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    found = getattr(importlib.import_module(module), function)
    if inspect.iscoroutinefunction(found) or (callable(found) and inspect.iscoroutinefunction(type(found).__call__)):
        raise TypeError(f"{function} is async, and a reward must be a plain {FORM}")
    try:
        inspect.signature(found).bind("", "", "", {})
    except (TypeError, ValueError) as error:
        raise TypeError(f"{function} must be a {FORM}: {error}") from None
    return found


def check_reward(name: str) -> None:
    """Raises ValueError unless the source of `name` defines it. Reads the source, imports nothing."""
    module, colon, function = name.partition(":")
    if not (colon and function.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise ValueError(f"{name!r}: write it as module:function, for example my_rewards:score, a {FORM}")
    spec = find_module(module)
    if spec is None:
        raise ValueError(f"{name!r}: there is no module {module!r}{_why_missing(module)}")
    if spec.origin is None or not spec.origin.endswith(".py"):
        return
    try:
        tree = ast.parse(Path(spec.origin).read_bytes())
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}: {error.msg}" if isinstance(error, SyntaxError) else f": {error}"
        raise ValueError(f"{name!r}: {spec.origin}{line}") from None
    _check_defined(name, function, spec.origin, tree)


def _check_defined(name: str, function: str, file: str, tree: ast.Module) -> None:
    last = [node for node in tree.body if function in set(bound_names(ast.Module([node], [])))][-1:]
    if last and isinstance(last[0], ast.AsyncFunctionDef) and not last[0].decorator_list:
        raise ValueError(f"{name!r}: {file} defines it with async def, and nothing awaits it: make it a plain {FORM}")
    names = set(bound_names(tree))
    if function not in names and "*" not in names:
        near = difflib.get_close_matches(function, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name!r}: {file} defines no {function!r}{hint}")


def _why_missing(module: str) -> str:
    top = module.partition(".")[0]
    owners = packages_distributions().get(top)
    if find_module(top) is None or top == module or not owners:
        return ": run from the folder that holds it, or install it"
    return f": {top!r} is a package of {owners[0]}'s own: give the folder of your rewards another name"
