"""Fixtures of unit tests."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import pytest

from deploy.config import PRESETS
from rl.model_files import BUILTIN
from swarm import run_config


@pytest.fixture
def data_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with a stand-in for every file that a preset expects the user to have fetched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for preset in PRESETS.glob("*.toml"):
        raw = tomllib.loads(preset.read_text())
        kind, _, path = raw.get("task", {}).get("name", "").partition(":")
        if kind == "jsonl":
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text('{"question": "q", "answer": "1"}\n')
        if (path := raw.get("model", {}).get("path", "")).endswith(".gguf"):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text("")
        if path.startswith("./"):
            shutil.copytree(BUILTIN / "tiny", path)
    shape = run_config.model_shape
    monkeypatch.setattr(run_config, "model_shape", lambda path: None if path.endswith(".gguf") else shape(path))
