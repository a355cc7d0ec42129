"""Weights on their way from a stage to whoever holds a copy: engines and anchor, by one codec.

A stream is one group of consumers that get the same frames in the same order. Its frames are whole
snapshots, or lossless deltas against the stream's previous frame.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from codec import delta
from codec.frames import FrameError, pack, unpack
from rl.config import SnapshotConfig


class BaseLost(RuntimeError):
    """A delta arrived whose base this consumer does not hold: it needs a whole snapshot."""

    def __init__(self, stage: int, base_tick: int | None, held_tick: int | None):
        super().__init__(stage, base_tick, held_tick)
        self.stage, self.base_tick, self.held_tick = stage, base_tick, held_tick

    def __str__(self) -> str:
        return f"stage {self.stage} sent a delta against tick {self.base_tick}, held is {self.held_tick}"


class Sender:
    """A stage's side of one stream; keeps what it last sent."""

    def __init__(self, config: SnapshotConfig, bf16: bool):
        self.encoding, self.bf16 = config.encoding, bf16
        self.base: np.ndarray | None = None
        self.tick: int | None = None

    def frame(self, flat: Tensor, tick: int, stage: int, whole: bool) -> np.ndarray:
        """Weights frame of `flat` fp32 [numel] after `tick` ticks; `whole` sends no delta."""
        new = flat.detach().cpu().numpy()
        new = delta.to_bf16(new) if self.bf16 else new
        header = {
            "kind": "weights",
            "tick": tick,
            "stage": stage,
            "encoding": self.encoding,
            "base_tick": None,
            "numel": len(new),
        }
        if self.encoding == "full":
            return pack(header, {"weights": new})
        if not whole and self.base is not None:
            header["base_tick"] = self.tick
        arrays = delta.encode(new, None if header["base_tick"] is None else self.base)
        self.base, self.tick = new if self.bf16 else new.copy(), tick  # in fp32 `new` is the live buffer itself
        return pack(header, arrays)


class Receiver:
    """A consumer's side of one stream: the last weights of every stage, in the dtype they travel in."""

    def __init__(self, config: SnapshotConfig):
        self.keeps = config.encoding == "delta"
        self.held: dict[int, np.ndarray] = {}
        self.tick: int | None = None

    def load(self, parts: list[np.ndarray], tick: int, master: Tensor) -> None:
        """Frames of all stages after `tick` ticks, into `master` fp32 [numel of the model].

        Raises FrameError for frames that are damaged or of another tick, stage or size, and BaseLost.
        Nothing is applied unless every part is right.
        """
        found = [self._part(part, tick, stage, len(master)) for stage, part in enumerate(parts)]
        total = sum(len(flat) for flat in found)
        if total != len(master):
            raise FrameError("all stages", "weights", f"{total} parameters, the model has {len(master)}")
        offset = 0
        for flat in found:
            values = delta.from_bf16(flat) if flat.dtype == np.uint16 else flat
            master[offset : offset + len(flat)].copy_(torch.from_numpy(values))
            offset += len(flat)
        self.held, self.tick = {stage: flat.copy() for stage, flat in enumerate(found)} if self.keeps else {}, tick

    def _part(self, part: np.ndarray, tick: int, stage: int, most: int) -> np.ndarray:
        sender = f"stage {stage}"
        header, arrays = unpack(part, sender)
        for field, expected in (("tick", tick), ("stage", stage)):
            if header.get(field) != expected:
                raise FrameError(sender, field, f"expected {expected}, got {header.get(field)!r}")
        if header.get("encoding") == "full":
            flat = arrays.get("weights")
            if flat is None or flat.ndim != 1 or flat.dtype not in (np.dtype(np.float32), np.dtype(np.uint16)):
                raise FrameError(sender, "weights", "is missing or not a row of float32 or bf16")
            return flat
        base_tick = header.get("base_tick")
        if base_tick is not None and (base_tick != self.tick or stage not in self.held):
            raise BaseLost(stage, base_tick, self.tick)
        numel = header.get("numel")
        if type(numel) is not int or not 0 <= numel <= most:
            raise FrameError(sender, "numel", f"is {numel!r}, the model has {most} parameters")
        try:
            return delta.decode(arrays, self.held[stage] if base_tick is not None else None, numel)
        except delta.BaseMismatch as error:
            raise BaseLost(stage, base_tick, self.tick) from error
        except ValueError as error:
            raise FrameError(sender, "weights", str(error)) from error
