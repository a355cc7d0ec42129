"""One contract for every rollout engine: what is sampled, its log-probs, and which weights it follows.

Beside each engine stands a plain forward of transformers in the engine's dtype, from the weights on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rl.engine import Key, Samples, request_seeds, uniforms
from rl.rollout import ENGINES
from rl.transformers_engine import _draw, in_common
from tests.conftest import make_model
from tests.contract.engine_process import LENGTH, EngineHere, EngineProcess, load, sample, save, score, stop_at, weights

PROMPTS = [[3, 4, 5, 6], [7, 8], [9, 10, 11, 12, 13, 2], [5, 5, 5]]
LONG = [list(np.random.default_rng(5).integers(2, 48, LENGTH - 20).tolist())]  # some blocks of a prefix cache
WORDS = ["<pad>", "<end>", *("".join(w) for n in range(1, 6) for w in product("ab", repeat=n))][:48]
STOPS = ["abba", "babab"]
NEEDS_VLLM = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed: `make vllm` installs it"),
]
MARKS = {"transformers": [], "vllm": NEEDS_VLLM}
KINDS = [
    pytest.param((kind, tied, dtype), id=f"{kind}-{tied}-{dtype}", marks=MARKS[kind])
    for kind in ENGINES
    for tied, dtype in (("untied", "float32"), ("tied", "bfloat16"))
]
BARS = {"float32": 1e-4, "bfloat16": 1e-1}  # nats, mean over tokens


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    kind, tied, dtype = request.param
    folder = make_model(tmp_path_factory.mktemp(tied), tied == "tied", hidden=128, positions=512)
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token=WORDS[1]).save_pretrained(folder)
    process = (EngineProcess if kind == "vllm" else EngineHere)(kind, folder, dtype)
    process.kind, process.dtype, process.folder = kind, dtype, folder
    yield process
    process.close()


def keys(prompts: int, n: int, seed: int = 0) -> list[Key]:
    return [(seed, 0, 1, p, s) for p in range(prompts) for s in range(n)]


def plain_logprobs(engine: EngineProcess, folder: Path, prompts: list[list[int]], found: Samples, temperature: float):
    """What transformers gives to the sampled tokens, one row a sample."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, engine.dtype))
    n = len(found.tokens) // len(prompts)
    for i, tokens in enumerate(found.tokens):
        prompt = prompts[i // n]
        ids = torch.tensor([*prompt, *tokens.tolist()])
        with torch.no_grad():
            expected = torch.log_softmax(plain(input_ids=ids[None]).logits[0].float() / temperature, -1)
        yield expected[torch.arange(len(prompt) - 1, len(ids) - 1), ids[len(prompt) :]].numpy()


def difference(engine: EngineProcess, folder: Path, prompts: list[list[int]], found: Samples, temperature: float):
    expected = np.concatenate(list(plain_logprobs(engine, folder, prompts, found, temperature)))
    mean = float(np.abs(np.concatenate(found.logprobs) - expected).mean())
    print(f"{engine.kind}, {engine.dtype}: {mean:.2g} nats a token from transformers, {len(expected)} tokens")
    return mean


def same(a: Samples, b: Samples) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a.tokens, b.tokens, strict=True))


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_are_those_of_a_plain_forward(engine: EngineProcess, temperature: float):
    found = engine(sample, PROMPTS, keys(4, 3), 20, temperature)
    assert difference(engine, engine.folder, PROMPTS, found, temperature) < BARS[engine.dtype]


def test_keys_decide_the_samples(engine: EngineProcess):
    first = engine(sample, PROMPTS, keys(4, 3), 20, 1.0)
    assert same(first, engine(sample, PROMPTS, keys(4, 3), 20, 1.0))
    other = engine(sample, PROMPTS, keys(4, 3, seed=1), 20, 1.0)
    assert all(not np.array_equal(a, b) for a, b in zip(first.tokens, other.tokens))
    assert len({tokens.tobytes() for tokens in first.tokens}) == 12


