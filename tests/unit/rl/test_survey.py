"""What a table's rows came to: left out, drawn for validation, the same again on resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from deploy.config import load, to_toml
from deploy.preflight import preflight
from rl.config import GrpoConfig, ModelConfig, RolloutConfig, SnapshotConfig, ValConfig
from rl.problems import Problems, ProblemSource
from rl.prompts import PromptEncoder
from rl.rollout import RolloutWorker
from rl.task_config import TaskConfig
from rl.tasks import located, make_task
from tests.unit.rl.test_data_rows import GOOD, LONG, write

LIMIT = 16
LONGS = [LONG | {"answer": str(i)} for i in range(5)]
MIXED = [*GOOD[:60], *LONGS[:2], *GOOD[60:], *LONGS[2:]]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    return write(tmp_path / "mixed.jsonl", *MIXED)


def config(file: Path, *settings: str):
    return load("k5", [f"task.name=jsonl:{file}", *settings])


# --- rows left out -----------------------------------------------------------------------------


def engine(task: TaskConfig, seed: int = 3) -> RolloutWorker:
    grpo = GrpoConfig(max_prompt_length=LIMIT)
    return RolloutWorker(
        ModelConfig(), task, grpo, RolloutConfig(), SnapshotConfig(), seed, val=ValConfig(size=8), threads=1
    )


def test_rows_left_out_are_counted_and_every_engine_leaves_out_the_same(mixed: Path, tmp_path: Path):
    task = TaskConfig(name=f"jsonl:{mixed}", overlong="drop")
    found = preflight(config(mixed, "task.overlong=drop"))
    assert [(s.rows, s.left_out) for s in found.sources] == [(205, 5)]
    one, two = engine(task), engine(task)
    assert one.problems() == two.problems() == found
    clean = make_task(TaskConfig(name=f"jsonl:{write(tmp_path / 'clean.jsonl', *GOOD)}"), 3, 8)
    for split, n in (("train", 400), ("val", found.validation)):
        examples = [one.tasks.example(split, i) for i in range(n)]
        assert (
            examples == [two.tasks.example(split, i) for i in range(n)] == [clean.example(split, i) for i in range(n)]
        )


def test_rows_of_the_validation_file_are_left_out_too(mixed: Path, tmp_path: Path):
    val = write(tmp_path / "val.jsonl", *GOOD[:10], *LONGS)
    found = preflight(config(mixed, "task.overlong=drop", f'task.params={{val="{val}"}}'))
    assert found.validation == 10 and [s.left_out for s in found.sources] == [5, 5]


# --- prompts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
def test_many_prompts_are_encoded_as_one_is(chat_model: Path, chat: bool):
    encoder = PromptEncoder(chat_model, TaskConfig(chat=chat, instruction="1+"), limit=99)
    prompts = [row["prompt"] for row in MIXED] * 6  # more than a chunk
    found = encoder.encode(prompts)
    assert found == [encoder.encode([prompt])[0] for prompt in prompts]
    shown = encoder.tokenizer.decode(found[0])
    assert shown == ("#1+" + prompts[0] + "??" if chat else "1+" + prompts[0])


def test_a_prompt_of_which_the_tokenizer_keeps_nothing_is_refused_whatever_stands_around_it(chat_model: Path):
    for task in (TaskConfig(), TaskConfig(instruction="1+2"), TaskConfig(chat=True)):
        with pytest.raises(ValueError, match="knows no character of the prompt 'ü'"):
            PromptEncoder(chat_model, task, limit=99).encode(["1", "ü"])


def test_what_a_chat_template_raises_is_said_of_the_prompt(chat_model: Path):
    (chat_model / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if '7' in m.content %}{{ raise_exception('no sevens') }}{% endif %}{{ m.content }}"
        "{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"chat template does not take the prompt '17' \(.*no sevens"):
        PromptEncoder(chat_model, TaskConfig(chat=True), LIMIT).encode(["1", "2", "17", "3"])


CHAT = [{"role": "user", "content": "1+"}, {"role": "assistant", "content": "2+"}, {"role": "user", "content": "3="}]


def test_a_chat_goes_through_the_template_with_its_options_and_the_instruction_is_the_systems(chat_model: Path):
    (chat_model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '#' if m.role == 'system' else ',' }}{{ m.content }}{% endfor %}{{ '?' * thinks }}"
    )
    task = TaskConfig(chat=True, instruction="9+", template_options={"thinks": 3})
    encoder = PromptEncoder(chat_model, task, limit=99)
    own = [{"role": "system", "content": "8+"}, *CHAT]
    found = [encoder.tokenizer.decode(ids) for ids in encoder.encode([CHAT, own, "7="])]
    assert found == ["#9+,1+,2+,3=???", "#8+,1+,2+,3=???", ",9+7=???"]
    with pytest.raises(ValueError, match="tokenize is for the tokenizer, and set by the run"):
        load("k5", ["task.chat=true", "task.template_options={tokenize=false}"])


def test_chats_without_a_template_are_refused_by_line(tmp_path: Path):
    rows = [*GOOD, {"prompt": CHAT, "answer": "1"}]
    with pytest.raises(ValueError, match=r"line 201: the prompt '\[\{.*is a list of messages: set task.chat=true"):
        preflight(config(write(tmp_path / "x.jsonl", *rows)))


# --- validation --------------------------------------------------------------------------------


def test_validation_draws_from_the_whole_file_each_row_once_and_the_same_for_every_seed(tmp_path: Path):
    train, val = write(tmp_path / "t.jsonl", {"prompt": "0=", "answer": "0"}), write(tmp_path / "v.jsonl", *GOOD)
    tasks = [make_task(TaskConfig(name=f"jsonl:{train}", params={"val": str(val)}), seed, 8) for seed in (0, 1)]
    drawn, other = ([task.example("val", i).metadata for i in range(200)] for task in tasks)
    assert drawn == other and drawn != GOOD
    assert sorted(drawn, key=GOOD.index) == GOOD
    places = [GOOD.index(row) for row in drawn[:40]]  # a fifth of them
    assert min(places) < 20 and max(places) >= 180 and 70 < sum(places) / 40 < 130
    with pytest.raises(IndexError):
        tasks[0].example("val", 200)


def test_made_problems_are_as_many_as_are_asked_for():
    assert make_task(TaskConfig(), 0, 8).problems() == Problems()
    assert make_task(TaskConfig(name="reasoning_gym:chain_sum"), 0, 8).problems() == Problems(validation=8)


# --- the same again ----------------------------------------------------------------------------


class Run:
    """The folder of a run that was stopped, as far as it is read before Ray starts, and the command that goes on."""

    def __init__(self, folder: Path, table: Path, *settings: str):
        self.folder = folder
        folder.mkdir()
        run_config = config(table, *self.keys(table, settings))
        (folder / "config.toml").write_text(to_toml(run_config))
        (folder / "data.json").write_text(preflight(run_config).to_json())

    def keys(self, table: Path, settings: tuple[str, ...]) -> list[str]:
        return ["run.checkpoint_every=1", f"task.name=jsonl:{table}", *settings]

    def resume(self, table: Path, *settings: str) -> str | None:
        """What the command says of a resume that it refuses; None if it goes on."""
        keys = [part for key in self.keys(table, settings) for part in ("--set", key)]
        result = CliRunner().invoke(app, ["run", "k5", "--out", str(self.folder), "--resume", *keys])
        if "as far as Ray" in result.output:
            return None
        assert result.exit_code == 2, (result.output, result.exception)
        return result.output

    def files(self) -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in self.folder.rglob("*") if file.is_file()}


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(*args: object) -> None:
        raise InterruptedError("as far as Ray")

    monkeypatch.setattr("deploy.cluster.launch.execute", execute)


def test_a_data_file_that_was_edited_is_refused_on_resume_and_nothing_is_changed(mixed: Path, tmp_path: Path):
    run = Run(tmp_path / "run", mixed, "task.overlong=drop")
    before = run.files()
    write(mixed, *MIXED[:-1], LONG | {"answer": "6"})
    said = run.resume(mixed, "task.overlong=drop")
    assert f"{mixed} was changed since the run began (205 rows, digest " in said and "put it back" in said
    assert run.files() == before
    write(mixed, *MIXED)
    assert run.resume(mixed, "task.overlong=drop") is None


def test_more_may_be_let_in_on_resume_only_where_nothing_was_left_out(mixed: Path, tmp_path: Path):
    clean = write(tmp_path / "clean.jsonl", *GOOD)
    for key in ("grpo.max_prompt_length=30", "task.overlong=drop"):
        assert Run(tmp_path / key, clean).resume(clean, key) is None
    run = Run(tmp_path / "mixed", mixed, "task.overlong=drop")
    said = run.resume(mixed, "task.overlong=drop", "grpo.max_prompt_length=18")
    assert "began with 5 rows left out as too long, now it would be 0" in said


def test_a_run_of_a_version_that_kept_no_digests_goes_on(mixed: Path, tmp_path: Path):
    run = Run(tmp_path / "run", mixed, "task.overlong=drop")
    (run.folder / "data.json").unlink()
    assert run.resume(mixed, "task.overlong=drop") is None


def test_the_digest_of_a_data_set_is_that_of_its_prompts_and_answers(tmp_path: Path):
    datasets = pytest.importorskip("datasets", reason="needs the datasets extra")

    def digest(name: str, rows: list[dict]) -> str:
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / name))
        (source,) = make_task(TaskConfig(name=f"hf:{tmp_path / name}"), 0, 8).problems().sources
        return source.digest

    assert digest("a", GOOD) == digest("b", GOOD)
    changed = [*GOOD[:-1], GOOD[-1] | {"answer": "77"}]
    assert digest("c", changed) != digest("a", GOOD)


def test_what_is_stored_is_readable():
    stored = Problems(3, (ProblemSource("x.jsonl", "ab", 4, 1),)).to_json()
    assert json.loads(stored) == [{"name": "x.jsonl", "digest": "ab", "rows": 4, "left_out": 1}]


def test_engines_are_told_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    found = located(TaskConfig(name="jsonl:a.jsonl", params={"val": "~/b.jsonl"}))
    assert found.name == f"jsonl:{tmp_path / 'a.jsonl'}" and found.params["val"] == str(Path.home() / "b.jsonl")
    (tmp_path / "data").mkdir()
    assert located(TaskConfig(name="hf:data")).name == f"hf:{tmp_path / 'data'}"
    for name in ("hf:openai/gsm8k/main", "sums", "reasoning_gym:chain_sum"):
        assert located(TaskConfig(name=name)).name == name
