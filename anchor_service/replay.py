"""coordinator -> anchor: the samples that a fire replays, of one mini-batch or of several. No torch.

M is the mean over the mini-batches t of their gradients at θ_s, each estimated from the samples that were chosen of it:

    M = Σ_i ∇l_i / d_i,    d_i = n · D_t · c_t / N_t    for sample i of mini-batch t

with n mini-batches, D_t response tokens that are in the loss in N_t samples, c_t of them chosen: the scale of one tick's gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from codec.frames import FrameError
from rl.batch import Batch, concat

PARTS = "parts"  # (samples, denominator) of each mini-batch, in the order of the samples


def pack_replay(parts: Sequence[tuple[Batch, float]]) -> np.ndarray:
    """What was chosen of each mini-batch, and what the sum over its tokens is divided by."""
    header: dict[str, Any] = {PARTS: [[len(batch), denominator] for batch, denominator in parts]}
    return concat([batch for batch, _ in parts]).to_frame(**header)


def unpack_replay(frame: np.ndarray, what: str) -> tuple[Batch, float | np.ndarray]:
    """The samples, and the denominator of all of them, or of each [N] float32. Raises FrameError naming the field."""
    header, batch = Batch.from_frame(frame, what)
    if PARTS not in header:
        return batch, _positive(header.get("denominator"), "denominator", what)
    parts = header[PARTS]
    if not isinstance(parts, list) or not all(isinstance(part, list) and len(part) == 2 for part in parts):
        raise FrameError(what, PARTS, f"{parts!r} are no pairs of samples and denominator")
    sizes = [size for size, _ in parts]
    if not all(type(size) is int and size > 0 for size in sizes) or sum(sizes) != len(batch):
        raise FrameError(what, PARTS, f"{sizes!r} samples of each mini-batch, where there are {len(batch)}")
    denominators = [_positive(denominator, PARTS, what) for _, denominator in parts]
    return batch, np.repeat(np.array(denominators, np.float32), sizes)


def _positive(value: Any, field: str, what: str) -> float:
    if type(value) not in (int, float) or not 0 < value < np.inf:
        raise FrameError(what, field, f"{value!r} is no number of response tokens")
    return value
