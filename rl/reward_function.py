"""A reward function of the user's own: found in its source before a run, called in a process of its own. No torch.

What it returns is a number, or parts by name; one that is async judges all answers of a request at the same time.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Awaitable, Callable
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any, TypedDict

from rl.messages import Prompt
from rl.module_source import check_defines, find_module

FORM = (
    "function(prompt: str | list, response: str, answer: str, metadata: dict) -> float or dict of parts, async or not"
)
LARGEST = 1e15  # squares of a whole batch still add up in float32, in which a batch keeps rewards
_RAISED = (Exception, SystemExit, KeyboardInterrupt)  # sys.exit() too is the function's answer
Asked = tuple[Prompt, str, str, dict[str, Any]]  # prompt, response, answer, metadata with `truncated`


class Said(TypedDict, total=False):
    """Of one answer: one of these, or parts beside the number that they came to."""

    number: float
    parts: dict[str, float]
    failed: str


def judge(name: str) -> Callable[[list[Asked] | None, float], list[Said] | bool]:
    """In the child: called with answers and the seconds for each; with None it says whether the function is async."""
    function = _imported(name)
    together = any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))
    runner = asyncio.Runner()  # one loop for all: clients that the module holds live on

    def judged(asked: list[Asked] | None, seconds: float) -> list[Said] | bool:
        if asked is None:
            return together
        if together:
            return runner.run(_all(function, asked, seconds))
        return [_alone(function, sample, seconds, runner) for sample in asked]

    return judged


async def _all(function: Callable[..., Any], asked: list[Asked], seconds: float) -> list[Said]:
    return list(await asyncio.gather(*(_awaited(function, sample, seconds) for sample in asked)))


async def _awaited(function: Callable[..., Any], sample: Asked, seconds: float) -> Said:
    try:
        value = await _in_time(function(*sample), seconds)
    except _RAISED as error:
        return _failure(error, seconds)
    return as_said(value)


def _alone(function: Callable[..., Any], sample: Asked, seconds: float, runner: asyncio.Runner) -> Said:
    """Outside of the loop: a plain function may run one of its own."""
    try:
        value = function(*sample)
        if inspect.isawaitable(value):
            value = runner.run(_in_time(value, seconds))
    except _RAISED as error:
        return _failure(error, seconds)
    return as_said(value)


async def _in_time(value: Awaitable[Any], seconds: float) -> Any:
    return await asyncio.wait_for(value, seconds)


def late(seconds: float) -> str:
    return f"was not done after {seconds:g} s (task.reward_timeout_s)"


def _failure(error: BaseException, seconds: float) -> Said:
    if isinstance(error, TimeoutError) and not str(error):  # of `wait_for`
        return {"failed": late(seconds)}
    return {"failed": f"raised {type(error).__name__}: {error}"}


def as_said(value: Any) -> Said:
    """A number, or a dict of parts, checked."""
    try:
        if not isinstance(value, dict):
            return {"number": _number(value)}
        parts = {_part(name): _number(part) for name, part in value.items()}
    except ValueError as wrong:
        return {"failed": f"returned {wrong}"}
    return {"parts": parts} if parts else {"failed": "returned no parts"}


def _part(name: Any) -> str:
    if not (isinstance(name, str) and re.fullmatch(r"[\w.-]+", name)):
        raise ValueError(f"a part called {name!r}: names are letters, digits, _ . -")
    return name


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{value!r}, not a finite number")
    if abs(number) > LARGEST:
        raise ValueError(f"{value!r}: rewards are kept in float32 and may be {LARGEST:g} at most, of either sign")
    return number


def _imported(name: str) -> Callable[..., Any]:
    module, _, function = name.rpartition(":")
    found = getattr(_of_file(Path(module)) if module.endswith(".py") else importlib.import_module(module), function)
    try:
        inspect.signature(found).bind("", "", "", {})
    except (TypeError, ValueError) as error:
        raise TypeError(f"{function} must be a {FORM}: {error}") from None
    return found


def _of_file(file: Path) -> Any:
    """The module of a file; it may import what lies beside it."""
    sys.path.append(str(file.parent.absolute()))
    spec = importlib.util.spec_from_file_location(f"reward_of_{file.stem}", file)
    assert spec and spec.loader, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles of the file look it up
    spec.loader.exec_module(module)
    return module


def check_reward(name: str) -> None:
    """Raises ValueError unless the source of `name` defines it. Reads the source, imports nothing."""
    module, colon, function = name.rpartition(":")
    if module.endswith(".py") and function.isidentifier():
        check_defines(name, function, Path(module).expanduser())
        return
    if not (colon and function.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise ValueError(
            f"{name!r}: write it as module:function or file.py:function, for example my_rewards:score, a {FORM}"
        )
    spec = find_module(module)
    if spec is None:
        raise ValueError(f"{name!r}: there is no module {module!r}{_why_missing(module)}")
    if spec.origin is not None and spec.origin.endswith(".py"):
        check_defines(name, function, Path(spec.origin))


def _why_missing(module: str) -> str:
    top = module.partition(".")[0]
    owners = packages_distributions().get(top)
    if find_module(top) is None or top == module or not owners:
        return ": run from the folder that holds it, or install it"
    return f": {top!r} is a package of {owners[0]}'s own: give the folder of your rewards another name"
