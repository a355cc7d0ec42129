"""What of the config a merger reads. `merger.config` checks it; no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from codec.config import Section


class MergerSettings(Section):
    """How the anchor's correction is merged into the compressed gradient."""

    kind: str = Field(
        default="signed_ema",
        description="`none` leaves G_comp as it is; `signed_ema`: the magnitude of G_comp, the sign of M̄; `calibrated`: the "
        "same with a share that is measured; `delta`: what the codec lost is added; `replace`: M̄ alone; "
        "`package.module:name`: your own",
    )
    alpha: float = Field(
        default=0.25, ge=0, le=1, description="share of G_comp that signed_ema keeps whatever the signs say"
    )
    dose: float = Field(
        default=1.0, ge=0, description="share of the correction applied; at most 1/(2(1-alpha)) never flips"
    )
    age_decay: float = Field(default=1.0, gt=0, le=1, description="dose is multiplied by this for each tick of age")
    adaptive_lambda_mode: Literal["none", "ratio"] = Field(
        default="none", description="`ratio`: λ = min(lambda_cap, 1/c)"
    )
    lambda_cap: float = Field(default=1.0, gt=0, description="largest λ of the ratio gate")
    spend: Literal["held", "once", "spread"] = Field(
        default="held",
        description="`delta` in every tick in which it is held, in the first alone, or in equal shares of the mean hold",
    )
    cap: float = Field(
        default=12.0,
        gt=0,
        description="a correction's share of a step is at most cap / τ, τ = C(1+beta_anc)/(1-beta_anc), C the mean hold",
    )
    hold_cap: bool = Field(default=False, description="`cap` for signed_ema too")
    prior: float = Field(
        default=0.03,
        ge=-1,
        le=1,
        description="how far signs of two M agree, as if seen in 20 pairs before the first; below half of it a share fades",
    )
