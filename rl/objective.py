"""From a batch to microbatches, log-probs and loss terms. Shared by the swarm's last stage and the anchor."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from codec.rows import Rows, pack_rows, rows_of, unpack_rows
from rl.batch import Batch
from rl.config import GrpoConfig
from rl.distinct import Distinct, distinct_of
from rl.grpo import LossTerms, policy_loss, token_logprobs
from rl.policy import Stage

HiddenStates = Float[Tensor, "b l h"] | Float[Tensor, "n h"]


@dataclass(frozen=True)
class MicroBatch:
    """B samples, right-padded to their longest, of L tokens. R is the number of their response tokens.

    A stage that computes no loss is sent tokens alone: advantages and log-probs are empty there.
    With `distinct` hidden states are those of n rows, and p of them predict.
    """

    ids: Int[Tensor, "b l"] | Int[Tensor, " n"]
    real: Bool[Tensor, "b l"]  # False at padding
    predicts: tuple[Tensor, ...]  # index of the hidden states that predict: (row, position) [r] each, or (row,) [p]
    predicted: Int[Tensor, " r"] | None  # by which of them each response token is; None: each by its own
    targets: Int[Tensor, " r"]
    advantages: Float[Tensor, " r"]
    rollout_logprobs: Float[Tensor, " r"]
    ref_logprobs: Float[Tensor, " r"] | None
    loss_weights: Float[Tensor, " r"] | None  # None: all 1
    samples: Int[Tensor, " r"]  # which of the B samples each response token is of
    rows: Rows  # the real tokens as a boundary sees them
    tokens: int  # real tokens
    distinct: Distinct | None = None  # rows that samples have in common are computed once

    def pack(self, hidden: Tensor) -> Tensor:
        """Hidden states -> the rows of a boundary: [B, L, H] -> [N, H], or [n, H] as they are."""
        return pack_rows(hidden, self.real) if self.distinct is None else hidden

    def unpack(self, rows: Tensor) -> Tensor:
        return unpack_rows(rows, self.real) if self.distinct is None else rows


def microbatches(
    batch: Batch, samples: np.ndarray, size: int, device: torch.device, tick: int = 0, share: bool = False
) -> list[MicroBatch]:
    """`samples` in the given order, `size` at a time, trained by `tick`. What the batch does not have is empty in them.

    `share`: rows that samples of a microbatch have in common are computed once.
    """
    return [_microbatch(batch, samples[i : i + size], device, tick, share) for i in range(0, len(samples), size)]


def _microbatch(batch: Batch, samples: np.ndarray, device: torch.device, tick: int, share: bool) -> MicroBatch:
    token_at = np.concatenate([[0], np.cumsum(batch.total)])
    response_at = np.concatenate([[0], np.cumsum(batch.response_lengths)])
    total = batch.total[samples]
    ids = np.zeros((len(samples), int(total.max())), np.int64)
    real = np.arange(ids.shape[1]) < total[:, None]
    ids[real] = np.concatenate([batch.tokens[token_at[i] : token_at[i + 1]] for i in samples])
    columns = np.arange(ids.shape[1])
    response = (columns >= batch.prompt[samples][:, None]) & real
    row, position = np.nonzero(response)

    def per_token(flat: np.ndarray) -> Tensor:
        return torch.from_numpy(np.concatenate([flat[response_at[i] : response_at[i + 1]] for i in samples])).to(device)

    def repeated(values: np.ndarray) -> Tensor:
        return per_token(np.repeat(values, batch.response_lengths) if len(values) else values)

    micro = MicroBatch(
        ids=torch.from_numpy(ids).to(device),
        real=torch.from_numpy(real).to(device),
        predicts=(torch.from_numpy(row).to(device), torch.from_numpy(position - 1).to(device)),
        predicted=None,
        targets=torch.from_numpy(ids[response]).to(device),
        advantages=repeated(batch.advantages),
        rollout_logprobs=per_token(batch.rollout_logprobs),
        ref_logprobs=per_token(batch.ref_logprobs) if len(batch.ref_logprobs) else None,
        loss_weights=repeated(batch.loss_weights) if len(batch.loss_weights) else None,
        samples=torch.from_numpy(row).to(device),
        rows=rows_of(ids, real, device, tick, share),
        tokens=int(real.sum()),
    )
    return _shared(micro, real) if share else micro


def _shared(micro: MicroBatch, real: np.ndarray) -> MicroBatch:
    """The same with distinct rows alone."""
    rows = micro.rows
    at = torch.zeros_like(micro.ids).masked_scatter(micro.real, rows.source)
    predicts, predicted = at[micro.predicts].unique(return_inverse=True)
    ids, distinct = micro.ids[micro.real][rows.kept], distinct_of(real, rows)
    return replace(micro, ids=ids, predicts=(predicts,), predicted=predicted, distinct=distinct)


def rows_per_token(micros: list[MicroBatch]) -> dict[str, float]:
    """As a metric: rows that go through the model for each token. Nothing where none are shared."""
    tokens = sum(micro.tokens for micro in micros if micro.distinct is not None)
    return {"perf/rows_per_token": sum(micro.ids.numel() for micro in micros) / tokens} if tokens else {}


def logprobs(
    stage: Stage,
    hidden: HiddenStates,
    micro: MicroBatch,
    temperature: float,
    with_entropy: bool = False,
    trains_entropy: bool = False,
) -> tuple[Float[Tensor, " r"], Float[Tensor, " r"] | None]:
    """Log-probs of the response tokens, and their entropy, from the last stage's hidden states (`token_logprobs`)."""
    logits = stage.logits(hidden[micro.predicts])
    return token_logprobs(logits, micro.targets, temperature, with_entropy, micro.predicted, trains_entropy)


def loss_terms(
    stage: Stage,
    hidden: HiddenStates,
    micro: MicroBatch,
    old_logprobs: Float[Tensor, " r"] | None,
    denominator: float | Float[Tensor, " r"],
    config: GrpoConfig,
    temperature: float,
) -> LossTerms:
    """Loss of one microbatch; `denominator` is `Batch.loss_tokens` of the global mini-batch, or of each token's own.

    `old_logprobs` None: this forward's own are the old ones, so every ratio is 1.
    """
    new, entropy = logprobs(stage, hidden, micro, temperature, True, config.entropy_coeff != 0)
    old, behaviour = new.detach() if old_logprobs is None else old_logprobs, micro.rollout_logprobs
    known = micro.ref_logprobs, behaviour, micro.loss_weights, micro.samples
    return policy_loss(new, old, micro.advantages, denominator, config, entropy, *known)
