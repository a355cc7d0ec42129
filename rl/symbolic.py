"""Whether two answers are the same formula, by the library math-verify (sympy), in a process of its own. No torch.

A policy can write what a computer algebra system chokes on. So only short answers without towers of powers get there,
and what is not decided after a deadline is not the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from rl.child import Child, ChildFailed
from rl.quantities import quantity

LONGEST = 300  # characters
DEADLINE_S = 10.0  # of one comparison; the library's own of 2 s a part cannot interrupt a long multiplication
START_S = 120.0  # of the library
_LIBRARY_S = 2
_DIGITS = 12  # a number written as a decimal is the same as a root or π only if it is so to this many places
_MATHS = re.compile(r"[\\^_√π∞]|\d[a-z]\b|\b[a-z]\s*[-+*/=<>(]|[-+*/=<>)]\s*[a-z]\b", re.IGNORECASE)
_LETTERS = re.compile(r"[^\W\d_]{3,}|[^\W\d_]+\s+[^\W\d_]{2,}")
_COMMAND = re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{[^{}]*\}|\\[a-zA-Z]+|(?:arc)?(?:sin|cos|tan)|sqrt|log|ln|pi")
_DATE_OR_TIME = re.compile(r"\d\s*[-/.]\s*\d+\s*[-/.]\s*\d|\d:\d")
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
            self._child = Child("rl.symbolic:comparison")
            self._child.started(START_S)
        try:
            return self._child.ask(DEADLINE_S, one, other)
        except ChildFailed:
            self._undecided += 1
            self._child = None
            return False


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
    numbers = [quantity(answer) is not None for answer in both]
    if all(numbers) or (any(numbers) and any(map(_left_to_do, both))):
        return False
    return any(map(_MATHS.search, both)) or (always and all(re.search(r"[^a-zA-Z]", answer) for answer in both))


def _left_to_do(answer: str) -> bool:
    return quantity(answer) is None and _TO_WORK_OUT.search(answer) is not None


def comparison() -> Callable[[str, str], bool]:
    """In the process: the library's judgement of one pair."""
    from math_verify import LatexExtractionConfig, parse, verify

    def parsed(answer: str) -> list:
        return parse(f"${answer}$", [LatexExtractionConfig()], "no_fallback", parsing_timeout=_LIBRARY_S)

    def compared(one: str, other: str) -> bool:
        a, b = parsed(one), parsed(other)
        if not a or not b:
            return False
        rules = {"float_rounding": _DIGITS, "allow_set_relation_comp": True, "timeout_seconds": _LIBRARY_S}
        return verify(a, b, **rules) and verify(b, a, **rules)

    return compared
