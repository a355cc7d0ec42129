"""Connect to a Ray cluster, drive a run on it, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import traceback
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import ray

from anchor_service.errors import WaitTimeout, described
from deploy.cluster.endings import Notice, can_go_on
from deploy.cluster.forkserver import forkserver, may_fork
from deploy.cluster.head import end_head, head_place
from deploy.cluster.kept_actors import new_actors
from deploy.cluster.lives import Lives
from deploy.cluster.loopback import join_head, loopback, start_head
from deploy.cluster.placement import OwnCluster
from deploy.cluster.takedown import shut_down
from deploy.config import load, to_toml
from deploy.resume import Resume
from swarm import scale
from swarm.fleet import Fleet
from swarm.json_lines import replace_text
from swarm.loggers import Loggers
from swarm.run_config import RunConfig
from swarm.sample_file import SampleFile
from swarm.telemetry import Listener, Telemetry

KNOCK_S = 10.0


@contextmanager
def cluster(config: RunConfig, address: str | None, lanes: int = 1) -> Generator[None]:
    """A Ray cluster: the one at `address`, or one of our own on this machine, gone at the end.

    Our own has room for `lanes` runs like `config` side by side.
    """
    with ExitStack() as stack:
        if address:
            # Explicit: what Ray does without it depends on the machine
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
            _knock(address)
            ray.init(address=address, log_to_driver=False)
        else:
            size = OwnCluster.of(config, lanes)
            head = head_place(size, config.swarm.start_timeout_s)
            stack.callback(end_head)
            stack.enter_context(loopback(head.token if head else None))
            environment = stack.enter_context(forkserver(config.swarm.threads)) if may_fork(config) else {}
            if head:
                join_head(head.address, environment)
            else:
                start_head(size, environment, forks=bool(environment))
        try:
            yield
        finally:
            shut_down()


def _knock(address: str) -> None:
    """Raises WaitTimeout if nobody listens there: Ray itself would try on and on, and heed no Ctrl-C meanwhile."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdigit()):
        return  # auto, or a name that Ray refuses
    try:
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_S).close()
    except OSError as error:
        raise WaitTimeout(f"{address} ({error})", "an answer", KNOCK_S, "--address, or start Ray there") from error


@contextmanager
def session(config: RunConfig, address: str | None, lanes: int = 1) -> Generator[Notice]:
    """`cluster`, with SIGTERM raised as an exception while it is there, or given notice of."""
    notice = Notice()
    previous = signal.signal(signal.SIGTERM, notice.on_signal)
    try:
        with cluster(config, address, lanes):
            signal.signal(signal.SIGTERM, notice.on_signal)  # again: ray.init puts a handler there, which aborts
            yield notice
    finally:
        signal.signal(signal.SIGTERM, previous)


def execute(
    config: RunConfig, run: Path, listener: Listener, resume: Resume | None = None, address: str | None = None
) -> dict[str, Any]:
    """`drive` on a Ray cluster that is there for this run alone, or on the one at `address`."""
    with session(config, address) as notice:
        # a cluster of one's own is most often sent the signal too: nothing of it is left to end a step
        with notice.grace(config.faults.grace_s if address else 0.0):
            return drive(config, run, listener, resume, notice=notice)


def drive(
    config: RunConfig,
    run: Path,
    listener: Listener,
    resume: Resume | None = None,
    actors: Callable[[RunConfig], AbstractContextManager[Fleet]] = new_actors,
    notice: Notice | None = None,
) -> dict[str, Any]:
    """Run `config` in the folder `run`, on the Ray cluster that is connected; returns the summary it also wrote.

    `resume`: where it goes on; until it does, the folder stays as it was. `actors`: new ones, or those of an earlier run.
    `notice`: of SIGTERM. A process that is lost costs the ticks since the newest checkpoint (`Lives`). Ctrl-C and SIGTERM
    end the run with status "interrupted", any other error with "failed" and the error raised again; the folder is valid
    in every case.
    """
    run = run.resolve()  # workers write their checkpoints there too, and theirs is another working directory
    run.mkdir(parents=True, exist_ok=True)
    if not resume:
        replace_text(run / "config.toml", to_toml(config))
    loggers = Loggers.named([*config.run.loggers], config.run.name, run, config.model_dump(mode="json"))
    samples = SampleFile(run, round(1e6 * config.samples.max_mb)) if config.samples.kept else None
    telemetry = Telemetry(run, listener, loggers, samples)
    outcome = _Outcome(config, telemetry, begun=resume is None)
    try:
        with actors(config) as fleet, outcome:  # the summary is written first: taking Ray down may not succeed
            lives = Lives(config, fleet, telemetry, run, notice)
            if resume:
                lives.begin(resume)
                _goes_on(run, config)
            outcome.lives, outcome.begun = lives, True
            lives.coordinator.progress.event("started", workers=len(fleet.workers))
            lives.run()
    except BaseException as failure:
        if outcome.summary is None:  # the actors did not even start
            outcome.__exit__(type(failure), failure, None)
        if outcome.summary is None or not isinstance(failure, KeyboardInterrupt):
            raise
    assert outcome.summary is not None  # written at every end that is not raised
    return outcome.summary


def _goes_on(run: Path, config: RunConfig) -> None:
    """What the folder says of the run's last end is over, and with another `swarm.dp` what `northstar scale` asked for."""
    if load(str(run / "config.toml"), given=()).swarm.dp != config.swarm.dp:
        scale.forget(run)
    replace_text(run / "config.toml", to_toml(config))
    (run / "summary.json").unlink(missing_ok=True)


class _Outcome:
    """Writes summary.json when a run ends, however it ends; an interrupted run ends without an error.

    Nothing of a run that was to go on and did not: what is there is the record of its last end.
    """

    def __init__(self, config: RunConfig, telemetry: Telemetry, begun: bool):
        self.config, self.telemetry, self.begun = config, telemetry, begun
        self.lives: Lives | None = None
        self.summary: dict[str, Any] | None = None

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not self.begun:
            self.telemetry.close()
            return False
        interrupted = isinstance(failure, KeyboardInterrupt)
        status = "interrupted" if interrupted else "failed" if failure else "completed"
        extra: dict[str, Any] = {"name": self.config.run.name, "seed": self.config.run.seed, "error": None}
        extra["can_go_on"] = can_go_on(failure, self.config.swarm.pp)
        if failure and not interrupted:
            lines = "".join(traceback.format_exception(failure)).splitlines()
            extra |= {"error": described(failure), "traceback": lines}
        counted = self.lives.coordinator.summary() if self.lives else {}
        self.summary = self.telemetry.finish(status, extra | counted)
        return interrupted
