"""`northstar`: the command line."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from deploy.packages import PACKAGES

if TYPE_CHECKING:
    from deploy.resume import Resume
    from swarm.run_config import RunConfig

_LOCK = ".lock"
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Source = Annotated[str, typer.Argument(metavar="PRESET_OR_TOML", help="a preset (`northstar presets`) or a TOML file")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", dir_okay=False, help="write the numbers there as well")
]
Address = Annotated[str | None, typer.Option(help="a running Ray cluster, for example auto or ray://host:10001")]


@app.callback()
def northstar() -> None:
    """Post-train language models with GRPO over slow links: a compressed fast swarm and its slow, dense anchor."""


@app.command()
def run(
    source: Source,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key, for example merger.dose=0.5")
    ] = None,
    out: Annotated[Path | None, typer.Option(file_okay=False, help="run folder; default runs/NAME-TIME")] = None,
    resume: Annotated[bool, typer.Option(help="go on from the newest checkpoint in --out")] = False,
    address: Address = None,
) -> None:
    """Run an experiment to its end: live progress, a run folder, a summary table. Exit 0 only if it ran to the end."""
    config = _checked(source, set_ or [])
    folder = _run_folder(config, out, resume)
    goes_on = _prepared(config, folder, resume)
    # After the checks: what is refused is refused before Ray is even imported
    from anchor_service.errors import described
    from deploy.cluster.launch import execute
    from deploy.display.run import Display, harmless, print_summary

    with _alone_in(folder), Display(config, folder) as display:
        try:
            summary = execute(config, folder, display, goes_on, address)
        except KeyboardInterrupt:
            display.close()
            typer.secho(f"interrupted before it started: {folder} is as it was", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            display.close()
            typer.secho(described(error), fg="red", err=True)
            _write_report(folder)
            raise typer.Exit(1) from error
    with harmless("the summary was not shown"):
        print_summary(summary, folder)
    _write_report(folder)
    raise typer.Exit(0 if summary["status"] == "completed" else 130)


@app.command()
def sweep(
    source: Annotated[
        str, typer.Argument(metavar="SWEEP_OR_TOML", help="a shipped sweep (experiments/sweeps) or a TOML file")
    ],
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="folder of the sweep; default runs/NAME; a second call goes on"),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change the base of every cell")
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
    from deploy.cluster.sweep_runs import Planned, check, plan
    from experiments import sweep as sweeps

    try:
        found = sweeps.read(sweeps.find(source)).but(base, seeds)
        folder = out or Path("runs") / found.name
        wanted = found.select(cells.split(",") if cells is not None else list(found.cells))
        runs = plan(found, folder, set_ or [], [job for job in found.jobs() if job.cell in wanted])
        check(runs)
    except sweeps.SweepError as error:
        raise _refused(error) from error
    # After the checks, as torch and Ray take their time
    from deploy.cluster.sweep_lanes import execute
    from deploy.display.sweep import SweepDisplay
    from experiments.cells import chosen

    def run(runs: list[Planned]) -> bool:
        with SweepDisplay(runs) as display:
            return execute(runs, display, address, lanes)

    with _alone_in(folder):
        sweeps.keep(found, folder)
        finished = run(runs)
        if finished and found.tuning:
            jobs = [job for job in found.jobs_at(chosen(folder)) if job.cell in wanted]
            judging = plan(found, folder, set_ or [], jobs)
            finished, runs = run(judging), runs + judging
        _write_report(folder)
    typer.echo(f"sweep folder {folder}; the same command goes on with what is not completed", err=True)
    if finished and all(run.state == "completed" for run in runs):
        raise typer.Exit(0)
    raise typer.Exit(1 if finished else 130)


@app.command()
def plan(
    source: Source,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="override a key, for example links.swarm_mbit=1000"),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Say what a config will send, hold and wait for: bytes, memory, time, the cadence its anchor can keep."""
    from deploy.display.run import console
    from deploy.estimate.plan import load_for_planning, make_plan, to_dict
    from deploy.estimate.tables import show

    try:
        found = make_plan(load_for_planning(source, set_ or []))
    except ValueError as error:
        raise _refused(error) from error
    show(found, console)
    if json_file:
        _write_json(json_file, to_dict(found))


