"""Start the actors of a run on a Ray cluster, drive it, and leave nothing behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from anchor_service.actor import Anchor
from anchor_service.errors import WaitTimeout
from deploy.config import RunConfig, to_toml
from merger import MERGERS
from rl.model_files import model_shape, resolve
from rl.policy import spans
from rl.rollout import RolloutWorker
from swarm import checkpoint
from swarm.coordinator import Coordinator, Fleet, gather
from swarm.telemetry import Listener, Telemetry
from swarm.tick import Rules
from swarm.worker import Worker, WorkerSetup

_ENV = {
    # Ray's masking of GPUs makes NCCL slow or hang on some machines; a worker picks its device itself
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@contextmanager
def cluster(config: RunConfig, address: str | None) -> Iterator[None]:
    """A Ray cluster: the one at `address`, or one of our own on this machine, gone at the end."""
    # Explicit, because a local start would otherwise switch token auth on and leave it on in the environment
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    if address:
        ray.init(address=address, log_to_driver=False)
    else:
        needed = sum(bundle.get("CPU", 0) for bundle in bundles(config))
        # Logical CPUs, so that a small machine can run every role; each process uses `swarm.threads` threads
        ray.init(
            num_cpus=max(os.cpu_count() or 1, needed),
            include_dashboard=False,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )
    try:
        yield
    finally:
        ray.shutdown()


def bundles(config: RunConfig) -> list[dict[str, float]]:
    """Resources of workers, engines and anchor, in this order: one placement-group bundle an actor."""

    def one(device: str) -> dict[str, float]:
        return {"CPU": 1, "GPU": 1} if device == "cuda" else {"CPU": 1}

    swarm = config.swarm
    roles = [swarm.device] * (swarm.dp * swarm.pp) + [config.rollout.device] * config.rollout.replicas
    return [one(device) for device in roles + [config.anchor.device] * anchor_workers(config)]


def anchor_workers(config: RunConfig) -> int:
    return config.anchor.workers if config.anchor.enabled else 0


@contextmanager
def fleet(config: RunConfig) -> Iterator[Fleet]:
    """All actors, built and connected. They are killed at the end, however the run ends."""
    group = _reserve(config)
    handles: list[Any] = []
    try:
        handles += _start(config, group)
        count = config.swarm.dp * config.swarm.pp
        workers, engines = handles[:count], handles[count : count + config.rollout.replicas]
        anchors = handles[count + config.rollout.replicas :]
        _build(config, workers, engines, anchors)
        yield Fleet(workers, engines, anchors)
    finally:
        for handle in handles:
            ray.kill(handle)
        remove_placement_group(group)


def _reserve(config: RunConfig) -> PlacementGroup:
    wanted = bundles(config)
    group = placement_group(wanted, strategy="PACK")
    ready, _ = ray.wait([group.ready()], timeout=config.swarm.start_timeout_s)
    if not ready:
        remove_placement_group(group)
        have, need = ray.cluster_resources(), {k: sum(b.get(k, 0) for b in wanted) for k in ("CPU", "GPU")}
        what = (
            f"{need['CPU']:g} CPUs and {need['GPU']:g} GPUs (it has {have.get('CPU', 0):g} and {have.get('GPU', 0):g})"
        )
        raise WaitTimeout(
            "the Ray cluster", what, config.swarm.start_timeout_s, "swarm.start_timeout_s, or lower swarm.dp"
        )
    return group


def _start(config: RunConfig, group: PlacementGroup) -> list[Any]:
    rules = Rules(
        grpo=config.grpo,
        anchor=config.anchor,
        merger=config.merger,
        q_cadence=config.q_cadence,
        temperature=config.rollout.temperature,
        check_every=config.swarm.check_every,
    )
    wanted = bundles(config)

    def actor(cls: type, index: int, *args: Any) -> Any:
        resources = wanted[index]
        options = dict(
            num_cpus=resources["CPU"],
            num_gpus=resources.get("GPU", 0),
            max_restarts=0,
            max_task_retries=0,  # a repeated tick would hang the other ranks
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
            runtime_env={"env_vars": {**_ENV, "OMP_NUM_THREADS": str(config.swarm.threads)}},
        )
        if cls is Worker and config.anchor.clock == "wall":
            options["concurrency_groups"] = {"inbox": 1}  # corrections arrive beside a running tick
        return ray.remote(**options)(cls).remote(*args)

    count = config.swarm.dp * config.swarm.pp
    handles = [
        actor(
            Worker,
            rank,
            WorkerSetup(rank, config.run.seed, config.model, config.codec, config.snapshot, config.swarm, rules),
        )
        for rank in range(count)
    ]
    handles += [
        actor(
            RolloutWorker,
            count + i,
            config.model,
            config.task,
            config.grpo,
            config.rollout,
            config.snapshot,
            config.run.seed,
            config.val.size,
            config.swarm.threads,
        )
        for i in range(config.rollout.replicas)
    ]
    return handles + [_start_anchor(config, actor, len(handles) + i) for i in range(anchor_workers(config))]


def _start_anchor(config: RunConfig, actor: Any, index: int) -> Any:
    layers = model_shape(str(resolve(config.model.path))).layers
    payload = MERGERS[config.merger.kind].payload or "sign"
    return actor(
        Anchor,
        index,
        config.anchor,
        config.model.path,
        config.model.dtype,
        spans(layers, config.swarm.boundaries, config.swarm.pp),
        config.grpo,
        config.rollout.temperature,
        config.snapshot,
        "dense" if config.anchor.payload == "dense" else payload,
        config.swarm.threads,
    )


def _build(config: RunConfig, workers: list[Any], engines: list[Any], anchors: list[Any]) -> None:
    """Wait until every actor has loaded its part of the model and the workers have met."""
    limit = (config.swarm.start_timeout_s, "swarm.start_timeout_s")
    (init,) = gather([("worker d0p0", workers[0].address.remote())], "its address", *limit)
    calls = [(f"worker {rank}", worker.build.remote(init)) for rank, worker in enumerate(workers)]
    calls += [(f"engine {i}", engine.__ray_ready__.remote()) for i, engine in enumerate(engines)]
    calls += [(f"anchor {i}", anchor.__ray_ready__.remote()) for i, anchor in enumerate(anchors)]
    gather(calls, "its part of the model", *limit)


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled as Ctrl-C is."""


