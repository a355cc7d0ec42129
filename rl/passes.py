"""pass@k: how likely one of k answers to a prompt is right."""

from __future__ import annotations

from math import comb

import numpy as np


def pass_at(rewards: np.ndarray, k: int) -> float:
    """The mean over prompts of 1 - C(n-c, k) / C(n, k), where c of a prompt's n >= k answers are right.

    rewards [prompts, n] of 0 and 1. It is without bias: the share of all choices of k of the n answers that hold a
    right one (Chen et al. 2021, Evaluating Large Language Models Trained on Code).
    """
    n = rewards.shape[1]
    return float(np.mean([1 - comb(n - int(c), k) / comb(n, k) for c in rewards.sum(1)]))


def passes(rewards: np.ndarray) -> dict[int, float]:
    """`pass_at` for k = 2, 4, … and n; {} where answers are not right or wrong, or there is one of each prompt."""
    n = rewards.shape[1]
    if not np.isin(rewards, (0, 1)).all():
        return {}
    return {k: pass_at(rewards, k) for k in sorted({2**i for i in range(1, n.bit_length()) if 2**i < n} | {n} - {1})}
