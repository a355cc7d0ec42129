"""Loggers beside the run folder: wandb, mlflow, trackio. They may be slow or fail; the run goes on. No torch.

Each works in a thread of its own, fed through a queue: a server that does not answer holds up no tick. The
libraries are imported there too, when a run begins.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

CLOSE_S = 30.0  # a logger may take so long to send what it still has when a run ends
_PROJECT = "northstar"


class Logger(Protocol):
    """One open run of a tracking tool. Any exception ends it, and nothing else."""

    def log(self, metrics: dict[str, float], tick: int) -> None: ...

    def show(self, samples: list[dict[str, Any]], tick: int) -> None:
        """Answers of the policy, of one step or one validation."""
        ...

    def close(self) -> None: ...


class Wandb:
    """Weights & Biases. `WANDB_MODE=offline` needs no server: its files lie in the run folder, for `wandb sync`."""

    def __init__(self, name: str, folder: Path, config: dict[str, Any]):
        import wandb  # pyright: ignore[reportMissingImports]

        quiet = wandb.Settings(silent=True, console="off", login_timeout=0)
        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False):
            raise RuntimeError("no API key: `wandb login`, or WANDB_MODE=offline")
        # create_new: the runs of a sweep may be open side by side
        self.run = wandb.init(
            project=_PROJECT, name=name, dir=str(folder), config=config, settings=quiet, reinit="create_new"
        )

    def log(self, metrics: dict[str, float], tick: int) -> None:
        self.run.log(metrics, step=tick)

    def show(self, samples: list[dict[str, Any]], tick: int) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self.run.log({_shown_as(samples): wandb.Table(**_columns(samples))}, step=tick)

    def close(self) -> None:
        self.run.finish()


class Mlflow:
    """MLflow, at MLFLOW_TRACKING_URI; without that, in files of its own in the run folder: `mlruns`."""

    def __init__(self, name: str, folder: Path, config: dict[str, Any]):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # files are all that needs neither server nor SQL
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlruns").resolve().as_uri())
        experiment = self.client.get_experiment_by_name(_PROJECT)
        number = experiment.experiment_id if experiment else self.client.create_experiment(_PROJECT)
        self.run = self.client.create_run(number, run_name=name).info.run_id
        for key, value in _flat(config):
            self.client.log_param(self.run, key, str(value)[:500])

    def log(self, metrics: dict[str, float], tick: int) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now = int(time.time() * 1000)
        entries = [Metric(mlflow_name(name), value, now, tick) for name, value in metrics.items()]
        for start in range(0, len(entries), 1000):  # as many as one call takes
            self.client.log_batch(self.run, metrics=entries[start : start + 1000])

    def show(self, samples: list[dict[str, Any]], tick: int) -> None:
        lines = "".join(json.dumps(sample) + "\n" for sample in samples)
        self.client.log_text(self.run, lines, f"{_shown_as(samples)}/tick-{tick:06d}.jsonl")

    def close(self) -> None:
        self.client.set_terminated(self.run)


class Trackio:
    """Trackio: a local database (TRACKIO_DIR moves it), or a Space by its own settings."""

    def __init__(self, name: str, folder: Path, config: dict[str, Any]):
        import trackio  # pyright: ignore[reportMissingImports]

        with contextlib.redirect_stdout(io.StringIO()):  # it prints into the live display
            self.run = trackio.init(project=_PROJECT, name=name, config=config, auto_log_gpu=False, auto_log_cpu=False)

    def log(self, metrics: dict[str, float], tick: int) -> None:
        self.run.log(metrics, step=tick)

    def show(self, samples: list[dict[str, Any]], tick: int) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self.run.log({_shown_as(samples): trackio.Table(**_columns(samples))}, step=tick)

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.run.finish()


LOGGERS: dict[str, Callable[[str, Path, dict[str, Any]], Logger]] = {
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
}


def mlflow_name(name: str) -> str:
    """A metric's name in the letters that MLflow takes: `acc/mean@1` is `acc/mean_at_1`, as verl writes it."""
    return re.sub(r"[^\w./ :-]", "_", name.replace("@", "_at_"))


def _shown_as(samples: list[dict[str, Any]]) -> str:
    return f"samples/{samples[0]['kind']}"


def _columns(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """As a table of strings and numbers."""
    flat = [dict(_flat(sample)) for sample in samples]
    names = list(dict.fromkeys(name for sample in flat for name in sample))
    return {"columns": names, "data": [[sample.get(name) for name in names] for sample in flat]}


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value) if isinstance(value, list) else value


class Loggers:
    """The open loggers of one run. `log` never waits and never raises; `failed` tells each failure once."""

    def __init__(self, wanted: dict[str, Callable[[], Logger]]):
        self._threads = {name: _Thread(name, make) for name, make in wanted.items()}

    @classmethod
    def named(cls, names: list[str], run: str, folder: Path, config: dict[str, Any]) -> Loggers:
        """Those of LOGGERS that a config asks for; a logger gets the run's name, its folder and its config."""
        return cls({name: partial(LOGGERS[name], run, folder, config) for name in names})

    def log(self, metrics: dict[str, float], tick: int) -> None:
        for thread in self._threads.values():
            thread.queue.put(lambda logger: logger.log(metrics, tick))

    def show(self, samples: list[dict[str, Any]], tick: int) -> None:
        for thread in self._threads.values() if samples else ():
            thread.queue.put(lambda logger: logger.show(samples, tick))

    def failed(self) -> dict[str, str]:
        """Name -> reason of every logger that has failed since this was last asked; it gets nothing any more."""
        found = {name: thread.error for name, thread in self._threads.items() if thread.error}
        for name in found:
            del self._threads[name]
        return found

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Let all of them finish; one that has not after `timeout_s` has failed, and is left behind."""
        for thread in self._threads.values():
            thread.queue.put(None)
        deadline = time.monotonic() + timeout_s
        for thread in self._threads.values():
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                thread.error = f"had not finished {timeout_s:g} s after the run"


class _Thread(threading.Thread):
    """One logger at work; ends at None, or at its first exception."""

    def __init__(self, name: str, make: Callable[[], Logger]):
        super().__init__(name=f"logger {name}", daemon=True)  # a run that has ended does not wait for it
        self.make, self.error = make, ""
        self.queue: queue.SimpleQueue[Callable[[Logger], None] | None] = queue.SimpleQueue()
        self.start()

    def run(self) -> None:
        try:
            logger = self.make()
            while (told := self.queue.get()) is not None:
                told(logger)
            logger.close()
        except BaseException as error:  # SystemExit of a library too: it would end the thread unsaid
            self.error = f"{type(error).__name__}: {error}"
