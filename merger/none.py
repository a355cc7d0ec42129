"""No merger: G = G_comp. The floor."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from merger.interface import Merger, Norm, Payload, local_norm

if TYPE_CHECKING:
    from merger.interface import Gradient, Held


class NoMerger(Merger):
    """Leaves the compressed gradient as it is, whatever the anchor says."""

    payload: ClassVar[Payload | None] = None

    def prepare(self, g_comp: Gradient, correction: Held, age: int, norm: Norm = local_norm) -> None: ...

    def apply(self, g_comp: Gradient, correction: Held) -> Gradient:
        return g_comp
