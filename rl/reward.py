"""What an answer is worth: the task's own score, or a function of the user's. No torch."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, Protocol

from rl.examples import Example

Reward = Callable[[Example, str, bool], float]  # (example, answer, was it cut at the length limit)
FORM = "function(prompt: str, response: str, answer: str, metadata: dict) -> float"


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


def make_reward(name: str | None, task: Scorer) -> Reward:
    """The task's score, 0 for an answer that was cut; or the function `name`, which also judges cut ones.

    Raises ValueError if the function cannot be imported or takes other arguments.
    """
    if name is None:
        return lambda example, text, cut: 0.0 if cut else task.score(example, text)
    function = _imported(name)

    def reward(example: Example, text: str, cut: bool) -> float:
        sample = (example.prompt, text, example.answer)
        try:
            value = function(*sample, dict(example.metadata) | {"truncated": cut})
        except Exception as error:
            raise RewardError(name, f"raised {type(error).__name__}: {error}", *sample) from error
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise RewardError(name, f"returned {value!r}, not a finite number", *sample)
        return number

    return reward


def _imported(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the module does when it is imported
        raise ValueError(f"task.reward {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    try:
        inspect.signature(found).bind("", "", "", {})
    except (TypeError, ValueError) as error:
        raise ValueError(f"task.reward {name!r} must be a {FORM}: {error}") from None
    return found


def check_reward(name: str) -> None:
    """Raises ValueError unless the source of `name` defines it. Reads the source, imports nothing."""
    module, colon, function = name.partition(":")
    if not (colon and function.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise ValueError(f"{name!r}: write it as module:function, for example my_rewards:score, a {FORM}")
    spec = _find(module)
    if spec is None:
        raise ValueError(f"{name!r}: there is no module {module!r}: run from the folder that holds it, or install it")
    if spec.origin is None or not spec.origin.endswith(".py"):
        return
    try:
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise ValueError(f"{name!r}: {spec.origin}, line {error.lineno}: {error.msg}") from None
    names = set(_defined(tree))
    if function not in names and "*" not in names:
        near = difflib.get_close_matches(function, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name!r}: {spec.origin} defines no {function!r}{hint}")


def _find(module: str) -> ModuleSpec | None:
    """Like importlib.util.find_spec, which would import the packages around `module`."""
    first, *rest = module.split(".")
    spec = importlib.util.find_spec(first)
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(part, list(spec.submodule_search_locations))
    return spec


def _defined(tree: ast.AST) -> Iterator[str]:
    """Names at the top of a module, those under an if or a try included; `*` if it imports all of another."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from _defined(node)
