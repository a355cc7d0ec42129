"""What can be known of a run from files alone, before Ray, actors or a run folder: a run that is refused changed nothing."""

from __future__ import annotations

from deploy.config import RunConfig
from rl.model_check import check_model
from rl.model_files import model_shape, resolve


def preflight(config: RunConfig) -> None:
    """Raises ValueError, naming the file or key and the fix, for what the run would stumble over later.

    Downloads a model of the hub and converts a GGUF file, once.
    """
    folder = resolve(config.model.path)
    config.check_fits(model_shape(str(folder)))
    check_model(folder)
