"""The samples of a run as rows of its page: which of them, and how much of a long one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from experiments.runs import text

ROWS = 240  # of one page: a browser searches and sorts them without a pause
LONGEST = 4000  # characters of a text
_TEXTS, _NUMBERS = ("kind", "prompt", "response"), ("step", "reward", "length")


class SampleRow(NamedTuple):
    """A sample as it is shown; numbers as they were written, to sort by."""

    step: int
    kind: str
    prompt: str
    response: str
    reward: float
    length: int
    truncated: bool
    parts: tuple[str, ...]  # of the reward, `name number`
    of: str = ""  # the set that was validated on, where it is not the task's own


class SampleTable(NamedTuple):
    """Rows, newest first, and of how many samples they are."""

    rows: list[SampleRow]
    there: int


def sample_table(folder: Path, most: int = ROWS) -> SampleTable | None:
    """At most `most` samples of a run's folder: of the last validation, of the first, else the newest of training.

    None where it has none. Lines that cannot be read are left out, as of every file of a run.
    """
    file = folder / "samples.jsonl"
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    found = [sample for line in lines if (sample := _sample(line))]
    validations = sorted({s["step"] for s in found if s["kind"] == "val"})
    ends = [
        [s for s in found if s["kind"] == "val" and s["step"] == step]
        for step in [*validations[-1:], *validations[:-1][:1]]
    ]
    chosen = [sample for end in ends for sample in end[: most // 3]]
    room = most - len(chosen)
    chosen += [s for s in found if s["kind"] != "val"][-room:] if room else []
    chosen.sort(key=lambda s: (-s["step"], s["kind"] != "val"))
    return SampleTable([_row(sample) for sample in chosen], len(found)) if chosen else None


def _sample(line: str) -> dict[str, Any] | None:
    """What is on the line, if it is a sample."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(found, dict) and all(isinstance(found.get(name), str) for name in _TEXTS)
    return found if whole and all(type(found.get(name)) in (int, float) for name in _NUMBERS) else None


def _row(sample: dict[str, Any]) -> SampleRow:
    prompt, response = _shortened(sample["prompt"]), _shortened(sample["response"])
    given = sample.get("parts")
    parts = tuple(f"{name} {text(value)}" for name, value in given.items()) if isinstance(given, dict) else ()
    cut = bool(sample.get("truncated"))
    of = str(sample.get("set", ""))
    return SampleRow(
        sample["step"], sample["kind"], prompt, response, sample["reward"], sample["length"], cut, parts, of
    )


def _shortened(text: str) -> str:
    over = len(text) - LONGEST
    return text if over <= 0 else f"{text[:LONGEST]} … ({over} characters more in samples.jsonl)"
