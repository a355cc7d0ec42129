"""Config of the task: prompts and rewards. No torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from codec.config import Reading, Section, When


class TaskConfig(Section):
    """Where prompts and rewards come from."""

    name: str = Field(
        default="sums",
        description="`sums`, `calculator`, `reasoning_gym:NAME`, `jsonl:PATH`, `verifiers:NAME`, or `hf:` and OWNER/NAME, "
        "OWNER/NAME/CONFIG or a PATH",
    )
    params: dict[str, Any] = Field(
        default_factory=dict,
        description="parameters of a reasoning_gym task; arguments of a verifiers environment; of jsonl and hf: columns and splits (docs/models.md)",
    )
    reward: str | None = Field(
        default=None,
        description="`module:function` or `file.py:function` of (prompt, response, answer, metadata), async or not, to a "
        "number or a dict of parts, in place of the task's own score; validation accuracy is then the mean reward",
    )
    reward_weights: dict[str, float] = Field(
        default_factory=dict, description="weights of the parts in a reward that is a dict; default: 1 each"
    )
    reward_timeout_s: float = Field(
        default=60.0,
        gt=0,
        description="deadline of one call of `reward`, or of a verifiers rubric; the import of its module may take a minute",
    )
    reward_failures: int = Field(
        default=8,
        ge=1,
        description="an answer on which `reward` fails scores 0, so many in a row end the run; 1: the first does",
    )
    instruction: str = Field(
        default="",
        description="text put in front of every prompt; of a prompt of messages the system's, where it has none",
    )
    chat: bool = Field(default=False, description="wrap prompts in the tokenizer's chat template")
    template_options: dict[str, Any] = Field(
        default_factory=dict,
        description="what the chat template is told besides, e.g. `{enable_thinking = false}`",
    )
    max_turns: int = Field(
        default=1, ge=1, description="turns of the policy in one sample; between two the task is asked for an answer"
    )
    environment: str | None = Field(
        default=None,
        description="`module:function` of (messages, metadata) that answers the policy's turns with messages, or with None "
        "to end; default: the task's own, if it has one",
    )
    environment_timeout_s: float = Field(default=60.0, gt=0, description="deadline of one answer of the environment")
    stop: list[str] = Field(
        default_factory=list,
        description="texts that end a turn beside the model's own ends, e.g. `</tool_call>`: with the token that completes one",
    )
    skip_special_tokens: bool = Field(
        default=True,
        description="whether special tokens are left out of the text that `reward`, `environment` and a verifiers environment get",
    )
    overlong: Literal["error", "drop"] = Field(
        default="error",
        description="rows of jsonl and hf with prompts beyond `grpo.max_prompt_length`: `error` refuses the run, `drop` "
        "leaves them out",
    )

    @property
    def reward_patience_s(self) -> float:
        """So long one request may wait for a reward that hangs, before the run ends by it; 0 without one."""
        return self.reward_timeout_s * self.reward_failures if self.reward or _verifiers(self.name) else 0.0


def _verifiers(name: str) -> bool:
    return name.startswith("verifiers:")


class TableParams(Section):
    """`task.params` of a task whose problems are rows of a table."""

    prompt: str | None = Field(
        default=None, description="column of the prompt; default: prompt, question, problem or messages"
    )
    answer: str = Field(default="answer", description="column of the answer; a dot goes into a field of it")
    train: str = Field(default="train", description="hf: split to train on")
    val: str | None = Field(
        default=None,
        description="hf: split, jsonl: file to validate on; default: a tenth of train, by a hash of the prompt",
    )
    answers: Literal["auto", "math", "text"] = Field(
        default="auto",
        description="`auto`: as numbers, else text, else formulas if they look so; `math`: formulas more often; `text`: never",
    )


_VERIFIERS = (When("task.name", ("verifiers:NAME",), _verifiers),)
_OWN = ((When("task.reward", ("MODULE:FUNCTION",), bool),),)
_OWN_ENVIRONMENT = (When("task.environment", ("MODULE:FUNCTION",), bool),)

READING: Reading = {
    "task.params": (
        (
            When(
                "task.name", ("reasoning_gym:NAME", "jsonl:PATH", "hf:NAME", "verifiers:NAME"), lambda name: ":" in name
            ),
        ),
    ),
    "task.params.train": ((When("task.name", ("hf:NAME",), lambda name: name.startswith("hf:")),),),
    "task.environment": ((When("task.max_turns", (2,), lambda most: most > 1),),),
    "task.environment_timeout_s": (_OWN_ENVIRONMENT, _VERIFIERS),
    "task.max_turns": ((When("task.name", ("calculator",)),), _OWN_ENVIRONMENT, _VERIFIERS),
    "task.skip_special_tokens": (*_OWN, _OWN_ENVIRONMENT, _VERIFIERS),
    "task.template_options": ((When("task.chat", (True,)),),),
    "task.reward_weights": _OWN,
    "task.reward_timeout_s": (*_OWN, _VERIFIERS),
    "task.reward_failures": (*_OWN, _VERIFIERS),
}
