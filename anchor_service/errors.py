"""Errors that name who did not answer and which knob to turn. Plain arguments, so that they survive pickling."""

from __future__ import annotations


class WaitTimeout(RuntimeError):
    """A deadline passed."""

    def __init__(self, who: str, what: str, seconds: float, knob: str):
        super().__init__(who, what, seconds, knob)
        self.who, self.what, self.seconds, self.knob = who, what, seconds, knob

    def __str__(self) -> str:
        return (
            f"{self.who} did not deliver {self.what} within {self.seconds:g} s; if it is only slow, raise {self.knob}"
        )


class Hung(WaitTimeout):
    """A wait for `what` took far longer than is usual. `who` keeps it waiting, and is not all that were missing."""

    def __init__(
        self,
        who: str,
        what: str,
        seconds: float,
        knob: str,
        usual: float | None = None,
        doing: str = "",
        stacks: str = "",
    ):
        super().__init__(who, what, seconds, knob)
        self.args = (who, what, seconds, knob, usual, doing, stacks)
        self.usual, self.doing, self.stacks = usual, doing, stacks

    def __str__(self) -> str:
        usual = "" if self.usual is None else f", which usually takes {self.usual:.2g} s"
        return f"{super().__str__()}{usual}. At the end: {self.doing}. Stacks are in {self.stacks}"


class ActorLost(RuntimeError):
    """A process of the run ended before it answered."""

    def __init__(self, who: str, what: str, reason: str):
        super().__init__(who, what, reason)
        self.who, self.what, self.reason = who, what, reason

    def __str__(self) -> str:
        return f"{self.who} ended before it delivered {self.what}: {self.reason}"


# so begins who was lost where all that is known is who was called with something that it was to deliver
ARGUMENT = "an actor that "
SWARM = "the swarm"  # whose weights and samples a fire pulls


class ReplicaMismatch(RuntimeError):
    """Replicas of a stage no longer hold the same weights, or do not hold the same correction."""

    def __init__(self, what: str, tick: int, version: int | None, ranks: list[str]):
        super().__init__(what, tick, version, ranks)
        self.what, self.tick, self.version, self.ranks = what, tick, version, ranks

    def __str__(self) -> str:
        return f"{self.what} at tick {self.tick}, correction version {self.version}: {'; '.join(self.ranks)}"


class NotFinite(FloatingPointError):
    """A NaN or an infinity. `what` was seen, `first` is the earliest place that has one, `fix` is for that place."""

    secondhand = False  # whether another rank knows better

    def __init__(self, what: str, first: str, fix: str):
        super().__init__(what, first, fix)
        self.what, self.first, self.fix = what, first, fix

    def __str__(self) -> str:
        return f"{self.what}. First seen in {self.first}: {self.fix}"


def described(error: BaseException) -> str:
    """An error for people: its type, its message whole, and what was noted of where it was raised."""
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return "\n".join([said, *getattr(error, "__notes__", ())])
