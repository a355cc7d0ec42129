"""A sweep: named cells of overrides on one base config, over seeds and a grid, and what to conclude from them.

    name = "decouple"
    base = "k5"                                    a preset or a TOML file
    seeds = [0, 1, 2]
    tuning = 1                                     with a grid: the first seed chooses each arm's point
    extend = 3                                     an arm whose best point is at an end gets up to so many beyond

    [cells]                                        what a cell changes: the keys of --set, or tables
    A = {}
    D = {anchor.delay_k = 20, anchor.cadence = 20}
    floor = {anchor.enabled = false, merger.kind = "none"}

    [grid]                                         optional: every cell at each of these
    grpo.lr = [1e-5, 3e-5]

    [gates]                                        optional: what the report judges
    base = "A"
    floor = "floor"

Pure: reading and expanding. Whether a cell's config is a good one is checked by who can load configs.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from codec.config import Section

SHIPPED = Path(__file__).parent / "sweeps"
FILE = "sweep.toml"  # the sweep, kept in its output folder for the report
_NAME = r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$"


class SweepError(ValueError):
    """One readable message for what is wrong with a sweep, or with one of its cells."""


class Gates(Section):
    """What the report judges every other cell by."""

    base: str | None = Field(default=None, description="cell that the others should remain near")
    floor: str | None = Field(default=None, description="cell that the others should be above")
    drop: float = Field(default=0.05, ge=0, description="largest drop of validation accuracy that is still near")
    step: int | None = Field(
        default=None, ge=1, description="step at which nearness is judged; default: the last validation"
    )


class Sweep(Section):
    """One sweep file."""

    name: str = Field(pattern=_NAME, description="name of the sweep; its folder is named after it")
    base: str = Field(description="preset or TOML file that every cell starts from")
    seeds: list[int] = Field(min_length=1, description="every cell is run with each of them as run.seed")
    cells: dict[str, dict[str, Any]] = Field(min_length=1, description="overrides of each cell")
    grid: dict[str, Any] = Field({}, description="lists of values: every cell is run at each combination")
    tuning: int = Field(
        0,
        ge=0,
        description="so many of the first seeds run the whole grid and choose each arm's point; the others run only "
        "there, and only they are judged. 0: all seeds run the whole grid",
    )
    extend: int = Field(
        0,
        ge=0,
        description="so many points more at most for an arm, one by one while its best is at an end of the grid, in the "
        "ratio of the last two there",
    )
    gates: Gates = Gates()
    two_by_two: list[str] = Field(
        [], description="four cells: neither, the first factor raised, the second raised, both (delay, cadence)"
    )
    compare: list[list[str]] = Field([], description="pairs of cells whose difference is reported, seed by seed")

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{seeds} names a seed twice")
        return seeds

    @model_validator(mode="after")
    def _names(self) -> Sweep:
        for cell, table in self.cells.items():
            if "run.seed" in flat(table):
                raise ValueError(f"cells.{cell} sets run.seed: seeds are those of the sweep")
            twice = set(flat(table)) & set(self.axes)
            if twice:
                raise ValueError(f"cells.{cell} sets {', '.join(sorted(twice))}, which is an axis of the grid")
        if self.tuning and not self.axes:
            raise ValueError(f"tuning = {self.tuning}: needs a [grid] to choose from")
        if self.tuning and self.two_by_two:
            raise ValueError("two_by_two compares cells at equal points of the grid, tuning chooses one for each arm")
        if self.tuning >= len(self.seeds):
            raise ValueError(f"tuning = {self.tuning} leaves none of {len(self.seeds)} seeds to judge by")
        if self.two_by_two and len(set(self.two_by_two)) != 4:
            raise ValueError(f"two_by_two = {self.two_by_two}: must be four different cells")
        if any(len(pair) != 2 for pair in self.compare):
            raise ValueError(f"compare = {self.compare}: must be pairs of cells")
        named = [*self.two_by_two, *itertools.chain(*self.compare), self.gates.base, self.gates.floor]
        unknown = {name for name in named if name is not None} - set(self.cells)
        if unknown:
            raise ValueError(f"no cell {', '.join(sorted(unknown))} (cells: {', '.join(self.cells)})")
        for axis, values in self.axes.items():
            if not isinstance(values, list) or not values or len(set(map(str, values))) < len(values):
                raise ValueError(f"grid.{axis} = {values!r}: must be a list of different values")
        return self

    @model_validator(mode="after")
    def _can_extend(self) -> Sweep:
        grids = [values for values in self.axes.values() if all(isinstance(v, float) and v > 0 for v in values)]
        if self.extend and not (self.tuning and len(self.axes) == len(grids) == 1 and len(grids[0]) > 1):
            raise ValueError(
                f"extend = {self.extend}: needs tuning, and a [grid] of one axis with two or more values above 0, written "
                "with a point or an exponent"
            )
        return self

    @property
    def axes(self) -> dict[str, Any]:
        """The grid with dotted keys."""
        return flat(self.grid)

    def points(self) -> list[dict[str, Any]]:
        """Every combination of the grid's values; one empty point without a grid."""
        return [dict(zip(self.axes, values)) for values in itertools.product(*self.axes.values())]

    def beyond(self, points: list[dict[str, Any]], best: dict[str, Any]) -> dict[str, Any] | None:
        """The next point past that end of `points` at which `best` is, in the ratio of the last two; None inside."""
        ((axis, here),) = best.items()
        low, *_, high = values = sorted(point[axis] for point in points)
        if low < here < high:
            return None
        return {axis: float(f"{here * here / values[1 if here == low else -2]:.6g}")}  # as a name: no 0.00048000000001

    def select(self, names: list[str]) -> set[str]:
        """Those of the cells. Raises SweepError for a name that is none."""
        unknown = set(names) - set(self.cells)
        if unknown:
            raise SweepError(f"no cell {', '.join(sorted(unknown))} in {self.name} (cells: {', '.join(self.cells)})")
        return set(names)

    def but(self, base: str | None, seeds: str | None, overrides: Collection[str] = ()) -> Sweep:
        """The same question of another base, over other seeds ("0,1,2"), or with `overrides` as of --set: no key of theirs is an
        axis of the grid then, and where none is left all the seeds that would have judged do. Raises SweepError."""
        try:
            others: dict[str, Any] = {} if base is None else {"base": base}
            given = {override.partition("=")[0].strip() for override in overrides}
            axes = {axis: values for axis, values in self.axes.items() if axis not in given}
            if len(axes) < len(self.axes):
                others |= (
                    {"grid": axes}
                    if axes
                    else {"grid": {}, "tuning": 0, "extend": 0, "seeds": self.seeds[self.tuning :]}
                )
            others |= {} if seeds is None else {"seeds": [int(s) for s in seeds.split(",")]}
            return Sweep.model_validate(self.model_dump() | others)
        except ValidationError as error:
            raise SweepError("\n".join(_explain(e) for e in error.errors())) from None
        except ValueError:
            raise SweepError(f"--seeds {seeds!r}: must be whole numbers with commas, for example 0,1,2") from None

    @property
    def later(self) -> tuple[str, ...]:
        """The seeds that judge where others tune."""
        return tuple(map(str, self.seeds[self.tuning :]))

    def jobs(self) -> list[Job]:
        """Every run, or those that tune. Seeds on the outside: an early look has all cells."""
        runs = itertools.product(self.seeds[: self.tuning or None], self.points(), self.cells)
        return [Job(cell, point, seed, self.cells[cell]) for seed, point, cell in runs]

    def jobs_beyond(self, points: dict[str, list[dict[str, Any]]]) -> list[Job]:
        """The runs that tune, at points of each arm beyond the grid."""
        return [
            Job(cell, point, seed, self.cells[cell])
            for seed in self.seeds[: self.tuning]
            for cell, found in points.items()
            for point in found
        ]

    def jobs_at(self, chosen: dict[str, dict[str, Any]]) -> list[Job]:
        """The runs of the other seeds, each arm at its chosen point."""
        seeds = self.seeds[self.tuning :] if self.tuning else []
        return [
            Job(cell, chosen[cell], seed, self.cells[cell]) for seed in seeds for cell in self.cells if cell in chosen
        ]


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    cell: str
    point: dict[str, Any]  # of the grid
    seed: int
    changes: dict[str, Any]

    @property
    def name(self) -> str:
        """`D`, or with a grid `D-lr=1e-05`: the folder of a cell at one point, and the name of its runs."""
        return cell_name(self.cell, self.point)

    @property
    def folder(self) -> Path:
        """Where it goes, below the folder of the sweep."""
        return Path(self.name) / f"seed-{self.seed}"

    def tables(self) -> list[dict[str, Any]]:
        """What is laid over the base, in order."""
        own = {"run.name": self.name, "run.seed": self.seed}
        return [nested(flat(self.changes)), nested(self.point), nested(own)]


