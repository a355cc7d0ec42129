"""Environments of the package `verifiers`: their loop, rubric and refusals. What loads the package is skipped without it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.config import ConfigError, load
from rl import verifiers_task
from rl.environment import EnvironmentFailed
from rl.examples import Example
from rl.messages import Message
from rl.reward import Judged, make_reward
from rl.task_config import TaskConfig
from rl.tasks import make_task
from rl.verifiers_client import EnvironmentRefused, split_calls
from rl.verifiers_process import Rollout, check_runs_here, limit_turns
from rl.verifiers_task import VerifiersTask, check_tools, check_verifiers

CONFIG = TaskConfig(
    name="verifiers:tests.digit_sums",
    max_turns=3,
    params={"problems": 40, "tool": True},
    chat=True,
    template_options={
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "last_digit",
                    "description": "The last digit of a sum.",
                    "parameters": {
                        "properties": {"digits": {"items": {"type": "integer"}, "title": "Digits", "type": "array"}},
                        "required": ["digits"],
                        "title": "last_digit_args",
                        "type": "object",
                        "additionalProperties": False,
                    },
                },
            }
        ]
    },
)


# --- without the package ------------------------------------------------------------------------


def test_calls_are_what_hermes_and_qwen_write_and_a_text_with_a_broken_one_has_none():
    call = '<tool_call>\n{"name": "add", "arguments": {"a": [1, 2]}}\n</tool_call>'
    assert split_calls(f"so {call}{call}") == ("so ", [{"name": "add", "arguments": '{"a": [1, 2]}'}] * 2)
    for text in ("none", f"{call}<tool_call>{{</tool_call>", '<tool_call>{"name": "add"}</tool_call>', "<tool_call>[]"):
        assert split_calls(text) == (text, [])


class JudgeRubric:
    rubrics = ()


class SandboxEnv:
    pass


def environment(rubric: Any = None, **fields: Any) -> Any:
    return SimpleNamespace(**({"rubric": rubric or SimpleNamespace(), "requires_group_rollouts": False} | fields))


class Sandboxed(SandboxEnv):
    rubric, requires_group_rollouts = SimpleNamespace(), False


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (environment(SimpleNamespace(rubrics=[SimpleNamespace(), JudgeRubric()])), "JudgeRubric asks a model"),
        (Sandboxed(), "Sandboxed runs in sandboxes behind a network"),
        (environment(envs=[Sandboxed()]), "Sandboxed runs in sandboxes behind a network"),
        (environment(requires_group_rollouts=True), "of a whole group"),
    ],
)
def test_what_needs_a_network_or_a_whole_group_is_refused(found: Any, says: str):
    check_runs_here(environment())
    with pytest.raises(EnvironmentRefused, match=says):
        check_runs_here(found)


def test_turns_are_the_fewer_of_both_limits_and_one_turn_is_no_answer_to_several():
    for most, turns, left in ((-1, 4, 4), (6, 4, 4), (3, 4, 3), (1, 4, 1), (1, 1, 1)):
        found = environment(max_turns=most, envs=[environment(max_turns=most)])
        limit_turns(found, turns)
        assert (found.max_turns, found.envs[0].max_turns) == (left, left)
    for most, says in ((-1, "any number of turns"), (6, "6 turns")):
        with pytest.raises(EnvironmentRefused, match=f"has {says}: set task.max_turns"):
            limit_turns(environment(envs=[environment(max_turns=most)]), 1)


def test_tools_have_to_be_in_the_chat_template():
    check_tools(TaskConfig(), [])
    check_tools(CONFIG, CONFIG.template_options["tools"])
    for config in (CONFIG.model_copy(update={"chat": False}), CONFIG.model_copy(update={"template_options": {}})):
        with pytest.raises(ValueError, match=r"set task.chat=true and task.template_options=.*last_digit"):
            check_tools(config, CONFIG.template_options["tools"])


@pytest.mark.parametrize(
    ("missing", "name", "says"),
    [
        ("verifiers", "tests.digit_sums", r"pip install 'northstar\[verifiers\]'"),
        ("verifiers.legacy", "tests.digit_sums", "are in 0.3"),
        ("none_there", "owner/none-there", r"no module 'none_there': install .*vf-install owner/none-there"),
        ("", "math", "math"),
        ("", "no name", "is no name of an environment"),
        ("", "tests.own_parts", "defines no 'load_environment'"),
    ],
)
def test_a_package_or_module_that_is_not_there_is_named_with_the_way_to_it(
    missing: str, name: str, says: str, monkeypatch: pytest.MonkeyPatch
):
    there = verifiers_task.find_module
    here = {"verifiers": SimpleNamespace(), "verifiers.legacy": SimpleNamespace()}
    monkeypatch.setattr(
        verifiers_task, "find_module", lambda module: None if module == missing else here.get(module) or there(module)
    )
    with pytest.raises(ValueError, match=says):
        check_verifiers(name)
    check_verifiers("tests.digit_sums") if missing.startswith("none") else None


@pytest.mark.parametrize("key", ["reward=math:sqrt", "environment=math:sqrt"])
def test_it_judges_and_answers_alone(key: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rl.tasks.check_verifiers", lambda name: None)
    with pytest.raises(ConfigError, match=f"task.{key[:6]}.* answers turns and judges by itself"):
        load("k5", ["task.name=verifiers:x", "task.max_turns=2", f"task.{key}"])


def test_a_rollout_that_asks_for_another_conversation_is_refused():
    def said(role: str, content: str) -> Any:
        return SimpleNamespace(role=role, content=content, model_dump=lambda exclude_none: [role, content])

    async def asked(*shown: Any) -> None:
        turns = SimpleNamespace(say=lambda turn: None, shown=lambda state: asyncio.sleep(0, [*shown]))
        await Rollout(turns, None, [said("user", "q")]).speak("a", cut=False)  # pyright: ignore[reportArgumentType]

    asyncio.run(asked(said("user", "q"), said("assistant", "a"), said("user", "go on")))
    for shown in ([said("user", "other"), said("assistant", "a")], [said("user", "q")], [said("user", "q")] * 2):
        with pytest.raises(EnvironmentRefused, match="asks for more than the next turn"):
            asyncio.run(asked(*shown))


# --- with it ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task() -> VerifiersTask:
    pytest.importorskip("verifiers", reason="pip install 'northstar[verifiers]'")
    found = make_task(CONFIG, 0, 8)
    assert isinstance(found, VerifiersTask)
    return found


def talk(task: VerifiersTask, example: Example, name: str, *turns: str) -> tuple[list[Message], Example]:
    """A conversation as engines hold it, and the problem as its reward is given it."""
    assert not isinstance(example.prompt, str) and len(example.prompt) == 3  # with a turn that the policy did not say
    messages = [*example.prompt]
    metadata = example.metadata | {"conversation_id": name}
    for i, turn in enumerate(turns):
        messages.append({"role": "assistant", "content": turn})
        if i < CONFIG.max_turns - 1 and (replies := task.respond([*messages], metadata)) is not None:
            messages += replies
    return messages, replace(example, metadata=metadata | {"conversation": messages})


def call(digits: Any) -> str:
    return f'<tool_call>{{"name": "last_digit", "arguments": {{"digits": {digits}}}}}</tool_call>'


def test_problems_are_the_data_sets_with_its_own_to_validate_on(task: VerifiersTask):
    assert [source.rows for source in task.problems().sources] == [40, 16] and task.problems().validation == 16
    assert {task.example("train", i).text for i in range(40)}.isdisjoint(task.example("val", i).text for i in range(16))


def test_as_a_set_it_is_validated_on_and_training_leaves_held_out_prompts_out(task: VerifiersTask):
    alone = make_task(CONFIG, 0, 8, trains=False)
    assert [source.rows for source in alone.problems().sources] == [16]
    assert [alone.example("val", i) for i in range(16)] == [task.example("val", i) for i in range(16)]
    one = task.example("train", 3).text
    others = make_task(CONFIG, 0, 8, held_out=frozenset({one}))
    assert {others.example("train", i).text for i in range(39)} == {
        task.example("train", i).text for i in range(40)
    } - {one}


def test_tools_answer_turns_and_a_turn_without_one_is_the_last(task: VerifiersTask):
    example = task.example("train", 0)
    messages, _ = talk(task, example, "a", call([7, 8]), call("true"), "5#5")
    first, second = (m["content"] for m in messages if m["role"] == "tool")
    assert first == "5" and "not iterable" in second
    messages, _ = talk(task, example, "b", "#5", "never said")
    assert [m["role"] for m in messages[2:]] == ["user", "assistant", "assistant"]


def test_the_rubric_judges_the_whole_by_function_and_weight(task: VerifiersTask):
    example = task.example("train", 1)
    right, wrong = f"#{example.answer}", "#none"
    _, asking = talk(task, example, "a", call([1]), right)
    _, alone = talk(task, example, "b", wrong)
    reward = make_reward(CONFIG, task)
    asked, told = reward([(asking, right, False), (alone, wrong, False)])
    assert asked.reward == 1.25 and (asked.parts["right"], asked.parts["asked"]) == (1, 1)
    assert told.reward == 0 and told.parts["num_turns"] == 1
    assert reward([(example, right, False)])[0].reward == 1 == task.score(example, right)


def test_a_conversation_that_was_cut_is_judged_as_far_as_it_went(task: VerifiersTask):
    example = task.example("train", 2)
    _, full = talk(task, example, "a", call([1]))  # the answer to it did not fit: the policy is not asked again
    full = replace(full, metadata=full.metadata | {"conversation": full.metadata["conversation"][:4]})
    (judged,) = make_reward(CONFIG, task)([(full, call([1]), True)])
    assert judged == Judged(0.25, judged.parts) and judged.parts["num_turns"] == 1


def test_a_process_that_does_not_know_the_conversation_is_told_what_was_said(task: VerifiersTask):
    example = task.example("train", 3)
    messages, told = talk(task, example, "a", call([2, 2]), call([3, 3]))
    turns = [*messages, {"role": "assistant", "content": f"#{example.answer}"}]
    told = replace(told, metadata=told.metadata | {"conversation": turns, "conversation_id": "as after a restart"})
    (judged,) = make_reward(CONFIG, task)([(told, turns[-1]["content"], False)])
    assert judged.reward == 1.5 and judged.parts["total_tool_calls"] == 2


def test_a_reward_function_that_raises_is_no_judgement_of_zero(task: VerifiersTask):
    example = task.example("train", 4)
    (judged,) = make_reward(CONFIG, task)([(example, "raise", False)])
    assert judged.failed.endswith("(Error calling reward function right: the reward is broken)") and judged.reward == 0
    with pytest.raises(EnvironmentFailed, match=r"task.name 'verifiers:tests.digit_sums' raised .*IndexError"):
        task.respond([{"role": "assistant", "content": "x"}], {"row": ["train", 10**6], "conversation_id": "z"})
