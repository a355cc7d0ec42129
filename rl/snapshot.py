"""Weights on their way from a stage to whoever holds a copy: engines and anchor, by one codec.

A stream is one group of consumers that get the same frames in the same order. It begins with the weights in the model's
own files, which both ends have read. Then a frame is one of these:

    exact   a lossless delta against what the receivers hold, in the dtype that weights travel in
    coded   a step towards the weights, in `snapshot.rate`, if an exact one is larger; what it loses is part of the next
    whole   all that the receivers are to hold, for those that have lost it
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from codec import coded_delta, delta
from codec.bf16 import from_bf16, to_bf16
from codec.frames import FrameError, pack, unpack
from codec.vector import EntropyVector
from rl.config import SnapshotConfig


class BaseLost(RuntimeError):
    """A delta arrived whose base this consumer does not hold: it needs a whole snapshot."""

    def __init__(self, stage: int, base_tick: int | None, held_tick: int | None):
        super().__init__(stage, base_tick, held_tick)
        self.stage, self.base_tick, self.held_tick = stage, base_tick, held_tick

    def __str__(self) -> str:
        if self.base_tick != self.held_tick:
            return f"stage {self.stage} sent a delta against tick {self.base_tick}, held is {self.held_tick}"
        cause = "" if self.base_tick else ", as the model's files have them: put the same on every node"
        return f"stage {self.stage} sent a delta against weights of tick {self.base_tick}, others are held{cause}"


class Sender:
    """A stage's side of one stream; keeps what its receivers hold. `rate`: of coded frames; None: every frame is exact."""

    def __init__(self, config: SnapshotConfig, bf16: bool, rate: float | None = None):
        self.encoding, self.bf16 = config.encoding, bf16
        self.coder = None if rate is None else EntropyVector(16 * rate)
        self.held = np.zeros(0, np.float32)  # [numel] as it travels; always fp32 where a coder adds to it
        self.tick: int | None = None  # None: nothing was sent
        self.whole = False  # whether the frame that was made last is

    def frame(self, flat: Tensor, tick: int, stage: int, whole: bool = False, exact: bool = True) -> np.ndarray:
        """Weights frame of `flat` fp32 [numel] after `tick` ticks; without `exact` a stream that has a rate sends a coded one.

        `whole`: all that the receivers would hold, had they lost nothing.
        """
        new = flat.detach()
        header: dict[str, Any] = {"kind": "weights", "tick": tick, "stage": stage, "numel": len(new), "base_tick": None}
        if self.encoding == "full":
            return pack(header | {"encoding": "full"}, {"weights": self._travelling(new)})
        if self.tick is None:  # after 0 ticks the receivers hold these weights too, from the model's files
            self._keep(self._travelling(new))
            whole, exact = whole or tick > 0, True
        self.whole = whole
        before, self.tick = self.tick or 0, tick
        kind, arrays, base_tick = "delta", dict[str, np.ndarray](), before
        if not whole or tick != before:  # else the step of this tick was made, and what it led to is asked for again
            kind, arrays = self._step(new, exact)
        if whole:
            kind, arrays, base_tick = "delta", delta.encode(self.held, None), None
        return pack(header | {"encoding": kind, "bf16": self.bf16, "base_tick": base_tick}, arrays)

    def _step(self, new: Tensor, exact: bool) -> tuple[str, dict[str, np.ndarray]]:
        """Bring what receivers hold to `new` fp32 [numel], or nearer: the kind of the frame, and its arrays.

        Where few weights move, at a low learning rate, a lossless delta is within the rate and takes the coded one's place.
        """
        travelling = self._travelling(new)
        held = self.held if self.coder is None else self._travelling(torch.from_numpy(self.held))
        arrays = delta.encode(travelling, held)
        size = sum(array.nbytes for array in arrays.values())
        if exact or self.coder is None or size <= self.coder.bits / 8 * len(new):
            self._keep(travelling)
            return "delta", arrays
        return "coded", coded_delta.encode(new.cpu().numpy(), self.held, self.coder)

    def _travelling(self, weights: Tensor) -> np.ndarray:
        return _patterns(weights) if self.bf16 else weights.cpu().numpy()

    def _keep(self, weights: np.ndarray) -> None:
        """`weights` as they travel; in fp32 they may be the live buffer itself."""
        if self.bf16:
            self.held = weights if self.coder is None else from_bf16(weights)
        else:
            self.held = weights.copy()


