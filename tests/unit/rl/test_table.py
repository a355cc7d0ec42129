"""Tables of problems, as jsonl or by the `datasets` library: the same rows are the same task."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
import pytest

from deploy.config import ConfigError, load
from rl.task_config import TaskConfig
from rl.tasks import Task, check_task, make_task

ROWS = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}", "level": i % 3} for i in range(300)]
TESTS = [{"question": f"What is {i} - 1?", "answer": f"#### {i - 1}", "level": 0} for i in range(20)]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory):
    return pytest.importorskip("datasets", reason="needs the datasets extra")


def lines(file: Path, rows: list[dict]) -> Path:
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def build(name: str, seed: int = 0, **params) -> Task:
    config = TaskConfig(name=name, params=params)
    check_task(config)
    return make_task(config, seed, 16)


def drawn(task: Task, split: str, n: int = 300) -> list:
    return [task.example(split, i) for i in range(n)]


def by_question(rows: Iterable[dict]) -> list[dict]:
    return sorted(rows, key=lambda row: row["question"])


# --- any table ---------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return lines(tmp_path / "rows.jsonl", ROWS)


def test_metadata_is_the_whole_row(file: Path):
    example = build(f"jsonl:{file}").example("train", 5)
    assert example.metadata in ROWS and example.metadata["question"] == example.prompt


def test_columns_are_those_that_params_name_and_a_dot_goes_into_a_field(tmp_path: Path):
    rows = [{"text": f"p{i}", "reward_model": {"truth": i}, "answer": "no"} for i in range(100)]
    task = build(f"jsonl:{lines(tmp_path / 'x', rows)}", prompt="text", answer="reward_model.truth")
    example = task.example("train", 0)
    assert example.answer == example.prompt[1:] and task.score(example, f"so {example.answer}") == 1.0


def test_a_chat_of_one_message_is_its_content_and_a_longer_one_stays_a_chat(tmp_path: Path):
    def rows(*before: dict) -> list[dict]:
        return [{"messages": [*before, {"role": "user", "content": f"q{i}"}], "answer": "1"} for i in range(100)]

    assert build(f"jsonl:{lines(tmp_path / 'x', rows())}").example("train", 0).prompt.startswith("q")
    system = {"role": "system", "content": "be kind"}
    task = build(f"jsonl:{lines(tmp_path / 'y', rows(system | {'tool_calls': None}))}")
    examples = [*drawn(task, "train", 80), *drawn(task, "val", 5)]
    assert all(e.prompt[0] == system and e.prompt[1] == e.metadata["messages"][1] for e in examples)
    assert not {e.text for e in drawn(task, "train", 80)} & {e.text for e in drawn(task, "val", 5)}


USER = {"role": "user", "content": "q"}
NO_CHATS = {
    "no message": ([], "holds list ([]), not a list of messages"),
    "text": (["q"], "message 0: 'q' has not role and content"),
    "no content": ([{"role": "user"}], "has not role and content"),
    "a tool call": ([USER | {"tool_calls": [1]}], "and nothing else"),
    "another role": ([USER | {"role": "human"}], "the role 'human' is none of system, user, assistant, tool"),
    "parts": ([USER | {"content": [{"type": "text"}]}], "message 0: its content is list, not text"),
    "system late": ([USER, {"role": "system", "content": "x"}, USER], "message 1 is the system's"),
    "the answer too": ([USER, {"role": "assistant", "content": "x"}], "ends with a message of the assistant"),
    "empty": ([{"role": "system", "content": " "}, USER], "message 0 is empty"),
}


@pytest.mark.parametrize(("chat", "says"), NO_CHATS.values(), ids=NO_CHATS)
def test_a_chat_that_is_none_is_named_by_line_and_message(tmp_path: Path, chat: list, says: str):
    rows = [*({"prompt": f"p{i}", "answer": "1"} for i in range(5)), {"prompt": chat, "answer": "1"}]
    with pytest.raises(ValueError, match="line 6: column 'prompt' ") as caught:
        build(f"jsonl:{lines(tmp_path / 'x', rows)}")
    assert says in str(caught.value)


def test_a_validation_file_is_the_validation_split_and_none_of_its_prompts_is_trained_on(file: Path, tmp_path: Path):
    val = lines(tmp_path / "val.jsonl", [*TESTS, *ROWS[:50]])
    task = build(f"jsonl:{file}", val=str(val))
    assert by_question(e.metadata for e in drawn(task, "val", 70)) == by_question([*TESTS, *ROWS[:50]])
    train = {e.prompt for e in drawn(task, "train", 250)}
    assert train == {row["question"] for row in ROWS[50:]}


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"prompt": "text"}, ["task.params", "no column 'text'", "question, answer, level"]),
        ({"answer": "solution"}, ["task.params", "no column 'solution'"]),
        ({"promt": "question"}, ["task.params", "promt", "allowed: prompt, answer, train, val"]),
        ({"prompt": 3}, ["task.params", "prompt"]),
        ({"val": "/nowhere.jsonl"}, ["task.params", "no such file: '/nowhere.jsonl'"]),
    ],
)
def test_columns_that_are_not_there_are_refused_before_a_run(file: Path, params: dict, says: list[str]):
    with pytest.raises(ConfigError) as refused:
        load("k5", [f"task.name=jsonl:{file}"], [{"task": {"params": params}}])
    assert all(part in str(refused.value) for part in says)


def test_params_that_a_task_does_not_take_are_refused():
    with pytest.raises(ConfigError, match=r"task\.params: sums takes none, got digits"):
        load("k5", ["task.params.digits=3"])


def test_a_line_that_is_no_row_is_named(tmp_path: Path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "a", "answer": "1"}\n\n[1, 2]\n')
    with pytest.raises(ValueError, match="line 3: list, not an object"):
        build(f"jsonl:{file}")
    file.write_text("{torn")
    with pytest.raises(ValueError, match=r"task\.params: .*line 1: not valid JSON"):
        build(f"jsonl:{file}")


# --- the datasets library ----------------------------------------------------------------------


@pytest.fixture
def forms(datasets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The same two splits in every form that `hf:` takes offline."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(TESTS)}
    for name, kind in (("parquet", "parquet"), ("json", "jsonl"), ("csv", "csv")):
        (tmp_path / name).mkdir()
        for split, rows in splits.items():
            getattr(rows, f"to_{name}")(str(tmp_path / name / f"{split}.{kind}"))
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    return {name: f"hf:{tmp_path / name}" for name in ("parquet", "json", "csv", "saved")}


@pytest.mark.parametrize("form", ["parquet", "json", "csv", "saved"])
def test_rows_of_the_library_make_the_task_that_a_jsonl_file_makes(forms: dict[str, str], file: Path, form: str):
    ours, theirs = build(f"jsonl:{file}", seed=3), build(forms[form], seed=3)
    for split, n in (("train", 300), ("val", ours.problems().validation)):
        assert drawn(ours, split, n) == drawn(theirs, split, n)
    example = theirs.example("train", 0)
    assert theirs.score(example, example.answer) == 1.0


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_a_split_of_its_own_is_validated_on(forms: dict[str, str], form: str):
    task = build(forms[form], val="test")
    assert by_question(e.metadata for e in drawn(task, "val", 20)) == by_question(TESTS)
    assert {e.prompt for e in drawn(task, "train")} == {row["question"] for row in ROWS}
    swapped = build(forms[form], train="test", val="train")
    assert {e.prompt for e in drawn(swapped, "train", 20)} == {row["question"] for row in TESTS}


def test_a_single_file_is_one_split(forms: dict[str, str], file: Path):
    one = f"{forms['parquet']}/train.parquet"
    assert drawn(build(one), "val", 20) == drawn(build(f"jsonl:{file}"), "val", 20)
    with pytest.raises(ValueError, match=r"task\.params: val: the file .* has no split 'test'"):
        build(one, val="test")


def test_what_cannot_be_loaded_is_said_with_the_fix(forms: dict[str, str]):
    with pytest.raises(ValueError, match="split 'dev' cannot be loaded"):
        build(forms["parquet"], val="dev")
    with pytest.raises(ValueError, match="no column 'text'"):
        build(forms["parquet"], prompt="text")
    with pytest.raises(ValueError, match="where there is no network, fetch it elsewhere and give its folder"):
        build("hf:someone/not-on-this-machine")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hf:", "hf:OWNER/NAME"),
        ("hf:/nowhere/at/all", "no such file or folder"),
        ("hf:a/b/c/d", "OWNER/NAME/CONFIG"),
        (f"hf:{__file__}", "must end in .parquet"),
    ],
)
def test_a_name_that_is_no_data_set_is_refused_before_a_run(datasets, name: str, says: str):
    with pytest.raises(ConfigError, match=r"task\.name") as refused:
        load("k5", [f"task.name={name}"])
    assert says in str(refused.value)


def test_the_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"task\.name: hf:… needs the datasets extra: pip install"):
        load("k5", ["task.name=hf:openai/gsm8k/main"])
