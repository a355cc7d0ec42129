"""An environment of the user's: a function that answers the policy's turns, in a process of its own. No torch."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rl.child import Child, ChildFailed
from rl.messages import Message, as_text
from rl.module_source import check_defines, find_module

_FORM = "function(messages: list, metadata: dict) -> list | None"
_IMPORT_S = 60.0  # its module may import much, on a busy machine


class EnvironmentFailed(RuntimeError):
    """An environment whose answer no policy can be shown, or that has none: the run stops."""


class OwnEnvironment:
    """The function `name`, which is asked about one turn at a time. Raises ValueError if it cannot be imported."""

    def __init__(self, name: str, timeout_s: float):
        self.name, self.timeout_s = name, timeout_s
        self._child = Child("rl.environment:responder", name)
        try:
            self._child.started(max(_IMPORT_S, timeout_s))
        except ChildFailed as failure:
            raise ValueError(f"task.environment {name!r} cannot be imported: its module {failure.reason}") from None

    def respond(self, messages: list[Message], metadata: dict[str, Any]) -> list[Message] | None:
        """Raises EnvironmentFailed."""
        try:
            return self._child.ask(self.timeout_s, messages, metadata)
        except ChildFailed as failure:
            hint = " (task.environment_timeout_s)" if failure.late else ""
            to = f"to {as_text(messages)[-400:]}"
            raise EnvironmentFailed(f"task.environment {self.name!r} {failure.reason}{hint}, {to}") from None


def responder(name: str) -> Callable[..., Any]:
    """In the child: the user's function."""
    module, _, function = name.partition(":")
    found = getattr(importlib.import_module(module), function)
    try:
        inspect.signature(found).bind([], {})
    except (TypeError, ValueError) as error:
        raise TypeError(f"{function} must be a {_FORM}: {error}") from None
    if inspect.iscoroutinefunction(found):
        raise TypeError(f"{function} is async, and an environment must be a plain {_FORM}")
    return found


def check_environment(name: str) -> None:
    """Raises ValueError unless the source of `name` defines it. Reads the source, imports nothing."""
    module, colon, function = name.partition(":")
    if not (colon and function.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise ValueError(f"{name!r}: write it as module:function, for example my_tools:respond, a {_FORM}")
    spec = find_module(module)
    if spec is None:
        raise ValueError(f"{name!r}: there is no module {module!r}: run from the folder that holds it, or install it")
    if spec.origin is not None and spec.origin.endswith(".py"):
        check_defines(name, function, Path(spec.origin))
