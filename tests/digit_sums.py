"""Environments of the package `verifiers` that need no network: the sums of the built-in task, with a calculator or a tool.

As a package of an environment has it, but for its size: `load_environment`, rows, what answers a turn, and a rubric.
"""

from __future__ import annotations

from typing import Any

import verifiers as vf
from datasets import Dataset

from rl.sums_task import DIGITS, Sums


class Calculator(vf.MultiTurnEnv):
    async def setup_state(self, state: Any) -> None:
        state["answers"] = 0

    @vf.stop
    async def asks_nothing(self, state: Any) -> bool:
        said = "".join(step["completion"][-1].content for step in state["trajectory"])
        return bool(said) and (not said.endswith("?") or "#" in said or said.count(",") + 1 >= DIGITS)

    async def env_response(self, messages: Any, state: Any, **_: Any) -> Any:
        state["answers"] += 1
        step = "".join(message.content for message in messages[1:]).count(",") + 1
        return [vf.UserMessage(content=str(sum(state["info"]["digits"][: step + 1]) % 10))]


def last_digit(digits: list[int]) -> str:
    """The last digit of a sum."""
    return str(sum(digits) % 10)


def right(completion: Any, answer: str) -> float:
    said = completion[-1].content
    if said == "raise":
        raise RuntimeError("the reward is broken")
    return float(said.removesuffix("$").partition("#")[2] == answer)


async def asked(state: Any) -> float:
    return float(
        state.get("answers", sum(len(step["completion"][-1].tool_calls or []) for step in state["trajectory"]))
    )


def rows(split: str, count: int) -> Dataset:
    examples = {e.prompt: e for e in (Sums(0).example(split, i) for i in range(count))}.values()
    found = [{"question": e.prompt, "answer": e.answer, "info": {"digits": [*e.metadata["digits"]]}} for e in examples]
    return Dataset.from_list(found)


def load_environment(problems: int = 64, tool: bool = False, **arguments: Any) -> vf.Environment:
    rubric = vf.Rubric(funcs=[right, asked], weights=[1.0, 0.25])
    data = {"dataset": rows("train", problems), "eval_dataset": rows("val", 16), "rubric": rubric}
    if not tool:
        return Calculator(**data, **arguments)
    shown = [{"role": "user", "content": "1+1+1+1+1="}, {"role": "assistant", "content": "#5"}]
    return vf.ToolEnv(tools=[last_digit], few_shot=shown, **data, **arguments)
