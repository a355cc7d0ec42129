"""An environment of the package `verifiers`, in a process of its own: its loop runs there, with the policy as its client.

    the library's rollout ─▶ asks its client for a turn ─▶ waits ◀─ the policy's turn (`speak`)
                                                             └─▶ what was said since, or None: the rollout is over

So whatever the library does between two turns (stop conditions, state, tools, errors) is done by its own code. A
conversation begins and ends within one request; nothing is kept from one to the next. No torch.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import os
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rl.messages import Message
from rl.reward_function import Asked, Said, as_said
from rl.verifiers_client import EnvironmentRefused, PolicyTurns, Turn, client_of

NETWORK = {  # classes whose work is done by a machine elsewhere
    "JudgeRubric": "asks a model behind a network to judge",
    "SandboxEnv": "runs in sandboxes behind a network",
    "SandboxMixin": "runs in sandboxes behind a network",
    "CliAgentEnv": "runs agents that ask a model behind a network",
    "BrowserEnv": "drives a browser behind a network",
}


@dataclass
class Rollout:
    """One conversation, as the library runs it."""

    turns: PolicyTurns
    state: asyncio.Task[Any]
    prompt: list[Any]  # what the library last showed the policy
    spoken: list[str] = field(default_factory=list[str])

    async def speak(self, text: str, cut: bool) -> list[Any] | None:
        """Messages that come behind the turn; None where the rollout is over. Raises what the environment raises."""
        before = _plain(self.prompt)
        self.spoken.append(text)
        self.turns.say(Turn(text, cut))
        shown = await self.turns.shown(self.state)
        if shown is None:
            return None
        goes_on = _plain(shown[: len(before)]) == before and len(shown) > len(before)
        if not goes_on or shown[len(before)].role != "assistant":
            raise EnvironmentRefused("it asks for more than the next turn of a conversation, or changes what was said")
        self.prompt = shown
        return shown[len(before) + 1 :]


class HostedEnvironment:
    """The environment `name` of verifiers, loaded with `arguments`, of `turns` turns at most."""

    def __init__(self, name: str, arguments: dict[str, Any], turns: int):
        self.environment: Any = importlib.import_module("verifiers").load_environment(name, **arguments)
        for number in (signal.SIGINT, signal.SIGTERM):  # the library takes both; Ctrl-C is the parent's
            signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
        check_runs_here(self.environment)
        limit_turns(self.environment, turns)
        self._loop = asyncio.Runner()  # one for all: a rollout waits in it for the policy
        self._rollouts: dict[str, Rollout] = {}

    def rows(self) -> dict[str, Any]:
        """All problems, and the tools that a policy has to be shown."""
        environment = self.environment
        train, val = environment.build_dataset(), environment.build_eval_dataset()
        if train is None:
            raise EnvironmentRefused("it has problems to validate on and none to train on")
        splits = {"train": train} if val is None else {"train": train, "val": val}
        tools = _plain(environment.tool_defs or [])
        found = {name: [_row(name, i, row) for i, row in enumerate(rows)] for name, rows in splits.items()}
        return {"rows": found, "tools": [_shown(tool) for tool in tools]}

    def respond(self, messages: list[Message], metadata: dict[str, Any]) -> list[Message] | None:
        """What comes behind the policy's last turn. Earlier ones are said again where the rollout is not there."""
        replies = self._loop.run(self._spoken(messages, metadata))
        return (
            None if replies is None else [{"role": m["role"], "content": m.get("content", "")} for m in _plain(replies)]
        )

    def judge(self, asked: list[Asked]) -> list[Said]:
        """By the rubric: its reward, and by name what each of its functions returned."""
        return [self._loop.run(self._judged(response, metadata)) for _, response, _, metadata in asked]

    async def _spoken(self, messages: list[Message], metadata: dict[str, Any], cut: bool = False) -> list[Any] | None:
        name, row = metadata["conversation_id"], self._input(*metadata["row"])
        turns = [message["content"] for message in messages if message["role"] == "assistant"]
        turns = turns[sum(message["role"] == "assistant" for message in row["prompt"]) :]
        rollout = self._rollouts.get(name)
        if rollout is None or turns[: len(rollout.spoken)] != rollout.spoken:
            rollout = self._rollouts[name] = await self._begun(row)
        replies: list[Any] | None = []
        for turn in turns[len(rollout.spoken) :]:
            replies = await rollout.speak(turn, cut and turn is turns[-1])
        return replies

    async def _judged(self, response: str, metadata: dict[str, Any]) -> Said:
        said = metadata.get("conversation", [*metadata["prompt"], {"role": "assistant", "content": response}])
        metadata = {"conversation_id": ""} | metadata
        await self._spoken(said, metadata, metadata["truncated"])
        rollout = self._rollouts.pop(metadata["conversation_id"])
        rollout.turns.say(None)  # they are over, or the tokens
        state, rubric = await rollout.state, self.environment.rubric
        if state.get("error") is not None:
            return {"failed": f"ended with {state['error']!r}"}
        with _errors() as errors:
            await rubric.score_rollout(state)
        await rubric.cleanup(state)
        if errors:
            return {"failed": f"raised in a reward function ({errors[0]})"}
        return {**as_said(state["metrics"]), **as_said(state["reward"])}

    async def _begun(self, row: dict[str, Any]) -> Rollout:
        turns = PolicyTurns()
        state = asyncio.ensure_future(self.environment.rollout(row, client_of(turns), "policy", {}))
        shown = await turns.shown(state)
        if shown is None:
            raise EnvironmentRefused("it ended before the policy said anything")
        if [(m.role, m.content) for m in shown] != [(m["role"], m["content"]) for m in row["prompt"]]:
            raise EnvironmentRefused("it shows the policy another prompt than its data set has")
        return Rollout(turns, state, shown)

    def _input(self, split: str, index: int) -> dict[str, Any]:
        environment = self.environment
        row = dict((environment.build_dataset() if split == "train" else environment.build_eval_dataset())[index])
        return row | {"prompt": _chat(row["prompt"])}


