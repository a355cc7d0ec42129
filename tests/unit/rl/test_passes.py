"""pass@k against the choices themselves, and what a validation says of it."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from deploy.config import ConfigError, load
from rl.batch import Batch
from rl.passes import pass_at, passes
from rl.val_config import OWN, AskedSet
from swarm.validation import Answered, accuracies, validation_metrics


def batch_of(rewards: np.ndarray) -> Batch:
    none, flat = np.zeros(0, np.float32), rewards.reshape(-1).astype(np.float32)
    lengths = np.full(flat.size, 3, np.int32)
    return Batch(none.astype(np.int32), lengths, lengths + 2, none, none, flat, none, np.zeros(flat.size, bool))


def metrics_of(batch: Batch, samples: int) -> dict[str, float]:
    return validation_metrics(load("k5"), {OWN: Answered(AskedSet("", 8, samples, 1.0, ""), batch)})


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_all_choices_of_k_answers_that_hold_a_right_one(n: int):
    rewards = (np.random.default_rng(n).random((6, n)) < 0.4).astype(np.float32)
    for k in range(1, n + 1):
        held = [any(row[i] for i in chosen) for row in rewards for chosen in combinations(range(n), k)]
        assert pass_at(rewards, k) == pytest.approx(np.mean(held), abs=1e-12)
    assert pass_at(rewards, 1) == pytest.approx(rewards.mean()) and pass_at(rewards, n) == rewards.any(1).mean()


def test_it_is_said_for_powers_of_two_and_for_all_and_only_of_right_and_wrong():
    assert list(passes(np.eye(8))) == [2, 4, 8] and list(passes(np.zeros((2, 6)))) == [2, 4, 6]
    assert passes(np.ones((3, 1))) == {} and passes(np.array([[0.5, 1.0]])) == {}


def test_a_validation_of_one_answer_each_says_what_it_always_said():
    found = metrics_of(batch_of(np.array([1, 0, 0, 1])), 1)
    aux = {"val-aux/response_length/mean": 2.0, "val-aux/response_length/clip_ratio": 0.0}
    assert found == {"val-core/sums/acc/mean@1": 0.5} | aux
    several = metrics_of(batch_of(np.array([[1, 0, 0, 1], [0, 0, 0, 0]])), 4)
    core = {"mean@4": 0.25, "pass@2": (1 - 1 / 6) / 2, "pass@4": 0.5}
    assert several == {f"val-core/sums/acc/{name}": pytest.approx(value) for name, value in core.items()} | aux


def test_sets_and_the_rows_of_each_source_have_metrics_of_their_own():
    own, more = batch_of(np.array([1, 0, 0, 1])), batch_of(np.array([[1, 0], [0, 0]]))
    answered = {
        OWN: Answered(AskedSet("", 4, 1, 1.0, "from"), own, ("x", "y", "x", "y")),
        "val/more": Answered(AskedSet("more", 2, 2, 1.0, ""), more),
    }
    found = {name: value for name, value in validation_metrics(load("k5"), answered).items() if "length" not in name}
    assert found == {
        "val-core/sums/acc/mean@1": 0.5,
        "val-core/sums/x/acc/mean@1": 0.5,
        "val-core/sums/y/acc/mean@1": 0.5,
        "val-core/more/acc/mean@2": 0.25,
        "val-core/more/acc/pass@2": 0.5,
    }
    assert accuracies(load("k5"), answered) == {"sums/x": 0.5, "sums/y": 0.5, "more": 0.25}
    assert accuracies(load("k5"), {OWN: Answered(AskedSet("", 4, 1, 1.0, ""), own)}) == {}


def test_several_greedy_answers_are_refused():
    with pytest.raises(ConfigError, match=r"val\.samples 4 greedy answers to a prompt are one"):
        load("k5", ["val.samples=4", "rollout.val_temperature=0.0"])
