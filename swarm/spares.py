"""Workers beside those that train: their processes are there, their stage is not built. Nothing here waits but `take`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from anchor_service.calls import ActorHandle, done_of, raised, replies
from swarm.worker import Worker

Handle = ActorHandle[Worker]
ANSWER_S = 0.5  # in which an idle process says that it is there


@dataclass
class Spare:
    """`answer`: to the last question whether it is there, asked once more after each."""

    handle: Handle
    answer: object
    ready: bool = False


class Spares:
    """For a rank that is lost, and for replicas that are missing or asked for.

    `new`: starts one where there is room; `dismiss`: ends one, also one that still waits for room.
    """

    def __init__(self, new: Callable[[None], Handle], dismiss: Callable[[Handle], None]):
        self.new, self.dismiss = new, dismiss
        self.held: list[Spare] = []

    def add(self, handles: Sequence[Handle]) -> None:
        """Processes that are starting."""
        self.held += [Spare(handle, handle.__ray_ready__.remote()) for handle in handles]

    def look(self, wanted: int) -> None:
        """Drop those that are gone and those that are too many, who is not ready first; start as many as are lacking."""
        for spare in list(self.held):
            if not done_of([spare.answer])[0]:
                continue
            if raised(spare.answer, "a spare worker"):
                self._drop(spare)
            else:
                spare.ready, spare.answer = True, spare.handle.__ray_ready__.remote()
        for spare in sorted(self.held, key=lambda spare: spare.ready)[: max(0, len(self.held) - wanted)]:
            self._drop(spare)
        self.add([self.new(None) for _ in range(wanted - len(self.held))])

    def ready(self) -> list[Handle]:
        """As of the last look."""
        return [spare.handle for spare in self.held if spare.ready]

    def take(self) -> Handle | None:
        """One that is there. None is better than one that starts: nobody knows whether there is room for it."""
        for spare in [spare for spare in self.held if spare.ready]:
            self.held.remove(spare)
            (said,) = replies([("a spare worker", spare.handle.__ray_ready__.remote())], "an answer", ANSWER_S, "")
            if not isinstance(said, Exception):
                return spare.handle
            self.dismiss(spare.handle)
        return None

    def _drop(self, spare: Spare) -> None:
        self.held.remove(spare)
        self.dismiss(spare.handle)

    def leave(self, handles: Sequence[Handle]) -> None:
        """These train from now on."""
        self.held = [spare for spare in self.held if spare.handle not in handles]
