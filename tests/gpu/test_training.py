"""A worker on a GPU: the losses and gradients of a CPU, up to the rounding of its dtype, and a whole run by Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from codec.config import KINDS, CodecConfig
from tests.conftest import make_batch
from tests.contract.harness import make_rank, run_ticks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
GPUS = torch.cuda.device_count()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_a_cpu_in_fp32(tied_model: Path, kind: str, dtype: str):
    codec = CodecConfig(kind=kind, **({"rank": 8} if kind in ("powersgd", "random_k") else {}))
    batches = [make_batch(seed=seed) for seed in range(3)]
    cpu = run_ticks(make_rank(tied_model, codec=codec), batches)
    gpu = run_ticks(make_rank(tied_model, codec=codec, dtype=dtype, on="cuda"), batches)
    bar = TOLERANCE[dtype]
    np.testing.assert_allclose(gpu["losses"], cpu["losses"], rtol=bar, atol=bar / 10)
    here, there = (np.concatenate([g.ravel() for g in run["grad"].values()]) for run in (cpu, gpu))
    assert here @ there / np.linalg.norm(here) / np.linalg.norm(there) > 1 - bar


@pytest.mark.slow
@pytest.mark.parametrize("pp", [1, 2])
def test_a_run_on_gpus_ends_and_says_what_it_took(pp: int, tmp_path: Path):
    """bf16 with fp32 masters. With two stages activations cross an nccl group; on one GPU there is one stage."""
    if pp > GPUS:
        pytest.skip(f"{pp} stages need {pp} GPUs, there are {GPUS}")
    keys = ["run.steps=3", "val.every=9", "val.size=32", "swarm.device=cuda", f"swarm.pp={pp}", "model.dtype=bfloat16"]
    keys += ["rollout.device=cuda", "rollout.replicas=1"] if pp + 1 <= GPUS else []
    keys += ["anchor.device=cuda"] if pp + 2 <= GPUS else []
    command = [sys.executable, "-m", "northstar", "run", "k5", "--out", tmp_path / "run"]
    for key in keys:
        command += ["--set", key]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "completed" and summary["ticks"] == 6
    print(summary["peak_memory_gb"], summary["last_step"]["perf/throughput"], "tokens/s")
