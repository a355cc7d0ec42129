"""What a run writes down: metrics.jsonl, corrections.jsonl, summary.json, TensorBoard events; and its loggers."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from anchor_service.errors import described
from rl import mismatch
from swarm.json_lines import append_record, keep_records, replace_text
from swarm.listeners import Board, Listener, Listeners, numbers
from swarm.loggers import Loggers
from swarm.manifest import NotWritten
from swarm.messages import Entries, Report, TickReport
from swarm.sample_file import Sample, SampleFile

REWOUND = "rewound"  # an event that stays, also where what was written beyond a checkpoint is dropped


def combine(reports: Sequence[Report], tokens: int) -> tuple[dict[str, float], Entries]:
    """Reports of all ranks -> metrics and ledger entries.

    `sums` are over response tokens and become means, those of `rl.mismatch` its metrics; `values` are
    averaged over the ranks that have them; of `peaks` (times, memory) the highest counts.
    """
    sums: dict[str, float] = defaultdict(float)
    values: dict[str, list[float]] = defaultdict(list)
    peaks: dict[str, float] = defaultdict(float)
    ledger: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for report in reports:
        for name, value in report.sums.items():
            sums[name] += value / tokens
        for name, value in _values(report).items():
            values[name].append(value)
        for name, value in report.peaks.items():
            peaks[name] = max(peaks[name], value)
        for channel, (sent, dense) in report.ledger.items():
            ledger[channel][0] += sent
            ledger[channel][1] += dense
    metrics = mismatch.metrics(sums) | {k: sum(v) / len(v) for k, v in values.items()} | dict(peaks)
    return metrics, {channel: (sent, dense) for channel, (sent, dense) in ledger.items()}


def _values(report: Report) -> dict[str, float]:
    return report.values | report.merge.metrics() if isinstance(report, TickReport) else report.values


@dataclass(frozen=True)
class Process:
    """A process of the run, for those who look at it from outside."""

    role: str
    index: int
    node: str  # Ray's id of it
    pid: int


class Telemetry:
    """The files of one run folder. Lines are written whole and flushed, so a killed run stays readable.

    A line that the disk does not take raises NotWritten: a run that nobody can read must not go on.

    `listener` gets every record, TensorBoard and the `loggers` the numbers. One of them that fails is left out from
    then on, with one event and one warning; only a KeyboardInterrupt of a listener ends the run. So it is with
    samples.jsonl, where there is one.
    """

    def __init__(
        self, run: Path, listener: Listener, loggers: Loggers | None = None, samples: SampleFile | None = None
    ):
        self.run = run
        self.listeners = Listeners({"display": lambda: listener, "tensorboard": lambda: Board(run)})
        self.loggers, self._samples = loggers or Loggers({}), samples
        self.started = time.time()
        self.validations: list[dict[str, Any]] = []
        self.last: dict[str, Any] = {}
        self.digests: list[str] = []
        self.seconds: dict[str, float] = defaultdict(float)
        self._processes: list[Process] = []
        self._metrics = (run / "metrics.jsonl").open("a")
        self._corrections = (run / "corrections.jsonl").open("a")

    def tick(self, step: int, tick: int, metrics: dict[str, Any]) -> None:
        self._write("tick", step, tick, metrics)

    def step(self, step: int, tick: int, metrics: dict[str, Any]) -> None:
        self._write("step", step, tick, metrics)

    def val(
        self, step: int, tick: int, metrics: dict[str, Any], accuracy: float, others: dict[str, float] | None = None
    ) -> None:
        """`others`: by name, of further sets and of the rows of each source."""
        found: dict[str, Any] = {"accuracy": accuracy} | ({"sets": others} if others else {})
        self.validations.append({"step": step, "tick": tick} | found)
        self._write("val", step, tick, metrics | found)

    def fire(self, step: int, tick: int, report: dict[str, Any]) -> None:
        """A correction was merged for the first time, or passed over for a newer one (first_tick None)."""
        keys = ("version", "source_tick", "first_tick", "digest", "bytes")
        first = report["first_tick"]
        line = {k: report[k] for k in keys} | {"lag": None if first is None else first - report["source_tick"]}
        append_record(self._corrections, line)
        self._write("fire", step, tick, {k: v for k, v in report.items() if not isinstance(v, list)})

    def event(self, step: int, tick: int, name: str, **fields: Any) -> None:
        self._write("event", step, tick, {"event": name} | fields)

    def samples(self, step: int, tick: int, make: Callable[[], list[Sample]]) -> None:
        """Keep what `make` gives, if samples are kept, and show it to the loggers."""

        def keep(file: SampleFile) -> None:
            found = make()
            file.add(found)
            self.loggers.show(found, tick)

        self._keep_samples(step, tick, keep)

    def _keep_samples(self, step: int, tick: int, work: Callable[[SampleFile], None]) -> None:
        if self._samples is None:
            return
        try:
            work(self._samples)
        except Exception as error:  # of a tokenizer, of a disk
            self._samples = None
            reason = described(error)
            warnings.warn(f"samples are not kept any more, the run goes on: {reason}", stacklevel=2)
            self.event(step, tick, "samples_failed", reason=reason)

    def processes(self, found: list[Process]) -> None:
        """Which processes the run consists of now, this one included: processes.json, if it has changed."""
        if found != self._processes:
            self._processes = found
            lines = [json.dumps(asdict(each)) for each in [Process("driver", 0, "", os.getpid()), *found]]
            replace_text(self.run / "processes.json", "[" + ",\n ".join(lines) + "]\n")

    def final_digest(self, digests: list[str]) -> None:
        self.digests = digests

    def _write(self, kind: str, step: int, tick: int, metrics: dict[str, Any]) -> None:
        record = {"kind": kind, "step": step, "tick": tick} | metrics
        append_record(self._metrics, record)
        self.last[kind] = record
        found = numbers(record)
        if found:  # loggers have one axis, which must not go back: ticks
            self.loggers.log(found | {"training/global_step": step}, tick)
        if kind == "step":
            for name, value in metrics.items():
                if name.startswith("timing_s/"):
                    self.seconds[name] += value
        self.listeners.tell(record)
        self._report_lost(step, tick)

    def _report_lost(self, step: int, tick: int) -> None:
        for kind, group in (("logger", self.loggers), ("listener", self.listeners)):
            for name, reason in group.failed().items():
                warnings.warn(f"{kind} {name} failed, the run goes on without it: {reason}", stacklevel=2)
                self.event(step, tick, f"{kind}_failed", **{kind: name}, reason=reason)

    def state(self) -> dict[str, Any]:
        return {"validations": self.validations, "seconds": dict(self.seconds)}

    def restore(self, state: dict[str, Any], step: int, merged: int) -> None:
        """Go on after `step`, in which version `merged` was the last."""
        self.validations, self.last = state["validations"], {}
        self.seconds.clear()
        self.seconds.update(state["seconds"])
        self.drop(step, merged)

    def drop(self, step: int, merged: int) -> None:
        """Keep no record beyond `step` and version `merged`."""
        self._metrics = _keep(self._metrics, lambda record: record["step"] <= step or record.get("event") == REWOUND)
        self._corrections = _keep(self._corrections, lambda record: record["version"] <= merged)
        last = self.validations[-1] if self.validations else {"tick": 0, "accuracy": None}
        self._keep_samples(step, int(last["tick"] or 0), lambda file: file.drop(step))
        self.listeners.tell({"kind": "restored", "step": step, "tick": last["tick"], "accuracy": last["accuracy"]})

    def finish(self, status: str, extra: dict[str, Any]) -> dict[str, Any]:
        """Write summary.json, then `close`. Raises NotWritten where a run that is completed cannot say so."""
        accuracies = [v["accuracy"] for v in self.validations]
        summary = {
            "status": status,
            "validations": self.validations,
            "val_start": accuracies[0] if accuracies else None,
            "val_end": accuracies[-1] if accuracies else None,
            "wall_s": time.time() - self.started,
            "seconds": dict(self.seconds),
            "last_step": self.last.get("step"),
            "weights_digests": self.digests,
        } | extra
        try:
            replace_text(self.run / "summary.json", json.dumps(summary, indent=2) + "\n")
        except NotWritten as error:
            if status == "completed":
                raise
            warnings.warn(f"how the run ended is not written down: {error}", stacklevel=2)  # and why it did is raised
        finally:
            self.close()
        return summary

    def close(self) -> None:
        """Close the files and loggers; the latter may take a while."""
        self.loggers.close()
        self.listeners.close()
        last = self.last.get("step") or {"step": 0, "tick": 0}
        with suppress(NotWritten):  # it was a warning too
            self._report_lost(last["step"], last["tick"])
        for file in (self._metrics, self._corrections):
            with suppress(OSError):  # of a line that was not written: that was said
                file.close()


def _keep(file: TextIO, wanted: Callable[[dict[str, Any]], bool]) -> TextIO:
    """The file again, with only the lines that are whole and wanted, open for appending."""
    file.close()
    path = Path(file.name)
    keep_records(path, wanted)
    return path.open("a")
