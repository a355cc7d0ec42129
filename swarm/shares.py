"""What each rank is sent of a step's samples: those of its replica, in the order in which it uses them, in one frame.

every stage       tokens and lengths: the rows of a boundary follow from them
the last stage    advantages, weights and log-probs besides, for the loss
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from codec.frames import FrameError
from rl.batch import Batch, concat, deal, deal_together

ROWS = ("tokens",)
LOSS = ("tokens", "advantages", "loss_weights", "rollout_logprobs", "ref_logprobs")


@dataclass(frozen=True)
class Share:
    """coordinator -> workers: one frame, the same for `ranks` ranks in a row."""

    frame: np.ndarray
    ranks: int
    dense: int  # bytes of its numbers, as a dense system sends them


def shares(minis: list[Batch], dp: int, pp: int, together: bool = False) -> Iterator[Share]:
    """Of a step's mini-batches, in the order of the ranks. `together`: a prompt's samples are."""
    hands = [(deal_together if together else deal)(mini, dp) for mini in minis]
    denominators = [mini.loss_tokens for mini in minis]
    for d in range(dp):
        own = concat([mini.pick(hand[d]) for mini, hand in zip(minis, hands)])
        for fields, ranks in ((ROWS, pp - 1), (LOSS, 1)):
            if ranks:
                sent = own.only(*fields)
                yield Share(sent.to_frame(denominators=denominators), ranks, sent.nbytes)


def mini_batches(frame: np.ndarray) -> list[tuple[Batch, int]]:
    """A rank's share of each mini-batch, and the tokens that are in the loss of the global one. Raises FrameError."""
    sender = "the coordinator"
    header, batch = Batch.from_frame(frame, sender)
    denominators = header.get("denominators")
    if not isinstance(denominators, list) or not denominators or not all(type(n) is int for n in denominators):
        raise FrameError(sender, "denominators", f"{denominators!r} are no numbers of response tokens")
    each, rest = divmod(len(batch), len(denominators))
    if rest:
        raise FrameError(sender, "denominators", f"{len(denominators)} mini-batches for {len(batch)} samples")
    return [(batch.take(i * each, (i + 1) * each), n) for i, n in enumerate(denominators)]
