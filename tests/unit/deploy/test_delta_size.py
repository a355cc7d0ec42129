"""The walk behind planned deltas: torch's Adam, the real mergers and the real coder, on some of the weights."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from deploy.config import load
from deploy.estimate import delta_size as walk
from deploy.estimate import sample
from deploy.estimate.bytes import weights_walk
from deploy.estimate.parameters import count_parameters, parameters
from merger import MERGERS, make_merger, merger_class
from merger.config import MergerConfig
from merger.interface import Merger, local_norm
from rl.config import GrpoConfig
from swarm.run_config import RunConfig


def walked(*overrides: str, preset: str = "demo") -> walk.Walk:
    config = load(preset, list(overrides))
    return weights_walk(config, parameters(config), config.ticks)


def noise(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(n, np.float32)


def test_adam_is_that_of_torch():
    grpo = GrpoConfig(lr=1e-3, betas=(0.8, 0.99), weight_decay=0.1)
    gradients = [noise(1000, t) for t in range(20)]
    found = list(walk._adam(grpo, noise(1000, 99), iter(gradients)))
    parameter = torch.nn.Parameter(torch.from_numpy(noise(1000, 99)))
    adam = torch.optim.AdamW([parameter], lr=grpo.lr, betas=grpo.betas, weight_decay=grpo.weight_decay)
    for g, weights in zip(gradients, found):
        parameter.grad = torch.from_numpy(g)
        adam.step()
        np.testing.assert_allclose(weights, parameter.detach().numpy(), rtol=0, atol=1e-6)


class Halfway(Merger):
    """Somebody else's, written for tensors."""

    payload = "sign"

    def prepare(self, g_comp, correction, age, norm=local_norm) -> None:
        self.dose = norm(g_comp) * 0

    def apply(self, g_comp, correction):
        return g_comp.lerp(g_comp.abs().mul(correction.sign()), 0.5).add_(self.dose)