def test_samples_do_not_depend_on_how_prompts_are_batched(engine: EngineProcess):
    """Up to the rounding of a logit in a batch of another size, which a bf16 engine shows."""
    together = engine(sample, PROMPTS, keys(4, 3), 20, 1.0)
    alone = [engine(sample, [prompt], keys(4, 3)[3 * i : 3 * i + 3], 20, 1.0) for i, prompt in enumerate(PROMPTS)]
    pairs = list(zip(together.tokens, [tokens for part in alone for tokens in part.tokens], strict=True))
    agree = [np.array_equal(a, b) for a, b in pairs]
    assert all(agree) if engine.dtype == "float32" else sum(agree) >= 6


def test_a_common_beginning_changes_nothing(engine: EngineProcess):
    """Examples before each problem: of one engine the tokens that all begin with go through the model once."""
    examples = list(np.random.default_rng(6).integers(2, 48, 45).tolist())
    prompts = [[*examples, *prompt] for prompt in PROMPTS]
    together = engine(sample, prompts, keys(4, 3), 20, 1.0)
    assert difference(engine, engine.folder, prompts, together, 1.0) < BARS[engine.dtype]
    alone = [engine(sample, [prompt], keys(4, 3)[3 * i : 3 * i + 3], 20, 1.0) for i, prompt in enumerate(prompts)]
    pairs = list(zip(together.tokens, [tokens for part in alone for tokens in part.tokens], strict=True))
    agree = [np.array_equal(a, b) for a, b in pairs]
    assert all(agree) if engine.dtype == "float32" else sum(agree) >= 6


@pytest.mark.parametrize(
    ("alike", "rests", "expected"),
    [(45, (4, 2, 6), 32), (64, (3, 1, 1), 64), (64, (3, 0), 32), (31, (9, 9), 0), (100, (5,), 0), (0, (70, 70), 0)],
)
def test_a_common_beginning_is_whole_blocks_and_leaves_a_token_to_each(
    alike: int, rests: tuple[int, ...], expected: int
):
    prompts = [[*range(alike), *range(1000 * (i + 1), 1000 * (i + 1) + rest)] for i, rest in enumerate(rests)]
    assert in_common(prompts) == expected


def test_answers_end_at_eos_or_are_marked_truncated(engine: EngineProcess):
    found = engine(sample, PROMPTS * 8, keys(32, 4), 12, 1.0)
    ends = [bool(tokens[-1] == 1) for tokens in found.tokens]
    assert found.truncated == [not end for end in ends]
    assert any(ends) and not all(ends)
    for tokens, logprobs, end in zip(found.tokens, found.logprobs, ends):
        assert 1 not in tokens[:-1] and (end or len(tokens) == 12) and len(logprobs) == len(tokens)


def test_each_sample_may_have_a_limit_of_its_own(engine: EngineProcess):
    limits = [3, 1, 12, 7, 12, 2, 9, 4, 12, 1, 5, 6]
    found, whole = (engine(sample, PROMPTS, keys(4, 3), most, 1.0) for most in (limits, 12))
    assert [len(t) <= n for t, n in zip(found.tokens, limits)] == [True] * 12
    assert found.truncated == [1 not in t for t in found.tokens]
    pairs = zip(found.tokens, whole.tokens, limits)
    agree = [np.array_equal(ours, theirs[:n]) for ours, theirs, n in pairs]
    assert all(agree) if engine.dtype == "float32" else sum(agree) >= 6


def said(tokens: np.ndarray) -> str:
    return "".join(WORDS[i] for i in tokens)


def test_a_turn_ends_with_the_first_token_that_completes_a_stop_text(engine: EngineProcess):
    whole = engine(sample, PROMPTS * 4, keys(16, 2), 12, 1.0)
    engine(stop_at, STOPS)
    try:
        found, alone = (
            engine(sample, prompts, keys(n, 2), 12, 1.0) for prompts, n in ((PROMPTS * 4, 16), (PROMPTS, 4))
        )
    finally:
        engine(stop_at, [])
    inside = 0
    for tokens, before, logprobs, cut in zip(found.tokens, whole.tokens, found.logprobs, found.truncated):
        ends = [n + 1 for n in range(len(tokens)) if any(text in said(tokens[: n + 1]) for text in STOPS)]
        assert ends in ([], [len(tokens)]) and len(logprobs) == len(tokens)
        assert cut == (not ends and tokens[-1] != 1)
        assert np.array_equal(tokens, before[: len(tokens)]) or engine.dtype == "bfloat16"
        inside += bool(ends) and not said(tokens).endswith(tuple(STOPS))
    assert inside and any(tokens[-1] == 1 for tokens in found.tokens)
    assert all(np.array_equal(a, b) for a, b in zip(alone.tokens, found.tokens)) or engine.dtype == "bfloat16"


