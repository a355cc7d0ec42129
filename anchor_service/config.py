"""Config of the anchor. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from codec.config import Section


class AnchorConfig(Section):
    """The slow actor that computes the dense gradient M of old weights on their own batch."""

    enabled: bool = Field(True, description="run an anchor at all")
    delay_k: int = Field(5, ge=1, description="how many ticks old M's weights are when it is first merged")
    cadence: int = Field(5, ge=1, description="M is refreshed every so many ticks")
    beta_anc: float = Field(0.5, ge=0, lt=1, description="M̄ ← beta_anc·M̄ + (1-beta_anc)·M at each fire")
    clock: Literal["lockstep"] = Field(
        "lockstep", description="`lockstep`: the swarm waits for a correction that is due"
    )
    payload: Literal["auto", "dense"] = Field(
        "auto", description="`auto`: sign planes where the merger needs no more; `dense`: fp32 M̄ always"
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="device of the anchor")
    micro_batch_size: int = Field(32, ge=1, description="samples in one backward of the anchor")
    slowdown: float = Field(1.0, ge=1, description="sleep until a fire took this many times its own time")
    timeout_s: float = Field(600.0, gt=0, description="deadline of a correction that is due")
