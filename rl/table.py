"""Problems in the rows of a table: a jsonl file, or a data set of the `datasets` library. No torch."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from functools import lru_cache

from rl.answers import final_answer, is_number, normal, same
from rl.data_rows import DataRows, digest_of_problems
from rl.examples import Example
from rl.messages import Prompt, as_text
from rl.problem_columns import problem_of, prompt_column
from rl.problems import Problems, ProblemSource
from rl.symbolic import Formulas, comparable
from rl.task_config import TableParams

Judge = Callable[[DataRows, Sequence[Prompt]], list[bool]]  # (rows, their prompts) -> which of them are kept


class Table:
    """Training and validation problems never overlap: neither a row nor its prompt is in both splits.

    `val` are rows kept for validation; without them about a tenth of `train` is, by a hash of the prompt; without `train`
    nothing is trained on. Nor is a prompt that is `held_out` for somebody else's validation.
    `judge` says which rows are left out, and may refuse some; without it none is. How answers are compared:
    `rl.answers`. Raises ValueError for rows without a prompt or an answer, and for a split without rows.
    """

    def __init__(
        self,
        train: DataRows | None,
        val: DataRows | None,
        columns: TableParams,
        seed: int,
        judge: Judge | None = None,
        held_out: frozenset[str] = frozenset(),
    ):
        self._seed, self._sources, self.formulas = seed, [], Formulas()
        given = [rows for rows in (train, val) if rows is not None]
        for rows in given:
            if not len(rows):
                raise ValueError(f"{rows.name} has no rows")
        column = prompt_column(given[0].place(0), given[0].rows[0], columns)
        self.columns = columns.model_copy(update={"prompt": column})
        self._splits: dict[str, tuple[DataRows, list[int]]] = {}
        prompts = {} if train is None else self._kept(train, judge)
        if val is None:
            own = {prompt for prompt in prompts.values() if _held_out(prompt)}
            self._splits["val"] = given[0], [i for i, prompt in prompts.items() if prompt in own]
        else:
            val_prompts = self._kept(val, judge)
            own = set(val_prompts.values())
            self._splits["val"] = val, list(val_prompts)
        if train is not None:
            self._splits["train"] = train, [i for i, p in prompts.items() if p not in own and p not in held_out]
        for split, (rows, indices) in self._splits.items():
            if not indices:
                raise ValueError(f"{rows.name}: no problem falls in the {split} split; it needs more rows")

    def _kept(self, rows: DataRows, judge: Judge | None) -> dict[int, str]:
        """The prompts of the rows that are not left out, by index; chats as text."""
        problems = rows.problems(self.columns)
        prompts = [prompt for prompt, _ in problems]
        fits = judge(rows, prompts) if judge else [True] * len(prompts)
        if not any(fits):
            raise ValueError(f"{rows.name}: all of its {len(rows)} rows are left out: raise grpo.max_prompt_length")
        digest = rows.digest or digest_of_problems(problems)
        self._sources.append(ProblemSource(rows.name, digest, len(rows), fits.count(False)))
        return {i: as_text(prompt) for i, (prompt, kept) in enumerate(zip(prompts, fits)) if kept}

    def problems(self) -> Problems:
        return Problems(len(self._splits["val"][1]), tuple(self._sources))

    def example(self, split: str, index: int) -> Example:
        """The metadata of an example is its whole row.

        Training goes through all rows, in another order each epoch. Validation draws each row at most once, in an
        order that is the same for every seed, so that runs are compared on the same rows.
        """
        rows, indices = self._splits[split]
        if split == "train":
            epoch, index = divmod(index, len(indices))
            position = _permutation(len(indices), f"{self._seed}:{epoch}")[index]
        else:
            position = _permutation(len(indices), split)[index]
        at = indices[position]
        row = rows.rows[at]
        return Example(*problem_of(rows.place(at), row, self.columns), row)

    def score(self, example: Example, text: str) -> float:
        gold = normal(final_answer(example.answer))
        response = normal(final_answer(text, number=is_number(gold)))
        if same(gold, response):
            return 1.0
        if self.columns.answers == "text" or not comparable(gold, response, self.columns.answers == "math"):
            return 0.0
        return float(self.formulas.same(gold, response))


@lru_cache(maxsize=4)
def _permutation(n: int, seed: str) -> list[int]:
    order = list(range(n))
    random.Random(seed).shuffle(order)
    return order


def _held_out(text: str) -> bool:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()[0] < 26  # about 10 %
