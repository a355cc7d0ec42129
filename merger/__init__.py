"""Mergers: (g_comp, correction, age) -> g, elementwise on flat fp32 gradients, the same on every rank.

Pure tensor methods: torch itself is not imported, so that a config can look a merger up in no time.
"""

from __future__ import annotations

from typing import cast

from codec.named import imported
from codec.planes import COMPILED_FROM
from merger.along_signs import AlongSigns
from merger.calibrated import Calibrated
from merger.delta import Delta
from merger.interface import Merger
from merger.none import NoMerger
from merger.replace import Replace
from merger.settings import MergerSettings
from merger.signed_ema import SignedEMA

MERGERS: dict[str, type[Merger]] = {
    "none": NoMerger,
    "signed_ema": SignedEMA,
    "calibrated": Calibrated,
    "delta": Delta,
    "replace": Replace,
}
_FACE = sorted({"payload", "__call__", *(name for name in vars(Merger) if not name.startswith("_"))})  # of the class


def merger_class(kind: str) -> type[Merger]:
    """One of MERGERS, or the class that "package.module:name" names. Raises ValueError if it is none."""
    if kind in MERGERS:
        return MERGERS[kind]
    found = imported(kind, "merger.kind")
    missing = [name for name in _FACE if not _has(found, name)]
    if not isinstance(found, type) or missing:
        lacks = f"it lacks {', '.join(missing)}" if missing else "it is no class"
        raise ValueError(f"merger.kind = {kind!r} is no merger: {lacks}; derive it from merger.interface.Merger")
    merger = cast("type[Merger]", found)
    if merger.payload not in ("sign", "dense", None) or (merger.needs_source and merger.payload != "dense"):
        says = f"payload {merger.payload!r} and needs_source {merger.needs_source!r}"
        raise ValueError(
            f"merger.kind = {kind!r} has {says}: payload is 'sign', 'dense' or None, and needs_source needs 'dense'"
        )
    return merger


def make_merger(config: MergerSettings) -> Merger:
    """The merger of `config.kind`. Raises ValueError if it cannot be found, or is none."""
    merger = merger_class(config.kind)(config)
    if not hasattr(merger, "dose"):
        raise ValueError(f"merger.kind = {config.kind!r} is no merger: it lacks dose, which `prepare` sets")
    return merger


def holds_planes(merger: type[Merger], device: str, numel: int) -> bool:
    """Whether signs stay packed while they are held. What somebody else's merger asks of a correction is not known."""
    ours = merger in MERGERS.values() and issubclass(merger, AlongSigns)
    return ours and (device == "cuda" or (device == "cpu" and numel >= COMPILED_FROM))


def _has(found: object, name: str) -> bool:
    return hasattr(found, name) and not getattr(getattr(found, name), "__isabstractmethod__", False)
