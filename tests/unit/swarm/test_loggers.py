"""Loggers get the run's numbers in order; none of them can stop a run, hold it up, or change what it writes."""

from __future__ import annotations

import importlib.util
import json
import threading
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from deploy.config import ConfigError, load
from swarm.loggers import LOGGERS, Logger, Loggers, mlflow_name
from swarm.run_config import RunSection
from swarm.telemetry import Telemetry

ROOT = Path(__file__).parents[3]
TICKS = 6


class Kept:
    """A logger that keeps what it gets, and raises at the tick it was told to."""

    def __init__(self, fails_at: int | None = None):
        self.entries: list[tuple[dict[str, float], int]] = []
        self.fails_at, self.closed = fails_at, False

    def log(self, metrics: dict[str, float], tick: int) -> None:
        if self.fails_at is not None and tick >= self.fails_at:
            raise OSError("no route to host")
        self.entries.append((metrics, tick))

    def close(self) -> None:
        self.closed = True


def record_run(folder: Path, makers: dict[str, Callable[[], Logger]]) -> list[dict[str, Any]]:
    """A run of three steps of two ticks on paper; its lines of metrics.jsonl."""
    folder.mkdir()
    telemetry = Telemetry(folder, lambda record: None, Loggers(makers))
    for tick in range(1, TICKS + 1):
        step = (tick + 1) // 2
        telemetry.tick(step, tick, {"actor/pg_loss": 1.0 / tick, "merger/kind": "none"})
        if tick % 2 == 0:
            telemetry.step(step, tick, {"critic/rewards/mean": tick / 8, "timing_s/step": 0.5})
    telemetry.finish("completed", {})
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_logger_gets_every_number_once_in_the_order_of_ticks(tmp_path: Path):
    kept = Kept()
    written = record_run(tmp_path / "run", {"kept": lambda: kept})
    assert [tick for _, tick in kept.entries] == sorted(tick for _, tick in kept.entries)
    assert [tick for _, tick in kept.entries] == [record["tick"] for record in written]
    assert kept.closed
    for (metrics, _), record in zip(kept.entries, written, strict=True):
        prefix = "step/" if record["kind"] == "step" else ""
        numbers = {f"{prefix}{k}": v for k, v in record.items() if "/" in k and not isinstance(v, str)}
        assert metrics == numbers | {"training/global_step": record["step"]}


@pytest.mark.parametrize("fails_at", [0, 3, TICKS])
def test_a_logger_that_fails_costs_one_event_and_one_warning_and_nothing_else(tmp_path: Path, fails_at: int):
    plain = record_run(tmp_path / "plain", {})
    healthy = Kept()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        written = record_run(tmp_path / "run", {"bad": lambda: Kept(fails_at), "good": lambda: healthy})
    events = [record for record in written if record["kind"] == "event"]
    assert [e | {"step": 0, "tick": 0} for e in events] == [
        {
            "kind": "event",
            "step": 0,
            "tick": 0,
            "event": "logger_failed",
            "logger": "bad",
            "reason": "OSError: no route to host",
        }
    ]
    assert sum("logger bad failed" in str(w.message) for w in warned) == 1
    assert [record for record in written if record["kind"] != "event"] == plain
    assert len(healthy.entries) == len(plain) and healthy.closed


@pytest.mark.parametrize("error", [ImportError("broken install"), SystemExit(1)])
def test_a_logger_that_cannot_even_open_ends_no_run(tmp_path: Path, error: BaseException):
    def refuse() -> Logger:
        raise error

    with pytest.warns(UserWarning, match="logger bad failed, the run goes on"):
        written = record_run(tmp_path / "run", {"bad": refuse})
    assert [record["logger"] for record in written if record["kind"] == "event"] == ["bad"]


def test_a_logger_that_hangs_holds_up_neither_the_ticks_nor_the_end():
    hang = threading.Event()

    class Hanging(Kept):
        def log(self, metrics: dict[str, float], tick: int) -> None:
            hang.wait()

    loggers = Loggers({"stuck": Hanging})
    for tick in range(1000):
        loggers.log({"actor/pg_loss": 0.0}, tick)
    assert not loggers.failed()
    loggers.close(timeout_s=0.05)
    assert list(loggers.failed()) == ["stuck"]
    hang.set()


def test_the_config_allows_exactly_the_loggers_there_are_and_each_is_an_extra():
    (allowed,) = get_args(RunSection.model_fields["loggers"].annotation)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(get_args(allowed)) == set(LOGGERS)
    assert set(LOGGERS) <= set(extras)


@pytest.mark.parametrize("name", sorted(LOGGERS))
def test_a_logger_that_is_not_installed_is_refused_with_the_fix(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None)
    with pytest.raises(
        ConfigError, match=rf"run\.loggers: '{name}' is not installed: pip install 'northstar\[{name}\]'"
    ):
        load("k5", [f'run.loggers=["{name}"]'])


def test_a_folder_that_is_named_like_a_logger_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert importlib.util.find_spec("wandb") is not None
    with pytest.raises(ConfigError, match="not installed"):
        load("k5", ['run.loggers=["wandb"]'])


def test_a_logger_that_there_is_not_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'wandb'"):
        load("k5", ['run.loggers=["wandbb"]'])


def test_names_are_made_fit_for_mlflow_and_stay_apart():
    names = ["val-core/reasoning_gym:gsm_symbolic/acc/mean@1", "step/timing_s/gen", "comm/bytes_ratio", "a/β"]
    fit = [mlflow_name(name) for name in names]
    assert fit[:3] == ["val-core/reasoning_gym:gsm_symbolic/acc/mean_at_1", *names[1:3]]
    assert len(set(fit)) == len(names)


@pytest.mark.parametrize("name", sorted(LOGGERS))
def test_an_installed_logger_takes_a_run_without_a_network(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # before its import, which reads it
    pytest.importorskip(name, reason=f"northstar[{name}] is an extra")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    loggers = Loggers.named([name], "law", tmp_path, {"run": {"name": "law", "steps": 3}, "grpo": {"lr": 1e-6}})
    for tick in range(3):
        loggers.log({"val-core/a:b/acc/mean@1": 0.5, "training/global_step": tick}, tick)
        loggers.log({"step/critic/rewards/mean": 0.25}, tick)  # the same tick again, as a step record is
    loggers.close(120)
    assert not loggers.failed()
    assert [file for file in tmp_path.rglob("*") if file.is_file()]
