"""A prompt as the policy is shown it: instruction, chat template, token ids. One way for engines and checks. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rl.data_rows import DataRows, refuse
from rl.model_files import model_config
from rl.task_config import TaskConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1024  # prompts a call of the tokenizer, which takes them in parallel


class PromptRefused(ValueError):
    """A prompt that the tokenizer or its chat template does not take."""


class PromptTooLong(PromptRefused):
    """A prompt has more tokens than `grpo.max_prompt_length`."""

    def __init__(self, prompt: str, tokens: int, limit: int):
        super().__init__(prompt, tokens, limit)
        self.prompt, self.tokens, self.limit = prompt, tokens, limit

    @property
    def what(self) -> str:
        return f"{self.tokens} tokens, grpo.max_prompt_length is {self.limit} ({self.prompt[:60]!r})"

    def __str__(self) -> str:
        return f"a prompt has {self.what}: raise it; a run that stopped here can go on so with --resume"


class PromptEncoder:
    """`limit`: the most tokens of a prompt, with all that is put around it. `tokenizer`: the folder's, if it is loaded."""

    def __init__(self, folder: Path, task: TaskConfig, limit: int, tokenizer: PreTrainedTokenizerBase | None = None):
        from rl.tokenizer import load_tokenizer  # transformers takes seconds

        self.tokenizer = load_tokenizer(folder) if tokenizer is None else tokenizer
        self._task, self._limit, self._vocab = task, limit, model_config(str(folder))["vocab_size"]
        self._nothing = next(self._encoded([""]))

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids. Raises PromptRefused for the first that cannot be shown."""
        found: list[list[int]] = []
        for ids in self._checked(prompts):
            if isinstance(ids, PromptRefused):
                raise ids
            found.append(ids)
        return found

    def judge(self, rows: DataRows, prompts: Sequence[str]) -> list[bool]:
        """Which of the rows' prompts are short enough, where `task.overlong` is "drop".

        Raises ValueError with the rows whose prompts cannot be shown; else also with those that are too long.
        """
        found = [prompt if isinstance(prompt, PromptRefused) else None for prompt in self._checked(prompts)]
        long = {i: fault for i, fault in enumerate(found) if isinstance(fault, PromptTooLong)}
        dropping, closing = self._task.overlong == "drop", ""
        if long and not dropping:
            closing = (
                f"{rows.name}: {len(long)} of {len(rows)} prompts are longer than grpo.max_prompt_length "
                f"{self._limit}: set it to {max(fault.tokens for fault in long.values())}, or task.overlong=drop to "
                f"leave them out"
            )
        named = {i: fault for i, fault in enumerate(found) if fault and not (dropping and i in long)}
        refuse([f"{rows.place(i)}: {long[i].what if i in long else fault}" for i, fault in named.items()], closing)
        return [fault is None for fault in found]

    def _checked(self, prompts: Sequence[str]) -> Iterator[list[int] | PromptRefused]:
        for prompt, ids in zip(prompts, self._encoded(prompts)):
            if isinstance(ids, PromptRefused):
                yield ids
            elif not ids or ids == self._nothing:
                yield PromptRefused(f"the model's tokenizer knows no character of the prompt {prompt[:60]!r}")
            elif max(ids) >= self._vocab:
                says = f"token {max(ids)}, and the model embeds {self._vocab}: take the text of it out"
                yield PromptRefused(f"the prompt {prompt[:60]!r} is encoded to {says}")
            elif len(ids) > self._limit:
                yield PromptTooLong(prompt, len(ids), self._limit)
            else:
                yield ids

    def _encoded(self, prompts: Sequence[str]) -> Iterator[list[int] | PromptRefused]:
        for first in range(0, len(prompts), CHUNK):
            chunk = prompts[first : first + CHUNK]
            try:
                yield from self._ids(chunk)
            except Exception:  # of the tokenizer, or what a chat template raises: find out for which
                yield from map(self._alone, chunk)

    def _alone(self, prompt: str) -> list[int] | PromptRefused:
        try:
            return self._ids([prompt])[0]
        except Exception as error:
            what = "chat template" if self._task.chat else "tokenizer"
            reason = f"{type(error).__name__}: {error}"
            return PromptRefused(f"the model's {what} does not take the prompt {prompt[:60]!r} ({reason})")

    def _ids(self, prompts: Sequence[str]) -> list[list[int]]:
        texts = [self._task.instruction + prompt for prompt in prompts]
        if not self._task.chat:  # verbose: it would warn of long ones, which are judged here
            return cast(list[list[int]], self.tokenizer(texts, verbose=False)["input_ids"])
        chats: list[list[dict[str, Any]]] = [[{"role": "user", "content": text}] for text in texts]
        encoded = self.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_dict=False, tokenizer_kwargs={"verbose": False}
        )
        return cast(list[list[int]], encoded)
