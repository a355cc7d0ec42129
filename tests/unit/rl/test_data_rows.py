"""Rows that no run could be shown are named by file and line before anything starts; the rest is read as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ray
from typer.testing import CliRunner

from deploy.cli import app
from rl.jsonl_rows import first_row, read_jsonl
from rl.problem_columns import problem_of
from rl.task_config import TableParams

GOOD = [{"prompt": f"{i % 10}+{i // 10 % 10}+{i // 100}=", "answer": str(i % 7)} for i in range(200)]
LONG = {"prompt": "+".join("123456789") + "=", "answer": "5"}  # 18 tokens of the built-in tokenizer


def write(file: Path, *rows: dict | str | bytes) -> Path:
    """One line each, ends `\\n`."""
    coded = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    file.write_bytes(b"\n".join(coded) + b"\n")
    return file


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """What the command says on standard error of a run that it refuses; Ray must not be started for it."""

    def no_ray(*args: object, **kw: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", no_ray)

    def run(*settings: str, preset: str = "k5") -> str:
        arguments = ["run", preset, "--out", str(tmp_path / "run")]
        result = CliRunner().invoke(app, [*arguments, *(part for s in settings for part in ("--set", s))])
        assert result.exit_code == 2, (result.output, result.exception)
        assert not (tmp_path / "run" / "summary.json").exists()
        return result.output

    return run


# --- through the command -----------------------------------------------------------------------

BAD = {
    "null answer": ({"prompt": "1+2=", "answer": None}, ["column 'answer' is null", "task.params.answer"]),
    "null prompt": ({"prompt": None, "answer": "1"}, ["column 'prompt' is null", "task.params.prompt"]),
    "empty answer": ({"prompt": "1+2=", "answer": " \t "}, ["'answer' is empty"]),
    "empty prompt": ({"prompt": "", "answer": "1"}, ["'prompt' is empty"]),
    "no answer": ({"prompt": "1+2="}, ["no column 'answer'; it has prompt"]),
    "a list": ({"prompt": "1+2=", "answer": ["1"]}, ["'answer' holds list", "not text"]),
    "half a pair": ('{"prompt": "1+\\ud800=", "answer": "1"}', ["surrogate", r"'\ud800'", "character 2"]),
    "a NUL": ('{"prompt": "1+2=", "answer": "1\\u0000"}', ["NUL at character 1"]),
    "not a number": ('{"prompt": "1+2=", "answer": NaN}', ["'answer' holds nan, not a finite number"]),
    "overflow": ('{"prompt": "1+2=", "answer": 1e999}', ["'answer' holds inf"]),
    "torn": ('{"prompt": "1+2=", "ans', ["not valid JSON", "at character"]),
    "no object": ("[1, 2]", ["list, not an object"]),
    "a key twice": ('{"prompt": "1=", "answer": "1", "answer": "2"}', ["the key 'answer' is there twice"]),
    "a huge integer": ('{"prompt": "1=", "answer": ' + "9" * 5000 + "}", ["cannot be read", "4300"]),
    "too deep": ('{"prompt": "1=", "answer": ' + "[" * 100_000 + "}", ["cannot be read"]),
    "latin-1": (b'{"prompt": "1=", "answer": "\xe9"}', ["not UTF-8: byte 0xe9 at offset"]),
    "unknown to the tokenizer": ({"prompt": "héllo", "answer": "1"}, ["knows no character of the prompt 'héllo'"]),
    "too long": (LONG, ["18 tokens, grpo.max_prompt_length is 16", "set it to 18, or task.overlong=drop"]),
}


@pytest.mark.parametrize(("row", "says"), BAD.values(), ids=BAD)
def test_a_row_that_no_run_could_be_shown_is_refused_by_file_and_line_before_ray(
    refused, tmp_path: Path, row: dict | str | bytes, says: list[str]
):
    file = write(tmp_path / "zeilen ü.jsonl", *GOOD, "", row)
    message = refused(f"task.name=jsonl:{file}")
    assert f"{file}, line 202: " in message
    assert [part for part in says if part not in message] == []


def test_rows_of_the_validation_file_are_checked_too(refused, tmp_path: Path):
    file, val = write(tmp_path / "train.jsonl", *GOOD), write(tmp_path / "val.jsonl", GOOD[0], LONG)
    assert f"{val}, line 2: 18 tokens" in refused(f"task.name=jsonl:{file}", f'task.params={{val="{val}"}}')


def test_several_rows_are_named_at_once_and_the_rest_counted(refused, tmp_path: Path):
    file = write(tmp_path / "x.jsonl", *GOOD, *[{"prompt": "1=", "answer": None}] * 9)
    message = refused(f"task.name=jsonl:{file}")
    assert [f"line {n}:" in message for n in range(200, 208)] == [False, *[True] * 5, False, False]
    assert "… and 4 more rows" in message


def test_the_instruction_and_the_chat_template_count_as_tokens(refused, tmp_path: Path, chat_model: Path):
    file = write(tmp_path / "x.jsonl", *GOOD)  # 6 tokens
    assert "line 1: 17 tokens" in refused(f"task.name=jsonl:{file}", "task.instruction=1+2+3+4+5+=")
    settings = ["task.chat=true", f"model.path={chat_model}", "grpo.max_prompt_length=8"]
    assert "line 1: 9 tokens" in refused(f"task.name=jsonl:{file}", *settings)  # one token before, two after


@pytest.mark.parametrize("name", ["sums", "reasoning_gym:chain_sum"])
def test_made_problems_that_are_hopelessly_long_are_refused_before_ray(refused, name: str):
    message = refused(f"task.name={name}", "grpo.max_prompt_length=3")
    assert f"task.name '{name}': a prompt has" in message and "grpo.max_prompt_length is 3" in message


def test_dropping_all_rows_is_refused(refused, tmp_path: Path):
    file = write(tmp_path / "x.jsonl", *GOOD)
    message = refused(f"task.name=jsonl:{file}", "task.overlong=drop", "grpo.max_prompt_length=3")
    assert f"{file}" in message and "all of its 200 rows are left out" in message


def test_rows_of_a_data_set_are_named_by_split_and_index(refused, tmp_path: Path):
    datasets = pytest.importorskip("datasets", reason="needs the datasets extra")
    rows = datasets.Dataset.from_list([*GOOD, {"prompt": "1=", "answer": None}])
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "saved"))
    assert "split 'train', row 200: column 'answer' is null" in refused(f"task.name=hf:{tmp_path / 'saved'}")


# --- the file ----------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\u0085", "\u000b", "\u000c", "\u001c"])
def test_only_a_newline_ends_a_line(tmp_path: Path, odd: str):
    raw = odd in "\u2028\u2029\u0085"  # the others JSON wants escaped
    row = {"prompt": f"a{odd}b", "answer": "1"}
    found = read_jsonl(str(write(tmp_path / "x.jsonl", json.dumps(row, ensure_ascii=not raw), GOOD[0])))
    assert found.rows == [row, GOOD[0]] and found.lines == [1, 2]


def test_a_carriage_return_alone_ends_no_line(tmp_path: Path):
    file = write(tmp_path / "x.jsonl", '{"prompt": "a",\r"answer": "1"}', GOOD[0])
    assert read_jsonl(str(file)).rows == [{"prompt": "a", "answer": "1"}, GOOD[0]]


def test_the_ends_of_windows_a_byte_order_mark_and_a_last_line_without_an_end_are_taken(tmp_path: Path):
    plain = [json.dumps(row) for row in GOOD[:3]]
    for data in ("\r\n".join(plain), "\ufeff" + "\n".join(plain), "\n\n".join(plain) + "\n\n  \n"):
        (tmp_path / "x.jsonl").write_bytes(data.encode())
        assert read_jsonl(str(tmp_path / "x.jsonl")).rows == GOOD[:3]
        assert first_row(str(tmp_path / "x.jsonl"))[1] == GOOD[0]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_another_encoding_is_named(tmp_path: Path, encoding: str):
    file = tmp_path / "x.jsonl"
    file.write_bytes("\n".join(json.dumps(row) for row in GOOD).encode(encoding))
    for read in (read_jsonl, first_row):
        with pytest.raises(ValueError, match=rf"x\.jsonl is in {encoding.upper()}.*: write it in UTF-8"):
            read(str(file))


def test_the_offset_of_a_bad_byte_is_that_in_the_file(tmp_path: Path):
    file = write(tmp_path / "x.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD[0]).encode(), b'{"prompt": "\xff"}')
    with pytest.raises(ValueError, match=rf"line 2: not UTF-8: byte 0xff at offset {file.read_bytes().index(0xFF)} "):
        read_jsonl(str(file))


def test_paths_are_relative_to_where_one_is_or_to_ones_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "ü ☃.jsonl", *GOOD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_jsonl("ü ☃.jsonl").rows == read_jsonl("~/ü ☃.jsonl").rows == GOOD


@pytest.mark.parametrize(
    ("value", "text"), [(7, "7"), (-0.5, "-0.5"), (True, "True"), (9007199254740993, "9007199254740993")]
)
def test_a_number_is_its_text(value: object, text: str):
    row = {"prompt": "p", "answer": value}
    assert problem_of("x", row, TableParams(prompt="prompt")) == ("p", text)
