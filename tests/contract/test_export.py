"""An export is the policy of a checkpoint: what transformers loads from it is what the run trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from codec.config import CodecConfig
from deploy.cli import app
from deploy.config import load, to_toml
from deploy.export import ExportError, export_policy
from rl.lora_config import LoraConfig
from rl.model_files import BUILTIN, model_shape
from rl.policy import whole_model
from rl.task_config import TaskConfig
from rl.tasks import make_task
from swarm import checkpoint
from swarm.manifest import Entry
from tests.conftest import make_batch, on_ranks
from tests.contract.engine_process import build
from tests.contract.harness import make_rank, run_ticks

SERVE = """
import json, sys
from vllm import LLM, SamplingParams

llm = LLM(model=sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=100)
answers = llm.generate(json.load(open(sys.argv[2])), SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)
print(json.dumps([answer.outputs[0].text for answer in answers]))
"""
CUTS = {1: (), 2: (2,), 4: (1, 2, 3)}


def run_folder(root: Path, model: Path, *overrides: str) -> Path:
    """What a run writes first."""
    root.mkdir(exist_ok=True)
    (root / "config.toml").write_text(to_toml(load("k5", [f"model.path={model}", "swarm.boundaries=[]", *overrides])))
    return root


def trained(run: Path, model: Path, pp: int = 1, step: int = 3, ticks: int = 2, lora: int = 0) -> dict[str, np.ndarray]:
    """A checkpoint of `step`, as the workers write it; the masters by name."""
    writer = checkpoint.CheckpointWriter(run, step)
    found = on_ranks(pp, _train, model, pp, str(writer.path), step, ticks, lora)
    writer.commit({"step": step}, {}, [files for _, files in found])
    return {name: value for stage, _ in reversed(found) for name, value in stage.items()}


def _train(
    rank: int, init: str, model: Path, pp: int, folder: str, step: int, ticks: int, lora: int
) -> tuple[dict[str, np.ndarray], dict[str, Entry]]:
    vocab = model_shape(str(model)).vocab
    state = make_rank(model, rank, pp=pp, boundaries=CUTS[pp], codec=CodecConfig(kind="none"), init=init, lora=lora)
    found = run_ticks(state, [make_batch(vocab=vocab, seed=step + i) for i in range(ticks)])
    return found["weights"], checkpoint.save_rank(state, folder, step)


@pytest.mark.parametrize("pp", [1, 2, 4])
def test_the_weights_that_transformers_loads_are_the_masters_to_the_bit(model: Path, tmp_path: Path, pp: int):
    run, out = run_folder(tmp_path / "run", model), tmp_path / "out"
    masters = trained(run, model, pp)
    found = export_policy(run, out)
    loaded = dict(AutoModelForCausalLM.from_pretrained(out).named_parameters())
    assert set(loaded) == set(masters) and found.step == 3
    for name, parameter in loaded.items():
        assert parameter.dtype == torch.float32
        np.testing.assert_array_equal(parameter.detach().numpy(), masters[name], err_msg=name)
    assert found.parameters == sum(p.numel() for p in loaded.values())  # a tied embedding is stored once
    with safe_open(out / "model.safetensors", framework="pt") as stored:
        assert set(stored.keys()) == set(masters)


def test_adapters_are_peft_s_and_merged_they_are_the_model_of_the_run(model: Path, tmp_path: Path):
    run, ids = run_folder(tmp_path / "run", model, "model.lora.rank=4"), torch.arange(2, 20)[None]
    masters = trained(run, model, pp=2, lora=4)
    export_policy(run, tmp_path / "adapter")
    whole = export_policy(run, tmp_path / "merged", merge=True)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "adapter")
    found = {name: p for name, p in theirs.named_parameters() if ".lora_" in name}
    assert len(found) == len(masters) and len(masters) == 2 * 7 * 4
    for name, value in masters.items():
        np.testing.assert_array_equal(found[f"base_model.model.{name}"].detach().numpy(), value)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert whole.parameters == sum(p.numel() for p in merged.parameters())
    ours, weights = whole_model(model, torch.float32, torch.device("cpu"), lora=LoraConfig(rank=4))
    weights.master.copy_(torch.from_numpy(np.concatenate([masters[name].ravel() for name in weights.names])))
    with torch.inference_mode():
        expected = ours(input_ids=ids).logits
        torch.testing.assert_close(theirs(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_there_is_nothing_to_merge_where_all_weights_were_trained(untied_model: Path, tmp_path: Path):
    run = run_folder(tmp_path / "run", untied_model)
    with pytest.raises(ExportError, match="no adapters to merge: leave out --merge"):
        export_policy(run, tmp_path / "out", merge=True)


@dataclass
class Greedy:
    """An exported run, 32 validation prompts, and what the run's own engine answers at next to no temperature."""

    out: Path
    texts: list[str]
    prompts: list[list[int]]
    ours: list[str]
    before: list[str]  # the base policy's


@pytest.fixture(scope="module")
def greedy(tmp_path_factory: pytest.TempPathFactory) -> Greedy:
    folder, model = tmp_path_factory.mktemp("greedy"), BUILTIN / "tiny"
    run, out = run_folder(folder / "run", model), folder / "out"
    masters = trained(run, model, pp=2)
    export_policy(run, out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    task = make_task(TaskConfig(name="sums"), 5, 32)
    texts = [task.example("val", i).prompt for i in range(32)]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    engine = build("transformers", model, "float32")

    def answers() -> list[str]:
        coldest = engine.sample(prompts, [(i,) for i in range(32)], 40, temperature=1e-4)
        return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in coldest.tokens]

    before, weights = answers(), engine.plain.weights
    for i, name in enumerate(weights.names):
        weights.view(i, weights.master).copy_(torch.from_numpy(masters[name]))
    return Greedy(out, texts, prompts, answers(), before)


