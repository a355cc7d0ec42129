"""How much of a device's memory bandwidth a merge uses. python -m benchmarks.merge_bandwidth [--device cuda] [--parameters N]

The merge is the one of a tick (`swarm/held.py`), with its counts of signs: signed_ema, of a bit a parameter. What it must at
least move is the gradient in, the signs in and the gradient out; a copy of as many floats moves two. Packing an M̄ into sign
planes moves a float in, a bit out; on a CPU with their compression, as for a frame.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor

from anchor_service.config import AnchorConfig
from anchor_service.messages import Correction
from benchmarks.medians import medians
from codec import signs
from codec.ledger import Ledger
from codec.signs import SignPlanes
from merger.config import MergerConfig
from merger.interface import local_norm
from rl.weights import Weights
from swarm.grid import Grid
from swarm.held import Held
from swarm.merge_sweep import held_form
from swarm.messages import TickPlan

GRADIENT, BIT = 4, 1 / 8  # bytes a parameter
PARAMETERS = 134_515_008  # of SmolLM2-135M, embedding tied
ROUNDS = 9


def bandwidth_share(name: str, moved: float, seconds: float, copied: float, copy_s: float) -> dict[str, float]:
    """Of a job that must move `moved` bytes, beside a copy that moves `copied`. Gigabytes are 1e9 bytes."""
    speed, of_copy = moved / seconds, copied / copy_s
    return {
        f"{name}_ms": 1e3 * seconds,
        f"{name}_gb_s": speed / 1e9,
        "copy_gb_s": of_copy / 1e9,
        f"{name}_share": speed / of_copy,
    }


def merge_speed(device: torch.device, parameters: int) -> dict[str, float]:
    """On random numbers, in medians of ROUNDS."""
    generator = torch.Generator(device).manual_seed(0)
    gradient = torch.randn(parameters, generator=generator, device=device)
    m = torch.randn(parameters, generator=generator, device=device)
    held = _holding(m.sign().char(), device)
    plan = TickPlan(tick=2, mini_batch=0, correction=None, version=None)

    def merge() -> None:
        assert held.merge(plan, gradient, local_norm).merged

    spare = torch.empty_like(gradient)
    jobs = {
        "merge": _finished(merge, device),
        "copy": _finished(lambda: spare.copy_(gradient), device),
        "encode": (lambda: signs.encode(m)) if device.type == "cpu" else _finished(lambda: signs.planes_of(m), device),
    }
    packed = held.correction is not None and isinstance(held.correction.values, SignPlanes)
    moved = {"merge": 2 * GRADIENT + (BIT if packed else 1), "encode": GRADIENT + BIT}
    found = medians(jobs, ROUNDS)
    numbers: dict[str, float] = {"parameters": parameters}
    for job in moved:
        numbers |= bandwidth_share(job, moved[job] * parameters, found[job], 2 * GRADIENT * parameters, found["copy"])
    return numbers


def _holding(m_bar: Tensor, device: torch.device) -> Held:
    """One rank's part in merging, as it is after the tick in which it adopted these signs."""
    weights = cast(Weights, SimpleNamespace(names=["all"], shapes=[(len(m_bar),)], offsets=[0, len(m_bar)]))
    held = Held(AnchorConfig(), MergerConfig(), 0, weights, Grid(0, 1, 1, device, Ledger()))
    values = held_form(held.merger, m_bar, device.type)
    held.correction = Correction(version=0, source_tick=0, first_tick=1, values=values, digest="")
    held.merger.holds.fire(1)
    return held


def _finished(job: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`job`, and the wait for what a device has only been asked for."""

    def run() -> None:
        job()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(prog="merge_bandwidth", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parameters", type=int, default=PARAMETERS)
    asked = parser.parse_args()
    device = torch.device(asked.device)
    torch.set_num_threads(1)
    on = {"on": torch.cuda.get_device_name(device)} if device.type == "cuda" else {"on": "cpu"}
    print(json.dumps(on | merge_speed(device, asked.parameters)))


if __name__ == "__main__":
    main()
