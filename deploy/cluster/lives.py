"""One run through its failures: a coordinator dies with the actors it lost, and the next goes on from the newest checkpoint.

run ── a process is lost ─▶ policy ─▶ others in its place, the rest as new ─▶ checkpoint ─▶ run
                              └─ END: the error is raised                        └─ none yet: from the beginning
"""

from __future__ import annotations

import time
from pathlib import Path

from anchor_service.errors import described
from deploy.cluster.endings import Notice, Terminated, whose
from deploy.resume import Resume, newest
from swarm.coordinator import Coordinator
from swarm.failure_policy import Decision, Failure, FailurePolicy, Role, Status
from swarm.fleet import Fleet
from swarm.run_config import RunConfig
from swarm.telemetry import REWOUND, Telemetry


class Lives:
    """All coordinators of one run in the folder `run`, one after another; `coordinator` is the present one.

    `notice`: that the run is to end. It ends with its step then, with a checkpoint if it keeps any.
    """

    def __init__(self, config: RunConfig, fleet: Fleet, telemetry: Telemetry, run: Path, notice: Notice | None = None):
        self.config, self.fleet, self.telemetry, self.run_folder = config, fleet, telemetry, run
        self.notice = notice or Notice()
        self.policy = FailurePolicy(config.faults)
        self.coordinator = self._born()

    def run(self) -> None:
        """To the end of the run. Raises what the policy does not deal with."""
        while (failure := self._failure()) is not None:
            self._rewind(failure)

    def begin(self, resume: Resume) -> None:
        """Go on from what is in the folder."""
        progress = self.coordinator.progress
        if resume.checkpoint is None:
            progress.begin_anew()
            return
        self.coordinator.restore(resume.checkpoint)
        for reason in resume.damaged:
            progress.event("checkpoint damaged", reason=reason, used=resume.checkpoint.name)

    def _born(self) -> Coordinator:
        coordinator = Coordinator(self.config, self.fleet, self.telemetry, self.run_folder, self.policy)
        coordinator.after_step = self._after_step
        return coordinator

    def _after_step(self) -> None:
        step, config = self.coordinator.progress.step, self.config
        if not self.notice.given or step == config.run.steps:
            return
        # where engines follow coded steps, those at a checkpoint are exact: one more would change what is computed
        if config.run.checkpoint_every and not config.saves_after(step) and config.snapshot.rate is None:
            self.coordinator.save()
        raise Terminated

    def _failure(self) -> Exception | None:
        """What the present life ended of, if it was no end of the run."""
        try:
            self.coordinator.run()
        except Exception as failure:
            return failure
        return None

    def _rewind(self, failure: Exception) -> None:
        """Until a coordinator stands on the newest checkpoint. One more failure on the way there is one of the same tick."""
        since, progress, reason = time.monotonic(), self.coordinator.progress, described(failure)
        tick = progress.tick
        while True:
            self._judge(failure, tick)
            try:
                self.fleet = self.fleet.again()
                self.coordinator = self._born()
                self.begin(newest(self.run_folder))
                break
            except Exception as another:
                another.__cause__ = another.__cause__ or failure  # of which it comes
                failure = another
        seconds = time.monotonic() - since
        found = {"reason": reason, "from_tick": tick, "to_tick": self.coordinator.progress.tick, "seconds": seconds}
        self.coordinator.progress.event(REWOUND, **found)

    def _judge(self, failure: Exception, tick: int) -> None:
        """Raises it if it is to end the run. One error is one failure of a role, however many of it are named."""
        if self.notice.given:  # what is lost now is most likely taken away
            raise Terminated from failure
        found: set[tuple[Role, Failure]] = {
            (blame.role, blame.failure) for blame in whose(failure, self.config.swarm.pp)
        }
        decisions = [self.policy.decide(Status(role, kind, tick, recoverable=False)) for role, kind in found]
        if not decisions or Decision.END in decisions:
            raise failure
