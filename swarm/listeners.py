"""Who is told of a run's records beside its files: a display, TensorBoard. None of them can end the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]: generated
from torch.utils.tensorboard import FileWriter

from anchor_service.errors import described


class Listener(Protocol):
    """Told of every record as it is written. A KeyboardInterrupt stops the run, any other exception only the listener.

    A resumed run is told first of kind `restored`: the step, the tick and the last accuracy before it, in no file.
    """

    def __call__(self, record: dict[str, Any]) -> None: ...


class Board:
    """TensorBoard events in the run folder, one a record: an event a number took 2 ms of a tick."""

    def __init__(self, folder: Path):
        self.writer = FileWriter(str(folder))

    def __call__(self, record: dict[str, Any]) -> None:
        at = record["step"] if record["kind"] == "step" else record["tick"]
        found = [Summary.Value(tag=name, simple_value=value) for name, value in numbers(record).items()]
        if found:
            self.writer.add_summary(Summary(value=found), at)

    def close(self) -> None:
        self.writer.close()


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """The metrics of a record; those of a step have the names of its ticks' means, on another axis."""
    prefix = "step/" if record["kind"] == "step" else ""
    return {f"{prefix}{k}": v for k, v in record.items() if isinstance(v, (int, float)) and "/" in k}


class Listeners:
    """The listeners of one run, by name. One that raises is told nothing more; `failed` tells each failure once."""

    def __init__(self, makers: dict[str, Callable[[], Listener]]):
        self._held: dict[str, Listener] = {}
        self._failed: dict[str, str] = {}
        for name, make in makers.items():
            self._guarded(name, lambda name=name, make=make: self._held.update({name: make()}))

    def tell(self, record: dict[str, Any]) -> None:
        for name, listener in list(self._held.items()):
            self._guarded(name, lambda listener=listener: listener(record))

    def close(self) -> None:
        for name, listener in list(self._held.items()):
            if isinstance(listener, Board):
                self._guarded(name, listener.close)

    def failed(self) -> dict[str, str]:
        """Name -> reason of every listener that has failed since this was last asked."""
        found, self._failed = self._failed, {}
        return found

    def _guarded(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # rich ends the process when its output is gone
            self._held.pop(name, None)
            self._failed[name] = described(error)
