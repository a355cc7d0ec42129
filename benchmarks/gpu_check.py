"""What a machine with a GPU has to show, in nine minutes and in one file. `make gpu-check`.

python -m benchmarks.gpu_check [--out gpu-check.json] [--device cuda] [section.key=value …]

    merge    the share of the device's memory bandwidth that a merge uses (benchmarks/merge_bandwidth.py)
    KIND     for each kind of codec two steps of `northstar run` on random weights of SmolLM2-135M's shape, corrections merged:
             on one GPU one stage and its virtual boundary, on two or more two stages and nccl
    vllm     such a run with an engine of vLLM on the worker's GPU, where the package is installed
    tests    tests/gpu

Every part is a process of its own with a deadline; one that fails is named, the others run all the same, and the exit code is 1.
Without a CUDA device the file says so, and the exit code is 0. `--device cpu` rehearses it. Settings behind it go to all runs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from textwrap import indent
from typing import Any

import torch

from benchmarks.random_model import LAYERS, write_model
from benchmarks.records import kept_records
from codec.config import KINDS

ROOT = Path(__file__).parents[1]
TOTAL_S, ENDING_S = 540.0, 20.0  # of all parts; that a process gets to take its own processes down
SETTINGS = [
    "run.steps=2",  # the first warms up
    "val.every=9",
    "val.size=2",
    "model.dtype=bfloat16",
    "task.reward=benchmarks.random_model:varied",
    "grpo.train_batch_size=8",
    "grpo.ppo_mini_batch_size=4",
    "grpo.max_response_length=64",
    "rollout.replicas=1",
    f"swarm.boundaries=[{LAYERS // 2}]",
    "swarm.threads=4",
    "anchor.delay_k=1",
    "anchor.cadence=2",
]
# a twentieth of the hidden size; the other kinds have defaults
OF_KIND = {"powersgd": ["codec.rank=28"], "random_k": ["codec.rank=28"]}
ROLES = {"worker": "swarm", "engine": "rollout", "anchor": "anchor"}  # and whose `device` is theirs
Numbers = dict[str, Any]


@dataclass(frozen=True)
class GpuPart:
    """One process. `numbers` reads what it has left, its output among it; `missing`: why it cannot run here."""

    name: str
    command: list[str]
    limit_s: float
    numbers: Callable[[str], Numbers]
    missing: str = ""


def check_parts(device: str, gpus: int, model: Sequence[str], folder: Path, has_vllm: bool) -> list[GpuPart]:
    """`model`: settings that all runs get last; `folder`: where they write."""
    merge = [sys.executable, "-m", "benchmarks.merge_bandwidth", "--device", device]
    tests = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "tests/gpu"]
    grid = [*SETTINGS, *on_gpus(device, gpus)]
    beside = [
        "rollout.engine=vllm",
        f"rollout.device={device}",
        f"rollout.kv_cache_gb={2 if device == 'cuda' else 0.5}",
    ]
    if device == "cuda":
        beside += ["rollout.placement=colocated", "rollout.gpu_memory=0.3"]
    runs = [_run(kind, [*grid, *of_kind(kind), *model], folder, 120) for kind in KINDS]
    vllm = _run("vllm", [*grid, *of_kind("transform"), *beside, *model], folder, 150)
    if not has_vllm:
        vllm = replace(vllm, missing="vllm is not installed: make vllm VLLM=vllm")
    first = GpuPart("merge", merge, 60, lambda output: json.loads(output.splitlines()[-1]))
    return [first, *runs, vllm, GpuPart("tests", tests, 300, lambda output: {"said": output.strip().splitlines()[-1]})]


def on_gpus(device: str, gpus: int) -> list[str]:
    """Two stages need two GPUs, as nccl takes no two ranks on one; an engine or an anchor without a GPU of its own shares
    the first worker's."""
    pp = 2 if gpus >= 2 else 1
    engine, anchor = ("separate" if gpus > before or device == "cpu" else "colocated" for before in (pp, pp + 1))
    return [
        f"swarm.device={device}",
        f"swarm.pp={pp}",
        f"rollout.device={device}",
        f"rollout.placement={engine}",
        f"anchor.device={device}",
        f"anchor.placement={anchor}",
    ]


def of_kind(kind: str) -> list[str]:
    return [f"codec.kind={kind}", *OF_KIND.get(kind, [])]


def _run(name: str, settings: Sequence[str], folder: Path, limit_s: float) -> GpuPart:
    sets = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "northstar", "run", "k5", *sets, "--out", str(folder / name)]
    return GpuPart(name, command, limit_s, lambda _: run_numbers(folder / name))


