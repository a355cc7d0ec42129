"""How much of a device's memory bandwidth a merge uses. python -m benchmarks.merge_bandwidth [--device cuda] [--parameters N]

The merge is the one of a tick (`swarm/held.py`), with its counts of signs: signed_ema, of a sign in int8 a parameter. What
it must at least move is the gradient in, the sign in and the gradient out; a copy of as many floats moves two.
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
from benchmarks.hot_paths import medians
from codec.ledger import Ledger
from merger.config import MergerConfig
from merger.interface import local_norm
from rl.weights import Weights
from swarm.grid import Grid
from swarm.held import Held
from swarm.messages import TickPlan

GRADIENT, SIGN = 4, 1  # bytes a parameter
PARAMETERS = 134_515_008  # of SmolLM2-135M, embedding tied
ROUNDS = 9


def bandwidth_share(parameters: int, merge_s: float, copy_s: float) -> dict[str, float]:
    """Of `parameters`, merged in `merge_s` seconds; a copy of as many floats takes `copy_s`. Gigabytes are 1e9 bytes."""
    merged, copied = (2 * GRADIENT + SIGN) * parameters / merge_s, 2 * GRADIENT * parameters / copy_s
    return {
        "parameters": parameters,
        "merge_ms": 1e3 * merge_s,
        "merge_gb_s": merged / 1e9,
        "copy_gb_s": copied / 1e9,
        "merge_share": merged / copied,
    }


def merge_speed(device: torch.device, parameters: int) -> dict[str, float]:
    """On random numbers, in medians of ROUNDS."""
    generator = torch.Generator(device).manual_seed(0)
    gradient = torch.randn(parameters, generator=generator, device=device)
    signs = torch.randn(parameters, generator=generator, device=device).sign().char()
    held = _holding(signs, device)
    plan = TickPlan(tick=2, mini_batch=0, correction=None, version=None)

    def merge() -> None:
        assert held.merge(plan, gradient, local_norm).merged

    spare = torch.empty_like(gradient)
    jobs = {"merge": _finished(merge, device), "copy": _finished(lambda: spare.copy_(gradient), device)}
    found = medians(jobs, ROUNDS)
    return bandwidth_share(parameters, found["merge"], found["copy"])


def _holding(signs: Tensor, device: torch.device) -> Held:
    """One rank's part in merging, as it is after the tick in which it adopted these signs."""
    weights = cast(Weights, SimpleNamespace(names=["all"], shapes=[(len(signs),)], offsets=[0, len(signs)]))
    held = Held(AnchorConfig(), MergerConfig(), 0, weights, Grid(0, 1, 1, device, Ledger()))
    held.correction = Correction(version=0, source_tick=0, first_tick=1, values=signs, digest="")
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
    on = {"on": torch.cuda.get_device_name(device)} if device.type == "cuda" else {"on": "cpu"}
    print(json.dumps(on | merge_speed(device, asked.parameters)))


if __name__ == "__main__":
    main()
