"""A reward of the user's own is found before a run starts, judges every answer, and is never wrong in silence."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import psutil
import pytest

from deploy.config import ConfigError, load
from rl import rollout
from rl.examples import Example
from rl.reward import Judged, Reward, RewardError, make_reward, parts_of
from rl.reward_function import check_reward
from rl.task_config import TaskConfig
from rl.tasks import located, make_task

SOURCE = """
import asyncio, functools, math, os, sys, time
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

def told(prompt, response, answer, metadata):
    if response == "hang":
        time.sleep(1000)
    if response == "exit":
        os._exit(7)
    if response == "crash":
        os.kill(os.getpid(), 11)
    if response == "stop":
        sys.exit(1)
    return float(response)

async def told_together(prompt, response, answer, metadata):
    if response == "wait":
        await asyncio.sleep(1000)
    if response == "meet":
        waiting.append(asyncio.get_running_loop().create_future())
        if len(waiting) == 3:
            for future in waiting:
                future.set_result(None)
        await waiting[-1] if len(waiting) < 3 else None
        return len(waiting)
    return told(prompt, response, answer, metadata)

waiting = []

def own_loop(prompt, response, answer, metadata):
    return asyncio.run(told_together(prompt, response, answer, metadata))

def deferred(prompt, response, answer, metadata):
    return told_together(prompt, response, answer, metadata)

def in_parts(prompt, response, answer, metadata):
    if response == "bare":
        return 1.0
    if response == "empty":
        return {}
    if response == "named":
        return {"of two words": 1.0}
    parts = {"right": float(response == answer), "short": -len(response) / 4}
    return parts | {"bonus": 2} if response == "bonus" else parts

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


def own(name: str, **config: Any) -> Reward:
    return make_reward(TaskConfig(reward=name, **({"reward_failures": 1} | config)), None)


def rewards(reward: Reward, *texts: str, cut: bool = False) -> list[float]:
    return [judged.reward for judged in reward([(EXAMPLE, text, cut) for text in texts])]


def test_the_function_gets_prompt_response_answer_and_metadata_in_this_order():
    assert rewards(own("own_rewards:echo"), "abc") == [500 + 30 + 2 + 0.25]


def test_rewards_need_not_be_0_or_1_and_the_function_judges_truncated_answers_too():
    reward = own("own_rewards:shorter")
    assert rewards(reward, "", "ab", "abcd") == [0.5, 0.0, -0.5]
    assert rewards(reward, "ab", cut=True) == [-1.0]  # a 0 would make running on worth more than a long answer
    assert EXAMPLE.metadata == {"weight": 0.25}  # each call has a copy of its own


def test_true_and_false_are_rewards():
    assert rewards(own("own_rewards:right"), "42", "41") == [1.0, 0.0]


def test_without_a_function_it_is_the_tasks_score_and_nothing_for_what_was_cut():
    task = make_task(TaskConfig(), 0, 8)
    example = task.example("train", 0)
    judged = make_reward(TaskConfig(), task)([(example, f"1#{example.answer}", cut) for cut in (False, True)])
    assert judged == [Judged(1.0), Judged(0.0)] and task.score(example, f"1#{example.answer}") == 1.0
    assert parts_of(judged) == {}


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
        ("hangs", "was not done after 2 s (task.reward_timeout_s)"),
    ],
)
def test_a_function_that_fails_stops_with_its_name_and_the_sample(function: str, says: str):
    with pytest.raises(RewardError) as failed:
        rewards(own(f"own_rewards:{function}", reward_timeout_s=2.0), "seven")
    for error in (failed.value, pickle.loads(pickle.dumps(failed.value))):  # it comes from an actor
        message = str(error)
        assert all(part in message for part in (f"own_rewards:{function}", says, "'what?'", "'seven'", "'42'"))


# --- failures cost a sample --------------------------------------------------------------------

BAD = {
    "exit": "ended its process (exit code 7)",
    "crash": "ended its process (signal SIGSEGV)",
    "hang": "was not done after 1 s (task.reward_timeout_s)",
    "stop": "raised SystemExit: 1",
    "x": "raised ValueError: could not convert string to float: 'x'",
}


