"""What several commands share: their options, the config they begin with, and how they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.models import OptionInfo

if TYPE_CHECKING:
    from swarm.run_config import RunConfig

ConfigSource = Annotated[
    str, typer.Argument(metavar="PRESET_OR_TOML", help="a preset (`northstar presets`) or a TOML file")
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", dir_okay=False, help="write the numbers there as well")
]
Address = Annotated[str | None, typer.Option(help="a running Ray cluster, for example auto or ray://host:10001")]


def set_option(says: str) -> OptionInfo:
    """`--set`, which may be given several times."""
    return typer.Option("--set", metavar="KEY=VALUE", help=says)


def refused(error: ValueError) -> typer.Exit:
    """A config or a sweep that is wrong: said in red, exit code 2."""
    typer.secho(str(error), fg="red", err=True)
    return typer.Exit(2)


def checked_config(source: str, overrides: list[str] | None) -> RunConfig:
    from deploy.config import load

    try:
        return load(source, overrides)
    except ValueError as error:
        raise refused(error) from error


def write_json(file: Path, numbers: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(numbers, indent=1) + "\n")
