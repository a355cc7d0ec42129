"""Config of validation: the task's own problems, and further sets under names of their own. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from codec.config import Section
from rl.task_config import TaskConfig


def _size(value: Any) -> Any:
    if value == "all" or (type(value) is int and value >= 1):
        return value
    raise ValueError(f"{value!r} must be a whole number from 1 on, or 'all'")


Size = Annotated[int | Literal["all"], BeforeValidator(_size)]
OWN = "val"  # the split of the task's own validation problems; a set's is `val/NAME`


class ValSet(Section):
    """One more set of problems to validate on; what it does not say is as for the task's own."""

    task: str | None = Field(
        default=None,
        description="as `task.name`; of `jsonl:PATH` every row, of `hf:` the split `params.val`; default: the task's own "
        "validation problems, to be asked in another way",
    )
    params: dict[str, Any] = Field(default_factory=dict, description="as `task.params`, which are not inherited")
    size: Size | None = Field(default=None, description="problems; default: `val.size`")
    samples: int | None = Field(default=None, ge=1, description="answers to each; default: `val.samples`")
    temperature: float | None = Field(default=None, ge=0, description="0: greedy; default: `rollout.val_temperature`")
    by: str | None = Field(default=None, description='default: `val.by`; `""`: none')


class ValConfig(Section):
    """Validation on prompts that training never sees."""

    every: int = Field(
        default=25, ge=1, description="validate every so many steps, and before the first and after the last"
    )
    size: Size = Field(default=256, description='validation prompts; `"all"`: every row that is kept for validation')
    samples: int = Field(
        default=1,
        ge=1,
        description="answers to each, k: accuracy is their mean, `acc/mean@k`; with `acc/pass@j`, the share of prompts that one "
        "of j answers gets right, for j = 2, 4, … k",
    )
    by: str = Field(
        default="",
        description="column of the rows (a dot goes into a field), e.g. `data_source`: metrics for each of its values besides",
    )
    sets: dict[str, ValSet] = Field(
        default_factory=dict,
        description="further sets by name, each a table `[val.sets.NAME]`; training leaves their prompts out",
    )

    @field_validator("sets")
    @classmethod
    def _names(cls, sets: dict[str, ValSet]) -> dict[str, ValSet]:
        for name in sets:
            if not name or not all(c.isalnum() or c in "_-" for c in name):
                raise ValueError(f"{name!r} names metrics: use letters, digits, '_' and '-'")
        return sets

    def asked(self, temperature: float = 0.0) -> dict[str, AskedSet]:
        """What is validated on, by split, the task's own problems first. `temperature`: where a set has none; only who samples needs one."""
        found = {OWN: AskedSet("", self.size, self.samples, temperature, self.by)}
        for name, one in self.sets.items():
            warm = temperature if one.temperature is None else one.temperature
            by = self.by if one.by is None else one.by
            found[f"{OWN}/{name}"] = AskedSet(name, one.size or self.size, one.samples or self.samples, warm, by)
        return found


@dataclass(frozen=True)
class AskedSet:
    """One set as it is asked for. `name`: "" for the task's own problems."""

    name: str
    size: int | Literal["all"]
    samples: int
    temperature: float
    by: str

    @property
    def key(self) -> str:
        """Where the config says it."""
        return f"val.sets.{self.name}" if self.name else "val"

    @property
    def count(self) -> int:
        """Raises ValueError where it is for the data to say, which whoever asks for a number does not read."""
        if self.size == "all":
            raise ValueError(f"{self.key}.size is 'all', and no data is read here: say how many with {self.key}.size=N")
        return self.size


def task_of(task: TaskConfig, one: ValSet) -> TaskConfig:
    """The task whose validation problems are the set's."""
    return task if one.task is None else task.model_copy(update={"name": one.task, "params": one.params})
