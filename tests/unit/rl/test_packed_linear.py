"""An engine's large matrices in oneDNN's layout: the same products, of the weights that are there now."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import rl.packed_linear
from rl.config import PACKED_FROM, ModelConfig, RolloutConfig
from rl.engine import PlainModel
from rl.packed_linear import PackedLinears
from rl.transformers_engine import TransformersEngine

PROMPTS, KEYS = [[3, 4, 5, 6], [7, 8, 9]], [(0, 0, 1, p, s) for p in range(2) for s in range(4)]
BARS = {"float32": 1e-5, "bfloat16": 0.1}  # nats a token


@pytest.mark.parametrize("dtype", BARS)
def test_an_engine_samples_with_copies_of_the_newest_weights(tied_model: Path, dtype: str, monkeypatch):
    monkeypatch.setattr(rl.packed_linear, "PACKED_FROM", 1)
    plain = PlainModel(
        tied_model, ModelConfig.model_validate({"path": str(tied_model), "dtype": dtype}), RolloutConfig()
    )
    engine = TransformersEngine(plain, RolloutConfig(), 64)
    assert len(engine.packed.layers) == 1 + 4 * 7  # the head, and seven matrices of each layer
    found = []
    for scale in (1.0, 0.5):
        plain.weights.master.mul_(scale)
        engine.publish()
        samples = engine.sample(PROMPTS, KEYS, 12, 1.0)
        scored = plain.score([PROMPTS[i // 4] for i in range(8)], samples.tokens, 1.0)
        assert np.abs(np.concatenate(scored) - np.concatenate(samples.logprobs)).mean() < BARS[dtype]
        found.append(np.concatenate(samples.logprobs))
    assert len(found[0]) != len(found[1]) or not np.allclose(found[0], found[1], atol=1e-2)


def test_where_onednn_cannot_the_plain_product_is_used():
    """A CPU without AVX-512 multiplies bf16, and does not lay it out."""
    code = "import torch; from torch import nn; from rl.packed_linear import PackedLinears; "
    code += "m = nn.Linear(512, 512, dtype=torch.bfloat16); p = PackedLinears(m)\n"
    code += "with torch.no_grad(), p.in_use(): m(torch.ones(2, 512, dtype=torch.bfloat16))\nprint(len(p.layers))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_large_matrices_alone_are_packed_and_only_while_they_are_in_use():
    large, small = nn.Linear(512, 512), nn.Linear(64, 64)
    model = nn.Sequential(large, nn.Linear(512, 64), small)
    packed = PackedLinears(model)
    assert packed.layers == [large] and large.weight.numel() == PACKED_FROM
    x = torch.randn(3, 5, 512)
    with torch.no_grad():
        expected = model(x)
        with pytest.raises(ZeroDivisionError), packed.in_use():
            assert "forward" in vars(large)
            torch.testing.assert_close(model(x), expected)
            raise ZeroDivisionError
    assert "forward" not in vars(large)
