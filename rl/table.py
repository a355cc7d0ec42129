"""Problems in the rows of a table: a jsonl file, or a data set of the `datasets` library. No torch."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from rl.answers import final_answer, is_number, normal, same
from rl.config import TableParams
from rl.examples import Example
from rl.symbolic import Formulas, comparable

Rows = Sequence[dict[str, Any]]  # a list, or a datasets.Dataset, which reads a row when it is asked for
PROMPTS = ("prompt", "question", "problem")


class Table:
    """Training and validation problems never overlap: neither a row nor its prompt is in both splits.

    `val` are rows kept for validation; without them about a tenth of `train` is, by a hash of the prompt.
    How answers are compared: `rl.answers`. `name` is for errors. Raises ValueError for columns that are not there
    and for a split without rows.
    """

    def __init__(self, name: str, train: Rows, val: Rows | None, columns: TableParams, seed: int):
        if not len(train) or (val is not None and not len(val)):
            raise ValueError(f"{name} has no rows")
        self.columns = columns.model_copy(update={"prompt": prompt_column(name, train[0], columns)})
        self._name, self._seed, self.formulas = name, seed, Formulas()
        prompts = [self._text(row, self.columns.prompt) for row in train]
        if val is None:
            held_out = {prompt for prompt in prompts if _held_out(prompt)}
            kept = [i for i, prompt in enumerate(prompts) if prompt in held_out]
        else:
            held_out = {self._text(row, self.columns.prompt) for row in val}
            kept = list(range(len(val)))
        others = [i for i, prompt in enumerate(prompts) if prompt not in held_out]
        self._splits = {"train": (train, others), "val": (train if val is None else val, kept)}
        for split, (_, indices) in self._splits.items():
            if not indices:
                raise ValueError(f"{name}: no problem falls in the {split} split; it needs more rows")

    def example(self, split: str, index: int) -> Example:
        """The metadata of an example is its whole row."""
        rows, indices = self._splits[split]
        epoch, position = divmod(index, len(indices))
        if split == "train":
            position = _permutation(len(indices), self._seed, epoch)[position]
        row = rows[indices[position]]
        return Example(self._text(row, self.columns.prompt), self._text(row, self.columns.answer), row)

    def score(self, example: Example, text: str) -> float:
        gold = normal(final_answer(example.answer))
        response = normal(final_answer(text, number=is_number(gold)))
        if same(gold, response):
            return 1.0
        if self.columns.answers == "text" or not comparable(gold, response, self.columns.answers == "math"):
            return 0.0
        return float(self.formulas.same(gold, response))

    def _text(self, row: dict[str, Any], column: str) -> str:
        return text_of(self._name, row, column)


def prompt_column(name: str, row: dict[str, Any], columns: TableParams) -> str:
    """The column of the prompts. Raises ValueError if it, or that of the answers, is not in `row`."""
    found = columns.prompt or next((column for column in PROMPTS if column in row), None)
    if found is None:
        raise ValueError(
            f"{name} has no column {', '.join(PROMPTS[:-1])} or {PROMPTS[-1]}: set task.params.prompt to one of "
            f"{', '.join(row)}"
        )
    for column in (found, columns.answer):
        text_of(name, row, column)
    return found


def text_of(name: str, row: dict[str, Any], column: str) -> str:
    """The value of a column, or with dots of a field inside one; of a chat of one message its content."""
    value: Any = row
    for part in [column] if column in row else column.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(
                f"{name} has no column {column!r}; it has {', '.join(row)}: "
                f"set task.params.prompt and task.params.answer"
            )
        value = value[part]
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and value[0].get("role") == "user":
        value = value[0].get("content")
    if not isinstance(value, str | int | float):
        raise ValueError(f"{name}: column {column!r} holds {type(value).__name__} ({str(value)[:60]}), not text")
    return str(value)


def read_jsonl(path: str) -> list[dict[str, Any]]:
    """One object a line; empty lines do not count. Raises ValueError with the line that is none."""
    rows = []
    for number, line in enumerate(Path(path).expanduser().read_text().splitlines(), start=1):
        if line.strip():
            rows.append(_object(path, number, line))
    return rows


def first_row(path: str) -> dict[str, Any] | None:
    """Of a jsonl file, without reading the rest of it; None if it is empty."""
    with Path(path).expanduser().open() as file:
        return next((_object(path, n, line) for n, line in enumerate(file, start=1) if line.strip()), None)


def _object(path: str, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number}: {type(row).__name__}, not an object")
    return row


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> list[int]:
    order = list(range(n))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order


def _held_out(text: str) -> bool:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()[0] < 26  # about 10 %
