"""A process that builds a model and samples from it starts without what transformers would bring along for others."""

from __future__ import annotations

import subprocess
import sys

from rl.lean import lean_transformers

UNWANTED = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp", "scipy.optimize")
ENGINE = """
import sys
from rl.batch import Prompts
from rl.config import GrpoConfig, ModelConfig, RolloutConfig, SnapshotConfig, TaskConfig
from rl.rollout import RolloutWorker

grpo = GrpoConfig(max_response_length=4)
engine = RolloutWorker(ModelConfig(), TaskConfig(), grpo, RolloutConfig(), SnapshotConfig(), 0, 8, 1)
engine.generate(Prompts("train", 1, (0, 1), 2, 1.0))
"""


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_an_engine_and_a_stage_do_without_a_compiler_tensor_parallelism_and_scipy():
    stage = """
from pathlib import Path
import torch
from rl.policy import Span, Stage
stage = Stage(engine.engine.plain.folder, Span(0, 4, 4), torch.float32, torch.device("cpu"))
real = torch.ones(2, 5, dtype=torch.bool)
stage.logits(stage(real.long(), real, {})[real]).sum().backward()
"""
    assert run(f"{ENGINE}{stage}print([name for name in {UNWANTED} if name in sys.modules])").strip() == "[]"


def test_torch_and_transformers_are_afterwards_what_they_were():
    """A compiler works, the probes say what is there, a mask that is a function of a user's own is mapped."""
    asked = """
import torch
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_scipy_available, is_torch_distributed_available
torch.manual_seed(0)
double = torch.compile(lambda x: 2 * x, backend="eager")
mask = sdpa_mask(1, 3, 3, mask_function=lambda b, h, q, k: k <= q, use_vmap=True, allow_is_causal_skip=False)
print(double(torch.ones(2)).sum().item(), is_scipy_available(), is_torch_distributed_available(), mask.int().tolist())
"""
    assert run(f"import rl.policy{asked}").strip() == "4.0 True True [[[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]]"


def test_nothing_is_replaced_where_the_compiler_is_loaded_already():
    import torch._dynamo

    with lean_transformers():
        assert sys.modules["torch._dynamo"] is torch._dynamo
        assert torch._dynamo.__file__ is not None
