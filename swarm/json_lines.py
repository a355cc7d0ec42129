"""Files of a run's folder, a JSON object a line or one text: a line is written whole, a text all of it or nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from swarm.manifest import writing


def append_record(file: TextIO, record: dict[str, Any]) -> None:
    """Raises NotWritten."""
    with writing(Path(file.name)):
        file.write(json.dumps(record) + "\n")
        file.flush()


def keep_records(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Only the lines that are whole and wanted. Raises NotWritten."""
    kept = [line for record, line in read_records(path) if wanted(record)]
    replace_text(path, "".join(kept))


def read_records(path: Path) -> list[tuple[dict[str, Any], str]]:
    """(record, its line) of every line that is whole: a full disk or a death may have cut one."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [(record, f"{line}\n") for line in lines if (record := _whole(line))]


def replace_text(path: Path, text: str) -> None:
    """All of it or nothing. Raises NotWritten."""
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        partial.write_text(text)
        os.replace(partial, path)


def _whole(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None
