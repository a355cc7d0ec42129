"""A Hugging Face causal LM cut into stages. A stage is built on the meta device and reads only its own tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from codec.rows import pack_rows, unpack_rows
from rl.distinct import Distinct, registered
from rl.lookup import Lookup
from rl.lora import NO_LORA, adapt, is_adapter
from rl.lora_config import LoraConfig
from rl.spans import Span
from rl.weights import Weights, slots_of

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def skeleton(
    folder: Path, attention: str = "sdpa", dtype: torch.dtype = torch.float32, lora: LoraConfig = NO_LORA
) -> PreTrainedModel:
    """The whole model on the meta device: no memory, but real rotary tables (they are not in checkpoints).

    Raises ValueError if transformers cannot use `attention` here.
    """
    config = AutoConfig.from_pretrained(folder)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=registered() if attention == "sdpa" else attention, dtype=dtype
            )
    except ImportError as error:
        raise ValueError(f"model.attention {attention!r} cannot be used on this machine: {error}") from error
    if lora.rank:
        adapt(model, lora)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model.eval()


def is_tied(model: PreTrainedModel) -> bool:
    return bool(model.config.tie_word_embeddings)


class Stage(nn.Module):
    """Decoder layers of one span, with the embedding if first and the norm and head if last.

    With `checkpointing` a layer keeps its input alone, and is computed again in the backward pass.
    """

    def __init__(
        self,
        folder: Path,
        span: Span,
        dtype: torch.dtype,
        device: torch.device,
        trainable: bool = True,
        attention: str = "sdpa",
        checkpointing: bool = False,
        lora: LoraConfig = NO_LORA,
    ):
        super().__init__()
        self.can_share = attention == "sdpa"  # rows that samples have in common
        model = skeleton(folder, attention, dtype, lora)
        self.span, self.config, self.checkpointing = span, model.config, checkpointing
        tied_away = is_tied(model) and span.last and not span.first
        embed, norm, head = model.model.embed_tokens, model.model.norm, model.lm_head
        self.layers = nn.ModuleList(model.model.layers[span.lo : span.hi])
        self.norm: nn.Module | None = norm if span.last else None
        self.lm_head: nn.Module | None = head if span.last else None
        self.rotary: nn.Module = model.model.rotary_emb.to(device)
        parts: list[tuple[str, nn.Module]] = []
        if span.first:
            parts.append(("model.embed_tokens.", embed))
        parts += [(f"model.layers.{span.lo + i}.", layer) for i, layer in enumerate(self.layers)]
        if span.last:
            parts.append(("model.norm.", norm))
        owned = len(parts)
        if span.last and not (is_tied(model) and span.first):
            # a tied head on another stage than the embedding is a copy of it, under its name
            parts.append(("model.embed_tokens." if tied_away else "lm_head.", head))
        self.weights = Weights(parts, folder, dtype, device, trainable, owned if tied_away else None, lora)
        if span.first and span.last and is_tied(model):
            head.weight = embed.weight
        self.embed: nn.Module | None = Lookup(embed, tied=span.last and is_tied(model)) if span.first else None
        self.eval()  # no dropout, whatever config.json says: the ratio is to the policy that sampled

    def forward(
        self, x: Tensor, real: Tensor, cuts: Mapping[int, Callable[[Tensor], Tensor]], distinct: Distinct | None = None
    ) -> Tensor:
        """Token ids [B, L] (first stage) or hidden states [B, L, H] -> hidden states [B, L, H].

        Sequences are right-padded, so a causal mask is enough: no real token can see padding.
        `cuts[i]` maps the real rows [N, H] that enter layer i (a virtual boundary); it runs once a forward,
        checkpointing or not, for it counts what it sees.
        With `distinct` ids [n], hidden states and rows [n, H] are those of its n rows, here and in `cuts`.
        """
        hidden = x if self.embed is None else self.embed(x)
        hidden = hidden if distinct is None else hidden[None]
        shared = self._for_all_layers(hidden, distinct)
        for i, layer in enumerate(self.layers, start=self.span.lo):
            if i in cuts:
                hidden = self._cut(cuts[i], hidden, real, distinct)
            hidden = self._through(layer, hidden, shared)
        return hidden if distinct is None else hidden[0]

    def _for_all_layers(self, hidden: Tensor, distinct: Distinct | None) -> dict[str, Any]:
        """What every layer is given beside its hidden states [B, L, H], or [1, n, H]."""
        if distinct is not None:
            assert self.can_share, "of attentions, sdpa alone takes rows that samples share"
            position_ids = distinct.positions[None]
            masks: dict[str, Any] = {"attention_mask": None, "distinct": distinct}
        else:
            position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
            # None where the attention is causal by itself; eager attention is not
            mask = create_causal_mask(self.config, hidden, attention_mask=None, past_key_values=None)
            masks = {"attention_mask": mask}
        return masks | {"position_ids": position_ids, "position_embeddings": self.rotary(hidden, position_ids)}

    @staticmethod
    def _cut(cut: Callable[[Tensor], Tensor], hidden: Tensor, real: Tensor, distinct: Distinct | None) -> Tensor:
        return unpack_rows(cut(pack_rows(hidden, real)), real) if distinct is None else cut(hidden[0])[None]

    def _through(self, layer: nn.Module, hidden: Tensor, shared: dict[str, Any]) -> Tensor:
        if not (self.checkpointing and torch.is_grad_enabled()):
            return layer(hidden, **shared)
        return checkpoint(partial(layer, **shared), hidden, use_reentrant=False, preserve_rng_state=False)

    def logits(self, rows: Tensor) -> Tensor:
        """Hidden rows [N, H] -> logits [N, V]; last stage only."""
        assert self.norm is not None and self.lm_head is not None, "only the last stage has a head"
        return self.lm_head(self.norm(rows))


def whole_model(
    folder: Path, dtype: torch.dtype, device: torch.device, attention: str = "sdpa", lora: LoraConfig = NO_LORA
) -> tuple[PreTrainedModel, Weights]:
    """The Hugging Face model itself, for generation, with its parameters in one flat buffer.

    The buffer has the order of all stages' owned parameters one after the other.
    """
    model = skeleton(folder, attention, dtype, lora)
    weights = Weights(_parts(model), folder, dtype, device, trainable=False, lora=lora)
    if is_tied(model):
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary_emb.to(device)
    return model, weights


def layout(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters by name, in the order of the whole model's flat buffer; a tied embedding once."""
    return {slot.full: slot.shape for slot in slots_of(_parts(skeleton(folder)))}


def adapters(folder: Path, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the adapters by name, in the order of the flat buffer."""
    slots = slots_of(_parts(skeleton(folder, lora=lora)))
    return {slot.full: slot.shape for slot in slots if is_adapter(slot.full)}


def _parts(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    parts = [("model.embed_tokens.", model.model.embed_tokens)]
    parts += [(f"model.layers.{i}.", layer) for i, layer in enumerate(model.model.layers)]
    parts.append(("model.norm.", model.model.norm))
    return parts if is_tied(model) else [*parts, ("lm_head.", model.lm_head)]