@app.command()
def probe(
    source: Source,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key, for example codec.rank=16")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="response tokens to score; twice as many others calibrate")] = 2000,
    json_file: JsonFile = None,
) -> None:
    """Measure what codecs do to the policy and its gradient, before a run, on its model, tasks and boundaries.

    One process with `swarm.threads` threads; on an idle machine --set swarm.threads=N makes it faster.
    """
    config = _checked(source, set_ or [])
    from deploy.display.run import console
    from deploy.probe import probe as probing
    from deploy.probe.tables import advice, show

    try:
        found = probing.probe(config, tokens, lambda line: console.print(line, highlight=False))
    except ValueError as error:
        raise _refused(error) from error
    show(found, console)
    if json_file:
        _write_json(json_file, probing.to_dict(found) | {"advice": advice(found)})


@app.command()
def simulate(
    source: Source,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="override a key, for example links.anchor_mbit=50.0"),
    ] = None,
    ticks: Annotated[int | None, typer.Option(min=1, help="ticks to simulate; default: those of the config")] = None,
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="folder for simulation.json, corrections.csv (a lag trace) and lag.png"),
    ] = None,
) -> None:
    """Run a config's schedule on a virtual clock: lags, bottleneck and bytes of up to 10,000 workers, no hardware."""
    from deploy.display.run import console
    from deploy.estimate import simulate as simulation
    from deploy.estimate.plan import load_for_planning

    try:
        found = simulation.simulate(load_for_planning(source, set_ or []), ticks)
    except ValueError as error:
        raise _refused(error) from error
    console.print(simulation.table(found))
    if out:
        simulation.write(found, out)
        console.print(f"simulation folder {out}")


@app.command()
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR", exists=True, file_okay=False, help="run folders, or folders that hold them"),
    ],
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", dir_okay=False, help="where the page goes; default report.html in DIR, beside it if several"
        ),
    ] = None,
    csv_file: Annotated[
        Path | None,
        typer.Option("--csv", metavar="FILE", dir_okay=False, help="also write one row a run: accuracies, ends, bytes"),
    ] = None,
) -> None:
    """Compare runs: a table in Markdown on standard output, and a self-contained page with figures and configs."""
    from experiments import run_table
    from experiments.report import markdown, write_html
    from experiments.runs import load_runs

    first = folders[0].resolve()
    out = html or (first if len(folders) == 1 else first.parent) / "report.html"
    try:
        write_html(folders, out)
        if csv_file:
            csv_file.parent.mkdir(parents=True, exist_ok=True)
            run_table.write(load_runs(folders), csv_file)
        typer.echo(markdown(folders), nl=False)
    except ValueError as error:
        raise _refused(error) from error
    typer.echo(f"page {out}", err=True)


@app.command()
def doctor(
    source: Annotated[
        str | None, typer.Argument(metavar="[PRESET_OR_TOML]", help="does this config fit? default: the machine alone")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key, for example swarm.dp=8")
    ] = None,
    address: Address = None,
    nodes: Annotated[int, typer.Option(min=1, help="with --address: nodes to wait for, two minutes at most")] = 1,
    out: Annotated[Path, typer.Option(help="where the run folder would be: its disk is looked at")] = Path("runs"),
    json_file: JsonFile = None,
) -> None:
    """Say what will not work here, or on a cluster, and the fix: versions, GPUs, network, ports, disks, clocks, memory.

    Exit 0 if nothing is an error, 1 if something is, 2 if the config itself is refused.
    """
    config = _checked(source, set_ or []) if source else None
    from deploy.display.run import console
    from deploy.doctor.checks import to_dict
    from deploy.doctor.examine import examine, show

    found = examine(config, address, out, nodes)
    show(found, console)
    if json_file:
        _write_json(json_file, to_dict(found))
    raise typer.Exit(1 if any(finding.level == "error" for finding in found) else 0)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", exists=True, file_okay=False, help="folder of the run")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="folder to write; it must not be there yet")],
    step: Annotated[
        int | None, typer.Option(min=1, help="global step of the checkpoint; default: the newest one")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="of the weights written; default: the run's model.dtype"),
    ] = None,
) -> None:
    """Write a checkpoint's policy as a Hugging Face folder, which transformers and vLLM load."""
    from deploy import export as exporting

    try:
        found = exporting.export(run, out, step, dtype)
    except ValueError as error:
        raise _refused(error) from error
    for reason in found.damaged:
        typer.secho(f"passed over: {reason}", fg="yellow", err=True)
    typer.echo(f"step {found.step}: {found.parameters:,} parameters in {found.dtype} to {found.folder}")


