"""Conversations: the policy's turns, and what an environment answers between them. One turn is a plain sample.

    prompt ─▶ engine ─▶ turn ─▶ respond ─▶ messages ─▶ tokens behind the turn ─▶ engine ─▶ turn ─▶ … ─▶ None, or a limit

Tokens of earlier turns stay as they were sampled: what comes is put behind them, and no text is ever encoded again. An
engine is given the whole conversation for each turn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rl.engine import Engine, Key, Samples
from rl.environment import EnvironmentFailed
from rl.examples import Example
from rl.messages import Message, checked_messages
from rl.prompts import PromptEncoder


@runtime_checkable
class Environment(Protocol):
    """What answers the policy's turns: a task, or a function of the user's."""

    def respond(self, messages: list[Message], metadata: dict[str, Any]) -> list[Message] | None:
        """What is said after the last of `messages`, which is the policy's; None: the conversation is over."""
        ...


@dataclass(frozen=True)
class Talks(Samples):
    """Samples whose tokens are those of all turns with the environment's between them, and log-probs the policy's own."""

    own: list[np.ndarray]  # bool, of each token
    texts: list[str]  # the last turn
    messages: list[list[Message]]  # from the prompt to the last turn

    def of_own(self, values: list[np.ndarray], every: int = 1) -> list[np.ndarray]:
        """Of one number for each token of every so manieth sample, those of the policy's tokens."""
        return [each[own] for each, own in zip(values, self.own[::every], strict=True)]

    @property
    def marks(self) -> np.ndarray:
        """As a batch has them: none where all tokens are the policy's."""
        marks = np.concatenate(self.own)
        return marks[:0] if marks.all() else marks


@dataclass
class _Talk:
    """One conversation as it grows."""

    prompt: list[int]
    key: Key
    example: Example
    messages: list[Message]
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    own: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    logprobs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    truncated: bool = False

    def add(self, tokens: np.ndarray, own: bool) -> None:
        self.tokens = np.concatenate([self.tokens, tokens.astype(np.int32)])
        self.own = np.concatenate([self.own, np.full(len(tokens), own)])


def conversation_id(key: Key) -> str:
    """The same to the environment and to the reward."""
    return "/".join(map(str, key))


class Conversations:
    """`most`: turns of the policy in one of them; the `environment` is asked between two."""

    def __init__(self, engine: Engine, encoder: PromptEncoder, environment: Environment | None, most: int):
        self.engine, self.encoder, self.environment, self.most = engine, encoder, environment, most

    def hold(
        self, prompts: list[list[int]], examples: list[Example], keys: list[Key], limit: int, temperature: float
    ) -> Talks:
        """len(keys) / len(prompts) samples of each prompt, of at most `limit` tokens, those of the environment counted.

        A later turn has the key of its sample with its number, from 1. Raises EnvironmentFailed.
        """
        n = len(keys) // len(prompts)
        chats = [self.encoder.chat(example.prompt) for example in examples]
        talks = [_Talk(prompts[i // n], key, examples[i // n], [*chats[i // n]]) for i, key in enumerate(keys)]
        said, live = self.engine.sample(prompts, keys, limit, temperature), talks
        for turn in range(1, self.most + 1):
            self._note(live, said)
            live = [talk for talk in live if turn < self.most and not talk.truncated and self._answered(talk, limit)]
            if not live:
                break
            whole = [[*talk.prompt, *talk.tokens.tolist()] for talk in live]
            rooms = [limit - len(talk.tokens) for talk in live]
            said = self.engine.sample(whole, [(*talk.key, turn) for talk in live], rooms, temperature)
        return Talks(
            tokens=[talk.tokens for talk in talks],
            logprobs=[talk.logprobs for talk in talks],
            truncated=[talk.truncated for talk in talks],
            own=[talk.own for talk in talks],
            texts=[talk.messages[-1]["content"] for talk in talks],
            messages=[talk.messages for talk in talks],
        )

    def _note(self, talks: list[_Talk], said: Samples) -> None:
        for talk, tokens, logprobs, cut in zip(talks, said.tokens, said.logprobs, said.truncated, strict=True):
            talk.add(tokens, own=True)
            talk.logprobs = np.concatenate([talk.logprobs, logprobs])
            talk.messages.append({"role": "assistant", "content": self.encoder.said(tokens)})
            talk.truncated = cut

    def _answered(self, talk: _Talk, limit: int) -> bool:
        """Whether the conversation goes on: what the environment says, if it fits with a token more, is put behind it."""
        assert self.environment is not None  # more turns than one are refused without
        metadata = dict(talk.example.metadata) | {"conversation_id": conversation_id(talk.key)}
        replies = self.environment.respond([*talk.messages], metadata)
        if replies is None:
            return False
        try:
            tokens = self.encoder.continuation(checked_messages(replies), int(talk.tokens[-1]))
        except ValueError as error:
            said, prompt = talk.messages[-1]["content"], talk.example.text
            raise EnvironmentFailed(f"after {said[:200]!r} to {prompt[:200]!r} the environment says {error}") from error
        talk.truncated = len(talk.tokens) + len(tokens) >= limit
        if not talk.truncated:
            talk.messages.extend(replies)
            talk.add(np.array(tokens), own=False)
        return not talk.truncated
