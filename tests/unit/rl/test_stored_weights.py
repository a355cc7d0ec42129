"""Pieces of stored weights are what the libraries that wrote them read back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rl.model_files import BUILTIN
from rl.policy import Stage
from rl.spans import spans
from rl.stored_weights import stored_weights

TINY = BUILTIN / "tiny"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(TINY / "config.json", tmp_path)
    return tmp_path


def pieces(n: int) -> list[tuple[int, int]]:
    return [(0, n), (0, 1), (n - 1, n), (n // 3, n // 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pieces_of_safetensors_are_what_the_library_loads(dtype: torch.dtype, folder: Path):
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(TINY / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    found = stored_weights(str(folder))
    assert {tensor.name for tensor in found} == set(tensors)
    for tensor in found:
        flat = tensors[tensor.name].float().reshape(-1).numpy()
        for start, stop in pieces(tensor.size):
            read = tensor.read(start, stop)
            assert read.dtype == np.float32 and read.tobytes() == flat[start:stop].tobytes()


def test_a_model_in_several_files_is_read_from_all_of_them(folder: Path):
    tensors = list(load_file(TINY / "model.safetensors").items())
    halves = {"one.safetensors": dict(tensors[::2]), "two.safetensors": dict(tensors[1::2])}
    for name, half in halves.items():
        save_file(half, folder / name)
    index = {"weight_map": {key: name for name, half in halves.items() for key in half}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert {t.name: t.size for t in stored_weights(str(folder))} == {key: t.numel() for key, t in tensors}
    (folder / "two.safetensors").unlink()
    assert stored_weights(str(folder)) == []


def test_tensors_come_in_the_order_of_the_layers_with_a_tied_embedding_once(folder: Path):
    tensors = load_file(TINY / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    stage = Stage(folder, spans(4, [], 1)[0], torch.float32, torch.device("cpu"), trainable=False)

    def part(name: str) -> str:
        return ".".join(name.split(".")[:3]) if "layers" in name else name

    def order(names: list[str]) -> list[str]:
        return list(dict.fromkeys(map(part, names)))

    found = stored_weights(str(folder))
    assert order([tensor.name for tensor in found]) == order(stage.weights.names)
    assert sum(tensor.size for tensor in found) == stage.weights.numel
    assert [tensor.kind for tensor in found if tensor.kind != "layer"] == ["embedding"]


def test_an_untied_head_comes_last(folder: Path):
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(TINY / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    kinds = [tensor.kind for tensor in stored_weights(str(folder))]
    assert (kinds[0], kinds[-1]) == ("embedding", "head") and set(kinds[1:-1]) == {"layer"}


def test_a_model_without_weights_or_with_packed_ones_has_no_pieces(folder: Path):
    assert stored_weights(str(folder)) == []
    save_file({"model.norm.weight": torch.zeros(8, dtype=torch.int8)}, folder / "model.safetensors")
    assert stored_weights(str(folder)) == []
    assert stored_weights("nobody/no-such-model") == []


def test_pieces_of_a_gguf_file_are_those_of_its_unpacked_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("NORTHSTAR_CACHE", str(tmp_path / "nothing converted"))
    rng = np.random.default_rng(0)
    kinds = {"token_embd.weight": "Q8_0", "blk.0.ffn_up.weight": "Q4_1", "output_norm.weight": "F32"}
    values = {name: rng.normal(0, 1, (96,) if "norm" in name else (40, 96)).astype(np.float32) for name in kinds}
    packed = {n: gguf.quants.quantize(v, gguf.GGMLQuantizationType[kinds[n]]) for n, v in values.items()}
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_embedding_length(96)
    writer.add_block_count(1)
    for name, data in packed.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kinds[name]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = stored_weights(str(tmp_path / "model.gguf"))
    assert [tensor.name for tensor in found] == list(kinds)
    for tensor in found:
        flat = gguf.dequantize(packed[tensor.name], gguf.GGMLQuantizationType[kinds[tensor.name]]).reshape(-1)
        for start, stop in pieces(tensor.size):
            assert tensor.read(start, stop).tobytes() == flat[start:stop].tobytes()
