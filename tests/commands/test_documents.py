"""Every command that README.md, CONTRIBUTING.md and docs/ print: run as it is printed, on a smaller scale, or checked where it cannot be.

All pages share one folder and are run in order: what a page tells its reader to make, a later one may use. So run the
whole file. A command that can neither run here nor is named in CHECKED fails.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from rl.problem_columns import problem_of
from rl.task_config import TableParams
from tests.commands.checks import check, check_span
from tests.commands.documents import PAGES, Block, Command, blocks, commands, spans
from tests.commands.scratch import Scratch

BLOCKS = [block for page in PAGES for block in blocks(page)]
COMMANDS = [command for block in BLOCKS if block.kind in ("bash", "console") for command in commands(block)]
SPANS = [span for page in PAGES for span in spans(page)]
FILES = {  # blocks that are files, under the names by which the pages call them
    "README.md": {},
    "CONTRIBUTING.md": {"python": ["my_codec.py", "my_merger.py"]},
    "docs/experiments.md": {"toml": ["mine.toml"]},
    "docs/models.md": {
        "toml": ["data.toml", "validation.toml", "turns.toml", "environment.toml", "reward.toml"],
        "python": ["my_tools.py", "my_rewards.py"],
        "json": ["chat.jsonl"],
    },
}
TEXTS = {
    "docs/architecture.md",
    "docs/engines.md",
    "docs/simulate.md",
    "docs/reliability.md",
}  # pages with blocks that are pictures or the grammar of a command
CHECKED = {  # what is not run, and why
    "make test": "would run itself",
    "make setup": "installs packages",
    "make check": "is a part of CI beside the tests",
    "pre-commit install": "writes into the clone's .git",
    "make soak": "takes twenty minutes of two cores",
    "make kills": "takes twenty runs: tests/chaos/test_faults.py is one",
    "make cut-links": "needs root",
    "northstar sweep smollm2": "trains SmolLM2 for forty minutes",
    "make chain": "trains a policy for six minutes",
    "make vllm": "installs a package",
    "make verifiers": "installs a package",
    "make gpu-check": "takes nine minutes where there is a GPU: tests/contract/test_gpu_check.py runs it as if there were none",
    "device=cuda": "needs a GPU",
    "smollm2-gpu": "needs a GPU",
    "smollm2-gsm --set rollout.engine=vllm": "needs five minutes of two cores",
    "--address": "needs a cluster that is there: tests/ray/test_cluster_auth.py starts one",
    "kubectl": "needs Kubernetes",
    "sbatch": "needs Slurm",
    "docker": "needs Docker",
    "pip install": "installs a package",
    "run.loggers": "needs an extra",
}
SIZES = ["val.size=8", "grpo.train_batch_size=4", "grpo.ppo_mini_batch_size=2", "grpo.group_size=4"]
# None: as printed, a page exports step 10; a replay is as long as what it replays; others take 2
STEPS = {"--out runs/long": None, "--out runs/wall": 12, "--out runs/replay": 12}
CODES = {"northstar doctor": {0, 1}}  # 1: it found something to say about this machine
INTERRUPTED = "# Ctrl-C at any time"


def _smaller(text: str) -> dict[str, list[str]]:
    """What is put behind a command's own arguments: steps and sizes, nothing else."""
    if "smollm2" in text:
        sets = ["val.size=2", "grpo.train_batch_size=1", "grpo.ppo_mini_batch_size=1", "grpo.group_size=2"]
        sets.append("grpo.max_response_length=24")
        return {"run": [x for size in sets for x in ("--set", size)]}
    steps = next((steps for part, steps in STEPS.items() if part in text), 2)
    sizes = [*SIZES, *([f"run.steps={steps}"] if steps else [])]
    sets = [x for size in sizes for x in ("--set", size)]
    return {
        "run": sets,
        "sweep": [*sets, "--seeds", "0"],
        "probe": ["--tokens", "100"],
    }


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scratch]:
    made = Scratch(tmp_path_factory.mktemp("user"))
    for page, kinds in FILES.items():
        for kind, names in kinds.items():
            texts = [block.text for block in BLOCKS if (block.page, block.kind) == (page, kind)]
            for name, text in zip(names, texts, strict=True):
                (made.folder / name).write_text(f"{text}\n")
    yield made
    made.close()


@contextmanager
def _row(record: Callable[[str, object], None], command: Command, how: str) -> Iterator[None]:
    """One line of the table at the end of the tests (tests/conftest.py)."""
    start = time.perf_counter()
    yield
    text = " ".join(command.text.replace("\\\n", " ").split())
    record("command", [command.where, text, how, round(time.perf_counter() - start, 1)])


