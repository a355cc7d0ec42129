"""What can be known ahead of a run: `northstar plan`, `probe`, `simulate`, `doctor` and `presets`. None of them trains."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from deploy.commands.options import Address, ConfigSource, JsonFile, checked_config, refused, set_option, write_json


def plan_command(
    source: ConfigSource,
    set_: Annotated[list[str] | None, set_option("override a key, for example links.swarm_mbit=1000")] = None,
    anchor_mb: Annotated[
        float | None,
        typer.Option("--anchor-bytes", min=0, help="MB a tick that the anchor may send; default: what it sends now"),
    ] = None,
    probe_file: Annotated[
        Path | None,
        typer.Option("--probe", metavar="FILE", help="what `probe --json` wrote: is the anchor worth its bytes?"),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Say what a config will send, hold and wait for: bytes, memory, time, the cadence its anchor can keep."""
    from deploy.display.run_display import console
    from deploy.estimate.plan import load_for_planning, make_plan
    from deploy.estimate.tables import show_plan

    try:
        budget = None if anchor_mb is None else anchor_mb * 1e6
        found = make_plan(load_for_planning(source, set_ or []), budget, probe_file)
    except ValueError as error:
        raise refused(error) from error
    show_plan(found, console)
    if found.anchor and not found.worth:
        sets = "".join(f" --set {shlex.quote(override)}" for override in set_ or [])
        console.print(
            f"Is the anchor worth its bytes? `northstar probe {source}{sets} --json probe.json`, then plan --probe probe.json",
            highlight=False,
        )
    if json_file:
        write_json(json_file, found.numbers())


def probe_command(
    source: ConfigSource,
    set_: Annotated[list[str] | None, set_option("override a key, for example codec.rank=16")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="response tokens to score; twice as many others calibrate")] = 2000,
    boundaries: Annotated[
        str | None,
        typer.Option(metavar="N,N,…", help="with so many boundaries too, evenly over the layers; fewer codecs"),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure what codecs do to the policy and its gradient, before a run, on its model, tasks and boundaries.

    One process with `swarm.threads` threads; on an idle machine --set swarm.threads=N makes it faster.
    """
    config = checked_config(source, set_)
    from deploy.display.run_display import console
    from deploy.probe.probe import numbers_of_boundaries, probe
    from deploy.probe.tables import advice, show_probe

    try:
        counts = numbers_of_boundaries(boundaries or "")
        found = probe(config, tokens, lambda line: console.print(line, highlight=False), counts=counts)
    except ValueError as error:
        raise refused(error) from error
    show_probe(found, console)
    if json_file:
        write_json(json_file, found.numbers() | {"advice": advice(found)})


def simulate_command(
    source: ConfigSource,
    set_: Annotated[list[str] | None, set_option("override a key, for example links.anchor_mbit=50.0")] = None,
    ticks: Annotated[int | None, typer.Option(min=1, help="ticks to simulate; default: those of the config")] = None,
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="folder for simulation.json, corrections.csv (a lag trace) and lag.png"),
    ] = None,
) -> None:
    """Run a config's schedule on a virtual clock: lags, bottleneck and bytes of up to 10,000 workers, no hardware."""
    from deploy.display.run_display import console
    from deploy.estimate.plan import load_for_planning
    from deploy.estimate.simulate import simulate
    from deploy.estimate.simulation import simulation_table, write_simulation

    try:
        found = simulate(load_for_planning(source, set_ or []), ticks)
    except ValueError as error:
        raise refused(error) from error
    console.print(simulation_table(found))
    if out:
        write_simulation(found, out)
        console.print(f"simulation folder {out}")


def doctor_command(
    source: Annotated[
        str | None, typer.Argument(metavar="[PRESET_OR_TOML]", help="does this config fit? default: the machine alone")
    ] = None,
    set_: Annotated[list[str] | None, set_option("override a key, for example swarm.dp=8")] = None,
    address: Address = None,
    nodes: Annotated[int, typer.Option(min=1, help="with --address: nodes to wait for, two minutes at most")] = 1,
    out: Annotated[Path, typer.Option(help="where the run folder would be: its disk is looked at")] = Path("runs"),
    json_file: JsonFile = None,
) -> None:
    """Say what will not work here, or on a cluster, and the fix: versions, GPUs, network, ports, disks, clocks, memory.

    Exit 0 if nothing is an error, 1 if something is, 2 if the config itself is refused.
    """
    config = checked_config(source, set_) if source else None
    from deploy.display.run_display import console
    from deploy.doctor.checks import counted
    from deploy.doctor.examine import examine, print_findings

    found = examine(config, address, out, nodes)
    print_findings(found, console)
    if json_file:
        write_json(json_file, counted(found))
    raise typer.Exit(1 if any(finding.level == "error" for finding in found) else 0)


def presets_command() -> None:
    """List the shipped presets."""
    from deploy.config import ConfigError, load, preset_names

    for name in preset_names():
        try:
            config = load(name)
        except ConfigError as error:  # its model or its data is not on this machine
            typer.echo(f"{name:20} not ready: {error}")
        else:
            typer.echo(f"{name:20} {config.model.path} on {config.task.name}, {config.run.steps} steps")
