"""What each fire replays: samples of its source tick's mini-batch, or of every mini-batch since the last fire's. No torch.

    anchor.replay   tick      b_{s+1}, or a seeded share of it
                    window    a seeded share of b_t for every t from the last fire's source tick to its own

Both replay as many samples. Of a window of n ticks each gives ⌊C/n⌋ of the C samples, or one more; where n > C, C of
the ticks give one each. Which ones depends on the seed and on the ticks in the window alone, not on when that became
known: every tick has its samples in a random order, and a rank of its own. So less and less of each is kept as a
window grows, at most 2·C samples and one whole mini-batch, and two windows can be made one again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import numpy as np

from anchor_service.config import AnchorConfig
from anchor_service.replay import pack_replay
from codec.frames import FrameError
from rl.batch import Batch, concat
from swarm.manifest import CheckpointError

FRAME = "window"  # of a checkpoint


@dataclass(frozen=True)
class MiniFrame:
    """One tick's samples, and a reference to them as a frame."""

    batch: Batch
    reference: object
    size: int


@dataclass(frozen=True)
class Replay:
    """What one fire replays, a reference to its frame and the bytes of it; what the diagnosis takes for b_{s+1}."""

    reference: object
    size: int
    diagnosed: object


Store = Callable[[np.ndarray], object]


class Choice(Protocol):
    """Sees every mini-batch; `fires` are versions."""

    def see(self, tick: int, mini: MiniFrame) -> None:
        """The mini-batch of the tick that comes."""
        ...

    def take(self, version: int) -> Replay:
        """What the fire that starts in that tick replays."""
        ...

    def release(self, version: int) -> None:
        """That fire cannot be void any more."""
        ...

    def give_back(self, version: int) -> None:
        """That fire is void: the next one replays its ticks too."""
        ...

    def save(self, lost: Iterable[int]) -> dict[str, np.ndarray]:
        """Frames for a checkpoint that lacks the fires `lost`, which are under way."""
        ...

    def restore(self, frame: np.ndarray | None) -> None:
        """Go on from what was saved. Raises CheckpointError."""
        ...


def make_choice(anchor: AnchorConfig, samples: int, seed: int, store: Store) -> Choice:
    """As `anchor.replay` says, of mini-batches of `samples`; `store` puts a frame where actors can fetch it."""
    kind = Window if anchor.replay == "window" else OwnTick
    return kind(anchor.replayed(samples), seed, store)


class OwnTick:
    """The mini-batch, or `count` of its samples with the denominator that keeps M unbiased."""

    def __init__(self, count: int, seed: int, store: Store):
        self.count, self.seed, self.store = count, seed, store

    def see(self, tick: int, mini: MiniFrame) -> None:
        self.mini = mini

    def take(self, version: int) -> Replay:
        """The diagnosis gets the whole mini-batch, whatever share of it the anchor uses."""
        mini, batch = self.mini, self.mini.batch
        if self.count == len(batch):
            return Replay(mini.reference, mini.size, mini.reference)
        rng = np.random.default_rng([self.seed, 0x5A3, version])
        chosen = np.sort(rng.choice(len(batch), self.count, replace=False))
        denominator = batch.loss_tokens * self.count / len(batch)
        frame = batch.pick(chosen).to_frame(denominator=denominator)
        return Replay(self.store(frame), frame.nbytes, mini.reference)

    def release(self, version: int) -> None: ...

    def give_back(self, version: int) -> None: ...

    def save(self, lost: Iterable[int]) -> dict[str, np.ndarray]:
        return {}

    def restore(self, frame: np.ndarray | None) -> None: ...


@dataclass(frozen=True, eq=False)
class _Seen:
    """Of one tick's mini-batch of `samples` samples: all, or the first of them in a random order."""

    tick: int
    rank: float  # uniform in [0, 1): the ticks of lowest rank give more
    samples: int
    loss_tokens: int  # of all
    batch: Batch
    order: np.ndarray | None  # None: the samples of `batch` are in that order

    def first(self, count: int) -> Batch:
        return self.batch.take(0, count) if self.order is None else self.batch.pick(self.order[:count])

    def cut(self, count: int) -> _Seen:
        """No more than `count` of its samples."""
        return replace(self, batch=self.first(count), order=None)


class Window:
    """`count` samples of all ticks since the last fire's source."""

    def __init__(self, count: int, seed: int, store: Store):
        self.count, self.seed, self.store = count, seed, store
        self._seen: list[_Seen] = []  # by tick
        self._taken: dict[int, list[_Seen]] = {}  # by fires that may still be void

    @property
    def kept(self) -> int:
        """Samples that are held of the present window."""
        return sum(len(seen.batch) for seen in self._seen)

    def see(self, tick: int, mini: MiniFrame) -> None:
        """The newest mini-batch stays whole: how much of it is needed shows when a fire starts, or the next one comes."""
        self._newest, samples = mini, len(mini.batch)
        rng = np.random.default_rng([self.seed, 0x5A4, tick])
        new = _Seen(tick, rng.random(), samples, mini.batch.loss_tokens, mini.batch, rng.permutation(samples))
        self._seen = self._cut([*self._seen, new], whole=new)

    def take(self, version: int) -> Replay:
        mini, seen = self._newest, self._seen
        self._seen, self._taken[version] = [], seen
        if seen[0].batch is mini.batch and self.count == seen[0].samples:
            return Replay(mini.reference, mini.size, mini.reference)
        each, rest = divmod(self.count, len(seen))
        more = sorted(seen, key=lambda s: s.rank)[:rest]
        counts = [each + (s in more) for s in seen]
        frame = pack_replay([(s.first(c), len(seen) * s.loss_tokens * c / s.samples) for s, c in zip(seen, counts)])
        reference = self.store(frame)
        return Replay(reference, frame.nbytes, reference)

    def release(self, version: int) -> None:
        self._taken.pop(version, None)

    def give_back(self, version: int) -> None:
        self._seen = self._cut(_by_tick([*self._taken.pop(version, []), *self._seen]))

    def save(self, lost: Iterable[int]) -> dict[str, np.ndarray]:
        void = [seen for version in lost for seen in self._taken.get(version, [])]
        seen = self._cut(_by_tick([*void, *self._seen]))
        if not seen:
            return {}
        ticks = [[s.tick, s.rank, s.samples, s.loss_tokens, len(s.batch)] for s in seen]
        return {FRAME: concat([s.batch for s in seen]).to_frame(ticks=ticks)}

    def restore(self, frame: np.ndarray | None) -> None:
        if frame is None:
            return
        try:
            header, batch = Batch.from_frame(frame, "the checkpoint")
            ends = np.cumsum([0, *(kept for *_, kept in header["ticks"])]).tolist()
            if ends[-1] != len(batch):
                raise ValueError(f"ticks of {ends[-1]} samples, where there are {len(batch)}")
            cuts = [batch.take(a, b) for a, b in pairwise(ends)]
            self._seen = [_Seen(t, rank, n, d, cut, None) for (t, rank, n, d, _), cut in zip(header["ticks"], cuts)]
        except (FrameError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(f"{FRAME}.frame is no window of samples for the anchor: {error}") from error

    def _cut(self, seen: list[_Seen], whole: _Seen | None = None) -> list[_Seen]:
        """What a fire that started now could need of these, but `whole` as it is."""
        lowest = sorted(seen, key=lambda s: s.rank)[: self.count]
        most = -(-self.count // max(1, len(lowest)))
        return [s if s is whole else s.cut(most) for s in seen if s in lowest]


def _by_tick(seen: list[_Seen]) -> list[_Seen]:
    return sorted(seen, key=lambda s: s.tick)
