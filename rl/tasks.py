"""Tasks: prompts by seed and a score for an answer. One small interface, one registry. No torch.

Train and validation prompts never overlap, whatever the seed: `sums`, `jsonl` and `hf` split by a hash of
the problem itself, or drop a training problem that is in a validation set of its own; so does `reasoning_gym`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from rl.calculator_task import Calculator
from rl.environment import check_environment
from rl.examples import Example
from rl.gym_task import ReasoningGym, check_gym, gym_names
from rl.hub_rows import check_hub_rows, hub_rows, is_local
from rl.jsonl_rows import first_row, read_jsonl
from rl.making import Making
from rl.problem_columns import prompt_column
from rl.problems import Problems
from rl.reward_function import check_reward
from rl.sums_task import Sums
from rl.table import Judge
from rl.task_config import TableParams, TaskConfig
from rl.verifiers_task import VerifiersTask, check_verifiers


class Task(Protocol):
    """`example` is a pure function of (seed, split, index); `score` is 1.0 for right, 0.0 for wrong."""

    def example(self, split: str, index: int) -> Example: ...

    def score(self, example: Example, text: str) -> float: ...

    def problems(self) -> Problems:
        """How many there are to validate on, and what they were read from."""
        ...


def _build_sums(argument: str, config: TaskConfig, making: Making) -> Task:
    return Sums(making.seed)


def _build_calculator(argument: str, config: TaskConfig, making: Making) -> Task:
    return Calculator(making.seed)


def _build_gym(argument: str, config: TaskConfig, making: Making) -> Task:
    return ReasoningGym(argument, config.params, making.seed, making.val_size, making.held_out)


def _build_jsonl(argument: str, config: TaskConfig, making: Making) -> Task:
    columns = _columns(config)
    if not making.trains:
        return making.table(None, read_jsonl(argument), columns)
    val = None if columns.val is None else read_jsonl(columns.val)
    return making.table(read_jsonl(argument), val, columns)


def _build_hf(argument: str, config: TaskConfig, making: Making) -> Task:
    columns = _columns(config)
    val = None if columns.val is None else hub_rows(argument, columns.val)
    return making.table(hub_rows(argument, columns.train) if making.trains else None, val, columns)


def _build_verifiers(argument: str, config: TaskConfig, making: Making) -> Task:
    return VerifiersTask(argument, config, making)


TASKS = {
    "sums": _build_sums,
    "calculator": _build_calculator,
    "reasoning_gym": _build_gym,
    "jsonl": _build_jsonl,
    "hf": _build_hf,
    "verifiers": _build_verifiers,
}
PLAIN = ("sums", "calculator")  # their names are all that there is to say
TABLES = ("jsonl", "hf")
ROWS = (*TABLES, "verifiers")  # whose problems are all read before a run
_OURS = frozenset(  # of apply_chat_template
    "conversation chat_template add_generation_prompt continue_final_message tokenize padding truncation max_length "
    "return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs".split()
)


def make_task(
    config: TaskConfig,
    seed: int,
    val_size: int,
    judge: Judge | None = None,
    held_out: frozenset[str] = frozenset(),
    trains: bool = True,
) -> Task:
    """What is given beside the config is told in `Making`. Raises ValueError with the rows that are no problem."""
    kind, _, argument = config.name.partition(":")
    return TASKS[kind](argument, config, Making(seed, val_size, judge, held_out, trains))


def located(config: TaskConfig) -> TaskConfig:
    """With absolute paths: an engine may have another working directory."""
    kind, _, argument = config.name.partition(":")
    params = dict(config.params)
    if config.reward and config.reward.rpartition(":")[0].endswith(".py"):
        reward = str(Path(config.reward).expanduser().absolute())
        config = config.model_copy(update={"reward": reward})
    if kind == "jsonl" and params.get("val"):
        params["val"] = str(Path(params["val"]).expanduser().absolute())
    if kind == "jsonl" or (kind == "hf" and is_local(argument)):
        argument = str(Path(argument).expanduser().absolute())
        return config.model_copy(update={"name": f"{kind}:{argument}", "params": params})
    return config


def check_set(config: TaskConfig, key: str) -> None:
    """As `check_task`, of a further set to validate on, which the config says at `key`."""
    kind = config.name.partition(":")[0]
    _check(f"{key}.task", _check_name, config.name)
    if kind in TABLES:
        _check(f"{key}.params", _check_set_params, config)
    _check(f"{key}.params", _check_params, config)


def _check_set_params(config: TaskConfig) -> None:
    kind = config.name.partition(":")[0]
    if "train" in config.params:
        raise ValueError("train: nothing of a set is trained on: leave it out")
    if kind == "jsonl" and "val" in config.params:
        raise ValueError("val: all rows of the file are the set: leave it out")
    if kind == "hf" and "val" not in config.params:
        raise ValueError("val is missing: say which split is the set, e.g. test")


def check_task(config: TaskConfig) -> None:
    """Raises ValueError, with the key and what is allowed, unless the task is there. Imports nothing heavy."""
    _check("task.name", _check_name, config.name)
    _check("task.params", _check_params, config)
    _check("task.overlong", _check_overlong, config)
    _check("task.template_options", _check_template_options, config.template_options)
    if config.reward is not None:
        _check("task.reward", check_reward, config.reward)
    if config.environment is not None:
        _check("task.environment", check_environment, config.environment)
    if config.name.startswith("verifiers:"):
        for key in ("reward", "environment"):
            if getattr(config, key) is not None:
                raise ValueError(
                    f"task.{key}: {config.name!r} answers turns and judges by itself: leave task.{key} out"
                )


def _check(key: str, check: Callable[[Any], None], value: Any) -> None:
    try:
        check(value)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _check_name(name: str) -> None:
    kind, _, argument = name.partition(":")
    if kind not in TASKS:
        near = difflib.get_close_matches(kind, TASKS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"unknown task {name!r}: use sums, calculator, reasoning_gym:NAME, jsonl:PATH, hf:NAME or verifiers:NAME{hint}"
        )
    if kind in PLAIN and argument:
        raise ValueError(f"unknown task {name!r}: {kind} takes no argument")
    if kind == "jsonl" and not Path(argument).expanduser().is_file():
        raise ValueError(f"no such file: {argument!r}")
    if kind == "hf":
        check_hub_rows(argument)
    if kind == "verifiers":
        check_verifiers(argument)
    if kind == "reasoning_gym" and argument not in gym_names():
        near = difflib.get_close_matches(argument, gym_names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"its tasks are {', '.join(sorted(gym_names()))}"
        raise ValueError(f"reasoning_gym has no task {argument!r}; {hint}")


def _check_params(config: TaskConfig) -> None:
    kind, _, argument = config.name.partition(":")
    if kind in PLAIN and config.params:
        raise ValueError(f"{kind} takes none, got {', '.join(config.params)}")
    if kind == "reasoning_gym" and config.params:
        check_gym(argument, config.params)
    if kind not in TABLES:
        return
    columns = _columns(config)
    if kind == "hf" and columns.val and Path(argument).expanduser().is_file():
        raise ValueError(
            f"val: the file {argument!r} has no split {columns.val!r}: give the folder of all splits' files"
        )
    if kind == "jsonl":
        for path in filter(None, (argument, columns.val)):
            if not Path(path).expanduser().is_file():
                raise ValueError(f"val: no such file: {path!r}")
            if (found := first_row(path)) is not None:
                prompt_column(*found, columns)


def _check_overlong(config: TaskConfig) -> None:
    kind = config.name.partition(":")[0]
    if config.overlong == "drop" and kind not in ROWS:
        raise ValueError(
            f"'drop' leaves rows of a table out, and {kind} makes its problems: leave it at 'error', and raise "
            f"grpo.max_prompt_length or ask for shorter problems in task.params"
        )


def _check_template_options(options: dict[str, Any]) -> None:
    if taken := sorted(set(options) & _OURS):
        raise ValueError(f"{', '.join(taken)} is for the tokenizer, and set by the run: leave it out")


def _columns(config: TaskConfig) -> TableParams:
    try:
        return TableParams.model_validate(config.params)
    except ValidationError as error:
        wrong = error.errors()[0]
        allowed = ", ".join(TableParams.model_fields)
        raise ValueError(f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']} (allowed: {allowed})") from None
