"""A GRPO step of TRL's `GRPOTrainer` beside a step of this project: `make bench-trl`, in an environment of its own with both.

    TRL        from `on_step_begin` to `on_step_end` of `trainer.train()`: the step's answers by `model.generate`, decoding,
               rewards, log-probs and entropies, backward, clipping, AdamW
    northstar  `timing_s/step` of `metrics.jsonl`: the step's answers by an engine, another process, and all that moves between
               the two; decoding, rewards, log-probs and entropies, backward, merge, clipping, AdamW, digests, and the new
               weights as the engine holds them

Neither counts start-up, validation, checkpoints or writing logs; the first step of each run warms up and is left out. Equal are
the policy, in fp32 on a CPU, prompts in their order, answers to each, their longest length, temperature, samples of a
microbatch, the objective (old log-probs are the update's own), AdamW and its numbers, one update a step, threads of a process,
torch and transformers. Both sample, so answers are not the same ones: their mean length is printed. Gradient checkpointing, TRL's
default, is off, as here. Prompts are computed once for all their answers here, which the built-in policy is told to do, and all
others do by default.

`no codec` is ordinary GRPO in one worker, one engine, no anchor, weights sent whole. The second row is the preset's codec, its
boundaries within the one worker, with its encoding of weights for the engine. Rounds in turn, so that drift of the machine hits all: ratios of
medians, of each round, and only they mean anything elsewhere. On a machine that does other work beside, seconds of processors
say more: of TRL's process; here of driver, worker, engine and all of Ray's own, writing logs included.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback, logging

from benchmarks.records import kept_records
from deploy.cluster.launch import cluster, drive
from deploy.config import load
from rl.model_files import resolve
from rl.tasks import make_task
from swarm.run_config import RunConfig

ALONE = [
    "swarm.pp=1",
    "anchor.enabled=false",
    "merger.kind=none",
    "rollout.max_staleness=0",
    "grpo.old_logprobs=tick",
    "grpo.rollout_is=none",
    "val.size=1",
    "samples.max_mb=0",
]
TRL, PLAIN, CODED = "TRL", "no codec", "with the codec of its preset"


class Case(NamedTuple):
    """Presets and what is set besides, of the row without a codec and of the one with; `file`: of a model to be fetched."""

    plain: tuple[str, list[str]]
    coded: tuple[str, list[str]]
    prompts: int  # of a step
    steps: int
    rounds: int
    file: str | None = None


CASES = {
    "tiny": Case(
        ("dense", ["snapshot.encoding=full", "swarm.share_prompts=true"]),
        ("demo", ["grpo.lr=6e-5", "swarm.micro_batch_size=32", "swarm.share_prompts=true"]),
        16,
        16,
        6,
    ),
    "smollm2": Case(
        (
            "smollm2",
            ["codec.kind=none", "snapshot.dtype=float32", "snapshot.encoding=full", "swarm.micro_batch_size=16"],
        ),
        ("smollm2", ["swarm.micro_batch_size=16"]),
        8,
        3,
        3,
        "models/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}


class Steps(NamedTuple):
    """Of each step of one run but the first: seconds, and of processors; tokens of an answer, in the mean of those steps."""

    seconds: list[float]
    cpu: list[float]
    tokens: float


def configs(case: Case, threads: int, replicas: int = 1) -> dict[str, RunConfig]:
    """By row: one update a step, whose prompts one call of each engine answers; as many engines as replicas of the swarm."""
    sizes = [f"{key}={case.prompts}" for key in ("train_batch_size", "ppo_mini_batch_size")]
    common = [
        *ALONE,
        *(f"grpo.{size}" for size in sizes),
        f"swarm.dp={replicas}",
        f"rollout.replicas={replicas}",
        f"rollout.batch_size={case.prompts // replicas}",
        f"run.steps={case.steps}",
        f"val.every={case.steps}",
        f"swarm.threads={threads}",
    ]
    rows = {PLAIN: case.plain, CODED: case.coded}
    return {row: load(preset, [*common, *overrides]) for row, (preset, overrides) in rows.items()}


def trl_settings(config: RunConfig) -> dict[str, Any]:
    """What `config` is as fields of TRL's GRPOConfig. Raises ValueError if microbatches do not divide a step's samples."""
    grpo, size = config.grpo, config.swarm.micro_batch_size
    samples = grpo.train_batch_size * grpo.group_size
    if samples % size:
        raise ValueError(
            f"swarm.micro_batch_size {size} does not divide the {samples} samples of a step: TRL needs whole ones"
        )
    return {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": samples // size,  # and TRL answers the prompts of all of them at once
        "num_generations": grpo.group_size,
        "max_completion_length": grpo.max_response_length,
        "temperature": config.rollout.temperature,
        "max_steps": config.run.steps,
        "learning_rate": grpo.lr,
        "lr_scheduler_type": "constant",
        "adam_beta1": grpo.betas[0],
        "adam_beta2": grpo.betas[1],
        "weight_decay": grpo.weight_decay,
        "max_grad_norm": grpo.grad_clip,
        "epsilon": grpo.clip_ratio,
        "optim": "adamw_torch_fused",
        "loss_type": "dapo",
        "beta": 0.0,
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


class _Clock(TrainerCallback):
    """When TRL's steps begin and end."""

    def __init__(self):
        self.seconds: list[float] = []
        self.cpu: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start, self.start_cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        self.cpu.append(time.process_time() - self.start_cpu)


