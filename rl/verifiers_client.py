"""The policy, as a client of the package `verifiers`: it is asked for a turn, and waits until there is one. No torch."""

from __future__ import annotations

import asyncio
import importlib
import json
import re
from typing import Any, NamedTuple, cast

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.S)


class EnvironmentRefused(ValueError):
    """An environment that cannot be run here."""


class Turn(NamedTuple):
    """What the policy says. `cut`: at the length limit."""

    text: str
    cut: bool


class PolicyTurns:
    """Between a rollout of the library and the policy: what is shown the one way, turns the other. None: there are no more."""

    def __init__(self) -> None:
        self._shown = asyncio.Queue[list[Any]]()
        self._turns = asyncio.Queue[Turn | None]()

    async def shown(self, rollout: asyncio.Task[Any]) -> list[Any] | None:
        """The messages of which the policy says what comes next; None where the rollout is over. Raises what it raised."""
        waiting = asyncio.ensure_future(self._shown.get())
        await asyncio.wait((waiting, rollout), return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        waiting.cancel()
        rollout.result()
        return None

    def say(self, turn: Turn | None) -> None:
        self._turns.put_nowait(turn)

    async def turn(self, shown: list[Any]) -> Turn | None:
        """The library's side."""
        self._shown.put_nowait(shown)
        return await self._turns.get()


class _Elsewhere:
    """In place of the client behind a network, which some environments ask for more than turns."""

    def __getattr__(self, name: str) -> Any:
        raise EnvironmentRefused("it asks for a model behind a network, which there is not here")


def client_of(turns: PolicyTurns) -> Any:
    """A verifiers.clients.Client that says them."""
    errors, types = importlib.import_module("verifiers.errors"), cast(Any, importlib.import_module("verifiers.types"))
    base: Any = importlib.import_module("verifiers.clients").Client

    class PolicyClient(base):
        async def get_response(
            self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **rest: Any
        ) -> Any:
            turn = await turns.turn([*prompt])
            if turn is None:  # as an engine says that has no room for another
                raise errors.OverlongPromptError("the conversation has as many tokens as it may have")
            content, calls = split_calls(turn.text) if tools else (turn.text, [])
            made = [types.ToolCall(id=f"call_{i}", **call) for i, call in enumerate(calls)]
            reason = "length" if turn.cut else "tool_calls" if made else "stop"
            message = types.ResponseMessage(
                content=content, tool_calls=made or None, finish_reason=reason, is_truncated=turn.cut
            )
            return types.Response(id="", created=0, model=model, message=message)

    PolicyClient.__abstractmethods__ = frozenset()  # what `get_response` of the library is made of, and this one is not
    return PolicyClient(_Elsewhere())


def split_calls(text: str) -> tuple[str, list[dict[str, str]]]:
    """Words, and calls of tools as Hermes and Qwen write them: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.

    A text with a call that cannot be read has none, as vLLM's parser has it.
    """
    calls = list[dict[str, str]]()
    for found in _CALL.findall(text):
        try:
            call = json.loads(found)
            calls.append({"name": str(call["name"]), "arguments": json.dumps(call["arguments"])})
        except (ValueError, KeyError, TypeError):
            return text, []
    return (text[: text.index("<tool_call>")] if calls else text), calls
