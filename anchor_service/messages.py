"""Messages of the circuit. Each names its two ends. What is large travels as frames, by reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anchor_service.errors import NotFinite
from codec import frames, signs
from codec.signs import SignPlanes
from codec.state import prefixed, under

LOOK = "look"
VOID, NORM = "void", "norm"  # of a report: why there is no correction; else the norm of M̄, by which it is judged


@dataclass(frozen=True)
class FireJob:
    """coordinator -> anchor: compute one correction."""

    version: int
    source_tick: int
    first_tick: int | None  # None on the wall clock: it is merged when it is there
    snapshot: list[object]  # reference to a weights frame, one a stage
    replay: list[object]  # reference to a batch frame, one element
    least_seconds: float = 0.0  # a simulated lag: not done before this time has passed


@dataclass(frozen=True)
class Correction:
    """anchor -> worker: M̄, or its sign, of one stage's parameters, flat.

    For a merger that looks a head comes first, with what it looks at; the whole is fetched if the merger wants it.
    """

    version: int
    source_tick: int
    first_tick: int | None  # None on the wall clock: in the first tick in which all ranks hold it
    # signs, packed or in int8, or float32 M̄, [numel of the stage]; None: of a head, or never fetched
    values: Tensor | SignPlanes | None
    digest: str  # of the frame that has the values
    look: Tensor | None = None  # int8 signs of M alone, at the coordinates of `merger.look`, for a merger that looks
    fetch: Callable[[], Correction] | None = None  # of a head: the whole


def pack_correction(
    m: Tensor, payload: str, version: int, source_tick: int, first_tick: int | None, stage: int
) -> np.ndarray:
    """Correction frame of one stage. `m` is M̄ [numel]; `payload` is `sign` or `dense`."""
    arrays = signs.encode(m, f"stage {stage}") if payload == "sign" else {"dense": m.cpu().numpy()}
    header = {
        "kind": "correction",
        "payload": payload,
        "version": version,
        "source_tick": source_tick,
        "first_tick": first_tick,
        "stage": stage,
        "numel": m.numel(),
    }
    return frames.pack(header, arrays)


def pack_head(look: Tensor, whole: np.ndarray) -> np.ndarray:
    """Head of the correction frame `whole`: M alone at the coordinates that a merger looks at, whose signs are sent."""
    header, _ = frames.unpack(whole, "the anchor")
    kept = {field: header[field] for field in ("version", "source_tick", "first_tick", "stage", "numel")}
    head = kept | {"kind": "head", "look": look.numel(), "whole": frames.digest_of(whole)}
    return frames.pack(head, prefixed(LOOK, signs.encode(look)))


def pack_void(error: NotFinite, version: int, stage: int) -> np.ndarray:
    """In the place of a correction, or of its head, whose M is not finite: why."""
    return frames.pack({"kind": VOID, "version": version, "stage": stage, "error": list(error.args)}, {})


def unpack_correction(frame: np.ndarray, stage: int, numel: int) -> Correction:
    """Raises FrameError if the frame is damaged, meant for another stage or model, or not finite; NotFinite where M was
    not, as the anchor itself says."""
    header, arrays = _unpacked(frame, kind="correction", stage=stage, numel=numel)
    try:
        values = signs.expanded(arrays, numel) if header.get("payload") == "sign" else _dense(arrays, numel)
    except ValueError as error:
        raise frames.FrameError("the anchor", "arrays", str(error)) from error
    return Correction(
        version=header["version"],
        source_tick=header["source_tick"],
        first_tick=header.get("first_tick"),
        values=values,
        digest=frames.digest_of(frame),
    )


def unpack_head(frame: np.ndarray, stage: int, numel: int, look: int) -> Correction:
    """Without its values. Raises FrameError as `unpack_correction` does, and where other than `look` signs are in it."""
    header, arrays = _unpacked(frame, kind="head", stage=stage, numel=numel, look=look)
    if type(header.get("whole")) is not str:
        raise frames.FrameError("the anchor", "whole", f"is {header.get('whole')!r}, not a digest")
    try:
        seen = signs.decode(under(LOOK, arrays), look)
    except ValueError as error:
        raise frames.FrameError("the anchor", "arrays", str(error)) from error
    return Correction(
        version=header["version"],
        source_tick=header["source_tick"],
        first_tick=header.get("first_tick"),
        values=None,
        digest=header["whole"],
        look=seen,
    )


def joined(head: Correction, whole: Correction) -> Correction:
    """Both parts of one correction. Raises FrameError if they are of two."""
    if whole.digest != head.digest:
        reason = f"is {whole.digest}, the head of correction {head.version} says {head.digest}"
        raise frames.FrameError("the anchor", "digest", reason)
    return replace(whole, look=head.look)


def _unpacked(frame: np.ndarray, **needs: object) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays of a frame whose header has what this rank needs, and the numbers that every correction has.

    Raises FrameError, or NotFinite of a void one."""
    header, arrays = frames.unpack(frame, "the anchor")
    if header.get("kind") == VOID:
        raise NotFinite(*map(str, header.get("error", ("an M", "nothing it said", "look at the anchor"))))
    for field, expected in needs.items():
        if header.get(field) != expected:
            raise frames.FrameError("the anchor", field, f"is {header.get(field)!r}, this rank needs {expected!r}")
    for field in ("version", "source_tick"):
        if type(header.get(field)) is not int:
            raise frames.FrameError("the anchor", field, f"is {header.get(field)!r}, not a number")
    if type(header.get("first_tick")) not in (int, type(None)):
        raise frames.FrameError("the anchor", "first_tick", f"is {header['first_tick']!r}, not a number")
    return header, arrays


