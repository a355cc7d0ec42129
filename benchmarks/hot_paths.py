"""Time what a tick adds to plain training, as ratios to a baseline in the same run: `make bench`.

Machines are noisy: medians of interleaved rounds, and only the ratios mean anything elsewhere.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from codec import frames, signs
from codec.boundary import Boundary
from codec.config import CodecConfig
from codec.ledger import Ledger
from merger import MERGERS
from merger.config import MergerConfig

HIDDEN, TOKENS, PARAMETERS = 576, 1024, 4_000_000  # SmolLM2's hidden size
torch.set_num_threads(1)
torch.manual_seed(0)


def medians(jobs: dict[str, Callable[[], object]], rounds: int = 9) -> dict[str, float]:
    """Median seconds of each job, all jobs in turn in every round so that drift hits them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds + 1):  # the first warms up
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def report(title: str, baseline: str, jobs: dict[str, Callable[[], object]]) -> None:
    found = medians(jobs)
    print(f"{title} (baseline: {baseline}, {found[baseline] * 1e3:.2f} ms)")
    for name, seconds in found.items():
        if name != baseline:
            print(f"  {name:44} {seconds / found[baseline]:8.3f} x  {seconds * 1e3:9.2f} ms")


def boundary() -> None:
    """A boundary, both directions, beside one SwiGLU block forward and backward on the same tokens."""
    x, dx = torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, HIDDEN)
    block = nn.Sequential(nn.Linear(HIDDEN, 3 * HIDDEN), nn.SiLU(), nn.Linear(3 * HIDDEN, HIDDEN))

    def layer() -> None:
        block(x).backward(dx)

    def crossing(cut: Boundary, observe: bool) -> None:
        cut.decode(cut.encode(x, observe))
        cut.decode_backward(cut.encode_backward(dx))

    cuts = {r: Boundary(CodecConfig(rank=r), 0, HIDDEN, 0, Ledger()) for r in (29, 72)}
    jobs: dict[str, Callable[[], object]] = {"MLP block": layer}
    for rank, cut in cuts.items():
        jobs[f"PowerSGD r={rank} ({rank / HIDDEN:.1%}), both ways"] = lambda cut=cut: crossing(cut, False)
        jobs[f"PowerSGD r={rank}, with statistics"] = lambda cut=cut: crossing(cut, True)
    report(f"boundary, H={HIDDEN}, {TOKENS} tokens", "MLP block", jobs)


def correction() -> None:
    """Merging, and packing and unpacking corrections, beside one Adam step on as many parameters."""
    g, m = torch.randn(PARAMETERS), torch.randn(PARAMETERS)
    parameter = nn.Parameter(torch.randn(PARAMETERS))
    parameter.grad = g.clone()
    adam = torch.optim.AdamW([parameter], lr=1e-6, fused=True)
    merge = MERGERS["signed_ema"](MergerConfig())
    planes, sign = signs.encode(m), m.sign().to(torch.int8)
    frame = frames.pack({}, planes)
    jobs: dict[str, Callable[[], object]] = {
        "Adam step": adam.step,
        "merge signed_ema": lambda: merge(g, sign, 0),
        "encode signs": lambda: signs.encode(m),
        "decode signs": lambda: signs.decode(planes, PARAMETERS),
        "pack a frame of fp32": lambda: frames.pack({}, {"m": m.numpy()}),
        "unpack a frame of sign planes": lambda: frames.unpack(frame, "bench"),
    }
    report(f"correction, {PARAMETERS:,} parameters", "Adam step", jobs)


if __name__ == "__main__":
    boundary()
    correction()
