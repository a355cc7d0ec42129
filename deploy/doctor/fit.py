"""Does a config fit the machines there are? Resources, memory by `northstar plan`, files. Pure: no torch, no Ray."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deploy.cluster.placement import counts, guests, placement, tags
from deploy.doctor.checks import GB, Finding, error, ok, warning
from deploy.doctor.facts import NodeFacts
from deploy.estimate.bytes import correction_bytes, snapshot_itemsize
from deploy.estimate.memory import LEAVES, Part, memory, peak
from deploy.estimate.parameters import Params, parameters, stage_parameters
from swarm.run_config import RunConfig

_PROCESS = 0.8e9  # Python, torch and what they import, of every actor
_KEPT = 3  # checkpoints on disk at once: two, and the one that is being written
_TRAINED = 12  # bytes of a parameter in a checkpoint: fp32 weight and two moments


@dataclass(frozen=True)
class Host:
    """One node as Ray counts it, and what it was found to be; no facts if it could not be asked."""

    resources: dict[str, float]
    facts: NodeFacts | None = None


def fit(config: RunConfig, hosts: list[Host]) -> Iterator[Finding]:
    """Findings on a config and the nodes of the cluster that it would run on."""
    yield from room(config, hosts)
    try:
        params = parameters(config)
    except ValueError as unknown:
        yield warning("memory", f"not checked: {unknown}", "make the model's config.json available here")
        return
    yield from ram(config, params, hosts)
    yield from gpu_memory(config, params, hosts)


def room(config: RunConfig, hosts: list[Host]) -> Iterator[Finding]:
    """Is there a node for every bundle?"""
    place = placement(config)
    left = unplaced(place.bundles, [host.resources for host in hosts])
    needs = ", ".join(f"{n:g} {name}" for name, n in place.total.items())
    if not left:
        yield ok("room", f"{needs} in {len(place.bundles)} bundles, on {len(hosts)} node{'s' * (len(hosts) > 1)}")
        return
    total = {name: sum(host.resources.get(name, 0) for host in hosts) for name in place.total}
    short = [name for name, n in place.total.items() if total[name] < n]
    missing = {key: tag for key, tag in tags(config).items() if not total[tag]}
    if missing:
        fix = "; ".join(
            f"`ray start --resources '{{\"{tag}\":1}}'` on the nodes that {key} means" for key, tag in missing.items()
        )
    elif "GPU" in short and not total["GPU"]:
        fix = "a cluster with GPUs (--address), or swarm.device, rollout.device and anchor.device = cpu"
    elif short:
        fix = "lower swarm.dp, swarm.pp or rollout.replicas, or add nodes; an autoscaler may still bring them (ray status)"
    elif config.swarm.placement == "replicas":
        fix = "swarm.placement=pack, as no node has room for all stages of a replica"
    else:
        fix = "other runs may hold what is there; or the nodes are too small for what is left over"
    have = ", ".join(f"{total[name]:g} {name}" for name in place.total)
    yield error("room", f"{len(left)} of {len(place.bundles)} bundles find no node: needs {needs}, has {have}", fix)


def unplaced(bundles: list[dict[str, float]], nodes: list[dict[str, float]]) -> list[dict[str, float]]:
    """Bundles left over when the one that asks for most things goes first, to the first node that holds it."""
    free, left = [dict(node) for node in nodes], []
    for bundle in sorted(bundles, key=lambda b: (len(b), sum(b.values())), reverse=True):
        # the node with least beside what is asked for, so that a plain bundle does not take the anchor's or a GPU's
        fitting = [node for node in free if all(node.get(name, 0) >= n for name, n in bundle.items())]
        if not fitting:
            left.append(bundle)
            continue
        node = min(fitting, key=lambda node: sum(n > 0 for name, n in node.items() if name not in bundle))
        for name, n in bundle.items():
            node[name] -= n
    return left


def roles(config: RunConfig) -> dict[str, tuple[int, str]]:
    """Processes and device of each role that `deploy.estimate.memory` knows."""
    _, engines, anchors, diagnosers = counts(config)
    found = {f"worker stage {p}": (config.swarm.dp, config.swarm.device) for p in range(config.swarm.pp)}
    found["engine"] = engines, config.rollout.device
    if anchors:
        found["anchor worker"] = anchors, config.anchor.device
    if diagnosers:
        found["diagnoser"] = diagnosers, config.anchor.device
    return found


def ram(config: RunConfig, params: Params, hosts: list[Host]) -> Iterator[Finding]:
    """All processes against all RAM there is: a lower bound of what can go wrong, since a node may hold more of them."""
    parts = memory(config, params)
    needed = 0.0
    for role, (n, device) in roles(config).items():
        on_cpu = peak(parts, role, "device") if device == "cpu" else 0.0
        needed += n * (_PROCESS + peak(parts, role, "host") + on_cpu)
    there = sum(host.facts.memory for host in hosts if host.facts)
    says = (
        f"about {needed / GB:.1f} GB for {sum(n for n, _ in roles(config).values())} processes, of {there / GB:.1f} GB"
    )
    if needed > there:
        yield error(
            "memory", says, "`northstar plan` says what holds it; fewer replicas, smaller microbatches, more nodes"
        )
    elif needed > 0.8 * there:
        yield warning("memory", says, "`northstar plan` says what holds it; activations are an estimate")
    else:
        yield ok("memory", says)


def gpu_memory(config: RunConfig, params: Params, hosts: list[Host]) -> Iterator[Finding]:
    """The largest of each kind of process, and who shares its GPU, against the smallest GPU that it may get."""
    parts = memory(config, params)
    shared = {role: n for role, n in zip(("engine", "anchor worker", "diagnoser"), guests(config)) if n}
    for role, (_, device) in roles(config).items():
        if role in shared:
            continue  # counted with the workers
        tag = _tag(config, role)
        mine = [host.facts for host in hosts if host.facts and (not tag or host.resources.get(tag))]
        sizes = [gpu.bytes for facts in mine for gpu in facts.gpus]
        if device != "cuda" or not sizes:  # without any, `room` has said so
            continue
        beside = [guest for guest, n in shared.items() if role in (f"worker stage {p}" for p in range(n))]
        needed = peak(parts, role, "device") + sum(_stays(parts, guest) for guest in beside)
        who = " and ".join([role, *beside]) + (" hold" if beside else " holds")
        says = f"{who} about {needed / GB:.1f} GB, the smallest GPU has {min(sizes) / GB:.1f} GB"
        knob = {"engine": "rollout.batch_size", "anchor worker": "anchor.micro_batch_size"}.get(
            role, "swarm.micro_batch_size, or raise swarm.pp"
        )
        if needed > min(sizes):
            yield error("GPU memory", says, f"lower {knob}; `northstar plan` says what holds it")
        elif needed > 0.9 * min(sizes):
            yield warning("GPU memory", says, f"lower {knob}; activations are an estimate")
        else:
            yield ok("GPU memory", says)


def _stays(parts: list[Part], guest: str) -> float:
    """Bytes of a guest while its worker trains: an engine sleeps, and keeps its weights."""
    if guest != "engine":
        return peak(parts, guest, "device")
    kept = (part for part in parts if (part.role, part.where, part.rough) == (guest, "device", False))
    return sum(part.bytes for part in kept if part.name not in LEAVES)


def _tag(config: RunConfig, role: str) -> str | None:
    """The resource of the nodes that a role of `deploy.estimate.memory` is on."""
    of_role = {"engine": config.rollout.resource, "anchor worker": config.anchor.resource, "diagnoser": None}
    return of_role.get(role, config.swarm.resource)


def checkpoint_bytes(config: RunConfig) -> float:
    """Of all checkpoints that a run keeps at once."""
    return _KEPT * _TRAINED * parameters(config).total if config.run.checkpoint_every else 0.0


def store_bytes(config: RunConfig) -> float:
    """In the object store at once, about: two snapshots and two corrections."""
    params = parameters(config)
    corrections = sum(correction_bytes(config, stage_parameters(config, params)))
    return 2 * (snapshot_itemsize(config) * params.total + corrections)


def needed_paths(config: RunConfig) -> tuple[str, ...]:
    """Files that every node reads, as it would look for them."""
    model, (kind, _, data) = config.model.path, config.task.name.partition(":")
    found = [model] if Path(model).expanduser().exists() else []  # else built in, or a hub id
    if kind == "jsonl":
        found += [data, *filter(None, [config.task.params.get("val")])]
    return tuple(found)


def files(config: RunConfig, hosts: list[Host], marker: str) -> Iterator[Finding]:
    """`marker` lies in the run folder, made by the driver: a node that sees it writes its checkpoints there too."""
    for path in needed_paths(config):
        without = _without(path, hosts)
        if without:
            yield error(
                "files",
                f"{path} is not there on {', '.join(without)}",
                "a shared file system, or the same path everywhere; an absolute path, as nodes have folders of their own",
            )
    without = _without(marker, hosts)
    if not without:
        yield ok("files", "the run folder is seen by every node")
    elif config.run.checkpoint_every:
        yield error(
            "files",
            f"the run folder is not seen on {', '.join(without)}: a checkpoint would lie in pieces",
            "--out on a file system that all nodes mount, or run.checkpoint_every=0",
        )
    else:
        yield ok("files", f"the run folder is not seen on {', '.join(without)}; without checkpoints that is no matter")


def _without(path: str, hosts: list[Host]) -> list[str]:
    return [host.facts.name for host in hosts if host.facts and not host.facts.seen.get(path, False)]