def test_a_low_temperature_takes_likely_tokens(engine: EngineProcess):
    def likelihood(temperature: float) -> float:
        return np.concatenate(engine(sample, PROMPTS, keys(4, 4), 10, temperature).logprobs).mean()

    assert likelihood(0.01) > -0.1 and likelihood(1.0) < -1


def test_temperature_0_takes_the_likeliest_token_and_is_certain_of_it(engine: EngineProcess):
    found = engine(sample, PROMPTS, keys(4, 2), 10, 0.0)
    assert not np.concatenate(found.logprobs).any()
    assert all(np.array_equal(a, b) for a, b in zip(found.tokens[::2], found.tokens[1::2], strict=True))
    cold = np.concatenate(list(plain_logprobs(engine, engine.folder, PROMPTS, found, 0.01)))
    assert cold.mean() > -0.1


def test_draws_follow_the_distribution(engine: EngineProcess):
    """The first token of 600 samples of one prompt, against the probabilities they came with."""
    found = engine(sample, PROMPTS[:1], keys(1, 600), 1, 1.0)
    tokens, logprobs = np.concatenate(found.tokens), np.concatenate(found.logprobs)
    for token in np.unique(tokens):
        p = np.exp(logprobs[tokens == token][0])
        assert abs((tokens == token).mean() - p) < 4 * (p * (1 - p) / 600) ** 0.5 + 1e-3


def test_it_follows_new_weights_and_no_cache_serves_old_ones(engine: EngineProcess, tmp_path: Path):
    prompts, seeds = PROMPTS + LONG, keys(5, 2)
    before = engine(sample, prompts, seeds, 8, 1.0)
    flat = engine(weights)
    noise = 0.05 * np.random.default_rng(1).standard_normal(len(flat)).astype(np.float32)
    engine(load, flat + noise)
    engine(save, tmp_path)
    after = engine(sample, prompts, seeds, 8, 1.0)
    assert not same(before, after)
    assert difference(engine, tmp_path, prompts, after, 1.0) < BARS[engine.dtype]
    assert difference(engine, engine.folder, prompts, after, 1.0) > 2 * BARS[engine.dtype]
    engine(load, flat)
    assert same(before, engine(sample, prompts, seeds, 8, 1.0))


def test_scores_of_given_answers_are_the_sampling_logprobs(engine: EngineProcess):
    found = engine(sample, PROMPTS, keys(4, 1), 10, 0.9)
    scores = engine(score, PROMPTS, found.tokens, 0.9)
    gaps = np.abs(np.concatenate(scores) - np.concatenate(found.logprobs))
    assert gaps.mean() < BARS[engine.dtype]


# --- random numbers ------------------------------------------------------------------------------


def test_uniforms_are_what_they_were_in_every_earlier_version():
    """A sample's numbers depend on its key alone, and a run of an old config gives its old samples."""
    found = uniforms([(3, 0, 1, 2, 0), (3, 1, 0, 255, 7)], 3)
    expected = [
        [0.5354129669246922, 0.06761852564170057, 0.976967441181487],
        [0.5890813632912884, 0.14257600889996147, 0.836554394368995],
    ]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(uniforms([(3, 1, 0, 255, 7)], 40)[0, :3], expected[1])


def test_seeds_of_requests_are_all_different_and_fit_a_generator():
    found = request_seeds(
        [(0, split, step, p, s) for split in (0, 1) for step in range(9) for p in range(9) for s in range(9)]
    )
    assert len(set(found)) == len(found) and all(0 <= seed < 2**63 for seed in found)
    torch.Generator().manual_seed(max(found))


def test_a_draw_inverts_the_distribution():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    uniform = torch.from_numpy(np.random.default_rng(0).random(40_000))
    chosen, logp = _draw(logits.expand(40_000, 4), uniform, temperature=1.3)
    expected = torch.softmax(logits / 1.3, 0)
    observed = torch.bincount(chosen, minlength=4) / 40_000
    np.testing.assert_allclose(observed, expected, atol=0.01)
    np.testing.assert_allclose(logp, expected.log()[chosen], atol=1e-5)
