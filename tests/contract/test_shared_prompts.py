"""Prompts that samples share, computed once: losses and gradients are the plain ones, and what crosses is too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from anchor_service.dense_gradient import DenseGradient
from codec.config import CodecConfig
from rl.batch import Batch, grouped
from rl.config import GrpoConfig, ModelConfig, SnapshotConfig
from rl.objective import MicroBatch, loss_terms, microbatches, rows_per_token
from rl.policy import Stage
from rl.spans import spans
from swarm.config import SwarmConfig
from swarm.shares import shares
from swarm.worker import Worker
from tests.conftest import make_batch, on_ranks, with_environment
from tests.contract.harness import make_rank, run_ticks

CPU = torch.device("cpu")
LENGTHS = [(9, [4, 0, 7, 7]), (5, [3, 1, 6]), (3, [5]), (20, [2, 8, 2, 0, 1])]  # of prompts, and of answers to each
ORDERS = {"grouped": list(range(13)), "scattered": [5, 0, 9, 7, 1, 12, 4, 2, 10, 6, 11, 3, 8]}


def groups(lengths: list[tuple[int, list[int]]] = LENGTHS, seed: int = 1) -> Batch:
    """Prompts that begin alike; answers of three tokens, so that some begin alike too; the two of 7 tokens are the same."""
    rng = np.random.default_rng(seed)
    batch = make_batch(sum(len(answers) for _, answers in lengths), seed=seed)
    prompt = np.repeat([n for n, _ in lengths], [len(answers) for _, answers in lengths]).astype(np.int32)
    response = np.array([n for _, answers in lengths for n in answers], np.int32)
    tokens = []
    for length, answers in lengths:
        own = [2, 3, 4, *rng.integers(2, 48, length)][:length]
        drawn = {n: rng.integers(5, 8, n) if n == 7 else None for n in answers}
        tokens += [np.concatenate([own, rng.integers(5, 8, n) if drawn[n] is None else drawn[n]]) for n in answers]
    return replace(
        batch,
        tokens=np.concatenate(tokens).astype(np.int32),
        prompt=prompt,
        total=prompt + response,
        rollout_logprobs=rng.normal(-3.5, 0.5, int(response.sum())).astype(np.float32),
    )


def through(stages: list[Stage], micro: MicroBatch, grpo: GrpoConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs and gradients of stages one after the other."""
    x = micro.ids
    for stage in stages:
        stage.weights.grad.zero_()
        x = stage(x, micro.real, {}, micro.distinct)
    terms = loss_terms(stages[-1], x, micro, micro.rollout_logprobs, 7.0, grpo, 1.3)
    terms.loss.backward()
    grads: dict[str, torch.Tensor] = {}
    for stage in stages:
        for i, name in enumerate(stage.weights.names):
            grads[name] = grads.get(name, 0) + stage.weights.view(i, stage.weights.grad).clone()
    return terms.logprobs, grads


def compare(stages: list[Stage], batch: Batch, order: list[int], entropy_coeff: float = 0.0) -> None:
    """Of one microbatch, shared and plain; with ratios of whole samples, which each have a weight of their own."""
    grpo = GrpoConfig(entropy_coeff=entropy_coeff, importance_sampling_level="sequence")
    batch = replace(batch, loss_weights=np.linspace(0, 2, len(batch)).astype(np.float32))
    (plain,), (shared,) = (microbatches(batch, np.array(order), 99, CPU, share=share) for share in (False, True))
    assert shared.ids.numel() < plain.tokens == shared.tokens
    (logprobs, grads), (expected, expected_grads) = (through(stages, micro, grpo) for micro in (shared, plain))
    torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-5)
    for name, grad in expected_grads.items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6 * grad.abs().max().item() + 1e-7)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_the_order_of_samples_does_not_matter(untied_model: Path, order: list[int]):
    stages = [Stage(untied_model, span, torch.float32, CPU) for span in spans(4, [2], 2)]
    compare(stages, groups() if order[0] == 0 else with_environment(groups()), order, entropy_coeff=0.1)


@pytest.mark.parametrize(
    "lengths",
    [[(6, [4])], [(6, [0, 0])], [(1, [3, 3, 3])], [(8, [1] * 6)], [(4, [0]), (4, [5])], [(3, [9, 9]), (12, [1, 1])]],
    ids=["one sample", "no answers", "a prompt of one token", "short answers", "a prompt alone", "long and short ones"],
)
def test_groups_of_any_shape(untied_model: Path, lengths: list[tuple[int, list[int]]]):
    (stage,) = [Stage(untied_model, span, torch.float32, CPU) for span in spans(4, [], 1)]
    batch = groups(lengths)
    (plain,), (shared,) = (microbatches(batch, np.arange(len(batch)), 99, CPU, share=share) for share in (False, True))
    found, expected = (through([stage], micro, GrpoConfig()) for micro in (shared, plain))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    for name, grad in expected[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-6)


