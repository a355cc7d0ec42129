"""A jsonl file: UTF-8, one JSON object a line. No torch.

Lines end at `\\n` alone (a `\\r` before it belongs to the end): other line ends of Unicode, U+2028 or U+0085, may stand
inside a JSON string. A byte order mark of UTF-8 is passed over.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rl.data_rows import DataRows, digest_of_bytes, refuse


def read_jsonl(path: str) -> DataRows:
    """Empty lines do not count. Raises ValueError with the lines that are no row."""
    data = _opened(path).read_bytes()
    rows, lines, faults = [], [], []
    for number, start, line in _lines(path, data.split(b"\n")):
        try:
            rows.append(_object(line, start))
            lines.append(number)
        except ValueError as error:
            faults.append(f"{path}, line {number}: {error}")
    refuse(faults)
    return DataRows(path, rows, lines, digest_of_bytes(data))


def first_row(path: str) -> tuple[str, dict[str, Any]] | None:
    """Of a jsonl file, without reading the rest of it, and its place; None if it is empty."""
    with _opened(path).open("rb") as file:
        for number, start, line in _lines(path, file):
            try:
                return f"{path}, line {number}", _object(line, start)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    return None


def _opened(path: str) -> Path:
    found = Path(path).expanduser()
    try:
        found.open("rb").close()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    return found


def _lines(path: str, raw: Iterable[bytes]) -> Iterator[tuple[int, int, bytes]]:
    """(number, its first byte's place in the file, line) of the lines that are not empty."""
    start = 0
    for number, line in enumerate(raw, start=1):
        line = line.removesuffix(b"\n")
        end = start + len(line) + 1
        if number == 1:
            _refuse_other_encodings(path, line)
            start += 3 * line.startswith(codecs.BOM_UTF8)
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield number, start, line
        start = end


def _refuse_other_encodings(path: str, line: bytes) -> None:
    found = json.detect_encoding(line[:4])  # by the byte order mark, or by where the zeros are
    if not found.startswith("utf-8"):
        raise ValueError(f"{path} is in {found.upper()}: write it in UTF-8")


def _object(line: bytes, start: int) -> dict[str, Any]:
    try:
        row = json.loads(line.decode(), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        at = start + error.start
        raise ValueError(f"not UTF-8: byte 0x{line[error.start]:02x} at offset {at} of the file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at character {error.pos + 1} ({_head(line)})") from None
    except (ValueError, RecursionError) as error:  # a key twice, an integer of thousands of digits, nested too deep
        raise ValueError(f"cannot be read: {error} ({_head(line)})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{type(row).__name__}, not an object ({_head(line)})")
    return row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of a key that is there twice one value would be lost without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def _head(line: bytes) -> str:
    return repr(line.decode(errors="replace").strip()[:60])