def _why_not_run(text: str) -> str | None:
    return next((why for part, why in CHECKED.items() if part in text), None)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.where)
def test_a_command_does_what_is_printed(command: Command, scratch: Scratch, record_property: Any):
    why = _why_not_run(command.text)
    if why:
        with _row(record_property, command, f"checked only: {why}"):
            check(command.text, scratch.folder)
        return
    interrupted = INTERRUPTED in command.text
    checkpoint = scratch.folder / "runs" / "long" / "checkpoints" / "step-000005"
    with _row(record_property, command, "ran, until Ctrl-C" if interrupted else "ran"):
        code, output = scratch.run(command.text, _smaller(command.text), checkpoint.exists if interrupted else None)
    allowed = {130} if interrupted else next((codes for part, codes in CODES.items() if part in command.text), {0})
    assert code in allowed, f"{command.where}: exit code {code}\n{output[-6000:]}"
    assert "Traceback" not in output, output[-6000:]


@pytest.mark.slow
def test_the_run_that_was_stopped_went_on_to_its_end_and_on_another_grid_beyond_it(scratch: Scratch):
    run = scratch.folder / "runs" / "long"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("completed", 15)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "step"] == list(range(1, 16))
    changed = [record for record in records if record.get("event") == "grid changed"]
    assert [(record["step"], record["dp_before"], record["dp"]) for record in changed] == [(10, 1, 2)]


@pytest.mark.slow
def test_the_replay_of_the_wall_clock_ended_with_the_same_weights(scratch: Scratch):
    wall, replay = (
        json.loads((scratch.folder / "runs" / name / "summary.json").read_text()) for name in ("wall", "replay")
    )
    assert wall["weights_digests"] == replay["weights_digests"]


@pytest.mark.parametrize("span", SPANS, ids=lambda span: span.where)
def test_a_command_inside_a_line_has_the_options_and_settings_it_names(
    span: Command, scratch: Scratch, record_property: Any
):
    with _row(record_property, span, "checked only: inside a line"):
        check_span(span.text, scratch.folder)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page}:{block.line}")
def test_every_block_is_of_a_known_kind(block: Block):
    """So that nobody prints a command that is never tried."""
    if block.kind in ("bash", "console"):
        assert commands(block)
    elif block.kind == "text":
        assert block.page in TEXTS
    else:
        assert block.kind in FILES.get(block.page, {}), (
            f"{block.page}:{block.line}: a test must say what {block.kind} is for"
        )


def test_no_command_hides_in_an_indented_block():
    hidden = [
        f"{page.name}:{number}"
        for page in PAGES
        for number, line in enumerate(page.read_text().splitlines(), start=1)
        if line.startswith(("    make ", "    northstar ", "    .venv/"))
        and not any(b.page.endswith(page.name) and b.line < number <= b.line + b.text.count("\n") + 1 for b in BLOCKS)
    ]
    assert hidden == []


def test_the_files_of_the_page_of_models_do_what_it_says(scratch: Scratch):
    from deploy.config import load
    from deploy.estimate.plan import load_for_planning

    for name in FILES["docs/models.md"]["toml"]:
        file = scratch.folder / name
        file.write_text(
            f'extends = "k5"\n{file.read_text()}'.replace("chat = true", "chat = false")
        )  # tiny has no template
    assert load_for_planning(str(scratch.folder / "data.toml"), []).task.params == {}
    environment = scratch.folder / "environment.toml"  # of a package that is not installed
    environment.write_text(re.sub(r'"verifiers:\w+"(.*\n)params.*\n', r'"calculator"\1', environment.read_text()))
    assert load(str(environment), []).task.max_turns == 6
    for name in ("reward.toml", "turns.toml"):
        code, output = scratch.run(f"northstar plan {name}", {})
        assert code == 0, output
    row = json.loads((scratch.folder / "chat.jsonl").read_text())
    assert problem_of("", row, TableParams(prompt="prompt"))[0] == row["prompt"]
    tools: dict[str, Any] = {}
    exec((scratch.folder / "my_tools.py").read_text(), tools)
    assert tools["respond"]([{"role": "assistant", "content": "6*7=?"}], {"answer": "42"})[0]["content"] == "42"
    assert tools["respond"]([{"role": "assistant", "content": "42"}], {"answer": "42"}) is None
    names: dict[str, Any] = {}
    exec((scratch.folder / "my_rewards.py").read_text(), names)
    assert names["score"]("1+1=", " 2 ", "2", {"truncated": False}) == {"right": 1.0, "short": -0.03}
