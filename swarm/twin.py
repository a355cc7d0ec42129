"""What one replica gives another in the place of a lost one: its state, and what the lost one had computed of the step."""

from __future__ import annotations

import json

import numpy as np
import torch
from torch import Tensor

from codec.frames import FrameError, pack, unpack
from swarm.rank import Rank

OldLogprobs = list[list[np.ndarray] | None]  # one a mini-batch; None: those of the tick itself


def pack_state(rank: Rank) -> np.ndarray:
    """A frame of all that its next tick depends on."""
    tensors, fields = rank.state()
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
    return pack({"kind": "rank", "stage": rank.grid.p, "fields": json.dumps(fields)}, arrays)


def take_state(rank: Rank, frame: np.ndarray) -> None:
    """What the other replica owes to sums to come it pays itself. Raises FrameError."""
    sender = f"a twin of {rank.grid.name}"
    header, arrays = unpack(frame, sender)
    if header.get("stage") != rank.grid.p:
        raise FrameError(sender, "stage", f"expected {rank.grid.p}, got {header.get('stage')!r}")
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    tensors |= {name: torch.zeros_like(tensors[name]) for name in rank.summed() if name in tensors}
    rank.restore(tensors, json.loads(header["fields"]))
    rank.seal.digest, rank.kept = None, {}


def arrays_of(tensors: list[Tensor] | None) -> list[np.ndarray] | None:
    return None if tensors is None else [tensor.detach().cpu().numpy() for tensor in tensors]


def tensors_of(arrays: list[np.ndarray] | None, device: torch.device) -> list[Tensor] | None:
    return None if arrays is None else [torch.from_numpy(array.copy()).to(device) for array in arrays]
