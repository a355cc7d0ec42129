"""Config of the merger. No torch."""

from __future__ import annotations

import difflib
from typing import Literal

from pydantic import Field, field_validator, model_validator

from codec.config import Reading, When
from merger import MERGERS
from merger.settings import MergerSettings


def _own(kind: str) -> bool:
    """Somebody else's merger may read every setting."""
    return ":" in kind


MERGING = When("merger.kind", tuple(kind for kind, merger in MERGERS.items() if merger.payload), _own)
_DOSED = When("merger.kind", ("signed_ema", "delta"), _own)
TAKES_SIGNS = When("merger.kind", tuple(kind for kind, merger in MERGERS.items() if merger.payload == "sign"), _own)


class MergerConfig(MergerSettings):
    """How the anchor's correction is merged into the compressed gradient."""

    placebo: Literal["own", "random"] | None = Field(
        default=None,
        description="a merger of signs without an anchor, on its schedule: the signs of the average of G_comp, or random ones",
    )

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        """A merger of the user's own is imported where it merges, not here: a config is read where its parts are not."""
        module, _, name = kind.partition(":")
        if kind not in MERGERS and not (name.isidentifier() and all(part.isidentifier() for part in module.split("."))):
            near = difflib.get_close_matches(kind, MERGERS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{kind!r} must be one of {', '.join(map(repr, MERGERS))}, or 'package.module:name'{hint}")
        return kind

    @model_validator(mode="after")
    def _needs_signs(self) -> MergerConfig:
        if self.placebo and self.kind not in TAKES_SIGNS.values:
            kinds = " or ".join(map(str, TAKES_SIGNS.values))
            raise ValueError(f"placebo {self.placebo!r} stands in for the signs of {kinds}, not for {self.kind!r}")
        return self


READING: Reading = {
    "merger.alpha": ((When("merger.kind", ("signed_ema",), _own),),),
    "merger.dose": ((_DOSED,),),
    "merger.age_decay": ((_DOSED,),),
    "merger.adaptive_lambda_mode": ((_DOSED,),),
    "merger.lambda_cap": ((When("merger.adaptive_lambda_mode", ("ratio",)), _DOSED),),
    "merger.spend": ((When("merger.kind", ("delta",), _own),),),
    "merger.hold_cap": ((When("merger.kind", ("signed_ema",), _own),),),
    "merger.cap": ((When("merger.kind", ("calibrated",), _own),), (When("merger.hold_cap", (True,)),)),
    "merger.prior": ((When("merger.kind", ("calibrated",), _own),),),
}
