"""Whether the size of a correction is one that those before it had, or the swarm's own gradients.

An anchor that lies, or is broken, is found by it.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median

REMEMBERED, ENOUGH = 20, 5  # norms that count, and how many must be there before one is refused


class NormHistory:
    """Norms of what was taken, newest last. Norms of 0, of batches without an advantage, say nothing and are taken.

    Near convergence most batches have next to no gradient, and one that has some is a thousand times larger, for the swarm as for
    the anchor: so what the swarm had in the ticks that the last fires replay counts beside the median.
    """

    def __init__(self, bound: float):
        """`bound`: how many times the larger of the two a norm may be."""
        self.bound = bound
        self.taken: deque[float] = deque(maxlen=REMEMBERED)
        self.beside: deque[float] = deque(maxlen=REMEMBERED)  # as M̄ forgets no faster than a fire at a time
        self.own: dict[int, float] = {}  # by tick, of those that no fire that was judged replays

    def saw(self, tick: int, norm: float) -> None:
        """The swarm's own gradient of a tick has this norm."""
        self.own[tick] = norm

    def judge(self, norm: float, source: int) -> str:
        """Why a correction of source tick `source` that has this norm is refused; "" if it is not, and then it is remembered."""
        if not math.isfinite(norm):
            return f"its norm is {norm}"
        replayed = [tick for tick in self.own if tick <= source + 1]  # one, or some of a window
        self.beside.append(max((self.own.pop(tick) for tick in replayed), default=0.0))
        usual = max(median(self.taken), *self.beside) if len(self.taken) >= ENOUGH else math.inf
        if norm > self.bound * usual:
            return (
                f"its norm {norm:.3g} is {norm / usual:.3g} times what is usual, {usual:.3g}, by the last {len(self.taken)} and by "
                f"the swarm's own gradients, beyond anchor.norm_bound {self.bound:g}"
            )
        if norm:
            self.taken.append(norm)
        return ""
