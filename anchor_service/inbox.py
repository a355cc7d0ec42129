"""Corrections that a rank holds. Ranks may receive them at different times; they merge only what all hold."""

from __future__ import annotations

import threading

from anchor_service.messages import Correction


class Inbox:
    """Versions held by one rank. `put` may be called from another thread than the tick's."""

    def __init__(self) -> None:
        self._held: dict[int, Correction | str] = {}
        self._lock = threading.Lock()

    def put(self, correction: Correction) -> None:
        with self._lock:
            self._held[correction.version] = correction

    def refuse(self, version: int, reason: str) -> None:
        """It has come, and must not be merged: all ranks are to pass it over."""
        with self._lock:
            self._held[version] = reason

    def waiting(self) -> dict[int, Correction | str]:
        """All of it, oldest first."""
        with self._lock:
            return dict(sorted(self._held.items()))

    def newest(self) -> int:
        """Highest version held; 0 if none."""
        with self._lock:
            return max(self._held, default=0)

    def adopt(self, version: int) -> Correction | str:
        """Take the agreed version out, to be merged from now on, or why not; it and all older ones leave the inbox.

        Raises KeyError if this rank does not hold it.
        """
        with self._lock:
            found = self._held[version]
            self._held = {v: c for v, c in self._held.items() if v > version}
            return found

    def put_back(self, corrections: dict[int, Correction | str]) -> None:
        """What `waiting` gave before some of it was taken out; what has come since stays."""
        with self._lock:
            self._held = corrections | self._held
