"""`northstar run` and `northstar sweep`: what trains, and writes the folders of runs.

What is refused is refused before torch or Ray is imported: both take their time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.commands.alone import LOCK_FILES, alone_in
from deploy.commands.options import Address, ConfigSource, checked_config, refused, set_option

if TYPE_CHECKING:
    from deploy.cluster.sweep_runs import SweepRun
    from deploy.resume import Resume
    from experiments.sweep import Job, Sweep
    from swarm.run_config import RunConfig

GO_ON = 75  # EX_TEMPFAIL: what batch systems take for "once more"
INTERRUPTED = 130  # Ctrl-C


def run_command(
    source: ConfigSource,
    set_: Annotated[list[str] | None, set_option("override a key, for example merger.dose=0.5")] = None,
    out: Annotated[Path | None, typer.Option(file_okay=False, help="run folder; default runs/NAME-TIME")] = None,
    resume: Annotated[bool, typer.Option(help="go on from the newest checkpoint in --out")] = False,
    auto_resume: Annotated[
        bool,
        typer.Option("--auto-resume", help="the same, or begin where --out holds none: for jobs that are relaunched"),
    ] = False,
    address: Address = None,
) -> None:
    """Run an experiment to its end: live progress, a run folder, a summary table. Exit 0 only if it ran to the end, 75 if
    the same command with --resume can go on: after SIGTERM, or the loss of a process that the run did not get over."""
    config = checked_config(source, set_)
    folder = _run_folder(config, out, resume or auto_resume)
    with _started_ahead([config], address):
        _run(config, folder, resume, auto_resume, address)


def _run(config: RunConfig, folder: Path, resume: bool, auto_resume: bool, address: str | None) -> None:
    goes_on = _prepared(config, folder, resume, auto_resume)
    from anchor_service.errors import described
    from deploy.cluster.endings import can_go_on
    from deploy.cluster.launch import execute
    from deploy.display.run_display import RunDisplay, harmless, print_summary

    with alone_in(folder), RunDisplay(config, folder) as display:
        try:
            summary = execute(config, folder, display, goes_on, address)
        except KeyboardInterrupt as interrupt:
            display.close()
            typer.secho(f"interrupted before it started: {folder} is as it was", err=True)
            raise typer.Exit(GO_ON if can_go_on(interrupt, config.swarm.pp) else INTERRUPTED) from None
        except Exception as error:
            display.close()
            typer.secho(described(error), fg="red", err=True)
            _write_report(folder)
            raise typer.Exit(GO_ON if can_go_on(error, config.swarm.pp) else 1) from error
    with harmless("the summary was not shown"):
        print_summary(summary, folder)
    _write_report(folder)
    ended = GO_ON if summary.get("can_go_on") else INTERRUPTED
    raise typer.Exit(0 if summary["status"] == "completed" else ended)


def sweep_command(
    source: Annotated[
        str, typer.Argument(metavar="SWEEP_OR_TOML", help="a shipped sweep (experiments/sweeps) or a TOML file")
    ],
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="folder of the sweep; default runs/NAME; a second call goes on"),
    ] = None,
    set_: Annotated[
        list[str] | None, set_option("change the base of every cell; an axis of the grid is fixed by it")
    ] = None,
    cells: Annotated[
        str | None, typer.Option(metavar="CELL,…", help="run these cells only; another call can run the others")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="PRESET_OR_TOML", help="start every cell from it instead of the sweep's base")
    ] = None,
    seeds: Annotated[str | None, typer.Option(metavar="SEED,…", help="these instead of the sweep's seeds")] = None,
    lanes: Annotated[
        int | None, typer.Option(min=1, help="runs side by side; default: as many as the CPUs and GPUs hold")
    ] = None,
    address: Address = None,
) -> None:
    """Run every cell of a sweep at every seed, and report. Goes on where it was stopped. Exit 0 only if all completed."""
    from experiments.sweep import SweepError

    try:
        call = _called(source, out, set_, cells, base, seeds)
        first = call.runs(call.sweep.jobs())
    except SweepError as error:
        raise refused(error) from error
    with _started_ahead([run.config for run in first if run.state != "completed"], address, lanes):
        _sweep(call, first, address, lanes)


def _sweep(call: _SweepCall, first: list[SweepRun], address: str | None, lanes: int | None) -> None:
    from anchor_service.errors import described
    from deploy.cluster.sweep_runs import check_runs
    from experiments.sweep import SweepError

    try:
        check_runs(first)
        _check_same_sweep(call)
    except SweepError as error:
        raise refused(error) from error
    with alone_in(call.folder):
        try:
            finished, runs = _run_all(call, first, address, lanes)
        except SweepError as error:
            raise refused(error) from error
        except Exception as error:
            typer.secho(described(error), fg="red", err=True)
            raise typer.Exit(1) from error
        finally:
            _write_report(call.folder)
    typer.echo(f"sweep folder {call.folder}; the same command goes on with what is not completed", err=True)
    if finished and all(run.state == "completed" for run in runs):
        raise typer.Exit(0)
    raise typer.Exit(1 if finished else INTERRUPTED)


@contextmanager
def _started_ahead(configs: list[RunConfig], address: str | None, lanes: int | None = None) -> Generator[None]:
    """Before torch and Ray: what runs here imports torch once, for itself and its workers, and meanwhile Ray starts."""
    from deploy.cluster.forkserver import fork_ahead, may_fork
    from deploy.cluster.head import head_ahead
    from deploy.cluster.placement import OwnCluster, largest

    if address or not configs or not all(map(may_fork, configs)) or "ray" in sys.modules:
        yield
        return
    with head_ahead(OwnCluster.of(largest(configs), lanes or 1)), fork_ahead(configs[0].swarm.threads):
        yield


# --- a run's folder ------------------------------------------------------------------------------


def _run_folder(config: RunConfig, out: Path | None, resume: bool) -> Path:
    if resume and out is None:
        raise refused(ValueError("--resume and --auto-resume need --out: the folder of the run to go on with"))
    folder = out or Path("runs") / f"{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if not resume and (folder / "metrics.jsonl").exists():
        raise refused(ValueError(f"{folder} already holds a run: choose another --out, or add --resume"))
    return folder


def _prepared(config: RunConfig, folder: Path, resume: bool, or_begin: bool) -> Resume | None:
    """All checks that need files alone; where a run goes on. One that is completed already ends the command, well."""
    from deploy.preflight import preflight
    from deploy.resume import plan_resume
    from rl.problems import check_same

    try:
        resume = resume or (or_begin and (folder / "config.toml").is_file())
        goes_on = plan_resume(folder, config, or_begin) if resume else None
        if resume and goes_on is None:
            typer.echo(
                f"{folder} is completed, {config.run.steps} steps: nothing is left to do; raise run.steps to go on"
            )
            raise typer.Exit(0)
        problems = preflight(config)
        if goes_on:
            check_same(folder / "data.json", problems)
    except ValueError as error:
        raise refused(error) from error
    return goes_on


def _write_report(folder: Path) -> None:
    """The run's page, however the run ended. Failing at it must not change how the run itself is said to have ended."""
    from deploy.display.run_display import harmless

    with harmless("report.html was not written"):
        if all(file.name in LOCK_FILES for file in folder.iterdir()):  # the run failed before it wrote anything
            return
        from experiments.report import write_html

        write_html([folder], folder / "report.html")


