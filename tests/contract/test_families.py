"""Every family of models that a run takes: its stages are the model that transformers loads, cut in pieces."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from codec.rows import pack_rows
from rl.model_files import model_shape
from rl.model_shape import FAMILIES, ModelNotFound
from rl.policy import Stage
from rl.spans import spans
from tests.contract.engine_process import build
from tests.contract.test_shared_prompts import compare, groups

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped queries
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,  # so that the short sequences of a test are rescaled too
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen2-tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=False),
    "qwen3-tied": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=False),
    "llama3-tied": LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "smollm2": LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e5}, tie_word_embeddings=True
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=None, tie_word_embeddings=False),
}


@pytest.fixture(scope="module", params=CONFIGS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of the family in several safetensors files, its norms and biases random too."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [3, 24] right-padded, and which are real."""
    lengths = torch.tensor([24, 9, 17])
    real = torch.arange(24)[None] < lengths[:, None]
    ids = torch.randint(2, 48, (3, 24), generator=torch.Generator().manual_seed(5))
    return ids * real, real


def plain(folder: Path, ids: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of the real tokens and the gradient of their loss, sample by sample, as transformers loads the model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = torch.cat([model(input_ids=row[keep][None]).logits[0] for row, keep in zip(ids, real)])
    loss(logits).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def loss(logits: torch.Tensor) -> torch.Tensor:
    """Anything smooth that weighs every logit differently."""
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    return (torch.log_softmax(logits, -1) * weights).mean()


def staged(stages: list[Stage], ids: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same of the stages one after the other; a tied embedding on two stages has the sum of two gradients."""
    x = ids
    for stage in stages:
        x = stage(x, real, cuts={})
    logits = stages[-1].logits(pack_rows(x, real))
    loss(logits).backward()
    grads: dict[str, torch.Tensor] = {}
    for stage in stages:
        stage.weights.collect()
        for i, name in enumerate(stage.weights.names):
            grads[name] = grads.get(name, 0) + stage.weights.view(i, stage.weights.grad)
    return logits.detach(), grads


@pytest.mark.parametrize("count", [1, 2, 4])
def test_logits_and_gradients_of_the_stages_are_those_of_the_model(family: Path, count: int):
    ids, real = padded()
    cuts = {1: [], 2: [2], 4: [1, 2, 3]}[count]
    stages = [Stage(family, span, torch.float32, torch.device("cpu")) for span in spans(4, cuts, count)]
    logits, grads = staged(stages, ids, real)
    expected, expected_grads = plain(family, ids, real)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert set(grads) == set(expected_grads)
    for name, grad in expected_grads.items():
        assert grad.abs().max() > 0, f"{name} does not matter: the test would not notice if it were wrong"
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("count", [1, 2])
def test_prompts_that_samples_share_change_neither_log_probs_nor_gradients(family: Path, count: int):
    stages = [Stage(family, span, torch.float32, torch.device("cpu")) for span in spans(4, [2][: count - 1], count)]
    compare(stages, groups(), list(range(13)))


def test_eager_attention_is_causal_too_and_gives_the_same(family: Path):
    """Unlike sdpa it sees the future where nobody gives it a mask."""
    ids, real = padded()
    stages = [Stage(family, s, torch.float32, torch.device("cpu"), attention="eager") for s in spans(4, [2], 2)]
    logits, grads = staged(stages, ids, real)
    expected, expected_grads = plain(family, ids, real)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_engine_samples_from_the_same_model(family: Path, attention: str):
    engine = build("transformers", family, "float32", attention=attention)
    prompts = [[3, 4, 5, 6], [7, 8], [9, 10, 11, 12, 13, 2]]
    samples = engine.sample(prompts, [(i,) for i in range(6)], 20, 1.0)
    model = AutoModelForCausalLM.from_pretrained(family, dtype=torch.float32)
    for i, (tokens, logprobs) in enumerate(zip(samples.tokens, samples.logprobs)):
        ids = torch.tensor([*prompts[i // 2], *tokens.tolist()])
        with torch.no_grad():
            expected = torch.log_softmax(model(input_ids=ids[None]).logits[0], -1)
        start = len(prompts[i // 2])
        expected = expected[torch.arange(start - 1, len(ids) - 1), ids[start:]]
        np.testing.assert_allclose(logprobs, expected.numpy(), atol=2e-4)


def test_answers_end_at_every_token_that_the_generation_config_names(family: Path, tmp_path: Path):
    shutil.copytree(family, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7, 9, 20]}))
    engine = build("transformers", tmp_path / "model", "float32")
    samples = engine.sample([[3, 4, 5]], [(i,) for i in range(64)], 30, 1.0)
    ends = {int(tokens[-1]) for tokens, cut in zip(samples.tokens, samples.truncated) if not cut}
    assert len(ends) > 1 and ends <= {1, 7, 9, 20}
    assert not any(set(tokens[:-1].tolist()) & {1, 7, 9, 20} for tokens in samples.tokens)


def test_every_supported_family_is_tried_here():
    assert {config.model_type for config in CONFIGS.values()} == set(FAMILIES)


# --- what is refused -----------------------------------------------------------------------------

BASE = {"model_type": "qwen2", "hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 48}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "gemma3_text"}, ["'gemma3_text'", "Qwen2", "Llama 3", "SmolLM2"]),
        ({"model_type": "qwen3_moe", "num_experts": 8}, ["'qwen3_moe'", "mixture of experts", "Qwen3"]),
        ({"model_type": "mixtral", "num_local_experts": 8}, ["'mixtral'", "mixture of experts"]),
        ({"model_type": "t5", "is_encoder_decoder": True}, ["'t5'", "encoder"]),
        ({"model_type": "qwen2_5_vl", "vision_config": {}}, ["'qwen2_5_vl'", "not only text"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["gptq", "quantized", "float32, bfloat16 or float16"]),
        ({"layer_types": ["full_attention", "linear_attention"] * 2}, ["linear_attention", "full attention"]),
    ],
    ids=lambda value: value.get("model_type", next(iter(value))) if isinstance(value, dict) else "",
)
def test_another_architecture_is_refused_by_name_with_what_is_supported(tmp_path: Path, changes: dict, says: list[str]):
    (tmp_path / "config.json").write_text(json.dumps(BASE | changes))
    with pytest.raises(ModelNotFound) as refused:
        model_shape(str(tmp_path))
    assert all(part in str(refused.value) for part in [str(tmp_path), *says])


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"sliding_window": 4096}, None),  # Qwen2 has the number in its config.json and does not use it
        ({"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 2}, 4096),
        ({"model_type": "mistral", "sliding_window": 4096}, 4096),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "llama", "sliding_window": 4096}, None),
    ],
)
def test_a_sliding_window_counts_where_transformers_uses_it(tmp_path: Path, changes: dict, window: int | None):
    (tmp_path / "config.json").write_text(json.dumps(BASE | changes))
    assert model_shape(str(tmp_path)).window == window


def test_a_tensor_of_another_shape_is_refused_and_not_repeated_to_fit(family: Path, tmp_path: Path):
    config = json.loads((family / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {name: t for file in family.glob("*.safetensors") for name, t in load_file(file).items()}
    (span,) = spans(4, [], 1)
    tensors["model.norm.weight"] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelNotFound, match=r"model\.norm\.weight is \(1,\), its config\.json makes it \(32,\)"):
        Stage(tmp_path, span, torch.float32, torch.device("cpu"))
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelNotFound, match=r"holds no tensor 'model\.norm\.weight'"):
        Stage(tmp_path, span, torch.float32, torch.device("cpu"))


def test_an_attention_that_is_not_installed_is_refused_with_the_key(family: Path):
    (span,) = spans(4, [], 1)
    with pytest.raises(ValueError, match=r"model\.attention 'flash_attention_2' cannot be used on this machine"):
        Stage(family, span, torch.bfloat16, torch.device("cpu"), attention="flash_attention_2")
