"""Where the answer of a text is, and whether two answers are the same. Gold and response take the same road. No torch.

    text ── final_answer ──▶ answer ── normal ──▶ number | text ── same ──▶ right or wrong

An answer is a number only if all of it is one; dates, times, tuples and expressions are never cut down to one of
their numbers. What plain comparison tells apart may still be the same formula: `rl.symbolic` decides that.
"""

from __future__ import annotations

import re
import unicodedata

from rl.quantities import amount, quantity

LONGEST = 2000  # characters of an answer that are compared as more than text
_DEEPEST = 3  # brackets in brackets
_MOST = 50  # elements of a tuple or set
_MARK = "####"
_BOX = re.compile(r"\\f?boxed\s*\{|\\.|[{}]", re.DOTALL)
_TUPLE = re.compile(r"[(\[][-+\d./\s]+(?:,[-+\d./\s]+)+[)\]]")
_LONGEST_WORD = 100
_WORD = re.compile(r"\S*")
_LEAD = re.compile(r"(?:[^\W\d]|[(\[{*`\"'“:<>~≈\\])*")
_TAIL = re.compile(r"(?:[^\W\d]|[.,;:!?)\]}*`\"'”<>\\])*$")
_COMMAND = re.compile(r"\\[a-zA-Z]")  # of LaTeX: what it makes of a number is another one
_VARIABLES = frozenset("abiknxyz")  # 2x is no 2; 5m, 5g and 5s are
_UNIT_POWER = re.compile(r"(?<=[^\W\d_])\^(?:[23]|\{[23]\})")  # km², which is no number
_SCRIPT = re.compile(r"[-+−n\d]")
_SCRIPTS = re.compile(r"([\^_])\{[-+n\d]\}(?:\1\{[-+n\d]\})+")
_WRAPS = [
    *(("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("*", "*"), ("`", "`")),
    *(('"', '"'), ("“", "”"), ("'", "'")),
]
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_SIGNS = str.maketrans(dict.fromkeys("−‐‑‒–﹣－", "-") | {"⁄": "/", "∕": "/", "٫": ".", "٬": ",", "×": "*", "·": "*"})
_LATEX = [
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right)(?![a-zA-Z])"), ""),
    (re.compile(r"(?<=\d)(?:\\[,!]|\{,\})(?=\d{3})"), ","),
    (re.compile(r"(?<!\\)\\[,;:! ]|\\q?quad(?![a-zA-Z])|(?<=\w)~(?=\w)"), " "),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\degree(?![a-zA-Z])"), "°"),
    (re.compile(r"(?<=[\w)])\*\*(?=[\w({-])"), "^"),
    (re.compile(r"\^\{(\w)\}"), r"^\1"),
]


def final_answer(text: str, number: bool = False) -> str:
    """What follows the last `####` on its line, else the last \\boxed{…}, else all of the text.

    With `number`, where neither is there: the last number of the text, if what holds it is a number.
    """
    if _MARK in text:
        lines = text.rsplit(_MARK, 1)[1].strip().splitlines()
        line = lines[0].strip() if lines else ""
        return line if (box := _boxed(line)) is None else box
    if (box := _boxed(text)) is not None:
        return box
    return (_last_number(text) if number else None) or text.strip()


def normal(answer: str) -> str:
    """An answer without what changes nothing: forms of characters, LaTeX spacing, quotes, emphasis, a full stop."""
    found = _plain_characters(answer)
    for pattern, plain in _LATEX:
        found = pattern.sub(plain, found)
    for _ in range(8):  # as deep as anybody quotes
        before, found = found, _unwrapped(" ".join(found.split()).rstrip(".,;: "))
        if found == before:
            break
    return found


def is_number(answer: str) -> bool:
    return quantity(normal(answer)) is not None


def same(one: str, other: str) -> bool:
    """Whether two answers in normal form are the same number, text, tuple or set. An empty one equals nothing."""
    if not one or not other:
        return False
    if max(len(one), len(other)) > LONGEST:
        return _folded(one) == _folded(other)
    return _same(one, other, _DEEPEST)


def _same(one: str, other: str, depth: int) -> bool:
    a, b = amount(one), amount(other)
    if a or b:
        return a is not None and b is not None and a.same(b)
    return _folded(one) == _folded(other) or (depth > 0 and _same_parts(_parts(one), _parts(other), depth - 1))


def _same_parts(one: list[str] | None, other: list[str] | None, depth: int) -> bool:
    """Tuples part by part; the order of a set is free. The first part is the brackets."""
    if not one or not other or len(one) != len(other) or len(one) > _MOST or one[0] != other[0]:
        return False
    if one[0] != "{}":
        return all(_same(a, b, depth) for a, b in zip(one[1:], other[1:]))
    pairs = [(one[1:], other[1:]), (other[1:], one[1:])]
    return all(any(_same(a, b, depth) for b in there) for here, there in pairs for a in here)


def _parts(answer: str) -> list[str] | None:
    """["()", "3", "4"] of "(3, 4)"; None if it is not one bracket with commas in it."""
    answer = answer.replace("\\{", "{").replace("\\}", "}")
    if len(answer) < 3 or answer[0] not in "([{" or answer[-1] not in ")]}":
        return None
    parts, depth = [""], 0
    for character in answer[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return None
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [answer[0] + answer[-1], *(part.strip() for part in parts)] if len(parts) > 1 and not depth else None


def _folded(answer: str) -> str:
    """Text as it is compared: case, and spaces beside punctuation, are nothing; nor are the brackets of (B)."""
    found = re.sub(r" ?([^\w\s]) ?", r"\1", answer.casefold())
    return found[1:-1] if re.fullmatch(r"\([a-z]\)", found) else found


def _boxed(text: str) -> str | None:
    """Inside of the last \\boxed{…} whose braces are balanced."""
    found, opened = None, []
    for token in _BOX.finditer(text):
        if token[0][-1] == "{" and len(token[0]) != 2:  # \{ is no brace of LaTeX's own
            opened.append((token.end(), len(token[0]) > 1))
        elif token[0] == "}" and opened:
            start, boxed = opened.pop()
            found = text[start : token.start()].strip() if boxed else found
    return found


def _last_number(text: str) -> str | None:
    """The last word with a digit in it, without what stands around its number; None if that is no number.

    `so 42 km.` and `x=42` hold 42; `1/2`, `10:30`, `(3, 4)` and `2x+3` are no numbers of their last digits.
    """
    text = _UNIT_POWER.sub("", _plain_characters(text))
    last = next((i for i in range(len(text) - 1, -1, -1) if text[i].isdigit()), None)
    if last is None or any(found.start() <= last < found.end() for found in _TUPLE.finditer(text)):
        return None
    word = text[: last + 1].split()[-1] + _matched(_WORD.match(text, last + 1))
    word = word.rsplit("=", 1)[-1]
    if len(word) > _LONGEST_WORD or _COMMAND.search(word):
        return None
    lead = _matched(_LEAD.match(word))
    core = word[len(lead) :]
    tail = _matched(_TAIL.search(core))
    core = normal(core.removesuffix(tail))
    formula = tail.strip(".,;:!?") in _VARIABLES or (lead[-1:].isalnum() and core[:1] in "+-") or "/" in core
    return core if quantity(core) and not formula else None


def _matched(found: re.Match[str] | None) -> str:
    """Of a pattern that matches everywhere."""
    return found[0] if found else ""


def _unwrapped(answer: str) -> str:
    for start, end in _WRAPS:
        inner = answer[len(start) : -len(end)]
        if inner and answer.startswith(start) and answer.endswith(end) and start not in inner and end not in inner:
            return inner
    found = _TEXT.fullmatch(answer)
    return found[1] if found else answer


def _plain_characters(text: str) -> str:
    """NFKC, one kind of minus, digits of ASCII. What NFKC would turn into another number is written out before."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", "".join(map(_written_out, text))).translate(_SIGNS)
        text = _SCRIPTS.sub(lambda run: f"{run[1]}{{{re.sub(r'[{}^_]', '', run[0])}}}", text)
    return text


def _written_out(character: str) -> str:
    """10² is not 102, 1½ is not 11/2; joiners and marks of direction are nothing."""
    form = unicodedata.decomposition(character)
    if unicodedata.category(character) == "Cf":
        return ""
    if form.startswith(("<super>", "<sub>")) and _SCRIPT.fullmatch(plain := unicodedata.normalize("NFKC", character)):
        return f"{'^' if form.startswith('<super>') else '_'}{{{plain}}}"
    if form.startswith("<fraction>"):
        return f" {character}"
    return str(unicodedata.decimal(character, character))
