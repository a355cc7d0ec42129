"""Validations by set: what further sets, and the rows of each source, came to at each validation of a run."""

from __future__ import annotations

from typing import Any, NamedTuple

from experiments.runs import Run, text

MOST = 10  # validations that are shown: the first and the newest


class ValidationTable(NamedTuple):
    """One row a set, one column a validation."""

    headings: list[str]
    rows: list[list[str]]


def validation_table(run: Run) -> ValidationTable | None:
    """Mean rewards. None of a run that validates on the problems of its task alone, without a column to tell them apart."""
    records = [r for r in run.records if r.get("kind") == "val"]
    if not any(_sets(r) for r in records):
        return None
    shown = records if len(records) <= MOST else [records[0], *records[1 - MOST :]]
    names = list(dict.fromkeys(name for r in shown for name in _sets(r)))
    rows = [["the task's own", *(text(r.get("accuracy"), ".3f") for r in shown)]]
    rows += [[name, *(text(_sets(r).get(name), ".3f") for r in shown)] for name in names]
    return ValidationTable(["validation", *(f"@{text(r.get('step'))}" for r in shown)], rows)


def _sets(record: dict[str, Any]) -> dict[str, Any]:
    found = record.get("sets")
    return found if isinstance(found, dict) else {}
