"""From a batch to microbatches, log-probs and loss terms. Shared by the swarm's last stage and the anchor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from codec.rows import Rows, rows_of
from rl.batch import Batch
from rl.config import GrpoConfig
from rl.grpo import LossTerms, policy_loss, token_logprobs
from rl.policy import Stage


@dataclass(frozen=True)
class MicroBatch:
    """B samples, right-padded to their longest, of L tokens. R is the number of their response tokens.

    A stage that computes no loss is sent tokens alone: advantages and log-probs are empty there.
    """

    ids: Int[Tensor, "b l"]
    real: Bool[Tensor, "b l"]  # False at padding
    predicts: tuple[Int[Tensor, " r"], Int[Tensor, " r"]]  # (row, position) of what predicts each response token
    targets: Int[Tensor, " r"]
    advantages: Float[Tensor, " r"]
    rollout_logprobs: Float[Tensor, " r"]
    ref_logprobs: Float[Tensor, " r"] | None
    rows: Rows  # the real tokens as a boundary sees them
    tokens: int  # real tokens


def microbatches(batch: Batch, samples: np.ndarray, size: int, device: torch.device, tick: int = 0) -> list[MicroBatch]:
    """`samples` in the given order, `size` at a time, trained by `tick`. What the batch does not have is empty in them."""
    return [_microbatch(batch, samples[i : i + size], device, tick) for i in range(0, len(samples), size)]


def _microbatch(batch: Batch, samples: np.ndarray, device: torch.device, tick: int) -> MicroBatch:
    token_at = np.concatenate([[0], np.cumsum(batch.total)])
    response_at = np.concatenate([[0], np.cumsum(batch.response_lengths)])
    total = batch.total[samples]
    ids = np.zeros((len(samples), int(total.max())), np.int64)
    real = np.arange(ids.shape[1]) < total[:, None]
    ids[real] = np.concatenate([batch.tokens[token_at[i] : token_at[i + 1]] for i in samples])
    columns = np.arange(ids.shape[1])
    response = (columns >= batch.prompt[samples][:, None]) & real
    row, position = np.nonzero(response)
    advantages = np.repeat(batch.advantages, batch.response_lengths) if len(batch.advantages) else batch.advantages

    def per_token(flat: np.ndarray) -> Tensor:
        return torch.from_numpy(np.concatenate([flat[response_at[i] : response_at[i + 1]] for i in samples])).to(device)

    return MicroBatch(
        ids=torch.from_numpy(ids).to(device),
        real=torch.from_numpy(real).to(device),
        predicts=(torch.from_numpy(row).to(device), torch.from_numpy(position - 1).to(device)),
        targets=torch.from_numpy(ids[response]).to(device),
        advantages=per_token(advantages),
        rollout_logprobs=per_token(batch.rollout_logprobs),
        ref_logprobs=per_token(batch.ref_logprobs) if len(batch.ref_logprobs) else None,
        rows=rows_of(ids, real, device, tick),
        tokens=int(real.sum()),
    )


def logprobs(
    stage: Stage, hidden: Float[Tensor, "b l h"], micro: MicroBatch, temperature: float
) -> tuple[Float[Tensor, " r"], Float[Tensor, " r"]]:
    """Log-probs and entropy of the response tokens, from the last stage's hidden states."""
    found, entropy = token_logprobs(stage.logits(hidden[micro.predicts]), micro.targets, temperature, with_entropy=True)
    assert entropy is not None, "it was asked for"
    return found, entropy


def loss_terms(
    stage: Stage,
    hidden: Float[Tensor, "b l h"],
    micro: MicroBatch,
    old_logprobs: Float[Tensor, " r"] | None,
    denominator: float | Float[Tensor, " r"],
    config: GrpoConfig,
    temperature: float,
) -> LossTerms:
    """Loss of one microbatch; `denominator` counts the response tokens of the global mini-batch, or of each token's own.

    `old_logprobs` None: this forward's own are the old ones, so every ratio is 1.
    """
    new, entropy = logprobs(stage, hidden, micro, temperature)
    old = new.detach() if old_logprobs is None else old_logprobs
    behaviour = micro.rollout_logprobs
    return policy_loss(new, old, micro.advantages, denominator, config, entropy, micro.ref_logprobs, behaviour)