@pytest.mark.parametrize("kind", [*(k for k, m in MERGERS.items() if m.payload), f"{__name__}:Halfway"])
@pytest.mark.parametrize("gate", ["none", "ratio"])
def test_what_is_merged_on_the_walk_is_what_the_run_merges(kind: str, gate: str):
    config = MergerConfig(kind=kind, alpha=0.3, dose=0.7, age_decay=0.9, adaptive_lambda_mode=gate)
    g, m_bar, source = (noise(500, seed) for seed in range(3))
    m_bar[::9] = 0
    merging, theirs = walk.Merging(config), merger_class(kind)
    held = torch.from_numpy(m_bar - source if theirs.needs_source else m_bar)
    merged = make_merger(config)(torch.from_numpy(g), held, age=3)
    np.testing.assert_allclose(merging(g, merging.held(m_bar, source), 3), merged.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sample_costs_what_all_weights_cost(dtype: str, monkeypatch: pytest.MonkeyPatch):
    """The built-in model whole, 12 times the sample, is walked and encoded."""
    overrides = (f"snapshot.dtype={dtype}", "run.steps=6")
    few = walked(*overrides)
    monkeypatch.setattr(walk, "PIECES", 10_000)
    everything = walk.Walk(few.course)
    assert everything.weights.shape[1] == few.course.params.total
    for source, target in [(0, 2), (4, 6), (10, 12), (0, 5), (2, 12)]:
        assert few.between(source, target) == pytest.approx(everything.between(source, target), rel=0.02)
    sent, exact = tuple(range(0, 13, 2)), frozenset({0, 6, 12})
    assert few.coded(0.05, sent, exact) == pytest.approx(everything.coded(0.05, sent, exact), rel=0.03)


def test_the_first_tick_moves_every_weight_by_the_learning_rate():
    found = walked("grpo.lr=1e-3")
    assert found.own
    steps = np.abs(found.weights[1] - found.weights[0]) / 1e-3
    assert (np.abs(steps - 1) < 0.01).mean() > 0.99  # but for gradients that are nothing beside eps


def test_a_longer_way_costs_more():
    found = [walked(f"grpo.lr={lr}", "snapshot.dtype=bfloat16") for lr in ("1e-6", "1e-5", "1e-4")]
    for near, far in pairwise(found):
        assert near.between(10, 12) < far.between(10, 12)
    for one in found:
        assert one.between(10, 12) < one.between(10, 15) < one.between(10, 30)
        assert one.between(10, 10) == 0


def test_a_held_sign_carries_weights_further():
    free, held = walked("merger.dose=0.0"), walked("merger.dose=1.0")
    steps = [np.abs(w.weights[60] - w.weights[55]).mean() for w in (free, held)]
    assert steps[1] > 1.3 * steps[0]
    np.testing.assert_array_equal(free.weights[:5], held.weights[:5])  # before the first correction


def test_without_any_advantage_nothing_moves_and_a_delta_is_empty():
    found = walked("links.blank_ticks=1.0")
    assert (found.weights == found.weights[0]).all()
    assert found.between(0, 60) * found.weights.shape[1] < 100


def test_ticks_beyond_the_walk_cost_what_its_last_ones_do():
    found = walked("run.steps=1000")
    last = walk.LONGEST
    assert len(found.weights) == last + 1
    beyond = [found.between(t - 2, t) for t in range(last + 1, 1000)]
    within = [found.between(t - 2, t) for t in range(last - walk.SETTLED + 1, last + 1)]
    assert set(beyond) == set(within)
    assert found.between(0, 999) == found.between(0, 999) > max(within)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rate", [0.025, 0.05])
def test_coded_frames_cost_their_rate_and_exact_ones_what_the_coder_left(dtype: str, rate: float):
    found = walked(f"snapshot.dtype={dtype}", "run.steps=200")
    sent = tuple(range(0, 401, 2))
    exact = frozenset({0, 50, 100, 150, 400})
    sizes = dict(zip(sent, found.coded(rate, sent, exact)))
    assert sizes.pop(0) == 0
    for tick in exact - {0}:
        assert found.between(tick - 2, tick) < sizes[tick] < (1.0 if dtype == "bfloat16" else 4)
    assert sizes[100] == sizes[150] == sizes[400] == pytest.approx(sizes[50], rel=0.02)  # beyond the walk: as its last
    assert [size for tick, size in sizes.items() if tick not in exact] == pytest.approx([2 * rate] * 196, rel=0.01)


def test_a_stream_with_no_exact_frame_on_the_walk_has_one_tried_at_its_end():
    found, sent = walked("run.steps=200"), tuple(range(0, 401, 2))
    *_, last = found.coded(0.05, sent, frozenset({0, 400}))
    assert 0.1 < last < 4


def table(vocab: int, tied: bool) -> dict:
    return {
        "model_type": "qwen2",
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


def moved(vocab: int, tied: bool, **links: float) -> tuple[float, float]:
    """Mean steps of the embedding's and of the head's weights in the first tick, in learning rates."""
    params = count_parameters(table(vocab, tied))
    config = RunConfig.model_validate(
        load("demo").model_dump() | {"run": {"steps": 1}, "links": {"prompt_tokens": 1.0, **links}}
    )
    course = weights_walk(config, params, 1).course
    course = walk.Course(**(vars(course) | {"path": "nobody/no-such-model"}))
    found, part = walk.Walk(course), sample.sample_weights(course.path, params, walk.PIECES, walk.PIECE)
    assert not found.own
    steps = np.abs(found.weights[1] - found.weights[0]) / config.grpo.lr
    return float(steps[part.table].mean()), float(steps[part.head].mean())


def test_all_of_a_small_vocabulary_moves_and_of_a_large_one_what_is_expected_or_occurs():
    assert moved(17, True) == pytest.approx((1, 1), abs=0.01)
    assert max(moved(1_000_000, True)) < 0.9
    few, _ = moved(100_000, False, response_tokens=1.0)
    many, _ = moved(100_000, False, response_tokens=1000.0)
    assert 0 < few < 0.1 < many < 0.9