def content_digest(frame: np.ndarray) -> str:
    """Digest of what a correction says, whenever it was merged: a run and its replay have the same."""
    return frames.digest(*frames.unpack(frame, "the anchor")[1].values())


def pack_record(arrays: dict[str, np.ndarray], tick: int, stage: int) -> np.ndarray:
    """worker -> diagnoser: vectors over one stage's own parameters, flat fp32 (or int8 signs), as of `tick`."""
    return frames.pack({"kind": "record", "tick": tick, "stage": stage}, arrays)


def unpack_records(records: Sequence[np.ndarray], tick: int, numel: int) -> dict[str, Tensor]:
    """Records of all stages -> fp32 vectors over the whole model, `numel` long, by name.

    Raises FrameError for a record that is damaged, of another tick or stage, or that does not fit the others.
    """
    stages = [_record(record, tick, stage) for stage, record in enumerate(records)]
    found = {}
    for name in stages[0]:
        if any(set(stage) != set(stages[0]) for stage in stages):
            raise frames.FrameError("the workers", name, "is not in the record of every stage")
        flat = np.concatenate([stage[name] for stage in stages]).astype(np.float32, copy=False)
        if flat.shape != (numel,):
            raise frames.FrameError("the workers", name, f"has {flat.shape} entries, the model {numel} parameters")
        found[name] = torch.from_numpy(flat)
    return found


def _record(record: np.ndarray, tick: int, stage: int) -> dict[str, np.ndarray]:
    sender = f"stage {stage}"
    header, arrays = frames.unpack(record, sender)
    for field, expected in (("kind", "record"), ("tick", tick), ("stage", stage)):
        if header.get(field) != expected:
            raise frames.FrameError(sender, field, f"is {header.get(field)!r}, not {expected!r}")
    for name, array in arrays.items():
        if array.ndim != 1 or array.dtype.name not in ("float32", "int8"):
            raise frames.FrameError(sender, name, f"is {array.dtype} {array.shape}, not a row of float32 or int8")
    return arrays


def _dense(arrays: dict[str, np.ndarray], numel: int) -> Tensor:
    found = arrays.get("dense")
    if found is None or found.dtype != np.float32 or found.shape != (numel,):
        kind = "missing" if found is None else f"{found.dtype} {found.shape}"
        raise ValueError(f"dense M̄ is {kind}, {numel} parameters need float32 ({numel},)")
    values = torch.from_numpy(found.copy())
    if not values.isfinite().all():
        raise ValueError("dense M̄ holds a NaN or an infinity")
    return values
