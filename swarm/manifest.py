"""What a checkpoint folder holds: size and digest of every file, written last and checked before anything is believed."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rl.file_digest import file_digest

NAME = "manifest.json"

Entry = dict[str, Any]  # {"size": bytes, "digest": hex}


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed from."""


class NotWritten(RuntimeError):
    """The system refused to write a file of the run: its disk is full, or read-only."""

    def __init__(self, file: str, reason: str):
        super().__init__(file, reason)
        self.file, self.reason = file, reason

    def __str__(self) -> str:
        return f"{self.file} could not be written: {self.reason}"


@contextmanager
def writing(path: Path) -> Generator[None]:
    """Raises NotWritten, naming `path` or what of it, for an OSError."""
    try:
        yield
    except OSError as error:
        raise NotWritten(str(error.filename or path), error.strerror or str(error)) from error


def entry(file: Path) -> Entry:
    """Of a file that is complete: it is on the disk when this returns, and read back from there."""
    sync(file)
    return {"size": file.stat().st_size, "digest": file_digest(file)}


def write(folder: Path, entries: dict[str, Entry]) -> None:
    """By file name. On the disk when this returns, with the folder's own entries."""
    file = folder / NAME
    file.write_text(json.dumps(entries, indent=1) + "\n")
    sync(file)
    sync(folder)


def check(folder: Path) -> None:
    """Raises CheckpointError, naming the file, unless the folder holds what its manifest says."""
    entries = _read(folder)
    for name, said in entries.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        size = file.stat().st_size
        if size != said["size"]:
            raise CheckpointError(f"{file} has {size:,} bytes, {said['size']:,} were written")
        if file_digest(file) != said["digest"]:
            raise CheckpointError(f"{file} is damaged: its digest is not that of what was written")


def _read(folder: Path) -> dict[str, Entry]:
    file = folder / NAME
    try:
        entries = json.loads(file.read_text())
        return {str(name): {"size": int(e["size"]), "digest": str(e["digest"])} for name, e in entries.items()}
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror}): without it nothing here can be trusted"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged ({type(error).__name__}: {error})") from None


def sync(path: Path) -> None:
    """A file's content, or a folder's entries, to the disk: a rename before that may survive a power cut alone."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