def steps_of_trl(config: RunConfig, threads: int, folder: Path) -> Steps:
    from datasets import Dataset
    from trl import GRPOConfig as TrlConfig  # pyright: ignore[reportMissingImports]
    from trl import GRPOTrainer  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(threads)
    task, model = make_task(config.task, config.run.seed, val_size=1), resolve(config.model.path)
    examples = [task.example("train", i) for i in range(config.run.steps * config.grpo.train_batch_size)]
    lengths: list[float] = []

    def reward(completions: list[str], completion_ids: list[list[int]], index: list[int], **_: Any) -> list[float]:
        lengths.append(statistics.mean(map(len, completion_ids)))
        return [task.score(examples[i], text) for i, text in zip(index, completions, strict=True)]

    prompts = [config.task.instruction + example.text for example in examples]
    clock = _Clock()
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa"),
        processing_class=AutoTokenizer.from_pretrained(model),
        reward_funcs=reward,
        args=TrlConfig(output_dir=str(folder), **trl_settings(config)),
        train_dataset=Dataset.from_dict({"prompt": prompts, "index": list(range(len(prompts)))}),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return Steps(clock.seconds[1:], clock.cpu[1:], statistics.mean(lengths[1:]))


def steps_here(config: RunConfig, folder: Path) -> Steps:
    spent: list[float] = []

    def look(record: dict[str, Any]) -> None:
        if record["kind"] == "step":
            spent.append(_cpu_of_all())

    drive(config, folder, look)
    records = kept_records(folder)
    steps = [record for record in records if record["kind"] == "step" and record["step"] > 1]
    tokens = statistics.mean(step["response_length/mean"] for step in steps)
    return Steps([step["timing_s/step"] for step in steps], [b - a for a, b in pairwise(spent)], tokens)


def _cpu_of_all() -> float:
    """Seconds of processors that this process and all below it took so far."""
    me, found = psutil.Process(), 0.0
    for process in (me, *me.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            found += times.user + times.system
    return found


def in_rounds(
    jobs: dict[str, Callable[[Path], Steps]], rounds: int, folder: Path, say: Callable[[str], None]
) -> dict[str, list[Steps]]:
    """All jobs in each round, each round beginning with another."""
    found: dict[str, list[Steps]] = {name: [] for name in jobs}
    names = list(jobs)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            found[name].append(jobs[name](folder / f"{name.replace(' ', '-')}-{i}"))
            last = found[name][-1]
            say(
                f"  round {i}, {name}: {statistics.median(last.seconds):.2f} s, {statistics.median(last.cpu):.2f} of CPU"
            )
    return found


def ratios_to(base: list[Steps], others: list[Steps], what: Callable[[Steps], list[float]]) -> list[float]:
    """Of each round: the median step of `base` over that of `others`."""
    return [statistics.median(what(b)) / statistics.median(what(o)) for b, o in zip(base, others, strict=True)]


def table_of(found: dict[str, list[Steps]]) -> list[str]:
    """A line a job: its median step over all rounds, and TRL's step over it, in seconds and in those of processors."""
    lines: list[str] = []
    measures: dict[str, Callable[[Steps], list[float]]] = {"s": lambda steps: steps.seconds, "CPU s": lambda s: s.cpu}
    for name, rounds in found.items():
        line = f"  {name:30} {statistics.mean(s.tokens for s in rounds):5.1f} tokens an answer"
        for unit, what in measures.items():
            line += f", {statistics.median([x for steps in rounds for x in what(steps)]):.2f} {unit} a step"
            if name != TRL:
                ratios = ratios_to(found[TRL], rounds, what)
                line += f" (TRL's is {statistics.median(ratios):.2f} x, {min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(line)
    return lines


def compare_steps(name: str, case: Case, threads: int, replicas: int) -> None:
    found = configs(case, threads, replicas)
    plain = found[PLAIN]
    jobs: dict[str, Callable[[Path], Steps]] = {TRL: lambda folder: steps_of_trl(plain, threads * replicas, folder)}
    jobs |= {row: lambda folder, config=config: steps_here(config, folder) for row, config in found.items()}
    here = f"{replicas} workers and engines" if replicas > 1 else "a worker and an engine"
    print(
        f"{name}, threads of TRL: {threads * replicas}, here {here} of {threads}; "
        f"{case.prompts} prompts x {plain.grpo.group_size} answers a step"
    )
    with tempfile.TemporaryDirectory() as temporary, cluster(plain, address=None):
        seen = in_rounds(jobs, case.rounds, Path(temporary), lambda line: print(line, flush=True))
    print("\n".join(table_of(seen)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="trl_step", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    there = [name for name, case in CASES.items() if case.file is None or Path(case.file).exists()]
    parser.add_argument(
        "--models", nargs="+", choices=CASES, default=there, help="default: those whose files are there"
    )
    cores = parser.add_mutually_exclusive_group()
    cores.add_argument("--threads", type=int, default=1, help="torch threads of each process, of both sides")
    cores.add_argument(
        "--replicas", type=int, default=1, help="workers and engines here, of a thread each; TRL's threads"
    )
    parser.add_argument("--rounds", type=int, help="default: 6 of the built-in model, 3 of SmolLM2")
    asked = parser.parse_args()
    if importlib.util.find_spec("trl") is None:
        parser.error("trl is not installed here: `make bench-trl` makes an environment that has it, .venv-trl")
    logging.disable_progress_bar()
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray starts workers at 15: beside other work TRL alone would run
    for name in asked.models:
        case = CASES[name]
        if case.prompts % asked.replicas:
            parser.error(f"--replicas {asked.replicas} must divide the {case.prompts} prompts of a step of {name}")
        compare_steps(name, case._replace(rounds=asked.rounds or case.rounds), asked.threads, asked.replicas)


if __name__ == "__main__":
    main()