def test_greedy_text_of_the_export_is_that_of_the_runs_engine(greedy: Greedy):
    tokenizer, exported = AutoTokenizer.from_pretrained(greedy.out), AutoModelForCausalLM.from_pretrained(greedy.out)
    theirs = []
    for prompt in greedy.prompts:
        ids = torch.tensor([prompt])
        full = exported.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40)
        theirs.append(tokenizer.decode(full[0, len(prompt) :], skip_special_tokens=True))
    assert greedy.ours == theirs and len(set(theirs)) > 16
    assert greedy.ours != greedy.before  # it was trained


@pytest.mark.slow
def test_vllm_continues_the_export_as_the_runs_engine_does(greedy: Greedy, tmp_path: Path):
    """Started as a user would start it, from the files."""
    pytest.importorskip("vllm", reason="vllm is not installed: `make vllm` installs it", exc_type=ImportError)
    (tmp_path / "texts.json").write_text(json.dumps(greedy.texts))
    done = subprocess.run(
        [sys.executable, "-c", SERVE, greedy.out, tmp_path / "texts.json"],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == greedy.ours


def test_shards_and_their_index_load_as_one_file_does(
    untied_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = run_folder(tmp_path / "run", untied_model)
    masters = trained(run, untied_model, pp=2)
    monkeypatch.setattr("deploy.export.SHARD", 20_000)
    export_policy(run, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    for name, parameter in AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters():
        np.testing.assert_array_equal(parameter.detach().numpy(), masters[name])


def test_the_dtype_is_the_models_unless_told_otherwise(untied_model: Path, tmp_path: Path):
    run = run_folder(tmp_path / "run", untied_model, "model.dtype=bfloat16")
    masters = trained(run, untied_model)
    for asked, expected in ((None, torch.bfloat16), ("float32", torch.float32)):
        out = tmp_path / str(asked)
        export_policy(run, out, dtype=asked)
        for name, parameter in AutoModelForCausalLM.from_pretrained(out, dtype="auto").named_parameters():
            assert parameter.dtype == expected
            assert torch.equal(parameter.detach(), torch.from_numpy(masters[name]).to(expected))


def test_an_export_is_a_model_to_train_from(tied_model: Path, tmp_path: Path):
    run = run_folder(tmp_path / "run", tied_model)
    trained(run, tied_model, pp=2)
    export_policy(run, tmp_path / "out")
    again = run_folder(tmp_path / "again", tmp_path / "out")
    masters = trained(again, tmp_path / "out", ticks=0)
    export_policy(again, tmp_path / "out2")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "out2"))
    assert masters and first == second


def test_tokenizer_and_generation_config_are_those_of_the_base_model(tmp_path: Path):
    model, run = BUILTIN / "tiny", run_folder(tmp_path / "run", BUILTIN / "tiny")
    trained(run, model, ticks=0)
    export_policy(run, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (model, tmp_path / "out"))
    assert new == old


def test_the_newest_checkpoint_counts_unless_a_step_is_named(untied_model: Path, tmp_path: Path):
    run = run_folder(tmp_path / "run", untied_model)
    old, new = trained(run, untied_model, step=4), trained(run, untied_model, step=8)
    for out, step, masters in (("a", None, new), ("b", 4, old), ("c", 8, new)):
        assert export_policy(run, tmp_path / out, step).step == (step or 8)
        norm = AutoModelForCausalLM.from_pretrained(tmp_path / out).get_parameter("model.norm.weight")
        np.testing.assert_array_equal(norm.detach().numpy(), masters["model.norm.weight"])


# --- what is refused -----------------------------------------------------------------------------


def test_what_cannot_be_exported_is_said_with_the_fix_and_nothing_is_written(untied_model: Path, tmp_path: Path):
    run, out = run_folder(tmp_path / "run", untied_model), tmp_path / "out"
    with pytest.raises(ValueError, match=r"has no checkpoint: set run\.checkpoint_every"):
        export_policy(run, out)
    trained(run, untied_model, pp=2, step=3, ticks=0)
    with pytest.raises(ValueError, match="no checkpoint of step 2: it has those of steps 3"):
        export_policy(run, out, step=2)
    with pytest.raises(ExportError, match="is no run folder"):
        export_policy(tmp_path, out)
    run_folder(run, BUILTIN / "tiny")  # as if the folder behind model.path had been replaced
    with pytest.raises(ExportError, match=r"holds \d+ parameters and the model of the run \d+: model\.path names"):
        export_policy(run, out)
    run_folder(run, untied_model)
    (run / "checkpoints" / "step-000003" / "rank-d0p0.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint that is whole: .*rank-d0p0.safetensors is missing"):
        export_policy(run, out)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_a_folder_that_is_there_is_left_alone(untied_model: Path, tmp_path: Path):
    run, out = run_folder(tmp_path / "run", untied_model), tmp_path / "out"
    trained(run, untied_model, ticks=0)
    out.mkdir()
    (out / "mine").write_text("mine")
    with pytest.raises(ExportError, match="is already there"):
        export_policy(run, out)
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_the_command(untied_model: Path, tmp_path: Path):
    run = run_folder(tmp_path / "run", untied_model)
    refused = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "out")])
    assert refused.exit_code == 2 and "run.checkpoint_every" in refused.output
    trained(run, untied_model, step=7, ticks=0)
    done = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "out"), "--dtype", "bfloat16", "--step", "7"])
    assert done.exit_code == 0 and "step 7" in done.output and "bfloat16" in done.output
    assert (tmp_path / "out" / "model.safetensors").exists()
