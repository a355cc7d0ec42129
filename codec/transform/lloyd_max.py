"""Scalar quantisers of a Gaussian, and how many bits each coefficient of a row gets.

The 2^b levels that minimise the mean squared error of a unit
Gaussian satisfy  threshold = middle of two levels,  level = mean of its cell.  Solved here by Newton's
method in float64.

Bits go where they save most ("greedy water-filling"): the b-th bit of a coefficient of variance λ
saves λ·(D(b-1) - D(b)), which falls with b, so the greedy choice is the largest of all these savings.

References: Lloyd 1982 (written 1957), "Least Squares Quantization in PCM", IEEE Trans. Inf. Theory 28(2); Max 1960,
"Quantizing for Minimum Distortion", IRE Trans. Inf. Theory 6(1); Panter and Dite 1951, "Quantization Distortion in
Pulse-Count Modulation with Nonuniform Spacing of Levels", Proc. IRE 39(1), for the levels that Newton starts from.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist

import numpy as np

# Mean squared error at 0, 1, 2, … bits. Written down, not computed: both ends of a link allocate by them, and
# two machines may differ in the last digit of an exp. (Max's own table rounds 0.009501 to 0.009497.)
DISTORTION = (1.0, 0.363380228, 0.117481848, 0.034547761, 0.009501008, 0.002504668, 0.00064424, 0.000163478)
MAX_BITS = len(DISTORTION) - 1
_GAUSS = NormalDist()


@cache
def levels(bits: int) -> np.ndarray:
    """Levels of the unit Gaussian's quantiser, float64 [2^bits], ascending."""
    count = 1 << bits
    # Panter and Dite: the best density of levels is that of a Gaussian of variance 3
    y = np.array([NormalDist(0, 3**0.5).inv_cdf((i + 0.5) / count) for i in range(count)])
    for _ in range(50):
        edge, mass, mean = _cells(y)
        step = np.linalg.solve(_jacobian(y, edge, mass, mean), y - mean)
        y = y - step
        if np.abs(step).max() < 1e-9:  # Newton: the next error is its square
            break
    y = (y - y[::-1]) / 2  # symmetric to the last bit
    y.flags.writeable = False
    return y


def thresholds(bits: int) -> np.ndarray:
    """Borders between the cells, float64 [2^bits - 1]."""
    y = levels(bits)
    return (y[1:] + y[:-1]) / 2


def allocate(deviations: np.ndarray, bits_per_row: int) -> np.ndarray:
    """Deviations, float32 [k] -> bits of each coefficient, uint8 [k], at most MAX_BITS each.

    They add up to `bits_per_row`, or to less if there is nothing left to gain: a deviation of 0 gets no
    bits. Both ends derive the same allocation from the same deviations; ties go to the lower index.
    Raises ValueError on a negative or non-finite deviation.
    """
    if not (np.isfinite(deviations).all() and (deviations >= 0).all()):
        raise ValueError("deviations must be finite and not negative")
    saved = -np.diff(DISTORTION)
    gains = (np.square(deviations, dtype=np.float64)[:, None] * saved).reshape(-1)  # [k · MAX_BITS]
    best = np.argsort(-gains, kind="stable")[: max(0, bits_per_row)]
    best = best[gains[best] > 0]
    return np.bincount(best // MAX_BITS, minlength=deviations.size).astype(np.uint8)


def _cells(y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges [n + 1], probability [n] and mean [n] of the cells around levels y [n]."""
    edge = np.concatenate([[-np.inf], (y[1:] + y[:-1]) / 2, [np.inf]])
    cdf = np.array([_GAUSS.cdf(e) for e in edge])
    mass = np.diff(cdf)
    upper = edge[:-1] > 0  # there differences of the upper tail are the accurate ones
    mass[upper] = -np.diff(np.array([_GAUSS.cdf(-e) for e in edge]))[upper]
    return edge, mass, -np.diff(_pdf(edge)) / mass


def _pdf(x: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * np.square(x)) / np.sqrt(2 * np.pi)


def _jacobian(y: np.ndarray, edge: np.ndarray, mass: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Of `y - mean of the cell` [n, n]: a level moves its own edges by half, and with them two means."""
    inner = edge[1:-1]
    below = _pdf(inner) * (inner - mean[:-1]) / mass[:-1] / 2  # mean of the cell below an edge, by that edge
    above = _pdf(inner) * (mean[1:] - inner) / mass[1:] / 2
    jacobian = np.eye(y.size)
    for i in range(y.size - 1):
        jacobian[i, i : i + 2] -= below[i]
        jacobian[i + 1, i : i + 2] -= above[i]
    return jacobian
