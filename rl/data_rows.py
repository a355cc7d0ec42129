"""The rows of one file or split, and what each is called in an error. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from rl.messages import Prompt, as_text
from rl.problem_columns import problem_of, top
from rl.task_config import TableParams

SHOWN = 5  # faults that an error spells out


@runtime_checkable
class _Columnar(Protocol):
    """A datasets.Dataset, as far as its columns go."""

    def select_columns(self, column_names: list[str]) -> Sequence[dict[str, Any]]: ...

    def __getitem__(self, key: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class DataRows:
    """`rows` is a list, or a datasets.Dataset, which reads a row when it is asked for."""

    name: str  # of the file, or of data set and split
    rows: Sequence[dict[str, Any]]
    lines: Sequence[int] | None = None  # of a file: the line of each row, from 1
    digest: str | None = None  # of a file's bytes

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, index: int) -> str:
        return f"{self.name}, row {index}" if self.lines is None else f"{self.name}, line {self.lines[index]}"

    def problems(self, columns: TableParams) -> list[tuple[Prompt, str]]:
        """Prompt and answer of every row. Raises ValueError with the rows that have none."""
        found, faults = [], []
        for index, row in enumerate(self._narrow(columns)):
            try:
                found.append(problem_of(self.place(index), row, columns))
            except ValueError as error:
                faults.append(str(error))
        refuse(faults)
        return found

    def _narrow(self, columns: TableParams) -> Sequence[dict[str, Any]]:
        """Of a data set the two columns alone: others may hold images, and each row would decode them."""
        if not isinstance(self.rows, _Columnar):
            return self.rows
        names = filter(None, (columns.prompt, columns.answer))
        return self.rows.select_columns(sorted({top(name, self.rows[0]) for name in names}))


def refuse(faults: Sequence[str], closing: str = "") -> None:
    """Raises ValueError with the first faults, how many more there are, and `closing`, if there is any."""
    if not faults:
        return
    more = [f"… and {len(faults) - SHOWN} more rows"] if len(faults) > SHOWN else []
    raise ValueError("\n".join([*faults[:SHOWN], *more, *filter(None, [closing])]))


def digest_of_bytes(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digest_of_problems(problems: Sequence[tuple[Prompt, str]]) -> str:
    """Of prompts and answers in their order, each with its length before it: no two lists run into one."""
    hashed = hashlib.blake2b(digest_size=16)
    for part in (part for pair in problems for part in pair):
        data = as_text(part).encode()
        hashed.update(len(data).to_bytes(8, "little") + data)
    return hashed.hexdigest()
