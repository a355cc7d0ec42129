"""Environments of the package `verifiers` by name: problems, answers to turns, and the rubric. No torch.

All that is the package's happens in a process of its own (`rl.verifiers_process`), one beside each engine.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rl.child import IMPORT_S, ChildFailed, Service
from rl.data_rows import DataRows
from rl.environment import reply_of
from rl.examples import Example
from rl.making import Making
from rl.messages import Message
from rl.module_source import check_defines, find_module
from rl.problems import Problems
from rl.reward_function import Asked, Said
from rl.task_config import TableParams, TaskConfig


class VerifiersTask:
    """The environment of `verifiers:NAME`. Raises ValueError if it cannot be loaded, or cannot be run here."""

    together = False

    def __init__(self, name: str, config: TaskConfig, making: Making):
        what, key = f"task.name {config.name!r}", "task.environment_timeout_s"
        arguments = name, json.dumps(config.params), str(config.max_turns)
        self._service = Service(what, key, config.environment_timeout_s, "rl.verifiers_process:host", *arguments)
        try:
            told = self._service.ask(max(IMPORT_S, config.environment_timeout_s), "rows")
        except ChildFailed as failure:
            raise ValueError(f"{what} {failure.reason}") from None
        check_tools(config, told["tools"])
        rows = {split: DataRows(f"{config.name} ({split})", found) for split, found in told["rows"].items()}
        columns = TableParams(prompt="prompt", answer="answer")
        train, val = rows["train"], rows.get("val")
        alone = None, train if val is None else val
        self._table = making.table(*((train, val) if making.trains else alone), columns)

    def example(self, split: str, index: int) -> Example:
        return self._table.example(split, index)

    def problems(self) -> Problems:
        return self._table.problems()

    def score(self, example: Example, text: str) -> float:
        """Of an answer of one turn, by the rubric."""
        asked = example.prompt, text, example.answer, example.metadata | {"truncated": False}
        (said,) = self.judge([asked], self._service.timeout_s)
        return said.get("number", 0.0)

    def respond(self, messages: list[Message], metadata: dict[str, Any]) -> list[Message] | None:
        """Raises EnvironmentFailed."""
        return reply_of(self._service, messages, "respond", messages, metadata)

    def judge(self, asked: list[Asked], seconds: float) -> list[Said]:
        return self._service.ask(seconds, "judge", asked)


def check_tools(config: TaskConfig, tools: list[dict[str, Any]]) -> None:
    """Raises ValueError unless the policy is shown the environment's tools: by the chat template, as it learned to call them."""
    if tools and not (config.chat and config.template_options.get("tools") == tools):
        raise ValueError(
            f"task.name {config.name!r} has tools, which the policy has to be shown: set task.chat=true and "
            f"task.template_options={{tools = {json.dumps(tools)}}} (in TOML, `:` is `=`)"
        )


def check_verifiers(name: str) -> None:
    """Raises ValueError unless the package is installed, and the environment's module is there. Imports neither."""
    if find_module("verifiers") is None:
        raise ValueError("it needs the package verifiers: pip install 'northstar[verifiers]'")
    if find_module("verifiers.legacy") is None:
        raise ValueError(
            f"verifiers {_installed()} is installed, and the environments that answer turns are in 0.3: "
            f"pip install 'northstar[verifiers]'"
        )
    module = name.replace("-", "_").split("/")[-1]  # as the package finds it
    if not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(f"{name!r} is no name of an environment: write it as verifiers:NAME or verifiers:OWNER/NAME")
    spec = find_module(module)
    if spec is None or spec.origin is None:
        raise ValueError(
            f"there is no module {module!r}: install the environment's package (vf-install {name}), or run from the "
            f"folder that holds it"
        )
    check_defines(name, "load_environment", Path(spec.origin))


def _installed() -> str:
    try:
        return version("verifiers")
    except PackageNotFoundError:
        return "(of unknown version)"