def run_numbers(run: Path) -> Numbers:
    """Of the last step of a run. Training: all tokens over its ticks, without waits for the anchor and old log-probs;
    generation: sampled tokens over the time that the swarm waited for them."""
    summary, config = json.loads((run / "summary.json").read_text()), tomllib.loads((run / "config.toml").read_text())
    step = summary["last_step"]
    lines = kept_records(run)
    ticks = [line for line in lines if (line["kind"], line["step"]) == ("tick", step["step"])]
    samples = config["grpo"]["train_batch_size"] * config["grpo"]["group_size"]
    trained = sum(tick["timing_s/tick"] - tick.get("timing_s/anchor_wait", 0.0) for tick in ticks)
    return {
        "training_tokens_s": step["perf/throughput"] * step["timing_s/step"] / trained,
        "generation_tokens_s": step["response_length/mean"] * samples / step["timing_s/gen"],
        "merge_ms": 1e3 * sum(tick["timing_s/merge"] for tick in ticks) / len(ticks),
        "peak_memory_gb": {
            f"{role}, {config[ROLES[role]]['device']}": gb for role, gb in summary["peak_memory_gb"].items()
        },
    }


def result_of(part: GpuPart, left_s: float, log: Path) -> Numbers:
    """Run it, for at most `left_s` seconds."""
    limit = min(part.limit_s, left_s)
    if part.missing or limit <= 0:
        return {"status": "failed" if not part.missing else "not run", "why": part.missing or "the time was over"}
    start = time.monotonic()
    code = _ended(part.command, limit, log)
    found: Numbers = {"status": "ok", "seconds": round(time.monotonic() - start, 1)}
    output = log.read_text(errors="replace")
    try:
        if code != 0:
            said = f"was not done after {limit:.0f} s" if code is None else f"exit code {code}"
            return found | {"status": "failed", "why": said, "output": output[-3000:]}
        return found | part.numbers(output)
    except (OSError, ValueError, LookupError, ZeroDivisionError) as error:
        why = f"what it left cannot be read: {type(error).__name__}: {error}"
        return found | {"status": "failed", "why": why, "output": output[-3000:]}


def _ended(command: Sequence[str], limit_s: float, log: Path) -> int | None:
    """The exit code; None if it took too long, and was ended with all of its processes."""
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            return None
        finally:
            try:
                process.wait(ENDING_S if process.poll() is None else 0)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def checked(parts: Sequence[GpuPart], folder: Path, total_s: float = TOTAL_S) -> Numbers:
    """Results by part, in the order in which they run, each printed as it comes."""
    found: Numbers = {}
    deadline = time.monotonic() + total_s
    for part in parts:
        found[part.name] = result_of(part, deadline - time.monotonic(), folder / f"{part.name}.log")
        print(row(part.name, found[part.name]), flush=True)
        if "output" in found[part.name]:
            print(indent(found[part.name]["output"][-1000:], "    | "), flush=True)
    return found


def row(name: str, result: Numbers) -> str:
    """One line of the table."""
    peaks = ", ".join(f"{role} {gb:.2f} GB" for role, gb in result.get("peak_memory_gb", {}).items())
    shown = [
        f"training {result['training_tokens_s']:,.0f} tokens/s" if "training_tokens_s" in result else "",
        f"generation {result['generation_tokens_s']:,.0f} tokens/s" if "generation_tokens_s" in result else "",
        f"merge {result['merge_ms']:.2f} ms" if "merge_ms" in result else "",
        f"{result['merge_share']:.0%} of {result['copy_gb_s']:,.0f} GB/s" if "merge_share" in result else "",
        peaks,
        *(str(result[key]) for key in ("said", "why") if key in result),
    ]
    return f"{name:10} {result['status']:8} {result.get('seconds', 0.0):6.1f} s  {'; '.join(filter(None, shown))}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="gpu_check", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    asked = parser.parse_args()
    facts: Numbers = {"device": asked.device, "gpus": torch.cuda.device_count(), "torch": str(torch.__version__)}
    facts |= {"torch_cuda": torch.version.cuda, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    if asked.device == "cuda" and not torch.cuda.is_available():
        why = f"not run: no CUDA device (torch {facts['torch']}, built for CUDA {facts['torch_cuda'] or 'none'})"
        asked.out.write_text(json.dumps(facts | {"status": why, "parts": {}}, indent=1) + "\n")
        print(f"{why}\n{asked.out}")
        return
    with tempfile.TemporaryDirectory(prefix="northstar-gpu-check-") as temporary:
        folder, settings = Path(temporary), list[str](asked.settings)
        if not any(setting.startswith("model.path=") for setting in settings):
            settings = [f"model.path={write_model(folder / 'model')}", *settings]
        gpus = facts["gpus"] if asked.device == "cuda" else 0
        parts = check_parts(asked.device, gpus, settings, folder, find_spec("vllm") is not None)
        found = checked(parts, folder)
    failed = [name for name, result in found.items() if result["status"] == "failed"]
    status = f"failed: {', '.join(failed)}" if failed else "ok"
    asked.out.write_text(json.dumps(facts | {"status": status, "parts": found}, indent=1) + "\n")
    print(f"{status}\n{asked.out}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
