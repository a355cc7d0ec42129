"""A Hugging Face causal LM cut into stages, with its weights in one flat buffer.

A stage is built on the meta device and reads only its own tensors from safetensors, a piece at a time, so
no process holds more of the model than it trains, not even while it loads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from codec.rows import pack_rows, unpack_rows
from rl.distinct import Distinct, registered
from rl.model_shape import ModelNotFound
from rl.spans import Span
from rl.stored_weights import stored_tensors

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
PIECE = 1 << 22  # elements that are read from a checkpoint at a time


def skeleton(folder: Path, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The whole model on the meta device: no memory, but real rotary tables (they are not in checkpoints).

    Raises ValueError if transformers cannot use `attention` here.
    """
    config = AutoConfig.from_pretrained(folder)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    except ImportError as error:
        raise ValueError(f"model.attention {attention!r} cannot be used on this machine: {error}") from error
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model.eval()


def is_tied(model: PreTrainedModel) -> bool:
    return bool(model.config.tie_word_embeddings)


class Weights:
    """All parameters of a model part as one flat fp32 buffer, its gradient likewise.

    The parameters are views into it, so merging, clipping, Adam, digests and snapshots are each one
    operation on one tensor. With `dtype=bfloat16` the model computes in a bf16 copy and the fp32
    buffers are the masters. The last `numel - owned` entries repeat another stage's tied embedding.
    """

    def __init__(
        self,
        parts: list[tuple[str, nn.Module]],
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        trainable: bool,
        owned_parts: int | None = None,
    ):
        slots = [
            (f"{prefix}{name}", prefix, module, name)
            for prefix, module in parts
            for name, _ in module.named_parameters()
        ]
        self.names = [full for full, *_ in slots]
        self.shapes = [tuple(module.get_parameter(name).shape) for _, _, module, name in slots]
        sizes = [prod(shape) for shape in self.shapes]
        self.offsets = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        self.numel = self.offsets[-1]
        owned_prefixes = {prefix for prefix, _ in parts[:owned_parts]}
        self.owned = sum(n for n, (_, prefix, *_rest) in zip(sizes, slots) if prefix in owned_prefixes)

        self.master = torch.empty(self.numel, dtype=torch.float32, device=device)
        self.compute = self.master if dtype == torch.float32 else torch.empty(self.numel, dtype=dtype, device=device)
        self.grad = torch.zeros_like(self.master) if trainable else self.master.new_zeros(0)  # of what is only read
        self._compute_grad = torch.zeros_like(self.compute) if trainable and dtype != torch.float32 else self.grad
        self._bind(slots, trainable)
        self._read(folder)

    def _bind(self, slots: list[tuple[str, str, nn.Module, str]], trainable: bool) -> None:
        for i, (_, _, module, name) in enumerate(slots):
            view = self.view(i, self.compute)
            parameter = nn.Parameter(view, requires_grad=trainable)
            if trainable:
                parameter.grad = self.view(i, self._compute_grad)
            *path, leaf = name.split(".")
            owner = module.get_submodule(".".join(path))
            owner.register_parameter(leaf, parameter)

    def _read(self, folder: Path) -> None:
        """Into the masters, a piece at a time. Raises ModelNotFound if a tensor is missing or has another shape."""
        stored = stored_tensors(folder)
        for i, (name, shape) in enumerate(zip(self.names, self.shapes)):
            if name not in stored:
                raise ModelNotFound(f"{folder} holds no tensor {name!r}")
            if stored[name].shape != shape:
                raise ModelNotFound(f"{folder}: {name} is {stored[name].shape}, its config.json makes it {shape}")
            flat = self.master[self.offsets[i] : self.offsets[i + 1]]
            for start in range(0, len(flat), PIECE):
                stop = min(start + PIECE, len(flat))
                flat[start:stop].copy_(torch.from_numpy(stored[name].read(start, stop)))
        self.publish()

    def view(self, i: int, flat: Tensor) -> Tensor:
        """Parameter i inside `flat`."""
        return flat[self.offsets[i] : self.offsets[i + 1]].view(self.shapes[i])

    def slice_of(self, name: str) -> slice:
        i = self.names.index(name)
        return slice(self.offsets[i], self.offsets[i + 1])

    def publish(self) -> None:
        """Copy the masters into the compute weights; nothing to do in fp32."""
        if self.compute is not self.master:
            self.compute.copy_(self.master)

    def collect(self) -> None:
        """Add the compute gradients of a microbatch to the fp32 ones; in fp32 autograd already did."""
        if self._compute_grad is not self.grad:
            self.grad.add_(self._compute_grad)
            self._compute_grad.zero_()


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
    ):
        super().__init__()
        self.can_share = attention == "sdpa"  # rows that samples have in common
        model = skeleton(folder, registered() if self.can_share else attention, dtype)
        self.span, self.config, self.checkpointing = span, model.config, checkpointing
        self.tied_away = is_tied(model) and span.last and not span.first
        embed, norm, head = model.model.embed_tokens, model.model.norm, model.lm_head
        self.embed: nn.Module | None = embed if span.first else None
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
            parts.append(("model.embed_tokens." if self.tied_away else "lm_head.", head))
        self.weights = Weights(parts, folder, dtype, device, trainable, owned if self.tied_away else None)
        if span.first and span.last and is_tied(model):
            head.weight = embed.weight
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
    folder: Path, dtype: torch.dtype, device: torch.device, attention: str = "sdpa"
) -> tuple[PreTrainedModel, Weights]:
    """The Hugging Face model itself, for generation, with its parameters in one flat buffer.

    The buffer has the order of all stages' owned parameters one after the other.
    """
    model = skeleton(folder, attention, dtype)
    weights = Weights(_parts(model), folder, dtype, device, trainable=False)
    if is_tied(model):
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary_emb.to(device)
    return model, weights


def layout(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters by name, in the order of the whole model's flat buffer; a tied embedding once."""
    parts = _parts(skeleton(folder))
    return {f"{prefix}{name}": tuple(p.shape) for prefix, module in parts for name, p in module.named_parameters()}


def _parts(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    parts = [("model.embed_tokens.", model.model.embed_tokens)]
    parts += [(f"model.layers.{i}.", layer) for i, layer in enumerate(model.model.layers)]
    parts.append(("model.norm.", model.model.norm))
    return parts if is_tied(model) else [*parts, ("lm_head.", model.lm_head)]
