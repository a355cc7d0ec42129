"""What can be known of a run from files alone, before Ray, actors or a run folder: a run that is refused changed nothing."""

from __future__ import annotations

import sys
from pathlib import Path

from codec.boundary import make_codec
from codec.gradient import gradient_maker
from deploy.packages import IN_ACTORS, check_packages
from merger import make_merger
from rl.model_check import check_model
from rl.model_files import model_shape, resolve
from rl.problems import Problems
from rl.survey import survey
from swarm.run_config import RunConfig


def preflight(config: RunConfig) -> Problems:
    """What the task's problems are made of.

    Downloads a model of the hub and converts a GGUF file, once. Raises ValueError, naming the file or key and the fix,
    for what the run would stumble over later.
    """
    check_packages([str(Path.cwd()), *sys.path], IN_ACTORS)  # Ray's workers look in the working directory first
    folder = resolve(config.model.path)
    shape = model_shape(str(folder))
    assert shape is not None  # a folder has one
    config.check_fits(shape)
    make_merger(config.merger)  # these may be anybody's
    gradient_maker(config.codec.gradient)
    if config.swarm.boundaries:
        make_codec(config.codec, shape.hidden, config.run.seed)
    tokenizer = check_model(folder)  # loaded once: a second for a large vocabulary
    return survey(config.task, config.val, config.grpo, folder, tokenizer, config.run.seed)
