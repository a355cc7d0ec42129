"""The order of microbatches in a stage: one forward one backward (1F1B).

    stage 0   F0 F1 ───── B0 F2 B1 F3 B2 ── B3
    stage 1      F0 B0 F1 B1 F2 B2 F3 B3            pp = 2, four microbatches

Pure: the run and the simulator share it.
"""

from __future__ import annotations


def schedule(p: int, pp: int, count: int) -> list[tuple[str, int]]:
    """1F1B order of stage `p`: ("F", i) and ("B", i) for each of `count` microbatches."""
    ahead = min(pp - 1 - p, count)
    order = [("F", i) for i in range(ahead)]
    for i in range(count - ahead):
        order += [("F", ahead + i), ("B", i)]
    return order + [("B", i) for i in range(count - ahead, count)]
