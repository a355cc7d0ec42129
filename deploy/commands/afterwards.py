"""What is made of runs that are over: `northstar report` and `northstar export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from deploy.commands.options import refused


def report_command(
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
    from experiments.report import report_markdown, write_html
    from experiments.run_table import write_csv
    from experiments.runs import load_runs

    first = folders[0].resolve()
    out = html or (first if len(folders) == 1 else first.parent) / "report.html"
    try:
        write_html(folders, out)
        if csv_file:
            csv_file.parent.mkdir(parents=True, exist_ok=True)
            write_csv(load_runs(folders), csv_file)
        typer.echo(report_markdown(folders), nl=False)
    except ValueError as error:
        raise refused(error) from error
    typer.echo(f"page {out}", err=True)


def export_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", exists=True, file_okay=False, help="folder of the run")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="folder to write; it must not be there yet")],
    step: Annotated[
        int | None, typer.Option(min=1, help="global step of the checkpoint; default: the newest one")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="of the weights written; default: the run's model.dtype"),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="of a run of adapters: the whole model with them added, not the adapters")
    ] = False,
) -> None:
    """Write a checkpoint's policy as a Hugging Face folder, which transformers and vLLM load, or its adapters as peft's."""
    from deploy.export import export_policy

    try:
        found = export_policy(run, out, step, dtype, merge)
    except ValueError as error:
        raise refused(error) from error
    for reason in found.damaged:
        typer.secho(f"passed over: {reason}", fg="yellow", err=True)
    typer.echo(f"step {found.step}: {found.parameters:,} parameters in {found.dtype} to {found.folder}")
