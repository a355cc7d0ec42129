"""Whether two answers are the same formula, by the library math-verify (sympy), in a process of its own. No torch.

A policy can write what a computer algebra system chokes on. So only short answers without towers of powers get there,
and what is not decided after a deadline is not the same.
"""

from __future__ import annotations

import logging
import re
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

from rl.child import Child, ChildFailed
from rl.quantities import amount

LONGEST = 300  # characters
CPU_S = 1.0  # of one comparison, of the CPU's time: how busy the machine is does not change a reward
DEADLINE_S = 60.0  # where the CPU's time does not help, in one long multiplication; and of the start
_DIGITS = 12  # a number written as a decimal is the same as a root or π only if it is so to this many places
_MATHS = re.compile(r"[\\^_√π∞]|\d[a-z]\b|\b[a-z]\s*[-+*/=<>(]|[-+*/=<>)]\s*[a-z]\b", re.IGNORECASE)
_LETTERS = re.compile(r"[^\W\d_]{3,}|[^\W\d_]+\s+[^\W\d_]{2,}")
_COMMAND = re.compile(
    r"\\(?:begin|end)\s*\{[a-zA-Z*]+\}|\\(?:text|mathrm|textbf|mbox)\s*\{[^{}]*\}|\\[a-zA-Z]+|(?:arc)?(?:sin|cos|tan)|sqrt|log|ln|pi"
)
_DATE_OR_TIME = re.compile(r"(?<![\d.])\d+\s*([-/.])\s*\d+\s*\1\s*\d|\d:\d")
_TOO_LARGE = re.compile(
    r"\^\s*\{[^{}]*[\^!]|\^\s*[^\s{]\s*\^|\d{5,}\s*[!^]|\^\s*\(?\{?\(?-?\d{4,}|\d{4,}\)?\s*!|!\s*!|\d{100}"
)
_TO_WORK_OUT = re.compile(r"[\d)}]\s*(?:[-+*/÷]|\\(?:cdot|div|times)(?![a-zA-Z]))\s*(?!10\s*\^)[\d(\\{]")


class Formulas:
    """Compares answers in normal form. Its process starts when the first pair needs it.

    Pairs that met the deadline or broke the library are not the same, and are counted.
    """

    def __init__(self) -> None:
        self._undecided = 0
        self._child: Child | None = None

    def take_undecided(self) -> int:
        """How many pairs were not decided since the last call."""
        found, self._undecided = self._undecided, 0
        return found

    def same(self, one: str, other: str) -> bool:
        """In both directions: the library would take `9 = 1` for 1."""
        if self._child is None:
            self._child = Child("rl.symbolic:formula_judge")
            self._child.started(DEADLINE_S)
        try:
            found = self._child.ask(DEADLINE_S, one, other)
        except ChildFailed:
            found = self._child = None
        self._undecided += found is None
        return bool(found)


def comparable(one: str, other: str, always: bool) -> bool:
    """Whether the library is to be asked: both are formulas, at least one does not look like plain text.

    Not for words, dates or times, of which it makes products, differences and quotients; not for what is left to be
    worked out (`3+4` for 7), which a policy could copy from the question; not for what could take too long.
    """
    both = one, other
    if max(map(len, both)) > LONGEST or any(map(_TOO_LARGE.search, both)):
        return False
    if any(_DATE_OR_TIME.search(answer) or _LETTERS.search(_COMMAND.sub(" ", answer)) for answer in both):
        return False
    numbers = [amount(answer) is not None for answer in both]
    if all(numbers) or (any(numbers) and any(map(_left_to_do, both))):
        return False
    if {"{"} < {answer.removeprefix("\\")[:1] for answer in both} & set("([{"):  # a set is no tuple
        return False
    return any(map(_MATHS.search, both)) or (always and all(re.search(r"[^a-zA-Z]", answer) for answer in both))


def _left_to_do(answer: str) -> bool:
    return amount(answer) is None and _TO_WORK_OUT.search(answer) is not None


def formula_judge() -> Callable[[str, str], bool | None]:
    """In the process: the library's judgement of one pair, None if it took too much time of the CPU."""
    from math_verify import LatexExtractionConfig, parse, verify

    def parsed(answer: str) -> list[Any]:
        no_timeout: Any = None  # which the library takes, against its annotation
        return parse(f"${answer}$", [LatexExtractionConfig()], "no_fallback", parsing_timeout=no_timeout)

    def compared(one: str, other: str) -> bool:
        a, b = parsed(one), parsed(other)
        fits = partial(verify, float_rounding=_DIGITS, allow_set_relation_comp=True, timeout_seconds=None)
        return bool(a and b) and fits(a, b) and fits(b, a)

    def judged(one: str, other: str) -> bool | None:
        signal.setitimer(signal.ITIMER_PROF, CPU_S, CPU_S)
        try:
            return compared(one, other)
        except _Late:
            return None
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    signal.signal(signal.SIGPROF, _late)
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    compared("(x+1)^2", "x^2+2x+1")  # what the library loads when it is first needed is on nobody's time
    return judged


class _Late(BaseException):
    """Not an Exception, as the library catches those."""


def _late(number: int, frame: Any) -> None:
    raise _Late
