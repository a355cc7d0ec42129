"""What one replica gives another in the place of a lost one: its state, and what the lost one had computed of the step.

One that leaves in order gives whoever takes its place what it alone has, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from codec.frames import FrameError, pack, unpack
from rl.config import ModelConfig, SnapshotConfig
from rl.snapshot import Sender
from swarm.messages import ENGINES_STREAM
from swarm.rank import Rank

OldLogprobs = list[list[np.ndarray] | None]  # one a mini-batch; None: those of the tick itself


def sender_of(stream: str, snapshot: SnapshotConfig, model: ModelConfig) -> Sender:
    """The engines' stream alone may have a rate."""
    return Sender(snapshot, snapshot.is_bf16(model), snapshot.rate if stream == ENGINES_STREAM else None)


def pack_state(rank: Rank, senders: Mapping[str, Sender] | None) -> np.ndarray:
    """A frame of all that its next tick depends on; `senders`: of the streams of weights of one that leaves."""
    tensors, fields = rank.state()
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
    streams = None if senders is None else {name: sender.tick for name, sender in senders.items()}
    arrays |= {f"stream.{name}": sender.held for name, sender in (senders or {}).items()}
    header = {"kind": "rank", "stage": rank.grid.p, "fields": json.dumps(fields), "streams": streams}
    return pack(header, arrays)


def take_state(rank: Rank, frame: np.ndarray, snapshot: SnapshotConfig) -> dict[str, Sender]:
    """What the other replica owes to sums to come it pays itself, unless it leaves. Raises FrameError.

    Returns senders of the streams that it leaves.
    """
    sender = f"a twin of {rank.grid.name}"
    header, arrays = unpack(frame, sender)
    if header.get("stage") != rank.grid.p:
        raise FrameError(sender, "stage", f"expected {rank.grid.p}, got {header.get('stage')!r}")
    streams, senders = header.get("streams"), dict[str, Sender]()
    for name, tick in (streams or {}).items():
        senders[name] = sender_of(name, snapshot, rank.setup.model)
        senders[name].tick, senders[name].held = tick, arrays.pop(f"stream.{name}").copy()
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    if streams is None:
        tensors |= {name: torch.zeros_like(tensors[name]) for name in rank.summed() if name in tensors}
    rank.restore(tensors, json.loads(header["fields"]))
    rank.seal.digest, rank.kept = None, {}
    return senders


def arrays_of(tensors: list[Tensor] | None) -> list[np.ndarray] | None:
    return None if tensors is None else [tensor.detach().cpu().numpy() for tensor in tensors]


def tensors_of(arrays: list[np.ndarray] | None, device: torch.device) -> list[Tensor] | None:
    return None if arrays is None else [torch.from_numpy(array.copy()).to(device) for array in arrays]
