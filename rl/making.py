"""What a task is made with, beside its config. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from rl.data_rows import DataRows
from rl.table import Judge, Table
from rl.task_config import TableParams


@dataclass(frozen=True)
class Making:
    """`trains`: else the task is a set of its own, and all of it is validated on."""

    seed: int
    val_size: int  # of made problems, how many are validated on
    judge: Judge | None  # says which rows of a table are left out
    held_out: frozenset[str]  # prompts that others validate on, and training leaves out
    trains: bool

    def table(self, train: DataRows | None, val: DataRows | None, columns: TableParams) -> Table:
        return Table(train, val, columns, self.seed, self.judge, self.held_out)