# --- a sweep's runs ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _SweepCall:
    """What one call of `northstar sweep` is about."""

    sweep: Sweep
    folder: Path
    overrides: list[str]
    cells: set[str]  # that this call runs

    def runs(self, jobs: list[Job]) -> list[SweepRun]:
        from deploy.cluster.sweep_runs import planned_runs

        return planned_runs(self.sweep, self.folder, self.overrides, [job for job in jobs if job.cell in self.cells])


def _called(
    source: str, out: Path | None, set_: list[str] | None, cells: str | None, base: str | None, seeds: str | None
) -> _SweepCall:
    from experiments.sweep import find_sweep, read_sweep

    sweep = read_sweep(find_sweep(source)).but(base, seeds, set_ or [])
    wanted = sweep.select(cells.split(",") if cells is not None else list(sweep.cells))
    return _SweepCall(sweep, out or Path("runs") / sweep.name, set_ or [], wanted)


def _check_same_sweep(call: _SweepCall) -> None:
    """What the report of a folder is about does not change under the runs that are there. Raises SweepError."""
    from experiments.sweep import FILE, SweepError, read_sweep

    if not (call.folder / FILE).is_file():
        return
    there = read_sweep(call.folder / FILE)
    for key in ("name", "axes", "tuning"):
        before, now = getattr(there, key), getattr(call.sweep, key)
        if before != now:
            says = f"{call.folder} holds the sweep {there.name} with {key} = {before!r}, and this one has {now!r}"
            raise SweepError(f"{says}: choose another --out")


def _run_all(
    call: _SweepCall, first: list[SweepRun], address: str | None, lanes: int | None
) -> tuple[bool, list[SweepRun]]:
    """The runs planned first and, where they tune, those beyond the grid and at the points that were chosen; whether
    none was interrupted."""
    from deploy.cluster.sweep_lanes import execute_sweep
    from deploy.display.sweep_display import SweepDisplay
    from experiments.cells import chosen
    from experiments.sweep import keep_sweep

    def ran(runs: list[SweepRun]) -> bool:
        with SweepDisplay(runs) as display:
            return execute_sweep(runs, display, address, lanes)

    keep_sweep(call.sweep, call.folder)
    runs, finished = list(first), ran(first)
    if call.sweep.tuning:
        known: set[Path] = set()
        while finished and (more := _not_known(call, known)):
            finished, runs = ran(more), runs + more
        if finished:
            judging = call.runs(call.sweep.jobs_at(chosen(call.folder)))
            finished, runs = ran(judging), runs + judging
    return finished, runs


def _not_known(call: _SweepCall, known: set[Path]) -> list[SweepRun]:
    """The runs beyond the grid that this call has not looked at yet. One that fails is an answer, and not asked twice."""
    from experiments.cells import beyond_grid
    from experiments.sweep import SweepError

    try:
        planned = call.runs(call.sweep.jobs_beyond(beyond_grid(call.folder)))
    except SweepError as error:
        raise SweepError(f"{error}; a point beyond the grid, which a smaller `extend` leaves out") from error
    found = [run for run in planned if run.folder not in known]
    known.update(run.folder for run in found)
    return found
