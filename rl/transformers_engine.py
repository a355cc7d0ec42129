"""The engine `transformers`: batched sampling with a KV cache, bit for bit the same on every machine of one kind."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from rl.config import RolloutConfig
from rl.device import prefer_determinism
from rl.engine import Key, PlainModel, Samples, uniforms
from rl.growing_cache import growing_cache
from rl.grpo import log_distribution
from rl.packed_linear import PackedLinears
from rl.stops import TurnText

BLOCK = 32  # tokens; longer than a prompt of the built-in model


class TransformersEngine:
    """Batched sampling with transformers and a KV cache: one prefill a prompt, finished rows leave the batch."""

    def __init__(self, plain: PlainModel, rollout: RolloutConfig, length: int):
        self.plain, self.model, self.device = plain, plain.model, plain.device
        prefer_determinism(self.device)
        self.eos = torch.tensor(plain.eos, device=self.device)
        # of a slice, which has gaps, torch's linear copies all of the head's weights: 0.6 s of SmolLM2 in bf16, little in fp32,
        # where another order of sums would be the only thing to see
        self.last = 1 if self.model.dtype == torch.float32 else torch.tensor([-1], device=self.device)
        self.packed = PackedLinears(self.model)

    def publish(self) -> None:
        self.plain.weights.publish()
        self.packed.forget()

    def sleep(self) -> None:
        """Weights stay, and keys and values are gone by then: what is left is what torch keeps for later."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def sample(
        self, prompts: list[list[int]], keys: list[Key], max_new: int | list[int], temperature: float
    ) -> Samples:
        with self.packed.in_use():
            return self._sample(prompts, keys, max_new, temperature)

    def _sample(
        self, prompts: list[list[int]], keys: list[Key], max_new: int | list[int], temperature: float
    ) -> Samples:
        n = len(keys) // len(prompts)
        limits = torch.tensor(max_new, device=self.device).expand(len(keys))
        max_new = int(limits.max())
        drawn = torch.from_numpy(uniforms(keys, max_new)).to(self.device)
        cache, logits, mask = self._prefill(prompts, n)
        rows = torch.arange(len(keys), device=self.device)  # which samples are still running
        stops = self.plain.stops
        turns = [stops.turn(prompts[i // n]) for i in range(len(keys))] if stops else []
        tokens = torch.zeros(len(keys), max_new, dtype=torch.int64, device=self.device)
        logprobs = torch.zeros(len(keys), max_new, device=self.device)
        lengths = limits.clone()
        finished = torch.zeros(len(keys), dtype=torch.bool, device=self.device)
        position = torch.tensor([len(p) for p in prompts], device=self.device).repeat_interleave(n)
        for t in range(max_new):
            chosen, logp = _draw(logits, drawn[rows, t], temperature)
            tokens[rows, t], logprobs[rows, t] = chosen, logp
            done = torch.isin(chosen, self.eos) | self._stopped(turns, rows, chosen)
            lengths[rows[done]] = t + 1
            finished[rows[done]] = True
            done |= limits[rows] == t + 1
            if done.any():
                keep = (~done).nonzero().squeeze(1)
                rows, chosen, position = rows[keep], chosen[keep], position[keep]
                mask = None if mask is None else mask[keep]
                if len(rows) and t + 1 < max_new:
                    cache.batch_select_indices(keep)
            if len(rows) == 0 or t + 1 == max_new:
                break
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            logits = self._forward(chosen[:, None], position[:, None], mask, cache)
            position = position + 1
        return _ragged(tokens, logprobs, lengths, finished)

    def _stopped(self, turns: list[TurnText], rows: Tensor, chosen: Tensor) -> Tensor:
        """Which of the running samples end with this token by their text."""
        if not turns:
            return torch.zeros_like(chosen, dtype=torch.bool)
        found = [turns[row].ends_with(token) for row, token in zip(rows.tolist(), chosen.tolist(), strict=True)]
        return torch.tensor(found, device=self.device)

    def _prefill(self, prompts: list[list[int]], n: int) -> tuple[DynamicCache, Tensor, Tensor | None]:
        """Left-padded prompts once each, their common beginning once for all; then the cache repeated for n samples each."""
        cache, first = growing_cache(self.model.config), in_common(prompts)
        if first:
            ids = torch.tensor([prompts[0][:first]], device=self.device)
            self._forward(ids, torch.arange(first, device=self.device)[None], None, cache)
            cache.batch_repeat_interleave(len(prompts))
        rest = [p[first:] for p in prompts]
        longest = max(map(len, rest))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in rest], device=self.device)
        pad = torch.tensor([longest - len(p) for p in rest], device=self.device)
        columns = torch.arange(longest, device=self.device)[None]
        mask = None
        if pad.any():
            mask = (columns >= pad[:, None]).long()
            mask = torch.cat([mask.new_ones(len(prompts), first), mask], dim=1)
        logits = self._forward(ids, first + (columns - pad[:, None]).clamp_min(0), mask, cache)
        cache.batch_repeat_interleave(n)
        mask = None if mask is None else mask.repeat_interleave(n, dim=0)
        return cache, logits.repeat_interleave(n, dim=0), mask

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: DynamicCache) -> Tensor:
        """Of the last column."""
        out = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=self.last,
        )
        return out.logits[:, -1]


def in_common(prompts: list[list[int]]) -> int:
    """Tokens that all begin with, in whole blocks: what is computed once does not hang on which prompts come together."""
    if len(prompts) < 2:
        return 0
    low, high = min(prompts), max(prompts)
    alike = next((i for i, (a, b) in enumerate(zip(low, high)) if a != b), min(len(low), len(high)))
    shortest = min(map(len, prompts))
    return min(alike, shortest - 1) // BLOCK * BLOCK


def _draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling, one uniform number a row: independent of which rows are in the batch.

    At temperature 0 the likeliest token, the first of several: it is certain, so its log-prob is 0.
    """
    if temperature == 0:
        return logits.argmax(dim=-1), torch.zeros(len(logits), device=logits.device)
    logp = log_distribution(logits, temperature)
    cdf = logp.double().exp().cumsum(-1)
    chosen = torch.searchsorted(cdf, (uniform.double() * cdf[:, -1])[:, None], right=True).squeeze(1)
    chosen = chosen.clamp_max(logits.shape[-1] - 1)
    return chosen, logp.gather(1, chosen[:, None]).squeeze(1)


def _ragged(tokens: Tensor, logprobs: Tensor, lengths: Tensor, finished: Tensor) -> Samples:
    cut = lengths.tolist()
    return Samples(
        tokens=[row[:n] for row, n in zip(tokens.to(torch.int32).cpu().numpy(), cut)],
        logprobs=[row[:n] for row, n in zip(logprobs.cpu().numpy(), cut)],
        truncated=[not f for f in finished.tolist()],
    )
