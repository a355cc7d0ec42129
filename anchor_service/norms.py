"""Whether the size of a correction is one that those before it had: an anchor that lies, or is broken, is found by it."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

REMEMBERED, ENOUGH = 20, 5  # norms that count, and how many must be there before one is refused


class NormHistory:
    """Norms of what was taken, newest last. Norms of 0, of batches without an advantage, say nothing and are taken."""

    def __init__(self, bound: float):
        """`bound`: how many times the median a norm may be."""
        self.bound = bound
        self.taken: deque[float] = deque(maxlen=REMEMBERED)

    def judge(self, norm: float) -> str:
        """Why what has this norm is refused; "" if it is not, and then it is remembered."""
        if not math.isfinite(norm):
            return f"its norm is {norm}"
        usual = median(self.taken) if len(self.taken) >= ENOUGH else math.inf
        if norm > self.bound * usual:
            return (
                f"its norm {norm:.3g} is {norm / usual:.3g} times the median {usual:.3g} of the last {len(self.taken)}, "
                f"beyond anchor.norm_bound {self.bound:g}"
            )
        if norm:
            self.taken.append(norm)
        return ""