def cell_name(cell: str, point: dict[str, Any]) -> str:
    return "-".join([cell, *(f"{key.rpartition('.')[2]}_{value}" for key, value in point.items())])


def flat(table: dict[str, Any], path: str = "") -> dict[str, Any]:
    """{dotted key: value} of nested tables; a quoted key may be dotted already."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return found


def nested(keys: dict[str, Any]) -> dict[str, Any]:
    """The opposite of `flat`."""
    found: dict[str, Any] = {}
    for key, value in keys.items():
        *tables, last = key.split(".")
        here = found
        for table in tables:
            here = here.setdefault(table, {})
            if not isinstance(here, dict):
                raise SweepError(f"{key!r}: {table!r} is set to a value and used as a table")
        here[last] = value
    return found


def sweep_names() -> list[str]:
    """The shipped sweeps."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def find_sweep(source: str) -> Path:
    """The file of a shipped sweep, or `source` itself. Raises SweepError if there is none."""
    shipped, file = SHIPPED / f"{source}.toml", Path(source).expanduser()
    if not shipped.exists() and not file.is_file():
        raise SweepError(f"no sweep or TOML file {source!r}: sweeps are {', '.join(sweep_names())}")
    return shipped if shipped.exists() else file


def read_sweep(file: Path) -> Sweep:
    """Raises SweepError. A `base` that is a file is found from the folder of the sweep file."""
    try:
        data = tomllib.loads(file.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SweepError(f"{file}: not valid TOML: {error}") from None
    base = data.get("base")
    if isinstance(base, str) and (file.parent / base).is_file():
        data["base"] = str((file.parent / base).resolve())
    try:
        sweep = Sweep.model_validate(data)
    except ValidationError as error:
        raise SweepError(f"{file}: " + "\n".join(_explain(e) for e in error.errors())) from None
    bad = [job.name for job in sweep.jobs() if not re.fullmatch(_NAME, job.name)]
    if bad:
        raise SweepError(
            f"{file}: {bad[0]!r} cannot name a folder: use letters, digits, dash and underscore, and dots behind them"
        )
    return sweep


def keep_sweep(sweep: Sweep, out: Path) -> None:
    """Write the sweep into its folder, for the report."""
    out.mkdir(parents=True, exist_ok=True)
    (out / FILE).write_text(tomli_w.dumps(sweep.model_dump(exclude_none=True, mode="json")))


def _explain(e: ErrorDetails) -> str:
    where = ".".join(map(str, e["loc"]))
    if e["type"] == "extra_forbidden":
        return f"unknown key {where!r} (allowed: {', '.join(Sweep.model_fields)})"
    if e["type"] == "missing":
        return f"{where} is missing"
    message = e["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