@pytest.mark.parametrize("name", ["told", "told_together"])
def test_one_that_hangs_exits_or_crashes_costs_its_sample_alone(name: str):
    reward = own(f"own_rewards:{name}", reward_timeout_s=1.0, reward_failures=2)
    texts = [text for bad in BAD for text in (bad, "0.5")]
    judged = reward([(EXAMPLE, text, False) for text in texts])
    assert judged[0::2] == [Judged(0.0, failed=says) for says in BAD.values()]
    assert judged[1::2] == [Judged(0.5)] * len(BAD)


def test_so_many_in_a_row_end_the_run_also_over_requests_and_a_judgement_begins_anew():
    reward = own("own_rewards:told", reward_failures=3)
    assert rewards(reward, "x", "x", "1", "x", "x") == [0.0, 0.0, 1.0, 0.0, 0.0]
    with pytest.raises(RewardError) as failed:
        rewards(reward, "y", "1")
    says = "failed on 3 answers in a row (task.reward_failures), the last time it raised ValueError"
    assert all(part in str(failed.value) for part in (says, "'what?'", "'y'"))


def test_as_many_that_hang_in_one_request_end_the_run_for_the_engine_has_a_deadline_too():
    reward = own("own_rewards:told", reward_failures=2, reward_timeout_s=1.0)
    with pytest.raises(RewardError, match="failed on 2 answers of one request"):
        rewards(reward, "hang", "1", "hang", "1")


def test_an_async_function_judges_all_answers_of_a_request_at_the_same_time():
    assert rewards(own("own_rewards:told_together"), "meet", "meet", "meet") == [3.0] * 3
    start = time.monotonic()
    judged = own("own_rewards:told_together", reward_timeout_s=0.5, reward_failures=9)(
        [(EXAMPLE, text, False) for text in ("wait", "1", *["wait"] * 6)]
    )
    late = "was not done after 0.5 s (task.reward_timeout_s)"
    assert judged == [Judged(1.0) if i == 1 else Judged(0.0, failed=late) for i in range(8)]
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("name", ["own_loop", "deferred"])
def test_a_plain_function_may_run_a_loop_or_return_what_is_to_be_awaited(name: str):
    assert rewards(own(f"own_rewards:{name}"), "0.25", "1") == [0.25, 1.0]


# --- parts -------------------------------------------------------------------------------------


def test_parts_are_weighed_and_kept_by_name():
    weighed = own("own_rewards:in_parts", reward_weights={"right": 2.0, "short": 0.5})
    judged = weighed([(EXAMPLE, text, False) for text in ("42", "1", "bonus")])
    assert [each.reward for each in judged] == [2 - 0.25, -0.125, 0.5 * -5 / 4 + 2]
    parts = parts_of(judged)
    np.testing.assert_array_equal(parts.pop("bonus"), np.array([np.nan, np.nan, 2], np.float32))
    assert {name: values.tolist() for name, values in parts.items()} == {
        "right": [1.0, 0.0, 0.0],
        "short": [-0.5, -0.25, -1.25],
    }
    assert rewards(own("own_rewards:in_parts"), "42") == [0.5]


@pytest.mark.parametrize(
    ("text", "weights", "says"),
    [
        ("bare", {"right": 1.0}, "returned a number, and task.reward_weights weighs right"),
        ("42", {"rigth": 1.0}, "returned no rigth, which task.reward_weights weighs"),
        ("empty", {}, "returned no parts"),
        ("named", {}, "returned a part called 'of two words'"),
        ("42", {"right": 1e16}, "rewards may be 1e+15 at most"),
    ],
)
def test_parts_that_do_not_fit_are_a_failure(text: str, weights: dict[str, float], says: str):
    with pytest.raises(RewardError) as failed:
        rewards(own("own_rewards:in_parts", reward_weights=weights), text)
    assert says in str(failed.value)


