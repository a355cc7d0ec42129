"""replace: G = M̄. No merger of the same fires can have more of the anchor in it; a control, not a way to train."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from merger.interface import Merger, Norm, Payload, local_norm

if TYPE_CHECKING:
    from merger.interface import Gradient, Held


class Replace(Merger):
    """Leaves nothing of G_comp once there is a correction. Needs M̄ in full."""

    payload: ClassVar[Payload | None] = "dense"

    def prepare(self, g_comp: Gradient, correction: Held, age: int, norm: Norm = local_norm) -> None:
        self.dose = 1.0

    def apply(self, g_comp: Gradient, correction: Held) -> Gradient:
        return 1.0 * correction
