"""Parameters and bytes by arithmetic against the real thing: transformers models, and the ledger of real ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from deploy.config import load
from deploy.estimate.bytes import tick_bytes
from deploy.estimate.parameters import count_parameters, parameters, stage_parameters
from deploy.estimate.workload import prompt_tokens, response_tokens, samples_per_tick, tokens_per_tick
from rl.config import SnapshotConfig
from rl.model_files import BUILTIN
from rl.policy import Stage
from rl.spans import spans
from swarm.run_config import RunConfig

SMALL = dict(
    vocab_size=50, hidden_size=32, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4, eos_token_id=1
)
FAMILIES = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2),
    "llama-mha": LlamaConfig(**SMALL),
    "llama-biases": LlamaConfig(**SMALL, num_key_value_heads=1, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SMALL, num_key_value_heads=2),
    "mistral-wide-heads": MistralConfig(**SMALL, num_key_value_heads=2, head_dim=24),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16),
    "qwen3-default-heads": Qwen3Config(**SMALL, num_key_value_heads=4),
    "qwen3-biases": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16, attention_bias=True),
}


def real_count(config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_real_model(family: str, tied: bool, tmp_path: Path):
    config = FAMILIES[family]
    config.tie_word_embeddings = tied
    config.save_pretrained(tmp_path)
    found = count_parameters(json.loads((tmp_path / "config.json").read_text()))
    assert found.total == real_count(AutoConfig.from_pretrained(tmp_path))
    assert found.total == found.embedding + found.layers * found.per_layer + found.norm + found.head
    assert (found.head == 0) == tied


def test_parameters_of_the_built_in_model():
    assert parameters(load("demo")).total == real_count(AutoConfig.from_pretrained(BUILTIN / "tiny"))


def test_a_model_without_a_size_is_refused_by_the_name_of_the_key():
    with pytest.raises(ValueError, match="intermediate_size"):
        count_parameters({"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 5})


@pytest.mark.parametrize(("boundaries", "pp"), [([], 1), ([1], 2), ([1, 2, 3], 2), ([1, 2, 3], 4), ([2], 1)])
def test_stages_hold_what_real_stages_hold(boundaries: list[int], pp: int, model: Path):
    config = RunConfig.model_validate(
        {
            "model": {"path": str(model)},
            "swarm": {"pp": pp, "boundaries": boundaries},
            "codec": {"kind": "none"},
        }
    )
    stages = spans(4, boundaries, pp)
    real = [Stage(model, span, torch.float32, torch.device("cpu"), trainable=False).weights.numel for span in stages]
    assert stage_parameters(config, parameters(config)) == real


def test_tokens_are_those_that_links_assumes_or_half_of_the_longest():
    config = load("k5", ["links.response_tokens=11.0"])
    assert (prompt_tokens(config), response_tokens(config)) == (8.0, 11.0)
    assert tokens_per_tick(config) == samples_per_tick(config) * 19.0 == 64 * 19.0


def test_samples_that_weigh_differently_are_sent_with_their_weights():
    plain, weighed = (tick_bytes(load("k5", sets)) for sets in ([], ["grpo.loss_agg_mode=seq-mean-token-mean"]))
    for channel in ("control", "replay"):
        assert 1 < weighed[channel][0] / plain[channel][0] < 1.2
    assert all(weighed[channel] == plain[channel] for channel in plain if channel not in ("control", "replay"))


def test_the_published_ratio_follows_from_the_arithmetic():
    """r of H numbers a token, and Q on its schedule."""
    config = load("k5")
    found = tick_bytes(config)
    sent = sum(found[c][0] for c in ("boundary_fwd", "boundary_bwd", "basis"))
    dense = sum(found[c][1] for c in ("boundary_fwd", "boundary_bwd", "basis"))
    refreshes = 31  # of 150 ticks: every 5th, and tick 2
    q = 4 * 128 * 4 * refreshes / 150
    assert sent / dense == pytest.approx(4 / 128 + q / dense, rel=1e-12)


@pytest.mark.parametrize("config", [load("floor"), load("k5", ["merger.dose=0"])], ids=["no merger", "no dose"])
def test_a_config_that_merges_nothing_asks_the_anchor_for_nothing(config: RunConfig):
    found = tick_bytes(config)
    assert all(found[c] == (0.0, 0.0) for c in ("snapshot", "replay", "correction"))
    assert found["control"] == tick_bytes(load("floor"))["control"]


def test_weights_and_corrections_go_once_to_each_node():
    each, one = tick_bytes(load("demo")), tick_bytes(load("demo", ["links.engine_nodes=1", "links.replica_nodes=1"]))
    for channel in each:
        shared = 2 if channel in ("rollout_sync", "correction") else 1
        assert each[channel] == pytest.approx([shared * n for n in one[channel]])


def test_a_rate_is_what_the_engines_cost_and_nothing_else_changes():
    config = load("demo", ["run.steps=100", "val.every=100", "snapshot.dtype=float32", "snapshot.encoding=delta"])
    rated, config = config, config.model_copy(update={"snapshot": SnapshotConfig(dtype="float32")})
    exact, coded = tick_bytes(config), tick_bytes(rated)
    assert {c for c in exact if exact[c] != coded[c]} == {"rollout_sync"}
    a_step = 2 * 2 * 0.05 * parameters(config).total  # to two nodes
    last = coded["rollout_sync"][0] * 200 - 99 * a_step
    assert 0 < last < 2 * 4 * parameters(config).total


@pytest.mark.parametrize(
    ("overrides", "passes"),
    [
        ([], 150 + 75 + 15),  # the second of each step, and 15 of 75 steps begin with a tick that refreshes Q
        (["codec.kind=none"], 150 + 75),
        (["grpo.old_logprobs=tick"], 150 + 75),
        (["grpo.old_logprobs=tick", "grpo.ppo_mini_batch_size=16"], 75),
        (["grpo.old_logprobs=rollout"], 150),
    ],
)
def test_a_forward_crosses_a_boundary_once_a_tick_and_once_for_each_pass_that_old_log_probs_take(
    overrides: list[str], passes: int
):
    config = load("k5", overrides, given=())
    found, ticks = tick_bytes(config), config.ticks
    forward, backward = (found[f"boundary_{way}"][1] for way in ("fwd", "bwd"))
    assert forward * ticks == pytest.approx(passes * backward)
