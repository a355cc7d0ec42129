"""When a codec's tables are refreshed, the basis Q of PowerSGD among them."""

from __future__ import annotations


def q_should_refresh(tick: int, q_cadence: int) -> bool:
    """Whether Q is refreshed before `tick`: on its cadence, and once before tick 2.

    Never before tick 1: there are no statistics of a previous tick yet.
    """
    return tick >= 2 and (tick == 2 or tick % q_cadence == 0)
