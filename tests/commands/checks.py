"""What can be said of a printed command without running it: its options, its config, its files."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import typer.main

from deploy.cli import app
from deploy.cluster.sweep_runs import planned_runs
from deploy.config import load, own_settings
from experiments.sweep import find_sweep, read_sweep
from tests.commands.documents import ROOT

CLI = typer.main.get_command(app).commands
# In place of a model and data that were not fetched, and of packages that are extras
STAND_INS = [
    "model.path=builtin:tiny",
    "swarm.boundaries=[2]",
    "grpo.max_prompt_length=16",
    "grpo.max_response_length=40",
    "task.name=sums",
    "task.chat=false",
    "run.loggers=[]",
]
# In place of a model that `make` fetches for a sweep, whose cells say where it is cut: of one on the hub no layer is counted
FETCHED = {"smollm2": ["model.path=HuggingFaceTB/SmolLM2-135M-Instruct"]}
_PLACEHOLDER = re.compile(r"[…\[]|(?:^|[ =:])[A-Z]+\b")


def check(text: str, folder: Path) -> None:
    """Raises where a command of a `bash` block, or of a line, could not be run as it is printed. `folder` has a Makefile."""
    for part in re.split(r"&&|;", text):
        words = shlex.split(part.replace("\\\n", " "), comments=True)
        if not words:
            continue
        name = Path(words[0]).name
        if name == "northstar":
            _northstar(words[1:])
        elif name == "make":
            subprocess.run(["make", "-n", *words[1:]], cwd=folder, check=True, capture_output=True)
        elif name == "pip":
            _extra(words[-1])
        else:
            _files(words)
            script = next((i for i, word in enumerate(words) if word.endswith(".sbatch")), None)
            if script is not None:
                preset, out, *rest = words[script + 1 :]
                _northstar(["run", preset, "--out", out, *rest])


def check_span(text: str, folder: Path) -> None:
    """As `check`; of one with placeholders only names."""
    words = text.split()
    if words[0] != "make" and (len(words) < 3 or _PLACEHOLDER.search(text) or "--help" in words):
        command = CLI[words[1]] if words[1] in CLI else None
        known = {option for param in command.params for option in param.opts} if command else set()
        unknown = {word for word in words[1:] if word.startswith("--")} - known - {"--help"}
        assert words[1] == "--help" or (command and not unknown), f"{text}: no such command, or no option {unknown}"
    else:
        check(text, folder)


def _northstar(words: list[str]) -> None:
    command = CLI[words[0]]
    found = command.make_context(words[0], list(words[1:])).params  # raises for an option that is none
    overrides = list(found.get("set_") or [])
    if words[0] == "sweep":
        sweep = read_sweep(find_sweep(found["source"])).but(found["base"] and "k5", found["seeds"], overrides)
        sweep.select((found["cells"] or next(iter(sweep.cells))).split(","))
        planned_runs(sweep, Path("/nowhere"), [*overrides, *FETCHED.get(sweep.base, [])])
    elif found.get("source"):
        ours = {override.partition("=")[0] for override in STAND_INS} | {"task.params"}
        given = set(own_settings(found["source"], overrides)) - ours
        load(found["source"], [*overrides, *STAND_INS], given=given)


def _extra(requirement: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    name = re.fullmatch(r"northstar\[(.+)\]", requirement)
    assert name and set(name[1].split(",")) <= set(extras), f"{requirement}: extras are {', '.join(extras)}"


def _files(words: list[str]) -> None:
    missing = [word for word in words if word.startswith("deploy/") and not (ROOT / word).exists()]
    assert not missing, f"no file {missing}"
