"""Tasks: prompts are pure functions of (seed, split, index), splits never overlap, and scores are right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from rl.examples import Example
from rl.gym_task import ReasoningGym, gym_names
from rl.task_config import TaskConfig
from rl.tasks import check_task, make_task

ODD = ["", " ", "#", "####", "\n", "x", "None", "nan", "1e999", "{}", "[1, 2", "0/0", "\x00", "é☃", "9" * 500, "#" * 99]


def task(name: str, seed: int = 0, val_size: int = 16, **params):
    return make_task(TaskConfig(name=name, params=params), seed, val_size)


# --- sums --------------------------------------------------------------------------------------


def worked(prompt: str) -> tuple[str, str]:
    """Running sums mod 10 of the digits in the prompt, and the last one: derived from the prompt alone."""
    digits = [int(c) for c in prompt.removesuffix("=").split("+")]
    running, steps = digits[0], []
    for digit in digits[1:]:
        running = (running + digit) % 10
        steps.append(str(running))
    return ",".join(steps), str(running)


@pytest.fixture(scope="module")
def sums_prompts() -> dict[tuple[int, str], list[str]]:
    tasks = {seed: task("sums", seed) for seed in (0, 7)}
    return {
        (seed, split): [sums.example(split, i).prompt for i in range(20_000)]
        for seed, sums in tasks.items()
        for split in ("train", "val")
    }


def test_train_and_validation_prompts_never_meet_whatever_the_seeds(sums_prompts):
    train = {p for (_, split), found in sums_prompts.items() if split == "train" for p in found}
    val = {p for (_, split), found in sums_prompts.items() if split == "val" for p in found}
    assert not train & val
    assert len(train) > 20_000 and len(val) > 4_000


def test_another_seed_gives_other_prompts_and_an_index_mostly_a_new_one(sums_prompts):
    assert sums_prompts[0, "train"][:50] != sums_prompts[7, "train"][:50]
    assert len(set(sums_prompts[0, "train"][:1000])) > 980


def test_an_example_is_a_pure_function_of_seed_split_and_index(sums_prompts):
    again = task("sums", 7)
    for i in (19_999, 3, 3, 12_345, 0):
        assert again.example("train", i).prompt == sums_prompts[7, "train"][i]
        assert again.example("val", i).prompt == sums_prompts[7, "val"][i]
        assert again.example("val", i) == task("sums", 7).example("val", i)


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_right_worked_answer_scores_1_and_every_other_digit_0(split: str):
    sums = task("sums", 1)
    for i in range(50):
        example = sums.example(split, i)
        steps, right = worked(example.prompt)
        assert example.answer == right
        for digit in "0123456789":
            assert sums.score(example, f"{steps}#{digit}$") == float(digit == right)
            assert sums.score(example, f"{steps}#{digit}") == float(digit == right)


def test_two_answers_no_answer_or_an_answer_out_of_place_score_0():
    sums = task("sums", 1)
    for i in range(50):
        example = sums.example("train", i)
        steps, right = worked(example.prompt)
        other = str((int(right) + 1) % 10)
        wrong = [
            right, steps, f"#{right}", f"{steps}#", f"{steps}#{right}#", f"{steps}#{other}#{right}",
            f"{steps}#{right}#{other}", f"{steps}#{right}{right}", f"{steps}# {right}", f"{steps}#{right}$$",
            f"{steps}#$", f"{steps}##{right}", *ODD,
        ]  # fmt: skip
        assert [text for text in wrong if sums.score(example, text) != 0.0] == []


def test_a_split_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="test"):
        task("sums").example("test", 0)


# --- jsonl -------------------------------------------------------------------------------------


@pytest.fixture
def lines(tmp_path: Path) -> str:
    file = tmp_path / "problems.jsonl"
    rows = [{"question": f"What is {i} + {i}?", "answer": f"Twice {i} is\n#### {2 * i:,}"} for i in range(400)]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return f"jsonl:{file}"


def count(found: list[Example]) -> int:
    return len({e.prompt for e in found})


def test_jsonl_splits_are_disjoint_cover_the_file_and_do_not_depend_on_the_seed(lines: str):
    splits = []
    for seed in (0, 1):
        jsonl = task(lines, seed)
        train = {jsonl.example("train", i).prompt for i in range(400)}
        val = {jsonl.example("val", i).prompt for i in range(jsonl.problems().validation)}
        assert not train & val and len(train | val) == 400
        assert 20 < len(val) < 80  # about a tenth
        splits.append((train, val))
    assert splits[0] == splits[1]


def test_every_jsonl_epoch_is_a_permutation_of_its_own(lines: str):
    jsonl = task(lines)
    n = count([jsonl.example("train", i) for i in range(400)])
    epochs = [[jsonl.example("train", e * n + i).prompt for i in range(n)] for e in range(4)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == n for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = task(lines, seed=1)
    assert [other.example("train", i).prompt for i in range(n)] not in epochs


def test_a_jsonl_example_is_a_pure_function_of_seed_split_and_index(lines: str):
    one, two = task(lines), task(lines)
    indices = [900, 3, 5000, 0, 401]
    assert [one.example("train", i) for i in indices] == [two.example("train", i) for i in reversed(indices)][::-1]


def test_a_repeated_question_is_never_in_both_jsonl_splits(tmp_path: Path):
    file = tmp_path / "repeats.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"p{i % 60}", "answer": str(i)}) for i in range(600)))
    jsonl = task(f"jsonl:{file}")
    counts = {"train": 600, "val": jsonl.problems().validation}
    train, val = ({jsonl.example(split, i).prompt for i in range(n)} for split, n in counts.items())
    assert not train & val and len(train | val) == 60


def test_a_jsonl_file_too_small_for_both_splits_is_refused(tmp_path: Path):
    file = tmp_path / "one.jsonl"
    file.write_text('{"prompt": "p", "answer": "1"}\n')
    with pytest.raises(ValueError, match=r"one\.jsonl.*no problem falls in the"):
        task(f"jsonl:{file}")


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("#### 1,234", 1), ("#### 1234", 1), ("#### 1234.0", 1), ("####1,234", 1), ("It is 7.\n#### 1,234", 1),
        ("#### 99 no, #### 1,234", 1), ("#### $1,234", 1), ("#### 1,234.", 1), ("the answer is 1234", 1),
        ("so 1,234", 1), ("12, then 1234", 1), ("####\n1234", 1), ("#### 1,234 dollars, not 7", 1),
        ("#### 1,235", 0), ("#### 123", 0), ("#### -1234", 0), ("#### 1234.5", 0), ("#### 12345", 0),
        ("#### 1234 #### 5", 0), ("1234 or 7", 0), ("1234 ####", 0), ("#### none", 0), ("1 234", 0),
    ],
)  # fmt: skip
def test_a_gsm8k_answer_is_scored_as_a_number(lines: str, text: str, score: int):
    example = Example("q", "They sum to 1,200 + 34 = <<1200+34=1234>>1234.\n#### 1,234")
    assert task(lines).score(example, text) == score


def test_odd_answers_to_a_jsonl_problem_score_0_and_raise_nothing(lines: str):
    jsonl, example = task(lines), Example("q", "#### 42")
    assert [text for text in ODD if jsonl.score(example, text) != 0.0] == []


def test_an_answer_in_words_is_compared_as_text(lines: str):
    jsonl, example = task(lines), Example("q", "#### Paris")
    assert jsonl.score(example, "I think\n#### Paris") == 1 and jsonl.score(example, " Paris ") == 1
    assert jsonl.score(example, "#### London") == 0


# --- reasoning_gym -----------------------------------------------------------------------------


TINY = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # about 200 different questions


def test_the_names_read_from_the_sources_are_those_of_the_librarys_registry():
    assert gym_names() == frozenset(DATASETS) and len(gym_names()) > 90


@pytest.mark.parametrize("seed", [0, 1])
def test_validation_questions_never_appear_in_training_even_where_problems_are_few(seed: int):
    gym = task("reasoning_gym:chain_sum", seed, val_size=80, **TINY)
    val = {gym.example("val", i).prompt for i in range(80)}
    train = [gym.example("train", i).prompt for i in range(600)]
    assert not val & set(train)
    raw = reasoning_gym.create_dataset("chain_sum", seed=99, size=600, **TINY)
    assert sum(item["question"] in val for item in raw) > 100  # without the rejection they would


def test_validation_is_the_same_for_every_seed_and_training_is_not():
    one, two = (task("reasoning_gym:chain_sum", seed, val_size=8) for seed in (0, 1))
    assert [one.example("val", i).prompt for i in range(8)] == [two.example("val", i).prompt for i in range(8)]
    assert [one.example("train", i).prompt for i in range(8)] != [two.example("train", i).prompt for i in range(8)]


def test_a_reasoning_gym_example_is_a_pure_function_of_seed_split_and_index():
    one, two = (task("reasoning_gym:chain_sum", 3, **TINY) for _ in range(2))
    indices = [5, 99_999, 0, 5]
    assert [one.example("train", i) for i in indices] == [two.example("train", i) for i in reversed(indices)][::-1]


def test_a_task_with_fewer_problems_than_the_validation_set_is_refused_and_does_not_loop():
    gym = task("reasoning_gym:chain_sum", val_size=1500, **TINY)
    with pytest.raises(ValueError, match="too few problems"):
        for i in range(50):
            gym.example("train", i)


@pytest.mark.parametrize("form", ["{}", " {} ", "#### {}", "First 1, then 2.\n#### {}\n", "#### 5 #### {}"])
def test_the_answer_after_the_last_hashes_is_what_reasoning_gym_scores(form: str):
    gym = task("reasoning_gym:chain_sum", **TINY)
    for i in range(10):
        example = gym.example("train", i)
        right = str(eval_sum(example.metadata["metadata"]["expression"]))
        assert gym.score(example, form.format(right)) == 1.0
        assert gym.score(example, form.format(int(right) + 1)) == 0.0


def eval_sum(expression: str) -> int:
    total, sign = 0, 1
    for word in expression.split():
        if word in "+-":
            sign = 1 if word == "+" else -1
        else:
            total += sign * int(word)
    return total


@pytest.mark.parametrize("name", ["chain_sum", "prime_factorization", "coin_flip", "simple_equations"])
def test_no_text_of_a_policy_makes_a_scorer_raise_or_scores_partly(name: str):
    gym = ReasoningGym(name, {}, seed=0, val_size=2)
    example = gym.example("train", 0)
    assert gym.score(example, example.answer) == 1.0
    assert [text for text in ODD if gym.score(example, text) != 0.0] == []


# --- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sums", "reasoning_gym:chain_sum", "reasoning_gym:gsm_symbolic"])
def test_a_task_that_exists_is_accepted(name: str):
    check_task(TaskConfig(name=name))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("sumz", "did you mean 'sums'"),
        ("json:/x", "did you mean 'jsonl'"),
        ("sums:5", "takes no argument"),
        ("", "use sums, calculator, reasoning_gym:NAME, jsonl:PATH, hf:NAME or verifiers:NAME"),
        ("gsm8k", "use sums, calculator, reasoning_gym:NAME, jsonl:PATH, hf:NAME or verifiers:NAME"),
        ("reasoning_gym", "chain_sum"),
        ("reasoning_gym:chain_sun", "did you mean 'chain_sum'"),
        ("reasoning_gym:chainsum", "did you mean 'chain_sum'"),
        ("reasoning_gym:qqqqqqqq", "chain_sum"),
        ("jsonl:", "no such file"),
        ("jsonl:/nowhere/at/all.jsonl", "/nowhere/at/all.jsonl"),
    ],
)
def test_an_unknown_task_is_refused_with_the_nearest_name_or_what_there_is(name: str, hint: str):
    with pytest.raises(ValueError, match=hint):
        check_task(TaskConfig(name=name))
