"""A model whose files disagree is refused before anything starts, by preflight, `doctor` and `probe`, with the fix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from deploy.cli import app
from deploy.config import load
from deploy.preflight import preflight
from rl.model_check import check_model
from rl.model_files import BUILTIN
from rl.model_shape import ModelNotFound
from rl.policy import HEAD, Stage
from rl.spans import spans
from rl.weights import PIECE

TINY = BUILTIN / "tiny"
Edit = Callable[[Path], None]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def keys(name: str, **changes: object) -> Edit:
    """Change keys of a JSON file of the model; a key is left out where the change is `...`."""

    def edit(model: Path) -> None:
        content = json.loads((model / name).read_text()) | changes
        (model / name).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return edit


def config(**changes: object) -> Edit:
    return keys("config.json", **changes)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    def edit(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors")

    return edit


def every(*edits: Edit) -> Edit:
    return lambda model: [edit(model) for edit in edits] and None


def head(factor: float) -> Edit:
    """A stored head: the embedding times `factor`."""
    return weights(lambda t: t.update({HEAD: factor * t["model.embed_tokens.weight"]}))


def token(content: str, i: int) -> Edit:
    def edit(model: Path) -> None:
        added = json.loads((model / "tokenizer.json").read_text())["added_tokens"]
        keys("tokenizer.json", added_tokens=[*added, added[0] | {"id": i, "content": content}])(model)

    return edit


def layers(n: int) -> Edit:
    return config(num_hidden_layers=n, layer_types=["full_attention"] * n)


def cut_short(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def broken_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"model": ')


NO_END = every(
    config(eos_token_id=None),
    keys("generation_config.json", eos_token_id=...),
    keys("tokenizer_config.json", eos_token=...),
)
REFUSED: dict[str, tuple[Edit, list[str]]] = {
    "a tied head of other numbers": (head(1.01), ["lm_head.weight", "set tie_word_embeddings to false"]),
    "an untied head that is not there": (
        config(tie_word_embeddings=False),
        ["no tensor 'lm_head.weight'", "set tie_word_embeddings to true"],
    ),
    "ties nothing by default": (config(tie_word_embeddings=...), ["no tensor 'lm_head.weight'"]),
    "fewer layers than there are": (
        layers(3),
        ["num_hidden_layers is 3", "has 4 layers", "set num_hidden_layers to 4"],
    ),
    "more layers than there are": (layers(5), ["no tensor 'model.layers.4.", "fetch the checkpoint again"]),
    "more tokens than the embedding": (
        config(vocab_size=20),
        ["is (17, 128)", "makes it (20, 128)", "set vocab_size to 17"],
    ),
    "another width": (config(intermediate_size=64), ["is (352, 128)", "makes it (64, 128)", "correct config.json"]),
    "biases that the family has not": (
        config(model_type="llama"),
        ["k_proj.bias'", "no part of the model that its config.json describes"],
    ),
    "a config that transformers refuses": (config(hidden_act="no-such"), ["transformers refuses", "no-such"]),
    "a file cut short": (cut_short, ["model.safetensors has 3234960 of 3235960 bytes", "fetch it again"]),
    "no tokenizer": (no_tokenizer, ["has no tokenizer", "tokenizer.json"]),
    "a broken tokenizer": (broken_tokenizer, ["cannot be loaded", "fetch its files again"]),
    "a token beyond the embedding": (token("<tool>", 17), ["token '<tool>' of id 17", "embeds 17"]),
    "an end beyond the embedding": (config(eos_token_id=[1, 17]), ["config.json: eos_token_id 17 is no token"]),
    "another file's end beyond it": (
        keys("generation_config.json", eos_token_id=-1),
        ["generation_config.json: eos_token_id -1 is no token"],
    ),
    "a padding beyond the embedding": (config(pad_token_id=17), ["pad_token_id 17 is no token", "set it to null"]),
    "no end": (NO_END, ["names no token that ends an answer", "add its eos_token_id to config.json"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_disagree_are_refused_with_the_fix(model: Path, name: str):
    edit, says = REFUSED[name]
    edit(model)
    with pytest.raises(ModelNotFound) as refused:
        preflight(load("k5", [f"model.path={model}"]))
    assert all(part in str(refused.value) for part in [str(model), *says]), refused.value


@pytest.mark.parametrize("name", ["a tied head of other numbers", "fewer layers than there are", "no end"])
def test_the_commands_say_so_before_anything_starts(model: Path, tmp_path: Path, name: str):
    edit, says = REFUSED[name]
    edit(model)
    file = tmp_path / "found.json"
    arguments = ["k5", "--set", f"model.path={model}"]
    doctor = CliRunner().invoke(app, ["doctor", *arguments, "--out", str(tmp_path), "--json", str(file)])
    (found,) = [f for f in json.loads(file.read_text())["findings"] if f["about"] == "model"]
    assert doctor.exit_code == 1 and found["level"] == "error"
    assert all(part in f"{found['says']}: {found['fix']}" for part in says) and found["fix"]
    for command in (["probe", *arguments, "--tokens", "10"], ["run", *arguments, "--out", str(tmp_path / "run")]):
        refused = CliRunner().invoke(app, command)
        assert refused.exit_code == 2
        assert all(part in refused.output.replace("\n", "") for part in says)
    assert not (tmp_path / "run").exists()


def test_doctor_says_that_a_sound_model_is_one_and_that_one_elsewhere_was_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    levels = []
    for path in ("builtin:tiny", "someone/not-on-this-machine"):
        file = tmp_path / "found.json"
        CliRunner().invoke(
            app, ["doctor", "k5", "--set", f"model.path={path}", "--out", str(tmp_path), "--json", str(file)]
        )
        levels += [f["level"] for f in json.loads(file.read_text())["findings"] if f["about"] == "model"]
    assert levels == ["ok", "warning"]


ACCEPTED: dict[str, Edit] = {
    "as it is": lambda model: None,
    "a tied head stored twice": head(1.0),
    "an untied head": every(head(1.01), config(tie_word_embeddings=False)),
    "tables of old checkpoints": weights(
        lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})
    ),
    "a head for rewards": weights(lambda t: t.update({"v_head.summary.weight": torch.ones(1, 128)})),
    "padding by the last row": config(pad_token_id=-1),
    "a padding token of its own, that nothing embeds": every(
        token("[PAD]", 17), keys("tokenizer_config.json", pad_token="[PAD]")
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_accepted_computes_what_transformers_computes(model: Path, name: str):
    ACCEPTED[name](model)
    check_model(model)
    ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
    (span,) = spans(4, [], 1)
    stage = Stage(model, span, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        found = stage.logits(stage(ids, torch.ones_like(ids, dtype=torch.bool), {})[0])
        expected = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(input_ids=ids).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_head_that_differs_in_its_last_number_alone_is_found(model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rl.model_check.PIECE", 100)  # several pieces, the last a short one
    assert PIECE % 100 == 4
    head(1.0)(model)
    check_model(model)
    weights(lambda t: t[HEAD][-1, -1].add_(1e-3))(model)
    with pytest.raises(ModelNotFound, match="other numbers"):
        check_model(model)
