"""A reward of the user's own is found before a run starts, judges every answer, and is never wrong in silence."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from deploy.config import ConfigError, load
from rl.config import TaskConfig
from rl.examples import Example
from rl.reward import RewardError, check_reward, make_reward
from rl.tasks import make_task

SOURCE = """
import functools, math, os, sys, time
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

def too_large(prompt, response, answer, metadata):
    return float(response)

def hangs(prompt, response, answer, metadata):
    while True:
        time.sleep(1)

def exits(prompt, response, answer, metadata):
    sys.exit(0)

def ends(prompt, response, answer, metadata):
    os._exit(7)

def crashes(prompt, response, answer, metadata):
    os.kill(os.getpid(), 11)

def interrupts(prompt, response, answer, metadata):
    raise KeyboardInterrupt

def where(prompt, response, answer, metadata):
    return os.getpid()

async def awaits(prompt, response, answer, metadata):
    return 1.0

made = functools.partial(right)
first, (second, *third) = right, (right, [])
assert (walrus := right)
for looped in [right]:
    pass
with open(os.devnull) as opened:
    in_a_with = right
match [right]:
    case [matched]:
        pass
in_two = in_one = right

class Judge:
    def __call__(self, prompt, response, answer, metadata):
        return 1.0

judge: Judge = Judge()

class Awaiting:
    async def __call__(self, prompt, response, answer, metadata):
        return 1.0

awaiting = Awaiting()

def sets():
    global globally
    globally = right

sets()
"""


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own_rewards.py").write_text(SOURCE)
    (tmp_path / "own_package" / "inner").mkdir(parents=True)
    (tmp_path / "own_package" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "own_package" / "inner" / "__init__.py").write_text("from own_rewards import right")
    (tmp_path / "own_torn.py").write_text("def score(:\n")
    (tmp_path / "own_exit.py").write_text("import sys\nscore = sys.exit('no licence')\n")
    (tmp_path / "own_end.py").write_text("import os\nscore = os._exit(5)\n")
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
        ("exits", "raised SystemExit: 0"),
        ("interrupts", "raised KeyboardInterrupt"),
        ("ends", "ended its process (exit code 7)"),
        ("crashes", "ended its process (signal SIGSEGV)"),
        ("hangs", "was not done after 3 s (task.reward_timeout_s)"),
    ],
)
def test_a_function_that_fails_stops_with_its_name_and_the_sample(function: str, says: str):
    with pytest.raises(RewardError) as failed:
        make_reward(f"own_rewards:{function}", None, 3.0)(EXAMPLE, "seven", False)
    for error in (failed.value, pickle.loads(pickle.dumps(failed.value))):  # it comes from an actor
        message = str(error)
        assert all(part in message for part in (f"own_rewards:{function}", says, "'what?'", "'seven'", "'42'"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("own_rewards:two_arguments", "metadata: dict"),
        ("own_rewards:CONSTANT", "metadata"),
        ("own_torn:x", "SyntaxError"),
        ("own_rewards:awaits", "is async"),
        ("own_rewards:awaiting", "is async"),
        ("own_exit:score", "raised SystemExit"),
        ("own_end:score", "ended its process (exit code 5)"),
    ],
)
def test_what_cannot_be_called_is_refused_when_it_is_imported(name: str, says: str):
    with pytest.raises(ValueError, match=r"task\.reward") as refused:
        make_reward(name, None)
    assert says in str(refused.value)


@pytest.mark.parametrize("value", ["1e39", "-3.5e38", "1e20", "-1e20", "1.1e15"])
def test_a_reward_that_float32_does_not_carry_is_refused_with_the_limit(value: str):
    with pytest.raises(RewardError) as failed:
        make_reward("own_rewards:too_large", None)(EXAMPLE, value, False)
    assert all(part in str(failed.value) for part in ("own_rewards:too_large", repr(float(value)), "1e+15", "float32"))


def test_rewards_up_to_the_limit_are_taken_as_they_are():
    reward = make_reward("own_rewards:too_large", None)
    values = ["1e15", "-1e15", "0.1", "1e-30"]
    assert [reward(EXAMPLE, value, False) for value in values] == list(map(float, values))


def test_metadata_that_does_not_travel_is_named():
    with pytest.raises(RewardError, match=r"own_rewards:right' cannot be given its arguments"):
        make_reward("own_rewards:right", None)(Example("", "", {"scorer": lambda: 1}), "", False)


def test_the_function_keeps_one_process_which_ends_with_the_last_reference():
    reward = make_reward("own_rewards:where", None)
    pid = int(reward(EXAMPLE, "", False))
    assert pid == reward(EXAMPLE, "", False) and pid != os.getpid() and psutil.pid_exists(pid)
    del reward
    assert not psutil.pid_exists(pid)


def test_the_process_of_a_function_that_hangs_ends_when_its_parent_is_killed():
    code = (
        "from rl.examples import Example; from rl.reward import make_reward; "
        "where = make_reward('own_rewards:where', None); print(int(where(Example('', ''), '', False)), flush=True); "
        "make_reward('own_rewards:hangs', None)(Example('', ''), '', False)"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env)
    first = psutil.Process(int(parent.stdout.readline()))
    while len(children := psutil.Process(parent.pid).children()) < 2:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    gone, alive = psutil.wait_procs([first, *children], timeout=60)
    assert not alive and len(gone) >= 2


# --- before a run starts -----------------------------------------------------------------------


ASSIGNED = [
    "made",
    "first",
    "second",
    "walrus",
    "looped",
    "in_a_with",
    "matched",
    "in_two",
    "in_one",
    "judge",
    "globally",
]


@pytest.mark.parametrize("name", ASSIGNED)
def test_a_function_that_is_assigned_is_found_and_judges(name: str):
    check_reward(f"own_rewards:{name}")
    assert make_reward(f"own_rewards:{name}", None)(EXAMPLE, "42", False) == 1.0


def test_a_module_that_makes_its_names_as_it_runs_is_not_judged_by_its_source(tmp_path: Path):
    for i, source in enumerate(("globals()['score'] = max", "def __getattr__(name): return max", "from os import *")):
        (tmp_path / f"own_dynamic{i}.py").write_text(source)
        check_reward(f"own_dynamic{i}:score")


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
        ("own_rewards:awaits", "async def, and nothing awaits it"),
        ("rl.my_rewards:score", "'rl' is a package of northstar's own: give the folder of your rewards another name"),
    ],
)
def test_a_name_that_is_not_there_is_refused_with_the_key(name: str, says: str):
    with pytest.raises(ConfigError) as refused:
        load("k5", [f"task.reward={name}"])
    assert all(part in str(refused.value) for part in ("task.reward", name, says))
