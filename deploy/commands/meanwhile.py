"""What a run that is under way is asked for: `northstar scale`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.commands.options import refused


def scale_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", exists=True, file_okay=False, help="folder of the run")],
    dp: Annotated[int, typer.Option("--dp", min=1, help="replicas that it is to have from a step's boundary on")],
) -> None:
    """Give a run that is under way more replicas, or fewer. No step is lost: new ones are taken in when they are there."""
    from deploy.config import load
    from swarm import scale

    stored = run / "config.toml"
    if not stored.is_file():
        raise refused(ValueError(f"{run} holds no run: it has no config.toml"))
    try:
        grpo = load(str(stored), given=()).grpo
    except ValueError as error:
        raise refused(error) from error
    samples = grpo.ppo_mini_batch_size * grpo.group_size
    if samples % dp:
        fits = ", ".join(str(n) for n in range(1, samples + 1) if samples % n == 0)
        raise refused(ValueError(f"--dp {dp} does not divide the {samples} samples of a tick; these do: {fits}"))
    scale.ask_for(run, dp)
    typer.echo(f"{run}: {dp} replicas from the next step for which they are there (event `replicas changed`)")