def test_a_row_is_computed_for_each_different_beginning_of_a_sample():
    batch = groups()
    ends = np.cumsum(batch.total)
    whole = [batch.tokens[end - n : end].tolist() for end, n in zip(ends, batch.total)]
    for size in (13, 4):
        micros = microbatches(batch, np.array(ORDERS["grouped"]), size, CPU, share=True)
        expected = [
            {tuple(tokens[:n]) for tokens in whole[i : i + size] for n in range(1, len(tokens) + 1)}
            for i in range(0, 13, size)
        ]
        assert [micro.ids.numel() for micro in micros] == [len(rows) for rows in expected]
        share = sum(map(len, expected)) / batch.total.sum()
        assert rows_per_token(micros)["perf/rows_per_token"] == pytest.approx(share)
    assert rows_per_token(microbatches(batch, np.arange(13), 4, CPU)) == {}


def test_checkpointing_changes_no_bit(untied_model: Path):
    (span,), batch = spans(4, [], 1), groups()
    (micro,) = microbatches(batch, np.arange(13), 13, CPU, share=True)
    found = [
        through([Stage(untied_model, span, torch.float32, CPU, checkpointing=again)], micro, GrpoConfig())
        for again in (False, True)
    ]
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(grad, found[1][1][name]) for name, grad in found[0][1].items())


def test_the_anchors_gradient_is_the_plain_one(tied_model: Path):
    batch, over = groups(), np.linspace(20, 40, 13, dtype=np.float32)
    plain, shared = (
        DenseGradient(
            tied_model, spans(4, [2], 1), torch.float32, CPU, 5, GrpoConfig(), 1.0, SnapshotConfig(), share=share
        )
        for share in (False, True)
    )
    for denominator in (37.0, over):
        expected = plain.gradient(batch, denominator)
        torch.testing.assert_close(shared.gradient(batch, denominator), expected, rtol=1e-4, atol=1e-6)


# --- in the swarm ------------------------------------------------------------------------------

CODECS = {
    "none": CodecConfig(kind="none"),
    "powersgd": CodecConfig(kind="powersgd", rank=8),
    "first token exact": CodecConfig(kind="powersgd", rank=8, first_token="exact"),
}
MINIS = [groups([*LENGTHS[:2], (6, [3])], seed=s) for s in range(2)]


def _ticks(rank: int, init: str, folder: Path, codec: CodecConfig, dp: int, pp: int, share: bool) -> dict:
    state = make_rank(folder, rank, dp, pp, (1, 2, 3), codec, init=init)
    return run_ticks(state, MINIS, size=3, share=share)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_losses_and_gradients_of_every_layout_are_the_plain_ones(untied_model: Path, codec: CodecConfig):
    (plain,) = on_ranks(1, _ticks, untied_model, codec, 1, 1, False)
    for dp, pp in ((1, 1), (2, 2)):
        ranks = on_ranks(dp * pp, _ticks, untied_model, codec, dp, pp, True)
        np.testing.assert_allclose(np.sum([r["losses"] for r in ranks], axis=0), plain["losses"], rtol=1e-4)
        for found in ranks:
            for name, grad in found["grad"].items():
                np.testing.assert_allclose(grad, plain["grad"][name], rtol=1e-4, atol=1e-6)


class Alone(Worker):
    """A worker around a rank that is there, without Ray."""

    def __init__(self, rank):
        self.rank = rank


@pytest.mark.parametrize("kind", ["transform", "powersgd"])
def test_what_crosses_is_the_same_in_every_byte_and_old_log_probs_are_those_of_the_tick(untied_model: Path, kind: str):
    """Of equal microbatches, in a step of two mini-batches whose old log-probs are recomputed."""
    codec = CodecConfig(kind=kind, rank=8 if kind == "powersgd" else None)
    told = []
    for share in (False, True):
        state = make_rank(untied_model, codec=codec, grpo=GrpoConfig(train_batch_size=16, old_logprobs="trainer"))
        state.setup = replace(state.setup, swarm=state.setup.swarm.model_copy(update={"share_prompts": share}))
        (given,) = shares(MINIS, 1, 1, together=True)
        report, old = Alone(state).begin_step(1, given.frame)
        told.append((report, np.concatenate(old[1])))
    (plain, expected), (shared, found) = told
    assert shared.ledger == plain.ledger
    assert shared.values["perf/rows_per_token"] < 0.7 and not plain.values
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_where_it_is_on_by_default():
    swarm, own = SwarmConfig(boundaries=[2]), ModelConfig(path="models/x")
    linear, shared = CodecConfig(kind="powersgd", rank=4), CodecConfig(kind="transform")
    assert all(swarm.shares_prompts(own, codec) for codec in (linear, shared, CodecConfig(kind="none")))
    for model, codec, why in (
        (ModelConfig(), shared, ""),  # of published bits
        (ModelConfig(path="models/x", attention="eager"), shared, "'eager', sdpa alone can"),
        (own, CodecConfig(kind="random_k", rank=4), "'random_k' codes each copy of a row anew"),
    ):
        assert not swarm.shares_prompts(model, codec) and why in swarm.unshared(model, codec)
        chosen = SwarmConfig(boundaries=[2], share_prompts=True)
        assert chosen.shares_prompts(model, codec) and chosen.unshared(model, codec) == ""


def test_a_prompts_samples_are_together_and_no_sample_is_lost():
    batch = groups()
    order = grouped(batch.pick(np.array(ORDERS["scattered"])))
    assert sorted(order) == list(range(13))
    prompts = np.repeat(range(4), [4, 3, 1, 5])[ORDERS["scattered"]][order]
    assert (np.diff(prompts) != 0).sum() == 3
