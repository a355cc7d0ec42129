"""A look at all problems of a task before a run: every row of a table, some of those that are made. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rl.config import GrpoConfig
from rl.messages import Prompt
from rl.problems import Problems
from rl.prompts import PromptEncoder
from rl.task_config import TaskConfig
from rl.task_sets import TaskSets
from rl.val_config import ValConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = 64  # made problems looked at, of each split


def survey(
    task: TaskConfig, val: ValConfig, grpo: GrpoConfig, folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Problems:
    """`folder` and `tokenizer` are the model's. Raises ValueError with the rows, or the problem, that a run could not be shown."""
    encoder = PromptEncoder(folder, task, grpo.max_prompt_length, tokenizer)
    _ = encoder.stops  # raises
    tasks = TaskSets(task, val, seed, encoder.judge, SAMPLE)  # making a problem may take long
    for split, one in {"train": None, **tasks.asked}.items():
        made = tasks.of(split)
        if made.problems().sources:  # each row was looked at
            continue
        key, count = ("task.name", min(grpo.train_batch_size, SAMPLE)) if one is None else (one.key, tasks.there(split))
        _check_made(
            f"{key} {task.name!r}" if made is tasks.task else key,
            encoder,
            [tasks.example(split, i).prompt for i in range(count)],
        )
    return tasks.problems()


def _check_made(where: str, encoder: PromptEncoder, prompts: list[Prompt]) -> None:
    try:
        encoder.encode(prompts)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
