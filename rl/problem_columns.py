"""The two columns of a row that make a problem: its prompt, text or a chat, and its answer. No torch."""

from __future__ import annotations

import math
from typing import Any

from rl.messages import Prompt, checked_chat
from rl.task_config import TableParams

PROMPTS = ("prompt", "question", "problem", "messages")


def prompt_column(where: str, row: dict[str, Any], columns: TableParams) -> str:
    """The column of the prompts. Raises ValueError if it, or that of the answers, is not in `row`."""
    found = columns.prompt or next((column for column in PROMPTS if column in row), None)
    if found is None:
        raise ValueError(
            f"{where}: no column {', '.join(PROMPTS[:-1])} or {PROMPTS[-1]}: set task.params.prompt to one of "
            f"{', '.join(row)}"
        )
    for key, column in (("prompt", found), ("answer", columns.answer)):
        _value(where, row, column, key)
    return found


def problem_of(where: str, row: dict[str, Any], columns: TableParams) -> tuple[Prompt, str]:
    """Prompt and answer: values of columns, or with dots of a field inside one. Of a chat of one message its content.

    Text, or a number that is written as text; the prompt may be a chat. Raises ValueError, with `where`, for anything
    that a policy cannot be shown or an answer cannot be compared with.
    """
    assert columns.prompt is not None  # looked for by then
    prompt, answer = (
        _value(where, row, column, key) for key, column in (("prompt", columns.prompt), ("answer", columns.answer))
    )
    fault = _fault_of_chat(prompt) if isinstance(prompt, list) else _fault(prompt)
    for key, column, found in (("prompt", columns.prompt, fault), ("answer", columns.answer, _fault(answer))):
        if found:
            raise ValueError(
                f"{where}: column {column!r} {found}: mend or remove the row, or set task.params.{key} to another column"
            )
    if not isinstance(prompt, list):
        return str(prompt), str(answer)
    chat = checked_chat(prompt)
    return (chat[0]["content"] if [m["role"] for m in chat] == ["user"] else chat), str(answer)


def group_of(row: dict[str, Any], column: str, prompt: str) -> str:
    """The value of a column as a part of a metric's name. Raises ValueError, with `prompt`, where it is none."""
    value: Any = row
    for part in [column] if column in row else column.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(
            f"the row of {prompt[:60]!r} has no text or whole number in column {column!r} ({value!r}); it has "
            f"{', '.join(row)}"
        )
    return metric_name(str(value))


def metric_name(text: str) -> str:
    """`text` as one part of the name of a metric."""
    return "_".join(text.replace(":", "_").replace("/", "_").split())


def top(column: str, row: dict[str, Any]) -> str:
    """The column of `row` that `column` is, or lies in."""
    return column if column in row else column.split(".")[0]


def _value(where: str, row: dict[str, Any], column: str, key: str) -> Any:
    value: Any = row
    for part in [column] if column in row else column.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(
                f"{where}: no column {column!r}; it has {', '.join(row)}: set task.params.{key}, or mend the row"
            )
        value = value[part]
    return value


def _fault_of_chat(value: Any) -> str | None:
    try:
        chat = checked_chat(value)
    except ValueError as error:
        return str(error)
    faults = ((i, _fault_of_text(message["content"])) for i, message in enumerate(chat))
    return next((f"message {i} {fault}" for i, fault in faults if fault), None)


def _fault(value: Any) -> str | None:
    if value is None:
        return "is null"
    if not isinstance(value, str | int | float):
        return f"holds {type(value).__name__} ({str(value)[:60]}), not text"
    if isinstance(value, float) and not math.isfinite(value):
        return f"holds {value}, not a finite number"
    return _fault_of_text(str(value))


def _fault_of_text(text: str) -> str | None:
    head = repr(text[:60])
    if not text.strip():
        return f"is empty ({head})"
    if "\0" in text:
        return f"holds a NUL at character {text.index(chr(0))} ({head})"
    try:
        text.encode()
    except UnicodeEncodeError as error:  # valid JSON, but no character, and nothing can encode it
        return f"holds half of a surrogate pair, {text[error.start]!r}, at character {error.start} ({head})"
    return None
