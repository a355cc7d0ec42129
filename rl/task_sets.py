"""The task of a run beside the further sets that it is validated on. No torch."""

from __future__ import annotations

from dataclasses import replace

from rl.examples import Example
from rl.problem_columns import group_of
from rl.problems import Problems
from rl.table import Judge
from rl.task_config import TaskConfig
from rl.tasks import Task, located, make_task
from rl.val_config import OWN, ValConfig, task_of

MOST_GROUPS = 64  # more metrics than these nobody reads: the column is another one


def located_sets(val: ValConfig) -> ValConfig:
    """With absolute paths, as `rl.tasks.located`."""
    found = dict(val.sets)
    for name, one in val.sets.items():
        if one.task is not None:
            at = located(TaskConfig(name=one.task, params=one.params))
            found[name] = one.model_copy(update={"task": at.name, "params": at.params})
    return val.model_copy(update={"sets": found})


class TaskSets:
    """`task` is trained and validated on; each set has a task of its own, or validates on the same problems.

    Training leaves out every prompt of a set. Raises ValueError with the key, for rows that are no problem or lack the
    column that metrics are asked for by, and for all of problems that are made. `most`: of made problems no more are made.
    """

    def __init__(
        self, task: TaskConfig, val: ValConfig, seed: int, judge: Judge | None = None, most: int | None = None
    ):
        self.asked = val.asked()
        self._most, sets = most, dict[str, Task]()
        for name, one in val.sets.items():
            split = f"{OWN}/{name}"
            if one.task is not None:
                sets[split] = make_task(task_of(task, one), seed, self._size(split), judge, trains=False)
        held_out = {made.example(OWN, i).text for split, made in sets.items() for i in range(self.there(split, made))}
        sizes = [self._size(split) for split, one in self.asked.items() if split not in sets and one.size != "all"]
        self.task = make_task(task, seed, max(sizes, default=1), judge, frozenset(held_out))
        self._sets = {split: sets.get(split, self.task) for split in self.asked}
        for split, made in self._sets.items():
            self._check_all(split, made)

    def of(self, split: str) -> Task:
        """Of `train`, `val` or `val/NAME`."""
        return self._sets.get(split, self.task)

    def example(self, split: str, index: int) -> Example:
        return self.of(split).example(split.partition("/")[0], index)

    def problems(self) -> Problems:
        """Of the task, and with it of all sets."""
        found = {split: self._problems(split, made) for split, made in self._sets.items()}
        own = found.pop(OWN)
        for name, one in found.items():
            if self._sets[name] is self.task:  # read once
                found[name] = replace(one, sources=())
        return replace(own, sets=found)

    def _problems(self, split: str, made: Task) -> Problems:
        by = self.asked[split].by
        if not by:
            return made.problems()
        examples = [made.example(OWN, i) for i in range(self.there(split, made))]
        try:
            groups = tuple(group_of(example.metadata, by, example.text) for example in examples)
        except ValueError as error:
            raise ValueError(f"{self.asked[split].key}.by: {error}") from None
        if len(set(groups)) > MOST_GROUPS:
            raise ValueError(
                f"{self.asked[split].key}.by: column {by!r} has {len(set(groups))} values, at most {MOST_GROUPS} make "
                f"metrics: choose a column that says where rows are from"
            )
        return replace(made.problems(), groups=groups)

    def _size(self, split: str) -> int:
        """How many are made, where they are made."""
        size = self.asked[split].size
        return 1 if size == "all" else min(size, self._most or size)

    def there(self, split: str, made: Task | None = None) -> int:
        """How many problems of a set are validated on. `made`: its task, while it is being made."""
        made = made or self._sets[split]
        there, size = made.problems().validation, self.asked[split].size
        return self._size(split) if there is None else there if size == "all" else min(size, there)

    def _check_all(self, split: str, made: Task) -> None:
        one = self.asked[split]
        if one.size == "all" and not made.problems().sources:
            raise ValueError(
                f"{one.key}.size 'all' is every row of a table, and these problems are made: give a number"
            )
