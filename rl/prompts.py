"""A prompt as the policy is shown it: instruction, chat template, token ids. One way for engines and checks. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rl.data_rows import DataRows, refuse
from rl.messages import Message, Prompt, as_text
from rl.model_files import model_config
from rl.task_config import TaskConfig

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from rl.stops import StopTexts

CHUNK = 1024  # prompts a call of the tokenizer, which takes them in parallel
_TURN = "what-the-policy-says"


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
        self._folder = folder

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids. Raises PromptRefused for the first that cannot be shown."""
        found: list[list[int]] = []
        for ids in self._checked(prompts):
            if isinstance(ids, PromptRefused):
                raise ids
            found.append(ids)
        return found

    def judge(self, rows: DataRows, prompts: Sequence[Prompt]) -> list[bool]:
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

    def _checked(self, prompts: Sequence[Prompt]) -> Iterator[list[int] | PromptRefused]:
        for text, ids in zip(map(as_text, prompts), self._encoded(prompts)):
            if isinstance(ids, PromptRefused):
                yield ids
            elif not ids or ids == self._nothing:
                yield PromptRefused(f"the model's tokenizer knows no character of the prompt {text[:60]!r}")
            elif max(ids) >= self._vocab:
                says = f"token {max(ids)}, and the model embeds {self._vocab}: take the text of it out"
                yield PromptRefused(f"the prompt {text[:60]!r} is encoded to {says}")
            elif len(ids) > self._limit:
                yield PromptTooLong(text, len(ids), self._limit)
            else:
                yield ids

    def _encoded(self, prompts: Sequence[Prompt]) -> Iterator[list[int] | PromptRefused]:
        for first in range(0, len(prompts), CHUNK):
            chunk = prompts[first : first + CHUNK]
            try:
                yield from self._ids(chunk)
            except Exception:  # of the tokenizer, or what a chat template raises: find out for which
                yield from map(self._alone, chunk)

    def _alone(self, prompt: Prompt) -> list[int] | PromptRefused:
        try:
            return self._ids([prompt])[0]
        except PromptRefused as refused:
            return refused
        except Exception as error:
            what = "chat template" if self._task.chat else "tokenizer"
            reason = f"{type(error).__name__}: {error}"
            return PromptRefused(f"the model's {what} does not take the prompt {as_text(prompt)[:60]!r} ({reason})")

    def _ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        if not self._task.chat:  # verbose: it would warn of long ones, which are judged here
            texts = [self._task.instruction + self._plain(prompt) for prompt in prompts]
            return cast(list[list[int]], self.tokenizer(texts, verbose=False)["input_ids"])
        chats: list[list[dict[str, Any]]] = [[*self.chat(prompt)] for prompt in prompts]
        encoded = self.tokenizer.apply_chat_template(
            chats,
            add_generation_prompt=True,
            return_dict=False,
            tokenizer_kwargs={"verbose": False},
            **self._task.template_options,
        )
        return cast(list[list[int]], encoded)

    def chat(self, prompt: Prompt) -> list[Message]:
        """With the instruction: in front of a text, else the message of the system where there is none."""
        instruction = self._task.instruction
        if isinstance(prompt, str):
            return [{"role": "user", "content": instruction + prompt}]
        alone = not instruction or prompt[0]["role"] == "system"
        return prompt if alone else [{"role": "system", "content": instruction}, *prompt]

    def said(self, tokens: np.ndarray) -> str:
        """What the policy said, as environments and rewards read it."""
        return cast(str, self.tokenizer.decode(tokens, skip_special_tokens=self._task.skip_special_tokens))

    def continuation(self, replies: list[Message], last: int) -> list[int]:
        """Token ids of what comes behind a turn of the policy that ended in the token `last`: what others said, up to where
        its next turn begins. Raises PromptRefused."""
        text = "".join(message["content"] for message in replies)
        try:
            shown = self._behind(replies, closed=last in self._ends) if self._task.chat else text
            ids = cast(list[int], self.tokenizer(shown, add_special_tokens=False, verbose=False)["input_ids"])
        except Exception as error:  # as in `_alone`
            raise PromptRefused(f"{text[:200]!r}, which is not taken ({type(error).__name__}: {error})") from error
        if not ids or max(ids) >= self._vocab:
            raise PromptRefused(f"{text[:200]!r}, of which the model knows no token, or has one that it does not embed")
        return ids

    def _behind(self, replies: list[Message], closed: bool) -> str:
        """What the chat template puts behind the policy's words; `closed`: these hold the end of its turn."""
        turn: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _TURN}]
        whole = self.tokenizer.apply_chat_template(
            cast(list[dict[str, Any]], [*turn, *replies]),
            add_generation_prompt=True,
            tokenize=False,
            **self._task.template_options,
        )
        _, said, rest = cast(str, whole).rpartition(_TURN)
        if not said:
            raise ValueError("the chat template leaves out what the assistant says")
        return rest.lstrip().removeprefix(self._end) if closed and self._end else rest

    @cached_property
    def _end(self) -> str:
        """Of a turn, in the chat template; "" if it has none."""
        from rl.stops import end_of_turn

        end = end_of_turn(self.tokenizer)
        return "" if end is None else cast(str, self.tokenizer.convert_ids_to_tokens(end))

    @cached_property
    def stops(self) -> StopTexts | None:
        """Texts that end a turn. Raises ValueError."""
        from rl.stops import StopTexts

        return StopTexts(self.tokenizer, self._task.stop) if self._task.stop else None

    @cached_property
    def _ends(self) -> list[int]:
        """Tokens with which the model itself ends a turn."""
        from rl.stops import stop_tokens

        return stop_tokens(self._folder, self.tokenizer)

    def _plain(self, prompt: Prompt) -> str:
        if isinstance(prompt, str):
            return prompt
        raise PromptRefused(f"the prompt {as_text(prompt)[:60]!r} is a list of messages: set task.chat=true")