@app.command()
def presets() -> None:
    """List the shipped presets."""
    from deploy.config import ConfigError, load, preset_names

    for name in preset_names():
        try:
            config = load(name)
        except ConfigError as error:  # its model or its data is not on this machine
            typer.echo(f"{name:20} not ready: {error}")
        else:
            typer.echo(f"{name:20} {config.model.path} on {config.task.name}, {config.run.steps} steps")


def _write_json(file: Path, numbers: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(numbers, indent=1) + "\n")


def _refused(error: ValueError) -> typer.Exit:
    """A config or a sweep that is wrong: said in red, exit code 2."""
    typer.secho(str(error), fg="red", err=True)
    return typer.Exit(2)


def _checked(source: str, overrides: list[str]) -> RunConfig:
    from deploy.config import load

    try:
        return load(source, overrides)
    except ValueError as error:
        raise _refused(error) from error


def _run_folder(config: RunConfig, out: Path | None, resume: bool) -> Path:
    if resume and out is None:
        typer.secho("--resume needs --out: the folder of the run to go on with", fg="red", err=True)
        raise typer.Exit(2)
    folder = out or Path("runs") / f"{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if not resume and (folder / "metrics.jsonl").exists():
        typer.secho(f"{folder} already holds a run: choose another --out, or add --resume", fg="red", err=True)
        raise typer.Exit(2)
    return folder


def _prepared(config: RunConfig, folder: Path, resume: bool) -> Resume | None:
    """All checks that need files alone; where a run goes on. One that is completed already ends the command, well."""
    from deploy.preflight import preflight
    from deploy.resume import plan_resume
    from rl.problems import check_same

    try:
        goes_on = plan_resume(folder, config) if resume else None
        if resume and goes_on is None:
            typer.echo(
                f"{folder} is completed, {config.run.steps} steps: nothing is left to do; raise run.steps to go on"
            )
            raise typer.Exit(0)
        problems = preflight(config)
        if goes_on:
            check_same(folder / "data.json", problems)
    except ValueError as error:
        raise _refused(error) from error
    return goes_on


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """No other command writes there meanwhile. A lock of a process that died is none."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(folder / _LOCK).acquire(timeout=0)
    except Timeout:
        message = f"another northstar command is writing to {folder}: wait for it to end, or choose another --out"
        raise _refused(ValueError(message)) from None
    with held:
        yield


def _write_report(folder: Path) -> None:
    """The run's page, however the run ended. Failing at it must not change how the run itself is said to have ended."""
    from deploy.display.run import harmless

    with harmless("report.html was not written"):
        if all(file.name == _LOCK for file in folder.iterdir()):  # the run failed before it wrote anything
            return
        from experiments.report import write_html

        write_html([folder], folder / "report.html")


def main() -> None:
    """What northstar.py calls once our packages are known to be ours."""
    for name in PACKAGES:  # before a folder of the same name beside the run can be found
        importlib.import_module(name)
    from deploy.cluster.takedown import leave

    sys.path.append(str(Path.cwd()))  # as `python -m` has it: task.reward may name a module beside the run
    try:
        app()
    except SystemExit as end:
        leave(end.code)
        raise
