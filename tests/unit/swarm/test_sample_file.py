"""samples.jsonl: what it says of a sample, that it stays bounded and about the whole run, and that it can cost no run."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl.batch import Batch, concat, of_validation
from rl.model_files import resolve
from rl.tokenizer import load_tokenizer
from swarm.loggers import Loggers
from swarm.sample_file import NAME, Reader, SampleFile
from swarm.telemetry import Telemetry


def sample(step: int, kind: str = "train", i: int = 0, size: int = 40) -> dict[str, Any]:
    return {"kind": kind, "step": step, "sample": i, "response": "x" * size}


def steps(file: SampleFile, kind: str = "train") -> list[int]:
    found = [json.loads(line) for line in file.path.read_text().splitlines()]
    return [record["step"] for record in found if record["kind"] == kind]


def batch_of(prompt: str, answers: list[str], rewards: list[float], end: list[int]) -> Batch:
    tokenizer = load_tokenizer(resolve("builtin:tiny"))
    head = tokenizer(prompt)["input_ids"]
    tails = [tokenizer(answer)["input_ids"] + end for answer in answers]
    none = np.zeros(0, np.float32)
    return Batch(
        tokens=np.array([token for tail in tails for token in head + tail], np.int32),
        prompt=np.array([len(head)] * len(tails), np.int32),
        total=np.array([len(head) + len(tail) for tail in tails], np.int32),
        rollout_logprobs=none,
        ref_logprobs=none,
        rewards=np.array(rewards, np.float32),
        advantages=none,
        truncated=np.array([not end] * len(tails)),
    )


def test_a_sample_is_what_was_shown_answered_and_paid():
    tokenizer = load_tokenizer(resolve("builtin:tiny"))
    first = batch_of("1+2=", ["3", "12"], [1.0, 0.1], [tokenizer.eos_token_id])
    second = batch_of("7+5+1=", ["1", "2"], [-0.3, 0.0], [])
    batch = Batch.from_frame(concat([first, second]).only(*of_validation(shown=True)).to_frame(), "an engine")[1]
    at = {"kind": "train", "step": 3, "tick": 4}
    parts = {"right": np.array([1, 0.1, np.nan, 0], np.float32)}
    found = Reader("builtin:tiny", True).read(at, batch, parts, first=32, each=2)
    rows = [
        (32, 0, "1+2=", "3", 1.0, 2, False),
        (32, 1, "1+2=", "12", 0.1, 3, False),
        (33, 0, "7+5+1=", "1", -0.3, 1, True),
        (33, 1, "7+5+1=", "2", 0.0, 1, True),
    ]
    names = ("problem", "sample", "prompt", "response", "reward", "length", "truncated")
    of = [{"parts": {"right": 1.0}}, {"parts": {"right": 0.1}}, {}, {"parts": {"right": 0.0}}]
    assert found == [at | dict(zip(names, row)) | more for row, more in zip(rows, of)]


def test_where_an_environment_spoke_a_sample_has_its_turns_and_the_length_of_the_policys():
    batch = concat([batch_of("1+2=", ["1?3#3", "3"], [1.0, 0.0], [])])
    marks = np.array([True, True, False, True, True, True])
    batch = Batch.from_frame(replace(batch, own=marks).only(*of_validation(shown=True)).to_frame(), "an engine")[1]
    found = Reader("builtin:tiny", True).read({}, batch, {}, first=0, each=2)
    assert [(s["response"], s["length"], s.get("turns")) for s in found] == [
        ("1?3#3", 4, ["1?", "3", "#3"]),
        ("3", 1, None),
    ]


def test_validation_without_samples_tells_rewards_and_lengths_alone():
    batch = batch_of("1+2=", ["3"], [1.0], [])
    told, shown = (batch.only(*of_validation(kept)) for kept in (False, True))
    assert told.tokens.size == 0 and shown.tokens.size and told.rewards.tolist() == shown.rewards.tolist() == [1.0]
    assert told.nbytes < shown.nbytes


@pytest.mark.parametrize("every", [1, 4])
def test_a_full_file_stays_within_its_bound_and_is_about_the_whole_run(tmp_path: Path, every: int):
    file = SampleFile(tmp_path, 4000)
    for step in range(1, 301):
        file.add([sample(step, i=i) for i in range(2)])
        if step % every == 0:
            file.add([sample(step, "val")])
        assert file.path.stat().st_size <= 4000
    for kind in ("train", "val"):
        found = steps(file, kind)
        assert found == sorted(found) and found[-1] == 300 and found[0] == (every if kind == "val" else 1)
    train = steps(file)
    assert all(train.count(step) == 2 for step in train)  # whole groups
    gaps = np.diff(sorted(set(train)))
    assert len(gaps) >= 8 and gaps.max() <= 64


def test_a_step_that_is_too_large_alone_is_kept_as_far_as_it_fits(tmp_path: Path):
    file = SampleFile(tmp_path, 500)
    file.add([sample(0, "val", i) for i in range(50)])
    found = [json.loads(line)["sample"] for line in file.path.read_text().splitlines()]
    assert found == list(range(len(found))) and len(found) == 500 // len(json.dumps(sample(0, "val", 9)) + "\n")


def test_what_was_sampled_after_a_checkpoint_is_not_there_twice(tmp_path: Path):
    told = lambda record: None  # noqa: E731
    telemetry = Telemetry(tmp_path, told, samples=SampleFile(tmp_path, 10**6))
    for step in range(1, 5):
        telemetry.samples(step, 2 * step, lambda step=step: [sample(step)])
    telemetry.close()
    with (tmp_path / NAME).open("a") as file:
        file.write(json.dumps(sample(5))[:-7])  # the run was killed
    again = Telemetry(tmp_path, told, samples=SampleFile(tmp_path, 10**6))
    again.restore({"validations": [], "seconds": {}}, 2, 0)
    again.samples(3, 6, lambda: [sample(3)])
    again.close()
    assert steps(SampleFile(tmp_path, 0)) == [1, 2, 3]


@pytest.mark.parametrize("fault", ["a full disk", "no tokenizer"])
def test_samples_that_cannot_be_kept_cost_one_event_and_one_warning(fault: str, tmp_path: Path):
    def make() -> list[dict[str, Any]]:
        if fault == "no tokenizer":
            raise OSError("no tokenizer")
        return [sample(1)]

    if fault == "a full disk":
        (tmp_path / NAME).symlink_to("/dev/full")
    telemetry = Telemetry(tmp_path, lambda record: None, samples=SampleFile(tmp_path, 10**6))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for step in (1, 2, 3):
            telemetry.samples(step, step, make)
        telemetry.restore({"validations": [], "seconds": {}}, 3, 0)
        assert telemetry.finish("completed", {})["status"] == "completed"
    (event,) = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    says = "No space left on device" if fault == "a full disk" else "no tokenizer"
    assert (event["event"], event["step"]) == ("samples_failed", 1) and says in event["reason"]
    assert sum("samples are not kept any more" in str(w.message) for w in warned) == 1


def test_loggers_are_shown_the_samples_in_their_turn(tmp_path: Path):
    told: list[Any] = []

    class Kept:
        def log(self, metrics: dict[str, float], tick: int) -> None:
            told.append(tick)

        def show(self, samples: list[dict[str, Any]], tick: int) -> None:
            told.append((samples, tick))

        def close(self) -> None: ...

    telemetry = Telemetry(tmp_path, lambda record: None, Loggers({"kept": Kept}), SampleFile(tmp_path, 10**6))
    telemetry.samples(1, 0, lambda: [sample(1)])
    telemetry.samples(1, 0, lambda: [])
    telemetry.tick(1, 1, {"actor/pg_loss": 0.5})
    telemetry.close()
    assert told == [([sample(1)], 0), 1]
