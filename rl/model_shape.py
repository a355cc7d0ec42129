"""What a config.json says of a model, read as transformers reads it: a key that is missing has its family's default.

No torch and no files: a dict goes in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

FAMILIES = {  # model_type of config.json -> what it is called
    "llama": "Llama 2, Llama 3, SmolLM2",
    "mistral": "Mistral",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
}
_QWEN = {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
_DEFAULTS = {  # of transformers' config classes (5.19)
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": _QWEN,
    "qwen3": _QWEN,
}


class ModelNotFound(ValueError):
    """`model.path` names nothing that can be loaded."""


class ModelRefused(ModelNotFound):
    """A model's files contradict each other: what was found, and what to do."""

    def __init__(self, says: str, fix: str):
        super().__init__(says, fix)
        self.says, self.fix = says, fix

    def __str__(self) -> str:
        return f"{self.says}: {self.fix}"


@dataclass(frozen=True)
class ModelShape:
    """What a config check and a byte count need to know of a model. Lengths are in tokens, None: no limit known."""

    hidden: int
    layers: int
    vocab: int
    tied: bool
    window: int | None  # attention reaches back this far; None: over everything
    chat: bool  # its tokenizer has a chat template
    positions: int | None = None  # the longest sequence that it was made for
    steady: int | None = None  # beyond it the rotary table depends on the longest sequence of a batch

    def too_long(self, length: int) -> Iterator[str]:
        """What of the model sequences of `length` tokens go beyond."""
        if self.window is not None and length > self.window:
            yield f"the model's sliding window of {self.window} (attention here spans the whole sequence)"
        if self.steady is not None and length > self.steady:
            yield (
                f"the {self.steady} tokens up to which the model's rope is one table (beyond them the log-probs of a "
                f"sample would depend on the longest sample beside it)"
            )
        elif self.positions is not None and length > self.positions:
            yield f"the {self.positions} positions of the model (max_position_embeddings in its config.json)"


def shape_of(config: dict[str, Any], path: str, chat: bool) -> ModelShape:
    """Raises ModelNotFound, with the reason, for a model that is not supported."""
    check_family(config, path)
    missing = [key for key in ("hidden_size", "num_hidden_layers", "vocab_size") if key not in config]
    if missing:
        raise ModelNotFound(f"{path!r}: its config.json has no {', '.join(missing)}")
    return ModelShape(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        vocab=config["vocab_size"],
        tied=config.get("tie_word_embeddings", False),  # untied by default, in each of the families
        window=_window(config),
        chat=chat,
        positions=_positions(config),
        steady=_steady(config),
    )


def check_family(config: dict[str, Any], path: str) -> None:
    """Raises ModelNotFound, with the reason and what is supported, unless it is a plain stack of decoder layers."""
    kind, supported = config.get("model_type"), ", ".join(f"{name} ({kind})" for kind, name in FAMILIES.items())
    reasons = {
        "a mixture of experts": any(key in config for key in ("num_experts", "num_local_experts", "n_routed_experts")),
        "an encoder with a decoder": config.get("is_encoder_decoder", False),
        "not only text": "vision_config" in config or "audio_config" in config,
    }
    why = next((f", {reason}" for reason, holds in reasons.items() if holds), "")
    if kind not in FAMILIES or why:
        raise ModelNotFound(f"{path!r} is a {kind!r} model{why}; supported are {supported}")
    if quantized := config.get("quantization_config"):
        raise ModelNotFound(
            f"{path!r} is quantized ({quantized.get('quant_method', 'unknown')}) and cannot be trained: "
            f"set model.path to the model in float32, bfloat16 or float16"
        )
    others = set(config.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if others:
        raise ModelNotFound(
            f"{path!r} has layers of {', '.join(sorted(others))}; supported are layers of full attention"
        )


def _setting(config: dict[str, Any], key: str) -> Any:
    """A key that is null is not missing."""
    return config.get(key, _DEFAULTS[config["model_type"]].get(key))


def _window(config: dict[str, Any]) -> int | None:
    """Llama never slides, Mistral unless its window is null, Qwen in some layers and only if told to."""
    if config["model_type"] == "llama":
        return None
    window = _setting(config, "sliding_window")
    if config["model_type"] == "mistral":
        return window
    kinds = config.get("layer_types")
    first = _setting(config, "max_window_layers")
    slides = "sliding_attention" in kinds if kinds else config["num_hidden_layers"] > first
    return window if config.get("use_sliding_window", False) and slides else None


def _rope(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Its kind and parameters: `rope_scaling` is the older name, `type` the older key."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return rope.get("rope_type", rope.get("type", "default")), rope


def _original(config: dict[str, Any], rope: dict[str, Any]) -> int:
    """Positions before scaling."""
    inside = rope.get("original_max_position_embeddings", _setting(config, "max_position_embeddings"))
    return config.get("original_max_position_embeddings", inside)


def _positions(config: dict[str, Any]) -> int:
    """`max_position_embeddings` may be that of before scaling: with `linear` and `dynamic` always, `yarn` often."""
    kind, rope = _rope(config)
    positions, factor = _setting(config, "max_position_embeddings"), rope.get("factor") or 1.0
    if kind in ("linear", "dynamic"):
        return int(positions * factor)
    return max(positions, int(_original(config, rope) * factor)) if kind == "yarn" else positions


def _steady(config: dict[str, Any]) -> int | None:
    """transformers makes the table of `dynamic` and `longrope` anew when a batch brings a longer sequence.

    Reference: `dynamic_rope_update` in transformers' modeling_rope_utils.py.
    """
    kind, rope = _rope(config)
    if kind == "dynamic":
        return _setting(config, "max_position_embeddings")
    return _original(config, rope) if kind == "longrope" else None
