"""Forward and backward of SmolLM2 on groups of samples, with and without shared prompts: `make bench-step`.

One process, one thread. Machines are noisy: medians of interleaved rounds, and only the ratios mean anything elsewhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.medians import medians
from rl.batch import Batch
from rl.config import GrpoConfig
from rl.model_files import model_shape, resolve
from rl.objective import MicroBatch, loss_terms, microbatches
from rl.policy import Stage
from rl.spans import Span

GRPO, CPU = GrpoConfig(), torch.device("cpu")


def made_up(groups: int, samples: int, prompt: int, response: int, vocab: int) -> Batch:
    """Random tokens: `groups` prompts, `samples` responses of half to once `response` tokens to each."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(response // 2, response + 1, groups * samples)
    heads = rng.integers(0, vocab, (groups, prompt), np.int32)
    parts = [part for i, n in enumerate(lengths) for part in (heads[i // samples], rng.integers(0, vocab, n, np.int32))]
    logprobs = -rng.random(lengths.sum(), np.float32)
    return Batch(
        tokens=np.concatenate(parts),
        prompt=np.full(len(lengths), prompt, np.int32),
        total=(prompt + lengths).astype(np.int32),
        rollout_logprobs=logprobs,
        ref_logprobs=logprobs[:0],
        rewards=np.zeros(len(lengths), np.float32),
        advantages=rng.standard_normal(len(lengths)).astype(np.float32),
        truncated=np.zeros(len(lengths), bool),
    )


def pass_through(stage: Stage, micros: list[MicroBatch]) -> None:
    stage.weights.grad.zero_()
    for micro in micros:
        hidden = stage(micro.ids, micro.real, {}, micro.distinct)
        loss_terms(stage, hidden, micro, None, 1000.0, GRPO, 1.0).loss.backward()
        stage.weights.collect()


def print_ratios_of(stages: dict[str, Stage], batch: Batch, size: int, rounds: int) -> None:
    jobs: dict[str, Callable[[], object]] = {}
    rows: dict[str, int] = {}
    for dtype, stage in stages.items():
        for share in (False, True):
            name = f"{dtype}, {'prompts shared' if share else 'plain'}"
            micros = microbatches(batch, np.arange(len(batch)), size, CPU, share=share)
            jobs[name] = lambda stage=stage, micros=micros: pass_through(stage, micros)
            rows[name] = sum(micro.ids.numel() for micro in micros)
    found, tokens = medians(jobs, rounds), int(batch.total.sum())
    base = next(iter(found.values()))
    for name, seconds in found.items():
        print(f"  {name:26} {rows[name]:6} rows {tokens / seconds:7.0f} tokens/s  {base / seconds:5.2f} x as fast")


def table(stage: Stage, micros: list[MicroBatch]) -> str:
    """Where one pass spends its time, by operation."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        pass_through(stage, micros)
    return found.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--groups", type=int, default=1, help="prompts of a pass")
    parser.add_argument("--samples", type=int, default=8, help="answers to each")
    parser.add_argument("--lengths", default="64x16,80x32,100x96", help="of prompts x longest answer, in tokens")
    parser.add_argument("--size", type=int, default=16, help="samples of a microbatch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", default="float32,bfloat16", help="e.g. float32,bfloat16")
    parser.add_argument("--profile", action="store_true", help="and where the time goes, by operation")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(resolve(args.model))
    shape = model_shape(str(folder))
    assert shape is not None  # a folder has one
    whole = Span(0, shape.layers, shape.layers)
    stages = {name: Stage(folder, whole, getattr(torch, name), CPU) for name in args.dtypes.split(",")}
    for lengths in args.lengths.split(","):
        prompt, response = map(int, lengths.split("x"))
        batch = made_up(args.groups, args.samples, prompt, response, shape.vocab)
        print(f"{args.groups} x {args.samples} samples, prompts of {prompt} tokens, answers of up to {response}:")
        print_ratios_of(stages, batch, args.size, args.rounds)
        for share in (False, True) if args.profile else ():
            micros = microbatches(batch, np.arange(len(batch)), args.size, CPU, share=share)
            print(table(next(iter(stages.values())), micros))


if __name__ == "__main__":
    main()
