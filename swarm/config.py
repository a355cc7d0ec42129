"""Config of the swarm. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from codec.config import Section


class SwarmConfig(Section):
    """The grid of workers: `dp` replicas of a pipeline of `pp` stages."""

    dp: int = Field(1, ge=1, description="data-parallel replicas")
    pp: int = Field(1, ge=1, description="pipeline stages; boundaries inside a stage are virtual")
    boundaries: list[int] = Field(
        default_factory=list, description="cut the decoder in front of these layers; len+1 is a multiple of pp"
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="cuda: nccl groups and one GPU a worker; cpu: gloo")
    micro_batch_size: int = Field(32, ge=1, description="samples in one microbatch of a worker")
    threads: int = Field(1, ge=1, description="torch threads of each process")
    check_every: int = Field(1, ge=0, description="compare the replicas' weight digests every so many ticks; 0: never")
    timeout_s: float = Field(300.0, gt=0, description="deadline of a tick and of every exchange between workers")
    start_timeout_s: float = Field(300.0, gt=0, description="deadline for actors to start and load the model")

    @model_validator(mode="after")
    def _cuts(self) -> SwarmConfig:
        if self.boundaries != sorted(set(self.boundaries)) or any(b < 1 for b in self.boundaries):
            raise ValueError(f"boundaries {self.boundaries} must be increasing layer numbers from 1 on")
        segments = len(self.boundaries) + 1
        if segments % self.pp:
            raise ValueError(
                f"{len(self.boundaries)} boundaries make {segments} segments, which {self.pp} stages (pp) cannot "
                f"share evenly: give {self.pp - 1} boundaries, or a multiple of pp minus one"
            )
        return self
