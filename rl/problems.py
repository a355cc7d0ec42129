"""What the problems of a task are made of: files or splits, their digests, and what was left out. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class ProblemSource:
    """A file or a split. `digest` is of a file's bytes, of a data set's prompts and answers."""

    name: str
    digest: str
    rows: int
    left_out: int  # of these, as too long (task.overlong)


@dataclass(frozen=True)
class Problems:
    """`validation`: how many there are to validate on; None: as many as are asked for. No sources: they are made."""

    validation: int | None = None
    sources: tuple[ProblemSource, ...] = ()
    groups: tuple[str, ...] = ()  # of each problem that is validated on, in their order, where metrics are asked for by
    sets: Mapping[str, Problems] = field(default_factory=dict[str, "Problems"])  # by split: further sets to validate on

    @property
    def read(self) -> tuple[ProblemSource, ...]:
        """All that was read, for the sets too."""
        return self.sources + tuple(source for one in self.sets.values() for source in one.sources)

    def to_json(self) -> str:
        return json.dumps([asdict(source) for source in self.read], indent=1) + "\n"


def check_same(stored: Path, now: Problems) -> None:
    """Raises ValueError if a run whose problems were written to `stored` would go on with others.

    A run of an earlier version wrote nothing there: nothing to compare.
    """
    if not stored.exists():
        return
    before = [ProblemSource(**source) for source in json.loads(stored.read_text())]
    for old, source in zip(before, now.read):  # by place: an engine's names are absolute paths
        if old.digest != source.digest:
            raise ValueError(
                f"{source.name} was changed since the run began ({old.rows} rows, digest {old.digest}; now "
                f"{source.rows}, {source.digest}): put it back as it was, or start another run without --resume"
            )
        if old.left_out != source.left_out:
            raise ValueError(
                f"{source.name}: the run began with {old.left_out} rows left out as too long, now it would be "
                f"{source.left_out}, and all problems would come in another order: keep task.overlong and "
                f"grpo.max_prompt_length as they were, or start another run without --resume"
            )
