"""Config of the codec. No torch: a config is read and refused before anything heavy is imported."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Base of every config section: unknown keys are errors, values are never coerced silently."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class GradientConfig(Section):
    """Compression of weight gradients on the data-parallel axis."""

    kind: Literal["none", "powersgd"] = Field("none", description="`powersgd` sends rank-r factors with error feedback")
    rank: int = Field(4, ge=1, description="rank of each weight matrix's factors")


class CodecConfig(Section):
    """What crosses a boundary between layers."""

    kind: Literal["none", "powersgd"] = Field("powersgd", description="`none` is the dense control")
    rank: int | None = Field(None, ge=1, description="numbers sent for each token; give this or `rank_ratio`")
    rank_ratio: float | None = Field(None, gt=0, le=1, description="rank as a share of the hidden size")
    q_cadence: int | None = Field(None, ge=1, description="refresh Q every so many ticks; default: `anchor.cadence`")
    gradient: GradientConfig = GradientConfig()

    @model_validator(mode="after")
    def _one_rank(self) -> CodecConfig:
        if self.rank is not None and self.rank_ratio is not None:
            raise ValueError(f"rank {self.rank} and rank_ratio {self.rank_ratio} are both set: remove one of them")
        if self.kind == "powersgd" and self.rank is None and self.rank_ratio is None:
            raise ValueError("powersgd needs a rank: set rank or rank_ratio (0.05 is the published share)")
        return self

    def rank_for(self, hidden: int) -> int:
        """The rank r at hidden size `hidden`. Raises ValueError if r > hidden."""
        rank = self.rank if self.rank is not None else max(1, round(self.rank_ratio * hidden))
        if rank > hidden:
            raise ValueError(f"rank {rank} is larger than the hidden size {hidden}: set rank to at most {hidden}")
        return rank
