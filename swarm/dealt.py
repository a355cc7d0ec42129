"""The samples of the present step, dealt over the replicas that there are: also to a rank in the place of a lost one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from anchor_service.calls import lost
from swarm.fleet import Fleet
from swarm.messages import Report
from swarm.progress import Progress
from swarm.regroup import Met, Regroup
from swarm.replay_choice import MiniFrame
from swarm.run_config import RunConfig
from swarm.shares import shares


class Dealt:
    """Of one step after another. `store` puts a frame where actors can fetch it."""

    def __init__(
        self,
        config: RunConfig,
        fleet: Fleet,
        progress: Progress,
        regroup: Regroup,
        store: Callable[[np.ndarray], object],
    ):
        self.pp, self.fleet, self.progress, self.regroup, self.store = config.swarm.pp, fleet, progress, regroup, store
        self.together, self.wall = config.shares_prompts, config.anchor.clock == "wall"
        self.unshared = config.swarm.unshared(config.model, config.codec)
        self.given: list[tuple[int, object]] = []  # to each rank: the step's first tick, its share
        self.old_logprobs: list[object] = []  # of each rank's share, where one in its place finds them
        self.without: set[int] = set()  # ranks that are new since
        self.anew = False  # whether these shares are nobody's any more: all ranks are to get others

    def begin(self, minis: list[MiniFrame], first: int) -> list[Report]:
        """The step's mini-batches, whose first tick is `first`, to all ranks; once more where workers are lost."""
        self._deal(minis, first)
        if self.unshared and first == 1:
            self.progress.event("prompts not shared", reason=self.unshared)
        while True:
            try:
                reports, self.old_logprobs = self.fleet.begin_step(self.given)
                break
            except Exception as failure:
                if self.regroup.after(failure, first).dealt_anew:
                    self._deal(minis, first)
        self._all_have_theirs()
        return reports

    def note(self, met: Met) -> Met:
        """What workers that met still need. Nothing of it is forgotten before all have it, whoever is lost meanwhile."""
        self.without |= set(met.fresh)
        self.anew |= met.dealt_anew
        return met

    def give_again(self, minis: list[MiniFrame], first: int) -> None:
        """Ranks that are new get their share; all of them, where there are more or fewer replicas than before, or where a
        lost rank's old log-probs went with its node. `first`: the tick that comes next."""
        # only on the wall clock: in lockstep those of the present weights would be others, and the run goes back
        if self.wall and self.without and not self.anew:
            self.anew = lost([self.old_logprobs[rank] for rank in self.without])
        if self.anew:
            self._deal(minis, first)
            # maybe of other samples now: old log-probs are taken anew, of the present weights
            _, self.old_logprobs = self.fleet.begin_step(self.given)
            self.progress.event("step dealt anew", replicas=self.regroup.dp)
        elif self.without:
            self.fleet.give({rank: (*self.given[rank], self.old_logprobs[rank]) for rank in self.without})
        self._all_have_theirs()

    def _all_have_theirs(self) -> None:
        self.without.clear()
        self.anew = False

    def _deal(self, minis: list[MiniFrame], first: int) -> None:
        self.given = []
        for share in shares([mini.batch for mini in minis], self.regroup.dp, self.pp, self.together):
            self.progress.control(share.ranks * share.frame.nbytes, share.ranks * share.dense)
            self.given += [(first, self.store(share.frame))] * share.ranks
