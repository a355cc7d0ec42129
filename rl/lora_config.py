"""Config of adapters. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from codec.config import Reading, Section, When

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoraConfig(Section):
    """Low-rank adapters that are trained in place of the weights (arXiv:2106.09685)."""

    rank: int = Field(
        default=0, ge=0, description="of the adapters, which alone are trained and sent; 0: the weights are"
    )
    alpha: float = Field(default=32.0, gt=0, description="what an adapter adds is multiplied by alpha/rank")
    targets: list[Projection] = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="the layers that have adapters, in every decoder layer",
    )


_LORA = (When("model.lora.rank", (16,), bool),)

READING: Reading = {"model.lora.alpha": (_LORA,), "model.lora.targets": (_LORA,)}
