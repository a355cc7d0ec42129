"""What a stage holds: no more than its buffers while it loads, and only its layers' inputs with checkpointing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from anchor_service.dense_gradient import DenseGradient
from codec.config import CodecConfig
from rl.config import GrpoConfig, SnapshotConfig
from rl.policy import Stage
from rl.spans import Span, spans
from tests.conftest import make_batch
from tests.contract.harness import make_rank, run_ticks

# --- loading -------------------------------------------------------------------------------------

CASES = [
    (0, 4, "float32", True),  # a trainer's first stage: masters and gradients
    (4, 8, "float32", True),  # its last one, with a copy of the tied embedding
    (0, 4, "bfloat16", True),  # and a compute copy with gradients of its own
    (0, 8, "float32", False),  # a whole model that is not trained: masters alone
]
LOAD = """
import json, os, resource, sys
from pathlib import Path
import torch
from rl.policy import Stage
from rl.spans import Span
folder, small, cases = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
torch.set_num_threads(1)
Stage(small, Span(0, 4, 4), torch.float32, torch.device("cpu"))  # imports, tables and caches of the libraries
for lo, hi, dtype, trainable in cases:
    if os.fork():  # each case in a process that has loaded nothing else yet
        assert os.wait()[1] == 0
        continue
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    weights = Stage(folder, Span(lo, hi, 8), getattr(torch, dtype), torch.device("cpu"), trainable).weights
    held = (weights.master, weights.compute, weights.grad, weights._compute_grad)
    buffers = {b.data_ptr(): b.nbytes for b in held if b is not None}
    status = Path("/proc/self/status").read_text()  # getrusage would count the process that started this one
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    print(peak - before, sum(buffers.values()), weights.numel, flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """105 million parameters, 420 MB in float32, in two files, so that a stage reads much of one."""
    config = Qwen2Config(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("large")
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    model.to_empty(device="cpu").save_pretrained(folder, max_shard_size="250MB")
    assert len(list(folder.glob("*.safetensors"))) == 2
    return folder


@pytest.fixture(scope="module")
def loaded(large_model: Path, untied_model: Path) -> list[tuple[int, int, int]]:
    """Of each case: by how many bytes the process grew, bytes of its buffers, parameters."""
    call = [sys.executable, "-c", LOAD, str(large_model), str(untied_model), json.dumps(CASES)]
    out = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    return [(int(growth), int(buffers), int(numel)) for growth, buffers, numel in map(str.split, out.splitlines())]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads resident memory from /proc")
@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{lo}-{hi}-{dtype}-{on}" for lo, hi, dtype, on in CASES])
def test_a_stage_peaks_within_a_fifth_of_its_buffers_while_it_loads(loaded: list[tuple[int, int, int]], case: int):
    growth, buffers, numel = loaded[case]
    expected = {("float32", True): 8, ("bfloat16", True): 12, ("float32", False): 4}[CASES[case][2:]]
    assert buffers == expected * numel
    assert 0.9 * buffers < growth < 1.2 * buffers + 8e6, f"{growth / buffers:.2f} x its buffers"


# --- activation checkpointing --------------------------------------------------------------------

CODECS = {
    "none": CodecConfig(kind="none"),
    "powersgd": CodecConfig(kind="powersgd", rank=8),
    "transform": CodecConfig(kind="transform", total_rate=0.3),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", CODECS)
def test_checkpointing_changes_no_bit_and_a_boundary_sees_each_forward_once(model: Path, kind: str, dtype: str):
    batches = [make_batch(seed=s) for s in range(2)]  # tables are refreshed before the second
    plain, checked = (
        run_ticks(
            make_rank(model, boundaries=(1, 3), codec=CODECS[kind], dtype=dtype, checkpointing=on),
            batches,
            trainer_logprobs=True,
        )
        for on in (False, True)
    )
    assert plain["losses"] == checked["losses"]
    np.testing.assert_array_equal(plain["flat"], checked["flat"])
    for name, grad in plain["grad"].items():
        np.testing.assert_array_equal(grad, checked["grad"][name], err_msg=name)
    for a, b in zip(plain["reports"], checked["reports"]):
        assert (a.sums, a.values, a.ledger) == (b.sums, b.values, b.ledger)


def test_the_anchors_gradient_is_the_same_to_the_bit(model: Path):
    batch = make_batch(seed=2)
    found = []
    for on in (False, True):
        anchor = DenseGradient(
            model, spans(4, [], 1), torch.float32, torch.device("cpu"), 5, GrpoConfig(), 1.0, SnapshotConfig(),
            checkpointing=on,
        )  # fmt: skip
        found.append(anchor.gradient(batch, batch.response_tokens).clone())
    assert found[0].any() and torch.equal(*found)


def kept(folder: Path, layers: int, checkpointing: bool) -> tuple[int, int]:
    """Bytes that autograd keeps of one microbatch's forward through the first `layers` layers, and of one [B, L, H]."""
    stage = Stage(folder, Span(0, layers, 4), torch.float32, torch.device("cpu"), checkpointing=checkpointing)
    weights = stage.weights.master
    own = range(weights.data_ptr(), weights.data_ptr() + weights.nbytes)
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.arange(2, 42).repeat(8, 1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = stage(ids, torch.ones_like(ids, dtype=torch.bool), {})
    return sum(seen.values()), out.nbytes


def test_with_checkpointing_a_layer_keeps_its_input_alone(untied_model: Path):
    two, hidden = kept(untied_model, 2, True)
    three, _ = kept(untied_model, 3, True)
    assert three - two == hidden
    without, _ = kept(untied_model, 3, False)
    assert three < without / 5
