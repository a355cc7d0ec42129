"""What the actors of a run are built from: the class of each, and the sections of the config that it gets."""

from __future__ import annotations

from dataclasses import dataclass

from anchor_service.actor import Anchor
from anchor_service.config import correction_payload
from anchor_service.dense_gradient import DenseSetup
from anchor_service.diagnosis import Diagnoser
from deploy.cluster.placement import counts
from merger import merger_class
from merger.look import stride_of
from rl.model_files import model_shape, resolve, trained_count
from rl.rollout import RolloutWorker
from rl.spans import spans
from rl.task_sets import located_sets
from rl.tasks import located
from swarm.rank import RankSetup
from swarm.run_config import RunConfig
from swarm.worker import Worker, WorkerSetup


@dataclass(frozen=True)
class ActorPlan:
    """One actor that is to be constructed."""

    kind: type
    arguments: tuple[object, ...]


def actor_plans(config: RunConfig) -> dict[str, list[ActorPlan]]:
    """By role, in the order of ROLES."""
    _, engines, anchors, diagnosers = counts(config)
    dense, payload = _dense(config), correction_payload(config.anchor, config.merger) or "sign"
    return {
        "worker": _workers(config),
        "engine": [_engine(config)] * engines,
        "anchor": [ActorPlan(Anchor, (dense, payload, _stride(config)))] * anchors,
        "diagnoser": [ActorPlan(Diagnoser, (dense,))] * diagnosers,
    }


def _stride(config: RunConfig) -> int | None:
    """Of the coordinates at which the merger looks, if it does."""
    return stride_of(trained_count(config.model)) if merger_class(config.merger.kind).looks else None


def _workers(config: RunConfig) -> list[ActorPlan]:
    rank = RankSetup(
        model=config.model,
        codec=config.codec,
        swarm=config.swarm,
        grpo=config.grpo,
        anchor=config.anchor,
        merger=config.merger,
        stride=_stride(config),
        q_cadence=config.q_cadence,
        temperature=config.rollout.temperature,
        seed=config.run.seed,
        ticks=config.ticks,
    )
    return [ActorPlan(Worker, (WorkerSetup(index, rank, config.snapshot),)) for index in range(counts(config)[0])]


def _engine(config: RunConfig) -> ActorPlan:
    sections = config.model, located(config.task), config.grpo, config.rollout, config.snapshot
    return ActorPlan(RolloutWorker, (*sections, config.run.seed, located_sets(config.val), config.swarm.threads))


def _dense(config: RunConfig) -> DenseSetup:
    shape = model_shape(str(resolve(config.model.path)))
    assert shape is not None  # a folder has one
    return DenseSetup(
        anchor=config.anchor,
        model=config.model,
        grpo=config.grpo,
        snapshot=config.snapshot,
        stages=spans(shape.layers, config.swarm.boundaries, config.swarm.pp),
        temperature=config.rollout.temperature,
        checkpointing=config.swarm.activation_checkpointing,
        threads=config.swarm.threads,
        share=config.shares_prompts,
    )
