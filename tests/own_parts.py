"""A codec, a merger and a sum of gradients that a user might write: a file each, outside this repository."""

from __future__ import annotations

from pathlib import Path

CODEC = '''
"""Every number as float16, each way."""

import torch

from codec.costs import CodecCost
from codec.dense import Dense


class Half(Dense):
    def encode(self, x, room, observe):
        half = x.half()
        payload, _ = super().encode(half, room, False)
        return payload, half.to(x.dtype) if observe else None

    def decode(self, payload, n, dtype):
        return super().decode(payload, n, torch.float16).to(dtype)

    def limits(self, n, dtype):
        return super().limits(n, torch.float16)


def half(config, hidden, seed):
    return Half(hidden), Half(hidden)


def cost(config, shape, tokens):
    return CodecCost("float16", forward=2 * shape.hidden, backward=2 * shape.hidden, dense=shape.dense)


half.cost = cost
'''

MERGER = '''
"""Steps of one size: where M's sign differs, a coordinate is left out. Remembers how often it merged."""

import torch

from merger.interface import Merger, MergerCost, local_norm


class Veto(Merger):
    payload = "sign"

    def __init__(self, config):
        super().__init__(config)
        self.merges = 0

    @classmethod
    def cost(cls, config, n):
        return MergerCost(state=8)

    def prepare(self, g_comp, correction, age, norm=local_norm):
        self.merges += 1
        self.dose = self.config.dose * self.config.age_decay**age

    def apply(self, g_comp, correction):
        vetoed = g_comp.sign().mul(correction) < 0
        return torch.where(vetoed, (1 - self.dose) * g_comp, g_comp)

    def state(self):
        return {"merges": torch.tensor(self.merges)}

    def restore(self, state):
        self.merges = int(state["merges"])
'''

GRADIENT = '''
"""Gradients summed in float16: half the bytes, and what rounding loses is lost."""

from math import prod

from codec.costs import GradientCost


class HalfSum:
    def __init__(self, replicas):
        self.replicas = replicas

    def __call__(self, grad):
        half = grad.half()
        self.replicas.sum(half, grad.nbytes)
        grad.copy_(half)

    def state(self):
        return {}

    def restore(self, state):
        pass


def halves(config, shapes, replicas, seed, device):
    return HalfSum(replicas)


def cost(config, shapes, copies):
    return GradientCost(sent=2 * sum(map(prod, shapes)), sums=1, kept=0)


halves.cost = cost
'''

NAMED = (
    "codec.kind=my_codec:half",
    "merger.kind=my_merger:Veto",
    "merger.age_decay=0.9",
)


BETWEEN_REPLICAS = "codec.gradient.kind=my_gradient:halves"


def write_parts(folder: Path) -> None:
    """The files; a process that has `folder` on its path finds them by their names above."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "my_codec.py").write_text(CODEC)
    (folder / "my_gradient.py").write_text(GRADIENT)
    (folder / "my_merger.py").write_text(MERGER)
