"""A model's weights where they lie, safetensors or GGUF, read in pieces as float32. No torch.

Pieces are read from the file, not mapped: the pages of a mapped checkpoint would count as memory of the process,
and a stage would need twice what it keeps while it loads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from codec.bf16 import from_bf16
from rl.gguf_files import gguf_reader
from rl.model_files import local_folder, model_shape, tensor_files, tensor_specs
from rl.model_shape import ModelNotFound

if TYPE_CHECKING:
    from gguf import ReaderTensor

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_KINDS = {
    "model.embed_tokens.weight": "embedding",
    "token_embd.weight": "embedding",
    "lm_head.weight": "head",
    "output.weight": "head",
}


@dataclass(frozen=True)
class Stored:
    """One tensor."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[int, int], np.ndarray]  # [start, stop) of the flat tensor -> float32 [stop - start]

    @property
    def size(self) -> int:
        """Elements."""
        return prod(self.shape)

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
        try:
            found = list(stored_tensors(folder).values())
        except ModelNotFound:  # a folder of metadata alone, or of packed weights
            found = []
    else:
        found = _gguf(Path(path).expanduser()) if path.endswith(".gguf") else []
    if found and (shape := model_shape(path)) and shape.tied:  # some checkpoints hold it twice
        found = [tensor for tensor in found if tensor.kind != "head"]
    return sorted(found, key=_position)


def _position(tensor: Stored) -> tuple[int, int]:
    """Embedding, layers by number, norm, head."""
    numbers = [int(part) for part in tensor.name.split(".") if part.isdecimal()]
    return (1, numbers[0]) if numbers else ({"embedding": 0, "layer": 2, "head": 3}[tensor.kind], 0)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder of safetensors, by name. Raises ModelNotFound where a file is missing or packed."""
    files, found = set(tensor_files(folder).values()), {}
    for file in sorted(files):
        if not file.exists():
            raise ModelNotFound(f"{folder} lacks {file.name}, which its index names: fetch it again")
        specs, data = tensor_specs(file)
        end = data + max((spec["data_offsets"][1] for spec in specs.values()), default=0)
        if file.stat().st_size < end:
            raise ModelNotFound(f"{file} has {file.stat().st_size} of {end} bytes: fetch it again")
        for name, spec in specs.items():
            if spec["dtype"] not in _DTYPES:
                raise ModelNotFound(
                    f"{file} holds {name!r} as {spec['dtype']}: packed weights cannot be trained, "
                    f"set model.path to the model in float32, bfloat16 or float16"
                )
            read = partial(_read_safetensors, file, data + spec["data_offsets"][0], np.dtype(_DTYPES[spec["dtype"]]))
            found[name] = Stored(name, tuple(spec["shape"]), read)
    return found


def _read_safetensors(file: Path, offset: int, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
    raw = np.fromfile(file, dtype, stop - start, offset=offset + start * dtype.itemsize)
    return from_bf16(raw) if dtype == np.uint16 else raw.astype(np.float32, copy=False)


def _gguf(file: Path) -> list[Stored]:
    return [
        Stored(tensor.name, tuple(int(n) for n in reversed(tensor.shape)), partial(_read_gguf, tensor))
        for tensor in gguf_reader(file).tensors
    ]


def _read_gguf(tensor: ReaderTensor, start: int, stop: int) -> np.ndarray:
    """Unpacks the rows that [start, stop) touches."""
    from gguf import dequantize

    width = int(tensor.shape[0])
    rows = tensor.data.reshape(int(tensor.n_elements) // width, -1)[start // width : -(-stop // width)]
    first = start // width * width
    return dequantize(rows, tensor.tensor_type).reshape(-1)[start - first : stop - first].astype(np.float32, copy=False)
