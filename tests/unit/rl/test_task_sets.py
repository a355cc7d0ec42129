"""Further sets to validate on: what is theirs, what training leaves out for them, and what each row counts for."""

from __future__ import annotations

from pathlib import Path

import pytest

from rl.problems import Problems, check_same
from rl.rollout import split_key
from rl.task_config import TaskConfig
from rl.task_sets import TaskSets, located_sets
from rl.val_config import ValConfig, ValSet
from tests.unit.rl.test_data_rows import GOOD, write


@pytest.fixture
def tables(tmp_path: Path) -> tuple[TaskConfig, Path]:
    """Rows to train on, and a file of ten of them and two others, each with where it is from."""
    train = write(tmp_path / "train.jsonl", *[row | {"source": f"a/{i % 3}"} for i, row in enumerate(GOOD)])
    others = [{"prompt": f"9+9+{i}=", "answer": "1"} for i in (7, 8)]
    rows = [row | {"source": "seen" if i < 10 else "new"} for i, row in enumerate([*GOOD[40:50], *others])]
    return TaskConfig(name=f"jsonl:{train}"), write(tmp_path / "set.jsonl", *rows)


def prompts(sets: TaskSets, split: str, n: int) -> list[str]:
    return [sets.example(split, i).text for i in range(n)]


def test_all_rows_of_a_set_are_validated_on_and_none_of_its_prompts_is_trained_on(tables: tuple[TaskConfig, Path]):
    task, file = tables
    sets = TaskSets(task, ValConfig(size=8, sets={"more": ValSet(task=f"jsonl:{file}", size="all")}), seed=3)
    found = sets.problems()
    assert found.sets["val/more"].validation == sets.there("val/more") == 12 and sets.there("val") == 8
    assert [source.rows for source in found.read] == [200, 12]
    asked = set(prompts(sets, "val/more", 12))
    assert len(asked) == 12 and {row["prompt"] for row in GOOD[40:50]} < asked
    trained = set(prompts(sets, "train", 600))
    assert trained & asked == set() and trained & set(prompts(sets, "val", found.validation or 0)) == set()
    alone = TaskSets(task, ValConfig(size=8), seed=3)
    assert set(prompts(alone, "train", 600)) & asked != set()
    assert prompts(alone, "val", 8) == prompts(sets, "val", 8)


def test_so_of_problems_that_are_made_for_a_set(tables: tuple[TaskConfig, Path]):
    tiny = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    gym = TaskConfig(name="reasoning_gym:chain_sum", params=tiny)
    sets = TaskSets(gym, ValConfig(size=4, sets={"more": ValSet(size=20)}), seed=0)
    assert sets.of("val/more") is sets.task and (sets.there("val"), sets.there("val/more")) == (4, 20)
    assert prompts(sets, "val", 4) == prompts(sets, "val/more", 4)
    (file,) = tables[1:]
    text = prompts(sets, "train", 1)[0]
    write(file, {"prompt": text, "answer": "1"})
    sets = TaskSets(gym, ValConfig(size=4, sets={"more": ValSet(task=f"jsonl:{file}", size="all")}), seed=0)
    assert text not in prompts(sets, "train", 100)


def test_each_problem_says_what_it_counts_for(tables: tuple[TaskConfig, Path]):
    task, file = tables
    more, plain = ValSet(task=f"jsonl:{file}", size="all"), ValSet(by="")
    sets = TaskSets(task, ValConfig(size=6, by="source", sets={"more": more, "plain": plain}), seed=3)
    found = sets.problems()
    metadata = [sets.example("val", i).metadata["source"] for i in range(6)]
    assert found.groups == tuple(source.replace("/", "_") for source in metadata)
    assert sorted(found.sets["val/more"].groups) == ["new"] * 2 + ["seen"] * 10
    assert found.sets["val/plain"].groups == () and found.sets["val/plain"].validation == found.validation
    assert found.sets["val/plain"].sources == ()  # said once
    field = ValConfig(size=3, by="metadata.source_dataset")
    assert TaskSets(TaskConfig(name="reasoning_gym:chain_sum"), field, 0).problems().groups == ("chain_sum",) * 3


@pytest.mark.parametrize(
    ("val", "says"),
    [
        (
            ValConfig(by="from"),
            r"^val\.by: the row of '.*' has no text or whole number in column 'from'.*it has prompt, ",
        ),
        (ValConfig(size="all", by="prompt"), r"^val\.by: column 'prompt' has \d+ values, at most 64 make metrics"),
        (ValConfig(sets={"a": ValSet(by="x")}), r"^val\.sets\.a\.by: the row of"),
        (ValConfig(sets={"a": ValSet(task="sums", size="all")}), r"^val\.sets\.a\.size 'all' is every row of a table"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(val: ValConfig, says: str, tmp_path: Path):
    rows = [{"prompt": f"{i}+{j}=", "answer": str(i)} for i in range(40) for j in range(40)]
    task = TaskConfig(name=f"jsonl:{write(tmp_path / 'rows.jsonl', *rows)}")
    with pytest.raises(ValueError, match=says):
        TaskSets(task, val, 0).problems()


def test_all_problems_of_a_task_that_makes_them_are_no_number():
    with pytest.raises(ValueError, match=r"^val\.size 'all' is every row of a table, and these problems are made"):
        TaskSets(TaskConfig(), ValConfig(size="all"), 0)


def test_what_is_not_said_of_a_set_is_as_for_the_task():
    sets = {"a": ValSet(), "b": ValSet(size=3, samples=1, temperature=0.0, by="")}
    found = ValConfig(size="all", samples=4, by="source", sets=sets).asked(0.7)
    told = {s: (x.key, x.size, x.samples, x.temperature, x.by) for s, x in found.items()}
    assert told == {
        "val": ("val", "all", 4, 0.7, "source"),
        "val/a": ("val.sets.a", "all", 4, 0.7, "source"),
        "val/b": ("val.sets.b", 3, 1, 0.0, ""),
    }


def test_random_numbers_of_a_set_depend_on_its_name_and_on_no_other_set():
    keys = [split_key(split) for split in ("train", "val", "val/a", "val/b")]
    assert keys[:2] == [0, 1] and len(set(keys)) == 4 and min(keys[2:]) > 1
    assert split_key("val/a") == keys[2]


def test_paths_of_sets_are_those_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    found = located_sets(ValConfig(sets={"a": ValSet(task="jsonl:a.jsonl", size=2), "b": ValSet()}))
    assert found.sets["a"] == ValSet(task=f"jsonl:{tmp_path / 'a.jsonl'}", size=2) and found.sets["b"] == ValSet()


def test_a_run_does_not_go_on_with_another_set(tables: tuple[TaskConfig, Path], tmp_path: Path):
    task, file = tables
    val = ValConfig(sets={"more": ValSet(task=f"jsonl:{file}")})
    (tmp_path / "data.json").write_text(TaskSets(task, val, 0).problems().to_json())
    check_same(tmp_path / "data.json", TaskSets(task, val, 0).problems())
    write(file, *GOOD[:3])
    with pytest.raises(ValueError, match=r"set\.jsonl was changed since the run began \(12 rows.*now 3"):
        check_same(tmp_path / "data.json", TaskSets(task, val, 0).problems())
    assert Problems().read == ()
