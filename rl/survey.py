"""A look at all problems of a task before a run: every row of a table, some of those that are made. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rl.config import GrpoConfig
from rl.messages import Prompt
from rl.problems import Problems
from rl.prompts import PromptEncoder
from rl.task_config import TaskConfig
from rl.tasks import make_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = 64  # made problems looked at, of each split


def survey(
    task: TaskConfig, grpo: GrpoConfig, folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int, val_size: int
) -> Problems:
    """`folder` and `tokenizer` are the model's. Raises ValueError with the rows, or the problem, that a run could not be shown."""
    encoder = PromptEncoder(folder, task, grpo.max_prompt_length, tokenizer)
    _ = encoder.stops  # raises
    val_size = min(val_size, SAMPLE)  # a table does not ask; making a problem may take long
    made = make_task(task, seed, val_size, encoder.judge)
    found = made.problems()
    if not found.sources:
        for split, count in (("train", min(grpo.train_batch_size, SAMPLE)), ("val", val_size)):
            _check_made(task, encoder, [made.example(split, i).prompt for i in range(count)])
    return found


def _check_made(task: TaskConfig, encoder: PromptEncoder, prompts: list[Prompt]) -> None:
    try:
        encoder.encode(prompts)
    except ValueError as error:
        raise ValueError(f"task.name {task.name!r}: {error}") from None
