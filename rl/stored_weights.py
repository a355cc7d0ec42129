"""A model's weights where they lie, safetensors or GGUF, read in pieces as float32. No torch.

For whoever needs to know what the weights are like, not to hold them: a run reads whole stages (`rl/policy.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from codec.delta import from_bf16
from rl.model_files import ModelNotFound, gguf_reader, local_folder, model_shape, tensor_files, tensor_specs

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_KINDS = {
    "model.embed_tokens.weight": "embedding",
    "token_embd.weight": "embedding",
    "lm_head.weight": "head",
    "output.weight": "head",
}


@dataclass(frozen=True)
class Stored:
    """One tensor, flat."""

    name: str
    size: int
    read: Callable[[int, int], np.ndarray]  # [start, stop) -> float32 [stop - start]

    @property
    def kind(self) -> str:
        """`embedding`, `head` or `layer` (also of the last norm)."""
        return _KINDS.get(self.name, "layer")


def stored_weights(path: str) -> list[Stored]:
    """Every tensor of the model, in the order in which a snapshot has them, a tied embedding once.

    Empty if the weights are not on this machine, or in a form that cannot be read in pieces.
    Raises ModelNotFound if `path` names no model.
    """
    folder = local_folder(path)
    if folder is not None:
        found = _safetensors(folder)
    else:
        found = _gguf(Path(path).expanduser()) if path.endswith(".gguf") else []
    if found and model_shape(path).tied:  # some checkpoints hold it twice
        found = [tensor for tensor in found if tensor.kind != "head"]
    return sorted(found, key=_position)


def _position(tensor: Stored) -> tuple[int, int]:
    """Embedding, layers by number, norm, head."""
    numbers = [int(part) for part in tensor.name.split(".") if part.isdecimal()]
    return (1, numbers[0]) if numbers else ({"embedding": 0, "layer": 2, "head": 3}[tensor.kind], 0)


def _safetensors(folder: Path) -> list[Stored]:
    try:
        files = set(tensor_files(folder).values())
    except ModelNotFound:  # a folder of metadata alone
        return []
    if not all(file.exists() for file in files):
        return []
    found = []
    for file in files:
        specs, data = tensor_specs(file)
        for name, spec in specs.items():
            if spec["dtype"] not in _DTYPES:
                return []
            read = partial(_read_safetensors, file, data + spec["data_offsets"][0], np.dtype(_DTYPES[spec["dtype"]]))
            found.append(Stored(name, prod(spec["shape"]), read))
    return found


def _read_safetensors(file: Path, offset: int, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
    raw = np.fromfile(file, dtype, stop - start, offset=offset + start * dtype.itemsize)
    return from_bf16(raw) if dtype == np.uint16 else raw.astype(np.float32, copy=False)


def _gguf(file: Path) -> list[Stored]:
    return [
        Stored(tensor.name, int(tensor.n_elements), partial(_read_gguf, tensor)) for tensor in gguf_reader(file).tensors
    ]


def _read_gguf(tensor, start: int, stop: int) -> np.ndarray:
    """Unpacks the rows that [start, stop) touches."""
    from gguf import dequantize

    width = int(tensor.shape[0])
    rows = tensor.data.reshape(int(tensor.n_elements) // width, -1)[start // width : -(-stop // width)]
    first = start // width * width
    return dequantize(rows, tensor.tensor_type).reshape(-1)[start - first : stop - first].astype(np.float32, copy=False)