class Receiver:
    """A consumer's side of one stream. What it holds is what is loaded: nobody else writes there."""

    def __init__(self, config: SnapshotConfig):
        self.coder = None if config.rate is None else EntropyVector(16 * config.rate)
        self.tick: int | None = None  # None: nothing came, the weights are those of the model's files

    def load(self, parts: list[np.ndarray], tick: int, master: Tensor) -> None:
        """Frames of all stages after `tick` ticks, into `master` fp32 [numel of the model].

        Raises FrameError for frames that are damaged or of another tick, stage or size, and BaseLost.
        Nothing is applied unless every part is right.
        """
        found: list[np.ndarray] = []
        for stage, part in enumerate(parts):
            found.append(self._part(part, tick, stage, master[sum(map(len, found)) :]))
        total = sum(map(len, found))
        if total != len(master):
            raise FrameError("all stages", "weights", f"{total} parameters, the model has {len(master)}")
        _write(found, master)
        self.tick = tick

    def take_back(self, parts: list[np.ndarray], master: Tensor) -> None:
        """`master` fp32 [numel of the model] as it was before these frames of all stages, which were loaded last.

        Of exact deltas alone: a coded step adds floats, and a whole frame says nothing of what was before.
        Raises FrameError or BaseLost, and then nothing is applied.
        """
        found: list[np.ndarray] = []
        bases = set[int]()
        for stage, part in enumerate(parts):
            flat, base = self._before(part, stage, master[sum(map(len, found)) :])
            found.append(flat)
            bases.add(base)
        _write(found, master)
        (self.tick,) = bases

    def catch_up(self, frames: list[np.ndarray], tick: int, stages: int, master: Tensor) -> None:
        """Load whole frames after `tick` ticks, one a stage; the rest are deltas before it, newest first: take them back."""
        whole, *back = [frames[i : i + stages] for i in range(0, len(frames), stages)]
        self.load(whole, tick, master)
        for parts in back:
            self.take_back(parts, master)

    def _before(self, part: np.ndarray, stage: int, rest: Tensor) -> tuple[np.ndarray, int]:
        """One stage's weights before a delta, as they travelled, and their tick; `rest` as for `_part`."""
        sender = f"stage {stage}"
        header, arrays = unpack(part, sender)
        base, numel = header.get("base_tick"), header.get("numel")
        wanted = ("stage", stage), ("tick", self.tick), ("encoding", "delta")
        for field, expected in wanted:
            if header.get(field) != expected:
                raise FrameError(sender, field, f"expected {expected}, got {header.get(field)!r}")
        if type(base) is not int or type(numel) is not int or not 0 <= numel <= len(rest):
            raise FrameError(sender, "base_tick", f"is {base!r}, of {numel!r} weights: nothing leads back")
        try:
            return delta.undo(arrays, _held(rest[:numel], header)), base
        except delta.BaseMismatch as error:
            raise BaseLost(stage, self.tick, self.tick) from error
        except ValueError as error:
            raise FrameError(sender, "weights", str(error)) from error

    def _part(self, part: np.ndarray, tick: int, stage: int, rest: Tensor) -> np.ndarray:
        """One stage's weights as they travelled; `rest`: what is held of it and of the stages behind it."""
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
        base_tick, held_tick = header.get("base_tick"), self.tick or 0
        if base_tick is not None and base_tick != held_tick:
            raise BaseLost(stage, base_tick, held_tick)
        numel = header.get("numel")
        if type(numel) is not int or not 0 <= numel <= len(rest):
            raise FrameError(sender, "numel", f"is {numel!r}, the model has {len(rest)} parameters from there on")
        try:
            return self._decoded(header, arrays, rest[:numel].detach())
        except delta.BaseMismatch as error:
            raise BaseLost(stage, base_tick, held_tick) from error
        except ValueError as error:
            raise FrameError(sender, "weights", str(error)) from error

    def _decoded(self, header: dict[str, Any], arrays: dict[str, np.ndarray], held: Tensor) -> np.ndarray:
        if header.get("encoding") == "coded":
            if self.coder is None:
                raise ValueError("a coded step came, and snapshot.rate is not set here")
            return coded_delta.decode(arrays, held.cpu().numpy(), self.coder)
        if header.get("base_tick") is None:
            return delta.decode(arrays, None, len(held))
        return delta.decode(arrays, _held(held, header), keeps_base=not header.get("bf16"))


def _held(weights: Tensor, header: dict[str, Any]) -> np.ndarray:
    """As they travel in a frame with this header: of bf16 an array of their own."""
    return _patterns(weights) if header.get("bf16") else weights.detach().cpu().numpy()


def _patterns(weights: Tensor) -> np.ndarray:
    """fp32 [n] -> uint16 [n] of bf16; a GPU rounds them itself, the same but for NaN, and half as much leaves it."""
    if weights.is_cuda:
        return weights.detach().bfloat16().view(torch.int16).cpu().numpy().view(np.uint16)
    return to_bf16(weights.detach().numpy())


def _write(stages: list[np.ndarray], master: Tensor) -> None:
    """Weights of all stages, as they travelled, into `master` fp32."""
    offset = 0
    for flat in stages:
        here = master[offset : offset + len(flat)]
        if flat.dtype != np.uint16:
            here.copy_(torch.from_numpy(flat))
        elif here.is_cuda:
            here.copy_(torch.from_numpy(flat.view(np.int16)).to(here.device).view(torch.bfloat16))
        else:
            from_bf16(flat, here.numpy())
        offset += len(flat)
