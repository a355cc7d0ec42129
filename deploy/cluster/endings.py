"""How a run is told to end, and whether it can go on after it has: SIGTERM, and failures of its processes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from ray.exceptions import RayError, RayTaskError

from rl.snapshot import BaseLost
from swarm.blame import Blame, blamed
from swarm.failure_policy import Failure
from swarm.grid import PeerLost


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends a run as Ctrl-C does, but somebody else may go on with it."""


class Notice:
    """SIGTERM. Where there is grace the first is `given` and no more, and acts when that is over; the second acts at once."""

    def __init__(self) -> None:
        self.given = False
        self._grace = 0.0

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.given or not self._grace:
            raise Terminated
        self.given = True
        threading.Thread(target=self._again, daemon=True).start()

    @contextmanager
    def grace(self, seconds: float) -> Generator[None]:
        """In here a run may come to the end of its step."""
        self._grace, self._over = seconds, threading.Event()
        try:
            yield
        finally:
            self._grace = 0.0
            self._over.set()

    def _again(self) -> None:
        main = threading.main_thread().ident
        if not self._over.wait(self._grace) and main is not None:
            signal.pthread_kill(main, signal.SIGTERM)


def whose(failure: BaseException, pp: int) -> list[Blame]:
    """`blamed`; where nobody says more than that an exchange broke off, it was some worker's, and so where weights are asked for
    that a rank which is new does not know."""
    forgot = isinstance(failure, BaseLost) and failure.base_tick != failure.held_tick  # else files differ, for ever
    some_worker = [Blame("worker", None, Failure.DEATH)] if forgot or isinstance(failure, PeerLost) else []
    return blamed(failure, pp) or some_worker


def can_go_on(failure: BaseException | None, pp: int) -> bool:
    """Whether a run that ended of it may end well the next time, without any change."""
    while failure is not None:
        lost = isinstance(failure, RayError) and not isinstance(failure, RayTaskError)
        if isinstance(failure, Terminated) or lost or whose(failure, pp):
            return True
        failure = failure.__cause__
    return False
