"""How much each sample's tokens weigh in the loss of a mini-batch: `grpo.loss_agg_mode`, and who is left out. No torch.

    loss = Σ_i w_i Σ_t l_it / T        T response tokens in N samples that are in the loss, L_i of sample i

    token-mean                w_i = 1              mean over all tokens (DAPO, arXiv:2503.14476, 3.3)
    seq-mean-token-mean       T / (N·L_i)          mean over samples of the mean over their tokens (GRPO)
    seq-mean-token-sum        T / N                ... of the sum over their tokens
    seq-mean-token-sum-norm   T / (N·longest)      ... over max_response_length (Dr. GRPO, arXiv:2503.20783, 3.1)

The weights are of the whole mini-batch, and made before its samples are dealt: so no layout, microbatch or replay changes
them. A sample that is left out has weight 0 and is in neither T nor N. T is what all is divided by, in every mode: so the
mean of any other number over the tokens that are trained needs no second one.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rl.batch import Batch
from rl.grpo_config import GrpoConfig


def out_of_loss(batch: Batch, grpo: GrpoConfig) -> np.ndarray:
    """Which samples of whole groups are in no loss, bool [N]."""
    out = batch.truncated & grpo.overlong_filter
    if grpo.zero_variance == "drop":
        out = out | np.repeat(of_one_reward(batch, grpo.group_size), grpo.group_size)
    return out


def of_one_reward(batch: Batch, group_size: int) -> np.ndarray:
    """Of which groups all rewards are the same, bool [groups]."""
    rewards = batch.rewards.reshape(-1, group_size)
    return (rewards == rewards[:, :1]).all(1)


def weighted(mini: Batch, grpo: GrpoConfig) -> Batch:
    """A whole mini-batch with its samples' weights in the loss; as it is, where every token weighs the same."""
    if not grpo.weighs_samples:
        return mini
    kept, lengths = ~out_of_loss(mini, grpo), np.maximum(1, mini.response_lengths).astype(np.float64)
    tokens, samples = max(1, int(mini.response_lengths[kept].sum())), max(1, int(kept.sum()))
    each = {
        "token-mean": np.ones(len(mini)),
        "seq-mean-token-mean": tokens / (samples * lengths),
        "seq-mean-token-sum": np.full(len(mini), tokens / samples),
        "seq-mean-token-sum-norm": np.full(len(mini), tokens / (samples * grpo.max_response_length)),
    }[grpo.loss_agg_mode]
    return replace(mini, loss_weights=(kept * each).astype(np.float32))
