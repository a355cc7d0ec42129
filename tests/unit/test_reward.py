"""A reward of the user's own is found before a run starts, judges every answer, and is never wrong in silence."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest

from deploy.config import ConfigError, load
from rl.config import TaskConfig
from rl.examples import Example
from rl.reward import RewardError, check_reward, make_reward
from rl.tasks import make_task

SOURCE = """
import math
from os.path import join as joined
if True:
    def under_an_if(prompt, response, answer, metadata):
        return 1.0
marker = imported = []  # filled when the module is imported
marker.append(1)
CONSTANT = 3

def shorter(prompt, response, answer, metadata):
    return 0.5 - len(response) / 4 if not metadata["truncated"] else -1.0

def echo(prompt, response, answer, metadata):
    return 100.0 * len(prompt) + 10 * len(response) + len(answer) + metadata["weight"]

def fails(prompt, response, answer, metadata):
    return {}["missing"]

def nothing(prompt, response, answer, metadata):
    pass

def infinite(prompt, response, answer, metadata):
    return math.inf

def right(prompt, response, answer, metadata):
    return response == answer

def two_arguments(response, answer):
    return 1.0
"""


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own_rewards.py").write_text(SOURCE)
    (tmp_path / "own_package" / "inner").mkdir(parents=True)
    (tmp_path / "own_package" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "own_package" / "inner" / "__init__.py").write_text("from own_rewards import right")
    (tmp_path / "own_torn.py").write_text("def score(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


EXAMPLE = Example("what?", "42", {"weight": 0.25})


def test_the_function_gets_prompt_response_answer_and_metadata_in_this_order():
    assert make_reward("own_rewards:echo", None)(EXAMPLE, "abc", False) == 500 + 30 + 2 + 0.25


def test_rewards_need_not_be_0_or_1_and_the_function_judges_truncated_answers_too():
    reward = make_reward("own_rewards:shorter", None)
    assert [reward(EXAMPLE, text, False) for text in ("", "ab", "abcd")] == [0.5, 0.0, -0.5]
    assert reward(EXAMPLE, "ab", True) == -1.0  # a 0 would make running on worth more than a long answer
    assert EXAMPLE.metadata == {"weight": 0.25}  # each call has a copy of its own


def test_true_and_false_are_rewards():
    reward = make_reward("own_rewards:right", None)
    assert (reward(EXAMPLE, "42", False), reward(EXAMPLE, "41", False)) == (1.0, 0.0)


def test_without_a_function_it_is_the_tasks_score_and_nothing_for_what_was_cut():
    task = make_task(TaskConfig(), 0, 8)
    example = task.example("train", 0)
    reward = make_reward(None, task)
    assert reward(example, f"1#{example.answer}", False) == 1.0 == task.score(example, f"1#{example.answer}")
    assert reward(example, f"1#{example.answer}", True) == 0.0


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("fails", "raised KeyError: 'missing'"),
        ("nothing", "returned None, not a finite number"),
        ("infinite", "returned inf, not a finite number"),
    ],
)
def test_a_function_that_fails_stops_with_its_name_and_the_sample(function: str, says: str):
    with pytest.raises(RewardError) as failed:
        make_reward(f"own_rewards:{function}", None)(EXAMPLE, "seven", False)
    for error in (failed.value, pickle.loads(pickle.dumps(failed.value))):  # it comes from an actor
        message = str(error)
        assert all(part in message for part in (f"own_rewards:{function}", says, "'what?'", "'seven'", "'42'"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("own_rewards:two_arguments", "metadata: dict"),
        ("own_rewards:CONSTANT", "metadata"),
        ("own_torn:x", "SyntaxError"),
    ],
)
def test_what_cannot_be_called_is_refused_when_it_is_imported(name: str, says: str):
    with pytest.raises(ValueError, match=r"task\.reward") as refused:
        make_reward(name, None)
    assert says in str(refused.value)


# --- before a run starts -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["echo", "under_an_if", "joined", "CONSTANT"])
def test_a_name_that_the_source_defines_is_accepted_without_importing_it(name: str):
    check_reward(f"own_rewards:{name}")
    check_reward("own_package.inner:right")  # its package raises when it is imported
    assert not [name for name in sys.modules if name.startswith("own_")]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("own_rewards", "write it as module:function"),
        ("own_rewards:", "write it as module:function"),
        (":echo", "write it as module:function"),
        ("own_rewards.py:echo", "there is no module 'own_rewards.py'"),
        ("own-rewards:echo", "write it as module:function"),
        ("own_rewardz:echo", "there is no module 'own_rewardz'"),
        ("own_package.outer:echo", "there is no module"),
        ("own_rewards:ecko", "did you mean 'echo'"),
        ("own_torn:score", "line 1"),
    ],
)
def test_a_name_that_is_not_there_is_refused_with_the_key(name: str, says: str):
    with pytest.raises(ConfigError) as refused:
        load("k5", [f"task.reward={name}"])
    assert all(part in str(refused.value) for part in ("task.reward", name, says))