def test_a_file_is_found_by_its_path_and_imports_what_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "some rewards"
    folder.mkdir()
    (folder / "length.py").write_text("def of(text): return len(text)\n")
    (folder / "my.py").write_text("from length import of\ndef score(prompt, response, *_): return of(response)\n")
    monkeypatch.chdir(tmp_path)
    config = load("k5", ["task.reward=some rewards/my.py:score"])
    found = located(config.task)
    monkeypatch.chdir("/")
    assert rewards(make_reward(found, None), "abc") == [3.0]
    with pytest.raises(ValueError, match="did you mean 'score'"):
        check_reward(f"{folder / 'my.py'}:scores")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("own_rewards:two_arguments", "metadata: dict"),
        ("own_rewards:CONSTANT", "metadata"),
        ("own_torn:x", "SyntaxError"),
        ("own_exit:score", "raised SystemExit"),
        ("own_end:score", "ended its process (exit code 5)"),
    ],
)
def test_what_cannot_be_called_is_refused_when_it_is_imported(name: str, says: str):
    with pytest.raises(ValueError, match=r"task\.reward") as refused:
        own(name)
    assert says in str(refused.value)


@pytest.mark.parametrize("value", ["1e39", "-3.5e38", "1e20", "-1e20", "1.1e15"])
def test_a_reward_that_float32_does_not_carry_is_refused_with_the_limit(value: str):
    with pytest.raises(RewardError) as failed:
        rewards(own("own_rewards:too_large"), value)
    assert all(part in str(failed.value) for part in ("own_rewards:too_large", repr(float(value)), "1e+15", "float32"))


def test_rewards_up_to_the_limit_are_taken_as_they_are():
    values = ["1e15", "-1e15", "0.1", "1e-30"]
    assert rewards(own("own_rewards:too_large"), *values) == list(map(float, values))


def test_metadata_that_does_not_travel_is_named():
    with pytest.raises(RewardError, match=r"own_rewards:right' cannot be given its arguments"):
        own("own_rewards:right")([(Example("", "", {"scorer": lambda: 1}), "", False)])


def test_the_function_keeps_one_process_which_ends_with_the_last_reference():
    reward = own("own_rewards:where")
    pid, again = map(int, rewards(reward, "", ""))
    assert pid == again == rewards(reward, "")[0] and pid != os.getpid() and psutil.pid_exists(pid)
    del reward
    assert not psutil.pid_exists(pid)


def test_the_process_of_a_function_that_hangs_ends_when_its_parent_is_killed():
    code = (
        "from rl.examples import Example; from rl.reward import make_reward; from rl.task_config import TaskConfig; "
        "own = lambda name: make_reward(TaskConfig(reward=name), None); answers = [(Example('', ''), '', False)]; "
        "where = own('own_rewards:where'); print(int(where(answers)[0].reward), flush=True); "
        "own('own_rewards:hangs')(answers)"
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
    assert rewards(own(f"own_rewards:{name}"), "42") == [1.0]


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
        ("nowhere/own_rewards.py:echo", "the file 'nowhere/own_rewards.py' cannot be read (No such file"),
        ("own-rewards:echo", "write it as module:function"),
        ("own_rewardz:echo", "there is no module 'own_rewardz'"),
        ("own_package.outer:echo", "there is no module"),
        ("own_rewards:ecko", "did you mean 'echo'"),
        ("own_torn:score", "line 1"),
        ("rl.my_rewards:score", "'rl' is a package of northstar's own: give the folder of your rewards another name"),
    ],
)
def test_a_name_that_is_not_there_is_refused_with_the_key(name: str, says: str):
    with pytest.raises(ConfigError) as refused:
        load("k5", [f"task.reward={name}"])
    assert all(part in str(refused.value) for part in ("task.reward", name, says))


def test_what_is_told_of_a_failure_is_text_that_travels():
    judged = [Judged(1.0), Judged(0.0, failed="no file \udcff.txt" + "x" * 1000)]
    told = rollout._failed(judged, [EXAMPLE, EXAMPLE], ["fine", "half a pair \ud83d"])
    assert told["count"] == 1 and told["reason"].startswith("no file \\udcff.txt")
    assert msgpack.unpackb(msgpack.packb(told)) == told and told["response"] == "half a pair \\ud83d"
