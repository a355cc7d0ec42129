"""The engine `vllm` on a GPU: its log-probs, new weights, and a sleep that frees the memory."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from rl.engine import Engine
from tests.conftest import make_model
from tests.contract.engine_process import EngineProcess, load, sample, save, sleep, weights
from tests.contract.test_engines import BARS, LONG, PROMPTS, difference, keys, same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed: `make vllm VLLM=vllm`"),
]
CACHE_GB = 4.0


@pytest.fixture(scope="module", params=["tied", "untied"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    folder = make_model(tmp_path_factory.mktemp("model"), request.param == "tied", hidden=256, positions=512)
    process = EngineProcess(
        "vllm", folder, "bfloat16", device="cuda", placement="colocated", gpu_memory=0.3, kv_cache_gb=CACHE_GB
    )
    process.kind, process.dtype, process.folder = "vllm", "bfloat16", folder
    yield process
    process.close()


def free_bytes(engine: Engine) -> int:
    return torch.cuda.mem_get_info()[0]


def test_logprobs_are_those_of_a_plain_forward(engine: EngineProcess):
    found = engine(sample, PROMPTS, keys(4, 8), 20, 0.7)
    assert difference(engine, engine.folder, PROMPTS, found, 0.7) < BARS["bfloat16"]
    assert same(found, engine(sample, PROMPTS, keys(4, 8), 20, 0.7))


def test_it_sleeps_wakes_and_follows_new_weights(engine: EngineProcess, tmp_path):
    prompts, flat = PROMPTS + LONG, engine(weights)
    before = engine(sample, prompts, keys(5, 2), 8, 1.0)
    awake = engine(free_bytes)
    engine(sleep)
    assert engine(free_bytes) - awake > 0.9 * CACHE_GB * 2**30
    noise = 0.05 * np.random.default_rng(1).standard_normal(len(flat)).astype(np.float32)
    engine(load, flat + noise)
    engine(save, tmp_path)
    after = engine(sample, prompts, keys(5, 2), 8, 1.0)
    assert not same(before, after)
    assert difference(engine, tmp_path, prompts, after, 1.0) < BARS["bfloat16"]
    engine(load, flat)
