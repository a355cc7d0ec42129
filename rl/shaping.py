"""What is taken off the rewards of training, before advantages: long answers, and distance from the base policy. No torch."""

from __future__ import annotations

import numpy as np

from rl.grpo_config import GrpoConfig

# Of a step's samples: scores of the task, what long answers lost, and the KL a token; the first and the last are verl's
SCORE, OVERLONG, KL_PENALTY = "critic/score/mean", "critic/overlong_penalty/mean", "actor/reward_kl_penalty"


def shaped(
    scores: list[float], lengths: np.ndarray, grpo: GrpoConfig, logprobs: list[np.ndarray], ref: list[np.ndarray]
) -> tuple[list[float], dict[str, float]]:
    """Rewards to train on of answers of `lengths` tokens [N]; and, if anything is taken off, sums for the metrics above."""
    penalties, kl = overlong_penalties(lengths, grpo), np.zeros(len(scores))
    sums = {OVERLONG: float(penalties.sum())} if grpo.overlong_buffer.length else {}
    if grpo.kl_in_reward:
        kl = sample_kl(logprobs, ref)
        sums[KL_PENALTY] = float((kl / np.maximum(1, lengths)).sum())
    if not sums:
        return scores, {}
    rewards = np.array(scores, np.float64) - penalties - grpo.kl_in_reward * kl
    return rewards.tolist(), sums | {SCORE: float(np.sum(scores))}


def overlong_penalties(lengths: np.ndarray, grpo: GrpoConfig) -> np.ndarray:
    """Soft overlong punishment of answers of `lengths` tokens [N], from 0 up to `overlong_buffer.penalty`, float64.

    Linear over the last `overlong_buffer.length` tokens before `max_response_length` (DAPO, arXiv:2503.14476, eq. 13;
    verl/workers/reward_manager/dapo.py).
    """
    buffer = grpo.overlong_buffer
    if not buffer.length:
        return np.zeros(len(lengths))
    into = np.maximum(0, np.asarray(lengths) - (grpo.max_response_length - buffer.length))
    return into / buffer.length * buffer.penalty


def sample_kl(logprobs: list[np.ndarray], ref_logprobs: list[np.ndarray]) -> np.ndarray:
    """k1 of each sample to the base policy, summed over its tokens, float64 [N].

    As `apply_kl_penalty` has it (verl/trainer/ppo/ray_trainer.py), whose outcome advantages sum token rewards; its
    log-probs are the trainer's, these the engine's.
    """
    pairs = zip(logprobs, ref_logprobs, strict=True)
    return np.array([np.sum(p, dtype=np.float64) - np.sum(q, dtype=np.float64) for p, q in pairs])
