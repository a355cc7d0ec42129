"""`make gpu-check` without a GPU: that it says so, the numbers it reads off a run, and parts that fail or take too long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_check import ROOT, SETTINGS, GpuPart, check_parts, checked, main, of_kind, on_gpus, row, run_numbers
from benchmarks.merge_bandwidth import bandwidth_share, merge_speed
from codec.config import KINDS
from deploy.config import load


def test_without_a_gpu_it_says_so_in_its_file_and_ends_well(tmp_path: Path):
    out = tmp_path / "gpu-check.json"
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(out)]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # also where there is one
    done = subprocess.run(command, env=hidden, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["status"].startswith("not run: no CUDA device") and found["status"] in done.stdout
    assert found["parts"] == {} and found["device"] == "cuda"


def test_a_share_of_the_bandwidth_is_bytes_over_time_over_that_of_a_copy():
    """Nine bytes a parameter, in and out, against the eight of a copy of floats."""
    found = bandwidth_share("merge", 9e9, 0.018, copied=8e9, copy_s=0.004)
    assert found["merge_gb_s"] == pytest.approx(500) and found["copy_gb_s"] == pytest.approx(2000)
    assert found["merge_share"] == pytest.approx(0.25) and found["merge_ms"] == pytest.approx(18)


def test_the_merge_that_is_measured_runs_on_a_cpu():
    found = merge_speed(torch.device("cpu"), 100_000)
    assert found["parameters"] == 100_000 and 0 < found["merge_share"] < 2 and 0 < found["encode_share"] < 2


def _run_folder(folder: Path) -> Path:
    """Two steps of two ticks; 100 tokens in the last one, of which 8 x 5 were sampled."""
    folder.mkdir()
    (folder / "config.toml").write_text(
        '[grpo]\ntrain_batch_size = 4\ngroup_size = 2\n[swarm]\ndevice = "cuda"\n[rollout]\ndevice = "cpu"\n'
    )
    last = {"step": 2, "perf/throughput": 20.0, "timing_s/step": 5.0, "timing_s/gen": 0.5, "response_length/mean": 5.0}
    summary = {"last_step": last, "peak_memory_gb": {"worker": 1.5, "engine": 0.5}}
    (folder / "summary.json").write_text(json.dumps(summary))
    waited = {"timing_s/tick": 3.0, "timing_s/anchor_wait": 2.5, "timing_s/merge": 0.003}
    ticks = [
        {"kind": "tick", "step": 1, "timing_s/tick": 99.0, "timing_s/merge": 9.0},
        {"kind": "step", "step": 2},
        {"kind": "tick", "step": 2, **waited},
        {"kind": "tick", "step": 2, "timing_s/tick": 1.5, "timing_s/merge": 0.001},
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(tick)}\n" for tick in ticks))
    return folder


def test_numbers_are_of_the_last_step_without_waits_for_the_anchor(tmp_path: Path):
    found = run_numbers(_run_folder(tmp_path / "run"))
    assert found["training_tokens_s"] == pytest.approx(100 / 2.0)
    assert found["generation_tokens_s"] == pytest.approx(8 * 5 / 0.5)
    assert found["merge_ms"] == pytest.approx(2.0)
    assert found["peak_memory_gb"] == {"worker, cuda": 1.5, "engine, cpu": 0.5}
    line = row("none", {"status": "ok", "seconds": 7.0} | found)
    assert "training 50 tokens/s" in line and "generation 80 tokens/s" in line and "worker, cuda 1.50 GB" in line


def _said(output: str) -> dict[str, Any]:
    return {"said": output.strip()}


def _python(name: str, code: str, limit_s: float = 20.0, missing: str = "") -> GpuPart:
    return GpuPart(name, [sys.executable, "-c", code], limit_s, _said, missing)


def test_a_part_that_fails_is_named_and_the_others_run(tmp_path: Path):
    parts = [
        _python("raises", "print('why it did'); raise SystemExit(3)"),
        _python("hangs", "import time; time.sleep(60)", limit_s=0.5),
        GpuPart("unreadable", [sys.executable, "-c", ""], 20.0, lambda output: {"x": json.loads(output)}),
        _python("elsewhere", "", missing="vllm is not installed"),
        _python("good", "print('fine')"),
    ]
    found = checked(parts, tmp_path)
    assert [(name, result["status"]) for name, result in found.items()] == [
        ("raises", "failed"),
        ("hangs", "failed"),
        ("unreadable", "failed"),
        ("elsewhere", "not run"),
        ("good", "ok"),
    ]
    assert found["raises"]["why"] == "exit code 3" and "why it did" in found["raises"]["output"]
    assert "was not done after" in found["hangs"]["why"] and found["hangs"]["seconds"] < 10
    assert "JSONDecodeError" in found["unreadable"]["why"]
    assert found["elsewhere"]["why"] == "vllm is not installed" and found["good"]["said"] == "fine"


def test_when_the_time_is_over_the_rest_is_said_to_have_failed(tmp_path: Path):
    found = checked([_python("late", "")], tmp_path, total_s=0.0)
    assert found["late"] == {"status": "failed", "why": "the time was over"}


@pytest.mark.parametrize("fails", [False, True])
def test_the_exit_code_says_whether_a_part_failed(fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = "raise SystemExit(1)" if fails else "print('ok')"
    monkeypatch.setattr("benchmarks.gpu_check.check_parts", lambda *_: [_python("only", code)])
    out = tmp_path / "gpu-check.json"
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu", "--out", str(out), "model.path=builtin:tiny"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == fails
    assert json.loads(out.read_text())["status"] == ("failed: only" if fails else "ok")


@pytest.mark.parametrize("gpus", [0, 1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_codec_has_a_part_whose_settings_are_read(kind: str, gpus: int):
    device = "cuda" if gpus else "cpu"
    settings = [*SETTINGS, *on_gpus(device, gpus), *of_kind(kind), "model.path=builtin:tiny", "swarm.boundaries=[2]"]
    config = load("k5", settings)
    assert config.codec.kind == kind and config.swarm.device == device
    assert config.swarm.pp == (2 if gpus >= 2 else 1)
    on = [config.swarm.device] * config.swarm.pp + [config.rollout.device, config.anchor.device]
    shared = [config.rollout.placement, config.anchor.placement].count("colocated")
    assert on.count("cuda") - shared <= gpus
    assert config.rollout.device == config.anchor.device == device


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_an_engine_of_vllm_shares_the_gpu_of_the_worker(device: str, tmp_path: Path):
    parts = {part.name: part for part in check_parts(device, 1, ["model.path=builtin:tiny"], tmp_path, has_vllm=True)}
    assert [*parts] == ["merge", *KINDS, "vllm", "tests"]
    words = parts["vllm"].command
    settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    config = load("k5", [*settings, "swarm.boundaries=[2]"])
    assert (config.rollout.engine, config.rollout.device) == ("vllm", device)
    assert (config.rollout.placement == "colocated") == (device == "cuda")
    missing = check_parts(device, 1, [], tmp_path, has_vllm=False)
    assert [part.name for part in missing if part.missing] == ["vllm"]
