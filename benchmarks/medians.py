"""Seconds of several jobs beside each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def medians(jobs: dict[str, Callable[[], object]], rounds: int = 9) -> dict[str, float]:
    """Median seconds of each job, all jobs in turn in every round so that drift hits them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds + 1):  # the first warms up
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}
