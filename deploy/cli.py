"""`northstar`: the command line. What each command does stands in `deploy/commands`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import typer

from deploy.commands.afterwards import export_command, report_command
from deploy.commands.ahead import doctor_command, plan_command, presets_command, probe_command, simulate_command
from deploy.commands.meanwhile import scale_command
from deploy.commands.training import run_command, sweep_command
from deploy.packages import PACKAGES

COMMANDS = {
    "run": run_command,
    "sweep": sweep_command,
    "scale": scale_command,
    "plan": plan_command,
    "probe": probe_command,
    "simulate": simulate_command,
    "report": report_command,
    "doctor": doctor_command,
    "export": export_command,
    "presets": presets_command,
}
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def northstar() -> None:
    """Post-train language models with GRPO over slow links: a compressed fast swarm and its slow, dense anchor."""


for name, command in COMMANDS.items():
    app.command(name)(command)


def main() -> None:
    """What northstar.py calls once our packages are known to be ours."""
    for package in PACKAGES:  # before a folder of the same name beside the run can be found
        importlib.import_module(package)
    from deploy.cluster.takedown import leave

    sys.path.append(str(Path.cwd()))  # as `python -m` has it: task.reward may name a module beside the run
    try:
        app()
    except SystemExit as end:
        leave(end.code)
        raise
