"""Samples with their rewards, ragged and flat, as they travel: engines -> coordinator -> swarm and anchor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from codec import frames
from rl.packing import OPTIONAL, PER_TOKEN, distinct_prompts, pack_samples, unpack_samples

_DTYPES = {
    "tokens": "int32",
    "prompt": "int32",
    "total": "int32",
    "rollout_logprobs": "float32",
    "ref_logprobs": "float32",
    "rewards": "float32",
    "advantages": "float32",
    "truncated": "bool",
    "loss_weights": "float32",
    "own": "bool",
}


Parts = dict[str, np.ndarray]  # of the rewards, by name: float32 [N], NaN where a sample has none
_PART = "part "
SCORES = ("rewards", "truncated", "own")  # what validation is made of


def of_validation(shown: bool) -> tuple[str, ...]:
    """What an engine tells of validation answers; with `shown` also the answers."""
    return ("tokens", *SCORES) if shown else SCORES


@dataclass(frozen=True)
class Prompts:
    """coordinator -> engine: the prompts `indices` of a split, `n` samples each, seeded by `step`."""

    split: str
    step: int
    indices: tuple[int, ...]
    n: int
    temperature: float
    wanted: tuple[str, ...] = OPTIONAL  # what comes back beside lengths


@dataclass(frozen=True)
class Batch:
    """N samples; token arrays are flat, one sample after the other. All but the lengths may be empty: not sent."""

    tokens: np.ndarray  # int32 [sum of total], prompt then response, from 0 up
    prompt: np.ndarray  # int32 [N], prompt lengths
    total: np.ndarray  # int32 [N], prompt + response lengths
    rollout_logprobs: np.ndarray  # float32 [sum of own], of the engine's sampling distribution
    ref_logprobs: np.ndarray  # float32 [sum of own] or [0]: of the base policy
    rewards: np.ndarray  # float32 [N]
    advantages: np.ndarray  # float32 [N], zeros for validation
    truncated: np.ndarray  # bool [N]
    # float32 [N] or [0]: of each response token of a sample in the loss (`rl/aggregation.py`); [0]: all 1
    loss_weights: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    # bool [sum of responses] or [0]: which response tokens are the policy's own, the others an environment's; [0]: all
    own: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def response_lengths(self) -> np.ndarray:
        return self.total - self.prompt

    @property
    def response_tokens(self) -> int:
        return int(self.response_lengths.sum())

    @property
    def own_lengths(self) -> np.ndarray:
        """Response tokens of each sample that are the policy's own."""
        return self._counted(self.own) if self.own.size else self.response_lengths

    @property
    def own_tokens(self) -> int:
        return int(self.own_lengths.sum())

    @property
    def turns(self) -> np.ndarray:
        """How often the policy spoke in each sample: runs of its own tokens."""
        if not self.own.size:
            return np.ones(len(self), np.int32)
        goes_on = np.concatenate([[False], self.own[:-1]])
        starts = np.cumsum(self.response_lengths) - self.response_lengths
        goes_on[starts[starts < len(goes_on)]] = False
        return self._counted(self.own & ~goes_on)

    def _counted(self, marks: np.ndarray) -> np.ndarray:
        """Of marks of response tokens, how many each sample has; int32."""
        ends = np.cumsum(self.response_lengths)
        counts = np.concatenate([[0], np.cumsum(marks)])
        return (counts[ends] - counts[ends - self.response_lengths]).astype(np.int32)

    @property
    def loss_tokens(self) -> int:
        """Tokens that are in the loss, of a whole mini-batch what it is divided by; at least 1."""
        if not self.loss_weights.size:
            return self.own_tokens
        return max(1, int(self.own_lengths[self.loss_weights != 0].sum()))

    @property
    def prompts_digest(self) -> str:
        """What was trained on, whoever sampled the answers."""
        first = np.cumsum(self.total) - self.total
        return digest_of_prompts([self.tokens[i : i + n] for i, n in zip(first, self.prompt)])

    def split(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Tokens of each sample's prompt, and of its response."""
        parts = np.split(self.tokens, np.cumsum(np.stack([self.prompt, self.response_lengths], 1))[:-1])
        return parts[0::2], parts[1::2]

    def take(self, start: int, stop: int) -> Batch:
        """Samples [start, stop)."""
        token = np.concatenate([[0], np.cumsum(self.total)])
        response = np.concatenate([[0], np.cumsum(self.response_lengths)])
        own = np.concatenate([[0], np.cumsum(self.own_lengths)])
        cut = {f.name: getattr(self, f.name)[start:stop] for f in fields(self)}
        cut["tokens"] = self.tokens[token[start] : token[stop]]
        cut["own"] = self.own[response[start] : response[stop]]
        for name in PER_TOKEN:
            cut[name] = getattr(self, name)[own[start] : own[stop]]
        return Batch(**cut)

    def pick(self, samples: np.ndarray) -> Batch:
        """The given samples, in that order."""
        there = {f.name: array for f in fields(self) if (array := getattr(self, f.name)).size}
        flat = {"tokens": self.total, "own": self.response_lengths} | dict.fromkeys(PER_TOKEN, self.own_lengths)
        places = {name: _places(flat[name], samples) if name in flat else samples for name in there}
        return replace(self, **{name: array[places[name]] for name, array in there.items()})

    def only(self, *names: str) -> Batch:
        """The lengths and these fields; the others are empty, and are not sent."""
        return replace(self, **{name: getattr(self, name)[:0] for name in OPTIONAL if name not in names})

    @property
    def nbytes(self) -> int:
        """Of its arrays, as a dense system sends them."""
        return sum(getattr(self, f.name).nbytes for f in fields(self))

    def to_frame(self, reward_parts: Parts | None = None, **header: Any) -> np.ndarray:
        """With the parts of the rewards, if they have some. Raises ValueError naming the field if it does not add up."""
        self._check()
        body, sent = pack_samples({f.name: getattr(self, f.name) for f in fields(self)})
        named = {f"{_PART}{name}": values for name, values in (reward_parts or {}).items()}
        return frames.pack(header | {"samples": len(self), "sent": sent}, {"body": body} | named)

    @staticmethod
    def from_frame(frame: np.ndarray, sender: str) -> tuple[dict[str, Any], Batch]:
        """The header, and the samples; what was not sent of them is empty. Raises FrameError."""
        header, batch, _ = Batch.with_parts(frame, sender)
        return header, batch

    @staticmethod
    def with_parts(frame: np.ndarray, sender: str) -> tuple[dict[str, Any], Batch, Parts]:
        """`from_frame`, and the parts of the rewards."""
        header, arrays = frames.unpack(frame, sender)
        parts = {name.removeprefix(_PART): arrays.pop(name) for name in [*arrays] if name.startswith(_PART)}
        body = arrays.get("body")
        if set(arrays) != {"body"} or body is None or body.ndim != 1 or body.dtype != np.uint8:
            raise frames.FrameError(sender, "arrays", f"a batch is one row of bytes, not {sorted(arrays)}")
        samples, sent = header.pop("samples", None), header.pop("sent", None)
        for name, value in (("samples", samples), ("sent", sent)):
            if type(value) is not int or value < 0:
                raise frames.FrameError(sender, name, f"is {value!r}, not a number from 0 up")
        for name, values in parts.items():
            if values.shape != (samples,) or values.dtype != np.float32:
                raise frames.FrameError(
                    sender, f"part {name}", f"is {values.dtype} {values.shape} of {samples} samples"
                )
        return header, Batch(**unpack_samples(body, samples, sent, sender)), parts

    def _check(self) -> None:
        """Raises ValueError."""
        for name, dtype in _DTYPES.items():
            array = getattr(self, name)
            if array.ndim != 1 or array.dtype != dtype:
                raise ValueError(f"{name} is {array.dtype} {array.shape}, not a row of {dtype}")
        n, total = len(self), len(self.total)
        if total != n or (self.prompt < 1).any() or (self.total < self.prompt).any():
            raise ValueError(f"prompt and total: {n} and {total} lengths, or one is below 1 or above its total")
        whole = {"tokens": int(self.total.sum()), "own": self.response_tokens}
        for name in sorted(OPTIONAL, key=PER_TOKEN.__contains__):  # the marks say how many log-probs there are
            there = len(getattr(self, name))
            full = self.own_tokens if name in PER_TOKEN else whole.get(name, n)
            if there not in (0, full):
                raise ValueError(f"{name}: {there} entries where there are {full}")


def digest_of_prompts(prompts: Sequence[Sequence[int] | np.ndarray]) -> str:
    """Of token ids, a prompt for each sample."""
    lengths, tokens = [len(prompt) for prompt in prompts], [token for prompt in prompts for token in prompt]
    return frames.digest(np.array(lengths, np.int32), np.array(tokens, np.int32))


def concat(batches: list[Batch]) -> Batch:
    """One after the other; where some have tokens of an environment, the others' are all marked as the policy's."""
    if any(b.own.size for b in batches):
        batches = [b if b.own.size else replace(b, own=np.ones(b.response_tokens, bool)) for b in batches]
    return Batch(**{f.name: np.concatenate([getattr(b, f.name) for b in batches]) for f in fields(Batch)})


def concat_parts(batches: list[tuple[int, Parts]]) -> Parts:
    """Of batches of so many samples, in order."""
    names = dict.fromkeys(name for _, parts in batches for name in parts)
    lacking = {n: np.full(n, np.nan, np.float32) for n, _ in batches}
    return {name: np.concatenate([parts.get(name, lacking[n]) for n, parts in batches]) for name in names}


def grouped(batch: Batch, ranks: int = 1) -> np.ndarray:
    """All samples, those of one prompt together; what has most tokens first, dealt back and forth over `ranks`."""
    prompt_of = distinct_prompts(batch.tokens, batch.prompt, batch.total)[0]
    responses = np.bincount(prompt_of, batch.response_lengths)
    weigh = responses + batch.prompt[np.unique(prompt_of, return_index=True)[1]]
    place = np.empty(len(weigh), np.int64)
    place[np.argsort(-weigh, kind="stable")] = np.arange(len(weigh))
    position = place[prompt_of]
    return np.lexsort((-batch.total, position, _hand(position, ranks)))


def _places(lengths: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Where the entries of the `chosen` rows lie in a flat array of rows of `lengths`, row after row."""
    starts, counts = (np.cumsum(lengths, dtype=np.int64) - lengths)[chosen], lengths[chosen].astype(np.int64)
    return np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())


def _hand(position: np.ndarray, ranks: int) -> np.ndarray:
    """Which rank is dealt the card at `position`: back and forth."""
    turn = position % (2 * ranks)
    return np.minimum(turn, 2 * ranks - 1 - turn)


def deal_together(batch: Batch, ranks: int) -> list[np.ndarray]:
    """Samples of each data-parallel rank: as many for each, a prompt's in one hand as far as that can be."""
    order = grouped(batch, ranks)
    return [order[rank * len(order) // ranks : (rank + 1) * len(order) // ranks] for rank in range(ranks)]


def deal(batch: Batch, ranks: int) -> list[np.ndarray]:
    """Samples of each data-parallel rank, longest first: dealt back and forth so that ranks weigh the same."""
    order = np.argsort(-batch.total, kind="stable")
    hand = _hand(np.arange(len(order)), ranks)
    return np.split(order[np.argsort(hand, kind="stable")], np.cumsum(np.bincount(hand, minlength=ranks))[:-1])