def _on_sigterm(signum: int, frame: Any) -> None:
    raise Terminated


def execute(
    config: RunConfig, run: Path, listener: Listener, resume: bool = False, address: str | None = None
) -> dict[str, Any]:
    """`drive` on a Ray cluster that is there for this run alone, or on the one at `address`."""
    previous = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        with cluster(config, address):
            signal.signal(signal.SIGTERM, _on_sigterm)  # again: ray.init puts a handler of its own there, which aborts
            return drive(config, run, listener, resume)
    finally:
        signal.signal(signal.SIGTERM, previous)


def drive(config: RunConfig, run: Path, listener: Listener, resume: bool = False) -> dict[str, Any]:
    """Run `config` in the folder `run`, on the Ray cluster that is connected; returns the summary it also wrote.

    Ctrl-C and SIGTERM end the run with status "interrupted", any error with "failed" and the error
    raised again; the folder is valid in every case.
    """
    config.check_fits(model_shape(str(resolve(config.model.path))))
    folder = checkpoint.newest(run) if resume else None
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.toml").write_text(to_toml(config))
    telemetry = Telemetry(run, listener)
    outcome = _Outcome(config, telemetry)
    try:
        with fleet(config) as actors, outcome:  # the summary is written first: taking Ray down may not succeed
            outcome.coordinator = coordinator = Coordinator(config, actors, telemetry, run)
            if folder:
                coordinator.restore(folder)
            telemetry.event(coordinator.step, coordinator.tick, "started", workers=len(actors.workers))
            coordinator.run()
    except BaseException as failure:
        if outcome.summary is None:  # the actors did not even start
            outcome.__exit__(type(failure), failure, None)
        if not isinstance(failure, KeyboardInterrupt):
            raise
    return outcome.summary


class _Outcome:
    """Writes summary.json when a run ends, however it ends; an interrupted run ends without an error."""

    def __init__(self, config: RunConfig, telemetry: Telemetry):
        self.config, self.telemetry = config, telemetry
        self.coordinator: Coordinator | None = None
        self.summary: dict[str, Any] | None = None

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, failure: BaseException | None, trace: Any) -> bool:
        interrupted = isinstance(failure, KeyboardInterrupt)
        status = "interrupted" if interrupted else "failed" if failure else "completed"
        error = f"{type(failure).__name__}: {failure}" if status == "failed" else None
        extra = {"name": self.config.run.name, "seed": self.config.run.seed, "error": error}
        counted = self.coordinator.summary() if self.coordinator else {}
        self.summary = self.telemetry.finish(status, extra | counted)
        return interrupted
