"""What a config.json says of a model, and how long its sequences may be: as transformers has it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

from deploy.cli import app
from deploy.config import ConfigError, load
from deploy.preflight import preflight
from rl.model_files import BUILTIN, model_shape
from rl.model_shape import FAMILIES
from rl.policy import Stage
from rl.spans import spans


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BUILTIN / "tiny", tmp_path / "model"))


def describe(model: Path, **changes: object) -> None:
    """Change keys of its config.json; those of its rope are not there any more."""
    config = json.loads((model / "config.json").read_text())
    del config["rope_parameters"]
    (model / "config.json").write_text(json.dumps(config | changes))


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
FACTORS = {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
LENGTHS = [  # config.json, the longest sequence, what is said beyond it; k5 has sequences of 56 tokens
    ({"max_position_embeddings": 55}, 55, "the 55 positions of the model"),
    ({"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 40}, 40, "rope is one table"),
    (
        {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 40, **FACTORS}},
        40,
        "rope is one table",
    ),
    (
        {
            "rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 99, **FACTORS},
            "original_max_position_embeddings": 50,
        },
        50,
        "rope is one table",
    ),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}, "max_position_embeddings": 32}, 64, "the 64 positions"),
    (
        {
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            "max_position_embeddings": 16,
        },
        64,
        "the 64 positions",
    ),
    ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "max_position_embeddings": 128}, 128, "the 128 positions"),
]


@pytest.mark.parametrize(("changes", "longest", "says"), LENGTHS)
def test_sequences_end_where_the_model_is_no_longer_defined(model: Path, changes: dict, longest: int, says: str):
    describe(model, **changes)
    arguments = [f"model.path={model}", "grpo.max_prompt_length=16"]
    preflight(load("k5", [*arguments, f"grpo.max_response_length={longest - 16}"]))
    with pytest.raises(
        ConfigError, match=f"max_response_length is {longest + 1}, beyond .*{says}.*: lower one of them"
    ):
        load("k5", [*arguments, f"grpo.max_response_length={longest - 15}"])


def test_the_command_refuses_a_length_beyond_the_positions_with_exit_code_2(tmp_path: Path):
    arguments = ["--set", "grpo.max_response_length=400", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, ["run", "k5", *arguments])
    assert result.exit_code == 2 and "the 128 positions" in result.output.replace("\n", " ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "linear", "yarn", "llama3"])
def test_up_to_that_length_a_sample_does_not_depend_on_the_longest_one_beside_it(model: Path, kind: str):
    """And beyond it does, of the kinds that are refused: the reason for it."""
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    rope |= {"longrope": FACTORS, "llama3": LLAMA3}.get(kind, {}) | {"original_max_position_embeddings": 16}
    rope = (
        rope if kind in ("longrope", "llama3", "yarn") else {k: rope[k] for k in ("rope_type", "rope_theta", "factor")}
    )
    describe(model, rope_parameters=rope, max_position_embeddings=64 if kind == "longrope" else 16)
    steady = model_shape(str(model)).steady
    assert steady == {"dynamic": 16, "longrope": 16}.get(kind)
    alone, within, beyond = (beside(model, longest) for longest in (8, 16, 40))
    torch.testing.assert_close(within, alone, rtol=1e-4, atol=1e-4)
    assert (float((beyond - alone).abs().max()) > 0.1) is (steady is not None)


def beside(model: Path, longest: int) -> torch.Tensor:
    """Logits [8, V] of a sample of 8 tokens in a microbatch with one of `longest`."""
    (span,) = spans(4, [], 1)
    stage = Stage(model, span, torch.float32, torch.device("cpu"))
    real = torch.arange(longest)[None] < torch.tensor([[8], [longest]])
    ids = (torch.arange(longest) % 13 + 2) * real
    with torch.no_grad():
        return stage.logits(stage(ids, real, {})[0, :8])


# --- what a missing key means --------------------------------------------------------------------

PLAIN = {"hidden_size": 32, "num_hidden_layers": 30, "vocab_size": 48, "num_attention_heads": 4}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sliding_window": None},
        {"sliding_window": 64},
        {"sliding_window": 64, "use_sliding_window": True},
        {"use_sliding_window": True},
        {"use_sliding_window": True, "max_window_layers": 30},
        {"use_sliding_window": True, "max_window_layers": 5},
        {"tie_word_embeddings": True},
    ],
    ids=str,
)
def test_a_key_is_read_as_transformers_reads_it_also_where_it_is_missing(tmp_path: Path, family: str, changes: dict):
    (tmp_path / "config.json").write_text(json.dumps(PLAIN | {"model_type": family} | changes))
    shape, theirs = model_shape(str(tmp_path)), AutoConfig.from_pretrained(tmp_path)
    window = getattr(theirs, "sliding_window", None) if family != "llama" else None
    if family.startswith("qwen") and "sliding_attention" not in theirs.layer_types:
        window = None
    assert (shape.window, shape.tied) == (window, theirs.tie_word_embeddings)
    assert shape.positions == theirs.max_position_embeddings
