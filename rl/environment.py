"""An environment of the user's: a function that answers the policy's turns, in a process of its own. No torch."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rl.child import ChildFailed, Service
from rl.messages import Message, as_text
from rl.module_source import check_defines, find_module

_FORM = "function(messages: list, metadata: dict) -> list | None"


class EnvironmentFailed(RuntimeError):
    """An environment whose answer no policy can be shown, or that has none: the run stops."""


class OwnEnvironment:
    """The function `name`, which is asked about one turn at a time. Raises ValueError if it cannot be imported."""

    def __init__(self, name: str, timeout_s: float):
        what, key = f"task.environment {name!r}", "task.environment_timeout_s"
        self._service = Service(what, key, timeout_s, "rl.environment:responder", name)

    def respond(self, messages: list[Message], metadata: dict[str, Any]) -> list[Message] | None:
        """Raises EnvironmentFailed."""
        return reply_of(self._service, messages, messages, metadata)


def reply_of(service: Service, messages: list[Message], *values: Any) -> list[Message] | None:
    """What the environment behind `service` answers to `messages`, asked with `values`. Raises EnvironmentFailed."""
    try:
        return service.ask(service.timeout_s, *values)
    except ChildFailed as failure:
        hint = f" ({service.key})" if failure.late else ""
        raise EnvironmentFailed(f"{service.what} {failure.reason}{hint}, to {as_text(messages)[-400:]}") from None
    except ValueError as error:  # there is no process that could be asked
        raise EnvironmentFailed(f"{service.what} {error}") from None


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
