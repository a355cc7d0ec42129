"""Adapters: peft's numbers, the same on every layout, and nothing else has a gradient or is sent."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from anchor_service.dense_gradient import DenseGradient
from deploy.config import load
from deploy.estimate.parameters import parameters
from merger.config import MergerConfig
from rl.config import GrpoConfig, SnapshotConfig
from rl.lora_config import LoraConfig
from rl.model_files import trained_count
from rl.policy import adapters, whole_model
from rl.spans import Span, spans
from tests.conftest import make_batch, on_ranks
from tests.contract.harness import make_rank, run_ticks

CPU = torch.device("cpu")
LORA = LoraConfig(rank=4)


def _work(rank: int, init: str, options: dict) -> dict:
    state = make_rank(rank=rank, init=init, lora=LORA.rank, **options)
    before = {name: held.clone() for name, held in state.stage.weights.frozen.items()}
    found = run_ticks(state, [make_batch(seed=s) for s in range(3)])
    frozen = state.stage.weights.frozen
    assert all(torch.equal(frozen[name], held) and not held.requires_grad for name, held in before.items())
    return found


@pytest.mark.parametrize("dp, pp", [(2, 1), (1, 2), (2, 2)])
def test_adapters_do_not_depend_on_the_layout(tied_model: Path, dp: int, pp: int):
    options = dict(folder=tied_model, merger=MergerConfig(kind="none"))
    (one,) = on_ranks(1, _work, options)
    assert set(one["weights"]) == set(
        adapters(tied_model, LORA)
    )  # the embedding, tied over two stages, is not among them
    ranks = on_ranks(dp * pp, _work, options | dict(dp=dp, pp=pp))
    np.testing.assert_allclose(np.sum([r["losses"] for r in ranks], axis=0), one["losses"], rtol=1e-4)
    for key, atol in (("grad", 1e-6), ("weights", 1e-5)):
        assert set().union(*(r[key] for r in ranks)) == set(one[key])
        for found in ranks:
            for name, value in found[key].items():
                np.testing.assert_allclose(value, one[key][name], rtol=1e-4, atol=atol, err_msg=f"{key} {name}")


def test_they_are_counted_from_a_model_s_headers_as_they_are(model: Path):
    """By the ledger, by `plan`, and as they are held."""
    config = load("k5", [f"model.path={model}", "model.lora.rank=4", "model.lora.targets=['k_proj', 'down_proj']"])
    expected = sum(math.prod(shape) for shape in adapters(model, config.model.lora).values())
    assert trained_count(config.model) == parameters(config).total == expected
    assert parameters(config).beneath == parameters(load("k5", [f"model.path={model}"]))


def _filled(folder: Path):
    """The whole model with adapters that do something."""
    model, weights = whole_model(folder, torch.float32, CPU, lora=LORA)
    weights.master.copy_(torch.randn(weights.numel, generator=torch.Generator().manual_seed(1)) * 0.1)
    return model, weights


def test_before_the_first_tick_they_add_nothing(model: Path):
    ids = torch.arange(2, 20)[None]
    plain, _ = whole_model(model, torch.float32, CPU)
    adapted, weights = whole_model(model, torch.float32, CPU, lora=LORA)
    with torch.inference_mode():
        assert torch.equal(plain(input_ids=ids).logits, adapted(input_ids=ids).logits)
    sizes = {name.rsplit(".lora_")[1][0]: held for name, held in zip(weights.names, weights.offsets)}
    assert set(sizes) == {"A", "B"} and weights.numel < sum(held.numel() for held in weights.frozen.values())


def test_what_they_add_is_in_the_whole_weights(model: Path):
    """Merged, as vllm and an export have it, the model computes what it computes with adapters."""
    ids = torch.arange(2, 20)[None]
    adapted, weights = _filled(model)
    plain, into = whole_model(model, torch.float32, CPU)
    merged = dict(weights.whole())
    assert list(merged) == into.names
    for i, name in enumerate(into.names):
        into.view(i, into.master).copy_(merged[name])
    with torch.inference_mode():
        expected = adapted(input_ids=ids).logits
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_m_is_the_gradient_of_the_adapters_alone(tied_model: Path):
    """By the chain rule: with G the dense gradient of a layer's weight, dB = s G Aᵀ and dA = s Bᵀ G."""
    batch, stages = make_batch(), spans(4, [2], 2)
    whole = dict(device=CPU, dtype=torch.float32, micro_batch_size=4, grpo=GrpoConfig(), temperature=1.0)
    adapted = DenseGradient(tied_model, stages, snapshot=SnapshotConfig(), lora=LORA, **whole)
    _, filled = _filled(tied_model)
    weights = adapted.model.weights
    weights.master.copy_(filled.master)
    found = adapted.gradient(batch, 1.0).clone()
    assert sum(len(adapted.shard(found, stage)) for stage in (0, 1)) == weights.numel

    dense = DenseGradient(tied_model, [Span(0, 4, 4)], snapshot=SnapshotConfig(), **whole)
    into = dense.model.weights
    merged = dict(filled.whole())
    for i, name in enumerate(into.names):
        into.view(i, into.master).copy_(merged[name])
    g = dense.gradient(batch, 1.0)
    scale = LORA.alpha / LORA.rank
    for name in (n for n in weights.names if ".lora_A." in n):
        layer = name.partition(".lora_A.")[0]
        a, b = (weights.names.index(name), weights.names.index(name.replace("lora_A", "lora_B")))
        full = into.view(into.names.index(f"{layer}.weight"), g)
        left, right = weights.view(b, weights.master), weights.view(a, weights.master)
        torch.testing.assert_close(weights.view(a, found), scale * left.T @ full, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(weights.view(b, found), scale * full @ right.T, rtol=1e-3, atol=1e-4)


def test_in_bf16_the_adapters_masters_stay_fp32(tied_model: Path):
    _, weights = whole_model(tied_model, torch.bfloat16, CPU, lora=LORA)
    assert weights.master.dtype == torch.float32
    assert {held.dtype for held in weights.frozen.values()} == {torch.bfloat16} == {weights.compute.dtype}
