"""What a fire replays of a window: unbiased, a function of seed and ticks, bounded, and kept by a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from anchor_service.config import AnchorConfig
from anchor_service.replay import unpack_replay
from swarm.manifest import CheckpointError
from swarm.replay_choice import FRAME, MiniFrame, OwnTick, Window, make_choice
from tests.conftest import make_batch

SAMPLES = 6


@cache
def mini(tick: int, samples: int = SAMPLES) -> MiniFrame:
    batch = make_batch(samples, seed=tick)
    batch = replace(batch, loss_weights=np.linspace(0, tick, samples).astype(np.float32))
    frame = batch.to_frame(denominator=batch.loss_tokens)
    return MiniFrame(batch, frame, frame.nbytes)


def window(count: int = SAMPLES, seed: int = 0) -> Window:
    return Window(count, seed, lambda frame: frame)


def seen(choice: Window, ticks: range) -> Window:
    for tick in ticks:
        choice.see(tick, mini(tick))
    return choice


@pytest.mark.parametrize(("count", "ticks"), [(6, 1), (2, 1), (6, 2), (6, 4), (6, 6), (3, 7), (1, 5)])
def test_a_window_is_an_unbiased_mean_of_its_ticks(count: int, ticks: int):
    """Over seeds, of sums over samples that are divided as each tick's own are: Σ weights · advantages / tokens."""
    batches = [mini(tick).batch for tick in range(1, ticks + 1)]
    expected = np.mean([batch.loss_weights @ batch.advantages / batch.loss_tokens for batch in batches])
    found = []
    for seed in range(400):
        batch, over = unpack_replay(seen(window(count, seed), range(1, ticks + 1)).take(1).reference, "a replay")
        assert len(batch) == count
        found.append((batch.loss_weights * batch.advantages / over).sum())
    error = np.std(found) / np.sqrt(len(found))
    assert np.mean(found) == pytest.approx(expected, abs=4 * error + 1e-6)


@pytest.mark.parametrize(("count", "ticks"), [(6, 4), (6, 6), (3, 2)])
def test_each_tick_of_a_window_gives_as_many_samples_as_the_others_or_one_more(count: int, ticks: int):
    _batch, over = unpack_replay(seen(window(count), range(1, ticks + 1)).take(1).reference, "a replay")
    _, counts = np.unique(over, return_counts=True)
    assert counts.sum() == count and set(counts) <= {count // ticks, -(-count // ticks)} and len(counts) == ticks


def test_a_window_of_one_tick_is_its_mini_batch_to_the_bit():
    choice = seen(window(), range(1, 4))
    choice.take(1)
    last = mini(4)
    choice.see(4, last)
    taken, own = choice.take(2), OwnTick(SAMPLES, 0, lambda frame: frame)
    own.see(4, last)
    assert taken == own.take(2) and taken.reference is last.reference and taken.size == last.size


def test_no_more_than_twice_the_samples_of_a_fire_are_kept_and_the_newest_mini_batch():
    for count in (1, 3, SAMPLES):
        choice = window(count)
        for tick in range(1, 40):
            choice.see(tick, mini(tick))
            assert choice.kept <= 2 * count + SAMPLES


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()


@pytest.mark.parametrize("count", [2, SAMPLES])
def test_a_void_fire_gives_its_ticks_back_as_if_it_had_not_been(count: int):
    whole, parts = seen(window(count), range(1, 12)), seen(window(count), range(1, 4))
    parts.take(1)
    seen(parts, range(4, 9)).take(2)
    parts.give_back(1)
    parts.give_back(2)
    assert same(seen(parts, range(9, 12)).take(3).reference, whole.take(1).reference)


@pytest.mark.parametrize("count", [2, SAMPLES])
@pytest.mark.parametrize("stop", [1, 3, 7])
def test_a_restored_window_goes_on_to_the_bit(count: int, stop: int):
    going, stopped = window(count), window(count)
    seen(going, range(1, stop + 1))
    frames = seen(stopped, range(1, stop + 1)).save(lost=())
    again = window(count)
    again.restore(frames[FRAME])
    for choice in (going, stopped, again):
        seen(choice, range(stop + 1, 10))
    one, two, three = (choice.take(1).reference for choice in (going, stopped, again))
    assert same(one, two) and same(one, three)


def test_a_checkpoint_has_the_ticks_of_fires_that_it_lacks_and_the_run_goes_on_as_before():
    whole, run = seen(window(), range(1, 9)), seen(window(), range(1, 5))
    run.take(1)
    seen(run, range(5, 8))
    again = window()
    again.restore(run.save(lost={1})[FRAME])
    assert same(seen(again, range(8, 9)).take(1).reference, whole.take(1).reference)
    without = seen(window(), range(5, 9))
    assert same(seen(run, range(8, 9)).take(2).reference, without.take(2).reference)


def test_nothing_is_kept_of_a_window_that_was_taken():
    choice = seen(window(), range(1, 4))
    choice.take(1)
    choice.release(1)
    assert choice.save(lost={1}) == {} and choice.kept == 0
    choice.restore(None)


def test_a_damaged_window_is_refused_by_name():
    frame = seen(window(), range(1, 4)).save(lost=())[FRAME]
    damaged = frame.copy()
    damaged[len(frame) // 2] ^= 1
    for bad in (damaged, mini(1).reference, mini(1).batch.to_frame(ticks=[[1, 0.5, 6, 30, 4]])):
        with pytest.raises(CheckpointError, match=r"window\.frame"):
            window().restore(bad)


def test_the_config_chooses():
    assert isinstance(make_choice(AnchorConfig(), SAMPLES, 0, id), OwnTick)
    found = make_choice(AnchorConfig(replay="window", replay_fraction=0.5), SAMPLES, 0, id)
    assert isinstance(found, Window) and found.count == SAMPLES // 2
