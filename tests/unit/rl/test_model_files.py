"""Where a model is found, and what is said where it is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest

from deploy.config import ConfigError, load
from rl.model_files import BUILTIN, model_shape, resolve, tensor_shapes
from rl.model_shape import ModelNotFound

TINY = BUILTIN / "tiny"
HUB = "someone/not-on-this-machine"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for module in (huggingface_hub.constants, huggingface_hub.file_download, huggingface_hub._snapshot_download):
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(hub: Path, *names: str) -> Path:
    """Files of the tiny model as a download of `HUB` would have left them."""
    folder = hub / "models--someone--not-on-this-machine"
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    for name in names:
        shutil.copy(TINY / name, snapshot)
    return snapshot


def test_a_model_of_the_hub_that_is_whole_on_this_machine_needs_no_network(hub: Path):
    snapshot = cached(hub, "config.json", "model.safetensors", "tokenizer.json")
    assert resolve(HUB) == snapshot and model_shape(HUB).hidden == 128


@pytest.mark.parametrize("names", [(), ("config.json",)], ids=["nothing", "metadata alone"])
def test_without_a_network_the_fix_is_named(hub: Path, names: tuple[str, ...]):
    if names:
        cached(hub, *names)
    load("k5", [f"model.path={HUB}"])  # it may be on the nodes of the cluster
    with pytest.raises(ModelNotFound) as missing:
        resolve(HUB)
    assert all(part in str(missing.value) for part in (repr(HUB), "HF_HUB_OFFLINE", f"hf download {HUB}", "model.path"))


def test_a_download_that_broke_off_between_two_shards_is_not_taken_for_whole(hub: Path):
    snapshot = cached(hub, "config.json", "model.safetensors")
    index = {"weight_map": {"model.norm.weight": "model.safetensors", "lm_head.weight": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelNotFound, match="could not be fetched"):
        resolve(HUB)


def test_a_folder_with_weights_in_another_form_is_refused_with_the_fix(tmp_path: Path):
    shutil.copy(TINY / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelNotFound, match=r"lacks weights in safetensors: .*save_pretrained"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json", None])
def test_a_chat_needs_a_template_wherever_the_tokenizer_has_it(tmp_path: Path, place: str | None):
    shutil.copytree(TINY, tmp_path / "model")
    template = "{{ messages[0]['content'] }}"
    if place == "tokenizer_config.json":
        config = json.loads((tmp_path / "model" / place).read_text()) | {"chat_template": template}
        template = json.dumps(config)
    if place:
        (tmp_path / "model" / place).write_text(template)
    arguments = [f"model.path={tmp_path / 'model'}", "task.chat=true"]
    if place:
        load("k5", arguments)
    else:
        with pytest.raises(ConfigError, match=r"task\.chat: .* has no chat template: set task\.chat=false"):
            load("k5", arguments)


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 538090408\n",
        b"",
        (TINY / "model.safetensors").read_bytes()[:100],
        (2).to_bytes(8, "little") + b"[]",
        (9).to_bytes(8, "little") + b"no header",
    ],
    ids=["git-lfs pointer", "empty", "cut in its header", "not an object", "not JSON"],
)
def test_a_file_that_is_no_whole_safetensors_file_is_to_be_fetched_again(content: bytes, tmp_path: Path):
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(TINY / name, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelNotFound, match="fetch it again"):
        tensor_shapes(tmp_path)