def host(name: str, arguments: str, turns: str) -> Callable[..., Any]:
    """In the child: called with the name of one of HostedEnvironment's methods and what that takes."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    found = HostedEnvironment(name, json.loads(arguments), int(turns))
    return lambda method, *values: getattr(found, method)(*values)


def check_runs_here(environment: Any) -> None:
    """Raises EnvironmentRefused for one that needs a network, a model beside the policy, or whole groups."""
    for inner in getattr(environment, "envs", []):
        check_runs_here(inner)
    for part in [environment, *parts_of_rubric(environment.rubric)]:
        for base in type(part).__mro__:
            if base.__name__ in NETWORK:
                raise EnvironmentRefused(f"{type(part).__name__} {NETWORK[base.__name__]}, which is not run here")
    if environment.requires_group_rollouts:
        raise EnvironmentRefused("it has reward functions of a whole group; only those of one rollout are run here")


def parts_of_rubric(rubric: Any) -> list[Any]:
    """A rubric with those inside it."""
    inner = getattr(rubric, "rubrics", [])
    return [rubric, *(part for each in inner for part in parts_of_rubric(each))]


def limit_turns(environment: Any, turns: int) -> None:
    """Raises EnvironmentRefused if it has several turns and the policy is given one."""
    for inner in getattr(environment, "envs", []):
        limit_turns(inner, turns)
    most = getattr(environment, "max_turns", 1)
    if turns == 1 and most != 1:
        much = f"{most} turns" if most > 0 else "any number of turns"
        raise EnvironmentRefused(f"it has {much}: set task.max_turns to how many the policy is to have")
    if hasattr(environment, "max_turns"):
        environment.max_turns = min(most, turns) if most > 0 else turns


@contextmanager
def _errors() -> Generator[list[str]]:
    """What the library reports and goes on from: a reward function that raises is 0 to it."""
    found = list[str]()
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("verifiers")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def _row(split: str, index: int, row: dict[str, Any]) -> dict[str, Any]:
    """As a table has it. The answer is for people, and for the digest of the problems: the rubric has the row."""
    answer, rest = row.get("answer"), {key: value for key, value in row.items() if key != "prompt"}
    shown = (
        str(answer) if isinstance(answer, str | int | float) and str(answer).strip() else json.dumps(rest, default=str)
    )
    return {"prompt": _chat(row["prompt"]), "answer": shown, "row": [split, index]}


def _chat(prompt: Any) -> list[Any]:
    """A data set's rows hold every key that one of them has."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [{key: value for key, value in message.items() if value is not None} for message in prompt]


def _plain(models: list[Any]) -> list[dict[str, Any]]:
    return [model.model_dump(exclude_none=True) for model in models]


def _shown(tool: dict[str, Any]) -> dict[str, Any]:
    """As chat templates want a tool."""
    return {"type": "function", "function": {key: tool[key] for key in ("name", "description", "parameters")}}
