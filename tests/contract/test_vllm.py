"""What the engine `vllm` does when something is wrong, and what it leaves of the process it lives in."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from deploy.export import export_policy
from rl.engine import EngineFailed
from rl.vllm_engine import VllmEngine
from tests.conftest import make_model
from tests.contract.engine_process import EngineProcess, load, sample, sleep, weights
from tests.contract.test_engines import NEEDS_VLLM, PROMPTS, keys
from tests.contract.test_export import run_folder, trained

pytestmark = NEEDS_VLLM
VLLM_ALONE = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    folder = make_model(tmp_path_factory.mktemp("model"), tied=True, hidden=128, positions=512)
    process = EngineProcess("vllm", folder, "float32")
    yield process
    process.close()


def lose_update(engine: VllmEngine) -> None:
    """New weights that vLLM is not told of."""
    engine.plain.weights.master.mul_(1.05)
    engine._prove()


def load_other_shape(engine: VllmEngine) -> None:
    weights = engine.plain.weights
    shapes, weights.shapes = weights.shapes, [tuple(reversed(shape)) for shape in weights.shapes]
    try:
        engine.publish()
    finally:
        weights.shapes = shapes


def set_threads(engine: VllmEngine, threads: int) -> tuple[int, int]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    return before, torch.get_num_threads()


def test_what_vllm_refuses_is_said_in_its_words(tmp_path_factory: pytest.TempPathFactory):
    short = make_model(tmp_path_factory.mktemp("short"), tied=True, hidden=128, positions=128)
    with pytest.raises(EngineFailed, match=r"(?s)vllm did not start.*max_model_len \(400\)"):
        EngineProcess("vllm", short, "float32")


def test_threads_are_as_configured_and_can_still_be_set(engine: EngineProcess):
    assert engine(set_threads, 2) == (1, 2)
    assert engine(set_threads, 1) == (2, 1)


def test_an_update_that_did_not_arrive_is_noticed(engine: EngineProcess):
    with pytest.raises(EngineFailed, match=r"log-probs of a fixed sequence are [\d.]+ nats.*at most 0\.01") as caught:
        engine(lose_update)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_sleeping_engine_gives_no_samples_and_new_weights_wake_it(engine: EngineProcess):
    """Order of the calls alone: a CPU's vLLM keeps its memory while it sleeps."""
    flat = engine(weights)
    engine(load, flat)
    before = engine(sample, PROMPTS, keys(4, 2), 8, 1.0)
    engine(sleep)
    with pytest.raises(EngineFailed):
        engine(sample, PROMPTS, keys(4, 2), 8, 1.0)
    engine(load, flat)
    after = engine(sample, PROMPTS, keys(4, 2), 8, 1.0)
    assert all(np.array_equal(a, b) for a, b in zip(before.tokens, after.tokens, strict=True))


def test_after_a_failed_update_there_are_no_samples(engine: EngineProcess):
    flat = engine(weights)
    for broken in (lambda: engine(load, np.full_like(flat, np.nan)), lambda: engine(load_other_shape)):
        with pytest.raises(EngineFailed, match="new weights for vllm"):
            broken()
        with pytest.raises(EngineFailed, match="its weights are not those of the run"):
            engine(sample, PROMPTS, keys(4, 1), 4, 1.0)


ASK = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
model, adapter, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
llm = LLM(model, dtype="float32", max_model_len=64, enforce_eager=True, skip_tokenizer_init=True, enable_lora=True, max_lora_rank=8)
asked = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
for request in (None, LoRARequest("trained", 1, adapter)):
    (found,) = llm.generate([{"prompt_token_ids": ids}], asked, lora_request=request)
    print("FOUND", [row[token].logprob for row, token in zip(found.prompt_logprobs[1:], ids[1:])])
"""


def test_exported_adapters_are_those_that_vllm_itself_adds(tmp_path: Path):
    model = make_model(tmp_path / "model", tied=True, hidden=128, positions=512)
    run, ids = run_folder(tmp_path / "run", model, "model.lora.rank=8"), list(range(2, 20))
    trained(run, model, lora=8)
    export_policy(run, tmp_path / "adapter")
    export_policy(run, tmp_path / "merged", merge=True)
    words = [sys.executable, "-c", ASK, str(model), str(tmp_path / "adapter"), json.dumps(ids)]
    answered = subprocess.run(words, capture_output=True, text=True, timeout=300, env=os.environ | VLLM_ALONE)
    found = [
        json.loads(line.removeprefix("FOUND ")) for line in answered.stdout.splitlines() if line.startswith("FOUND")
    ]
    assert len(found) == 2, answered.stderr[-2000:]
    for folder, theirs in zip((model, tmp_path / "merged"), found):
        with torch.inference_mode():
            logits = AutoModelForCausalLM.from_pretrained(folder)(input_ids=torch.tensor([ids])).logits[0, :-1]
        ours = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        np.testing.assert_allclose(theirs, ours.numpy(), atol=1e-4)
    assert np.abs(np.subtract(*found)).max() > 1e-2
