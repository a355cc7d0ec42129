"""Config of the merger. No torch."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from codec.config import Reading, Section, When

Kind = Literal["none", "signed_ema", "delta"]
MERGING = When("merger.kind", tuple(kind for kind in get_args(Kind) if kind != "none"))


class MergerConfig(Section):
    """How the anchor's correction is merged into the compressed gradient."""

    kind: Kind = Field("signed_ema", description="`none` leaves G_comp as it is")
    alpha: float = Field(0.25, ge=0, le=1, description="share of G_comp that signed_ema keeps whatever the signs say")
    dose: float = Field(1.0, ge=0, description="share of the correction applied; at most 1/(2(1-alpha)) never flips")
    age_decay: float = Field(1.0, gt=0, le=1, description="dose is multiplied by this for each tick of age")
    adaptive_lambda_mode: Literal["none", "ratio"] = Field("none", description="`ratio`: λ = min(lambda_cap, 1/c)")
    lambda_cap: float = Field(1.0, gt=0, description="largest λ of the ratio gate")
    placebo: Literal["own", "random"] | None = Field(
        None,
        description="signed_ema without an anchor, on its schedule: the signs of the average of G_comp, or random ones",
    )

    @model_validator(mode="after")
    def _needs_signs(self) -> MergerConfig:
        if self.placebo and self.kind != "signed_ema":
            raise ValueError(f"placebo {self.placebo!r} stands in for the signs of signed_ema, not for {self.kind!r}")
        return self


READING: Reading = {
    "merger.alpha": ((When("merger.kind", ("signed_ema",)),),),
    "merger.dose": ((MERGING,),),
    "merger.age_decay": ((MERGING,),),
    "merger.adaptive_lambda_mode": ((MERGING,),),
    "merger.lambda_cap": ((When("merger.adaptive_lambda_mode", ("ratio",)), MERGING),),
}
