"""One contract for every rollout engine: what is sampled, its log-probs, and which weights it follows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rl.config import ModelConfig, RolloutConfig
from rl.rollout import ENGINES, _draw

PROMPTS = [[3, 4, 5, 6], [7, 8], [9, 10, 11, 12, 13, 2], [5, 5, 5]]


@pytest.fixture(params=sorted(ENGINES))
def engine(request: pytest.FixtureRequest, untied_model: Path):
    return ENGINES[request.param](untied_model, ModelConfig(), RolloutConfig())


def _uniforms(prompts: int, n: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((prompts, n, length))


def test_logprobs_are_those_of_a_plain_forward(engine, untied_model: Path):
    samples = engine.sample(PROMPTS, _uniforms(4, 3, 20), temperature=0.7)
    plain = AutoModelForCausalLM.from_pretrained(untied_model, dtype=torch.float32)
    for i, (tokens, logprobs) in enumerate(zip(samples.tokens, samples.logprobs)):
        prompt = PROMPTS[i // 3]
        ids = torch.tensor([*prompt, *tokens.tolist()])
        with torch.no_grad():
            expected = torch.log_softmax(plain(input_ids=ids[None]).logits[0] / 0.7, -1)
        expected = expected[torch.arange(len(prompt) - 1, len(ids) - 1), ids[len(prompt) :]]
        np.testing.assert_allclose(logprobs, expected.numpy(), atol=1e-4)


def test_samples_do_not_depend_on_how_prompts_are_batched(engine):
    uniforms = _uniforms(4, 3, 20)
    together = engine.sample(PROMPTS, uniforms, 1.0)
    for i, prompt in enumerate(PROMPTS):
        alone = engine.sample([prompt], uniforms[i : i + 1], 1.0)
        for s in range(3):
            np.testing.assert_array_equal(alone.tokens[s], together.tokens[3 * i + s])
            np.testing.assert_allclose(alone.logprobs[s], together.logprobs[3 * i + s], atol=1e-5)


def test_answers_end_at_eos_or_are_marked_truncated(engine):
    samples = engine.sample(PROMPTS * 8, _uniforms(32, 4, 12), 1.0)
    ends = [bool(tokens[-1] == 1) for tokens in samples.tokens]
    assert samples.truncated == [not end for end in ends]
    assert any(ends) and not all(ends)
    for tokens, end in zip(samples.tokens, ends):
        assert 1 not in tokens[:-1] and (end or len(tokens) == 12)


def test_it_follows_new_weights(engine, untied_model: Path):
    uniforms = _uniforms(4, 2, 8)
    before = engine.sample(PROMPTS, uniforms, 1.0)
    flat = engine.weights.master.numpy().copy()
    changed = flat + 0.05 * np.random.default_rng(1).standard_normal(len(flat)).astype(np.float32)
    engine.weights.master.copy_(torch.from_numpy(changed))
    engine.weights.publish()
    after = engine.sample(PROMPTS, uniforms, 1.0)
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(before.tokens, after.tokens))
    engine.weights.master.copy_(torch.from_numpy(flat))
    engine.weights.publish()
    for a, b in zip(before.tokens, engine.sample(PROMPTS, uniforms, 1.0).tokens):
        np.testing.assert_array_equal(a, b)


def test_scores_of_given_answers_are_the_sampling_logprobs(engine):
    samples = engine.sample(PROMPTS, _uniforms(4, 1, 10), 0.9)
    for a, b in zip(engine.score(PROMPTS, samples.tokens, 0.9), samples.logprobs):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_draws_follow_the_distribution():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    uniform = torch.from_numpy(np.random.default_rng(0).random(40_000))
    chosen, logp = _draw(logits.expand(40_000, 4), uniform, temperature=1.3)
    expected = torch.softmax(logits / 1.3, 0)
    observed = torch.bincount(chosen, minlength=4) / 40_000
    np.testing.assert_allclose(observed, expected, atol=0.01)
    np.testing.assert_allclose(logp, expected.log()[chosen], atol=1e-5)
