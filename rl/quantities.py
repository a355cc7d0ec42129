"""Numbers as people write them: signs, currency, thousands, percent, fractions. Exact, never a float. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

LONGEST = 1000  # characters: a longer one is text, so that no answer takes long to read
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?P<before>[$€£¥]?)\s*(?P<inner>[+-]?)(?P<digits>{_DIGITS})"
    r"(?:e(?P<e>[+-]?\d{1,4})|\s*(?:\*|x|\\times|\\cdot)\s*10\^\{?(?P<power>[+-]?\d{1,4})\}?)?"
    r"\s*(?P<after>[$€£¥%°]?)",
    re.IGNORECASE,
)
_RATIO = re.compile(
    r"(?P<sign>[+-]?)\s*(?:(?P<whole>\d+)(?:\s+(?=\d+/)|(?=\s*\\frac)))?\s*"
    r"(?:(?P<top>\d+)\s*/\s*(?P<bottom>\d+)|\\frac\s*(?:\{(?P<t>-?\d+)\}|(?P<t1>\d))\s*(?:\{(?P<b>\d+)\}|(?P<b1>\d)))"
)
_MEASURED = re.compile(
    rf"([+-]?[$€£¥]?(?:{_DIGITS})[%°]?)"
    r"(?:\s+\(?([a-z]{2,}(?:\s+[a-z]+)*\s*(?:[.,;()].*)?)|\s*\\(?:text|textrm|mathrm|mbox)\s*\{\s*([^{}]+)\}(?:\^[23])?)",
    re.IGNORECASE,
)
_CHANGES_THE_NUMBER = frozenset(
    "hundred hundreds thousand thousands million millions billion billions trillion trillions dozen dozens half quarter "
    "am pm and or to plus minus times over by divided out of pi sqrt mod remainder squared cubed point per "
    "jan feb mar apr may jun jul aug sep sept oct nov dec january february march april june july august september "
    "october november december bc ad bce ce".split()
)
_SIGN_OF = {
    **{"dollar": "$", "dollars": "$", "usd": "$", "euro": "€", "euros": "€", "eur": "€"},
    **{"percent": "%", "pct": "%", "degree": "°", "degrees": "°"},
}


@dataclass(frozen=True)
class Quantity:
    """A value and what it counts: the sign of a currency, `%`, `°`, words, or nothing."""

    value: Fraction
    unit: str = ""

    def same(self, other: Quantity) -> bool:
        """Equal values. A missing unit fits any; `50%` is 50 where percent are asked for, and it is 0.5."""
        if self.unit and other.unit and self.unit != other.unit:
            return False
        if "%" in (self.unit, other.unit) and self.unit != other.unit:
            percent, plain = (self, other) if self.unit == "%" else (other, self)
            return plain.value in (percent.value, percent.value / 100)
        return self.value == other.value


def quantity(text: str) -> Quantity | None:
    """The number that `text`, in normal form, is as a whole; None if it is anything else."""
    if len(text) > LONGEST:
        return None
    if found := _NUMBER.fullmatch(text):
        return _plain(found)
    if found := _RATIO.fullmatch(text):
        return _ratio(found)
    return None


def amount(text: str) -> Quantity | None:
    """`quantity`, or the number in front of words that say what is counted: `1,234 dollars`. Not `5 million`."""
    if (found := quantity(text)) or len(text) > LONGEST or not (words := _MEASURED.fullmatch(text)):
        return found
    number, unit = quantity(words[1]), (words[2] or words[3]).strip().casefold()
    first = re.match(r"[^\W\d_]+", unit)
    if number is None or first is None or first[0] in _CHANGES_THE_NUMBER:
        return None
    return Quantity(number.value, number.unit or _SIGN_OF.get(unit, unit))


def _plain(found: re.Match[str]) -> Quantity | None:
    if (found["sign"] and found["inner"]) or (found["before"] and found["after"]):
        return None
    value = Fraction(Decimal(f"{found['digits'].replace(',', '')}e{found['e'] or found['power'] or 0}"))
    negative = "-" in (found["sign"], found["inner"])
    return Quantity(-value if negative else value, found["before"] or found["after"])


def _ratio(found: re.Match[str]) -> Quantity | None:
    top, bottom = int(found["top"] or found["t"] or found["t1"]), int(found["bottom"] or found["b"] or found["b1"])
    if not bottom or (found["whole"] and top < 0):
        return None
    value = int(found["whole"] or 0) + Fraction(top, bottom)
    return Quantity(-value if found["sign"] == "-" else value)
