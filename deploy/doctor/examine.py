"""`northstar doctor`: gather the facts, on this machine or on every node of a cluster, and say what will not work."""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from anchor_service.errors import described
from deploy.cluster.placement import UNMASKED, placement, tags
from deploy.doctor import checks, fit
from deploy.doctor.checks import Finding, error, merge, pins, warning
from deploy.doctor.facts import NodeFacts, busy, node_facts
from deploy.doctor.fit import Host
from rl.model_files import is_whole, local_folder
from rl.model_shape import ModelRefused
from swarm.run_config import RunConfig

_WAIT_S = 120.0  # for nodes that should be there, and for what is asked of one
_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


def examine(config: RunConfig | None, address: str | None, folder: Path, nodes: int = 1) -> list[Finding]:
    """All findings. With an address on the nodes of that cluster, waiting until there are `nodes` of them."""
    return merge(_cluster(config, address, folder, nodes) if address else _machine(config, folder))


def print_findings(findings: list[Finding], console: Console) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    for found in findings:
        where = f" ({', '.join(found.where)})" if found.where else ""
        fix = f"\n→ {found.fix}" if found.fix else ""
        table.add_row(f"[{_COLOURS[found.level]}]{found.level}[/]", found.about, _plain(found.says + where + fix))
    console.print(table)


def _plain(text: str) -> str:
    """Rich would read [extras] as its own markup."""
    return text.replace("[", "\\[")


def _machine(config: RunConfig | None, folder: Path) -> list[Finding]:
    """This machine, for a run of its own."""
    facts = node_facts(str(folder))
    found = [*_node(facts, config, several=False), *checks.auth(facts, connects=False), *checks.ports(busy())]
    if config:
        found += _files(config)
        own = {"CPU": max(facts.cpus, placement(config).total["CPU"]), "GPU": len(facts.gpus)}
        found += fit.fit(config, [Host(own | dict.fromkeys(tags(config).values(), 1.0), facts)])
    return found


def _node(facts: NodeFacts, config: RunConfig | None, several: bool) -> list[Finding]:
    checkpoint, store = _sizes(config)
    return [
        *checks.versions(facts, pins()),
        *checks.imports(facts),
        *checks.gpus(facts),
        *checks.interfaces(facts, several),
        *checks.disks(facts, checkpoint, store),
    ]


def _files(config: RunConfig) -> Iterator[Finding]:
    """What a run checks before it starts, if its model is here as a folder: nothing is fetched or converted for it."""
    try:
        folder = local_folder(config.model.path)
        if folder is None or not is_whole(folder):
            fix = "a run fetches or converts it here, and checks it then"
            yield warning("model", f"not checked: no folder of {config.model.path!r} is on this machine", fix)
            return
        from deploy.preflight import preflight  # it builds the model without its weights, with torch

        preflight(config)
    except ModelRefused as refused:
        yield error("model", refused.says, refused.fix)
    except ValueError as refused:
        yield error("config", str(refused), "correct what it names")
    else:
        yield checks.ok("model", "config.json, checkpoint and tokenizer agree")


def _sizes(config: RunConfig | None) -> tuple[float, float]:
    try:
        return (fit.checkpoint_bytes(config), fit.store_bytes(config)) if config else (0.0, 0.0)
    except ValueError:  # a model whose shape is not known here; `fit` says so
        return 0.0, 0.0


# --- a cluster ---------------------------------------------------------------------------------


def _cluster(config: RunConfig | None, address: str, folder: Path, nodes: int) -> list[Finding]:
    from deploy.cluster.launch import cluster

    here = node_facts(str(folder))  # before Ray is met: connecting sets RAY_AUTH_MODE
    found = list(checks.auth(here, connects=True))
    try:
        with cluster(config or RunConfig(), address):
            return found + _connected(config, here, folder, nodes)
    except Exception as failure:
        first = str(failure).strip().splitlines()[0]
        fix = "its address and port, the same RAY_AUTH_MODE and token as its nodes, the same Ray and Python"
        return [*found, error("cluster", f"{address}: {type(failure).__name__}: {first}", fix)]


def _connected(config: RunConfig | None, here: NodeFacts, folder: Path, nodes: int) -> list[Finding]:
    alive = _alive(nodes)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(prefix=".doctor-", dir=folder.resolve()) as marker:
        asked = (marker.name, *(fit.needed_paths(config) if config else ()))
        hosts, found = _ask(alive, str(folder.resolve()), asked)
        if config:
            found += [*_files(config), *fit.files(config, hosts, marker.name)]
    if len(alive) < nodes:
        fix = "their `ray start` and its log; the head's port open to them; the same token"
        found.append(error("nodes", f"{len(alive)} of {nodes} have come", fix))
    else:
        found.append(checks.ok("nodes", f"{len(alive)} alive"))
    there = [host.facts for host in hosts if host.facts]
    for facts in there:
        found += [replace(f, where=(facts.name,)) for f in _node(facts, config, several=len(alive) > 1)]
    found += checks.alike([replace(here, name="this process"), *there])
    answering = [node for node, host in zip(alive, hosts) if host.facts]
    found += checks.skew(_clocks(answering))
    found += checks.reach(*_knock(answering))
    return found + (list(fit.fit(config, hosts)) if config else [])


def _alive(nodes: int) -> list[dict[str, Any]]:
    import ray

    deadline = time.monotonic() + _WAIT_S
    while True:
        alive = [node for node in ray.nodes() if node["Alive"]]
        if len(alive) >= nodes or time.monotonic() > deadline:
            return alive
        time.sleep(1)


def _on(node: dict[str, Any], what: Any, **options: Any) -> Any:
    """A function or a class that runs on that node, takes nothing from it, and sees what a worker would see."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    options |= {
        "num_cpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        "runtime_env": {"env_vars": UNMASKED},  # else Ray hides all GPUs from what asks for none
    }
    return ray.remote(**options)(what)


def _ask(alive: list[dict[str, Any]], folder: str, paths: tuple[str, ...]) -> tuple[list[Host], list[Finding]]:
    import ray
    from ray.exceptions import RayError

    from anchor_service.calls import failure

    asking = [_on(node, node_facts, max_retries=0).remote(folder, paths) for node in alive]
    hosts, found = [], []
    for node, answer in zip(alive, asking):
        try:
            hosts.append(Host(node["Resources"], ray.get(answer, timeout=_WAIT_S)))
        except RayError as failed:
            hosts.append(Host(node["Resources"]))
            why = described(failure(failed, node["NodeManagerHostname"], "its facts"))
            fix = "install the package there, the same version as here"
            found.append(replace(error("node", f"cannot be asked: {why}", fix), where=(node["NodeManagerHostname"],)))
    return hosts, found


def _now() -> float:
    return time.time()


def _clocks(alive: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Seconds that each node's clock is ahead of this one, and half of the quickest round trip."""
    import ray

    found = {}
    for node in alive:
        clock, best = _on(node, _now, max_retries=0), []
        for _ in range(4):
            sent = time.time()
            there = cast(float, ray.get(clock.remote(), timeout=_WAIT_S))
            back = time.time()
            best.append(((back - sent) / 2, there - (sent + back) / 2))
        sure, ahead = min(best)
        found[node["NodeManagerHostname"]] = ahead, sure
    return found


class Door:
    """Listens on its node's address, on any port, as rank 0 of a process group does."""

    def __init__(self) -> None:
        import ray

        self.socket = socket.create_server((ray.util.get_node_ip_address(), 0))

    def address(self) -> tuple[str, int]:
        return self.socket.getsockname()

    def knock(self, address: tuple[str, int]) -> str:
        """Empty if it opens, else why not."""
        try:
            socket.create_connection(address, timeout=10).close()
        except OSError as failure:
            return f"{address[0]}: {failure}"
        return ""


def _knock(alive: list[dict[str, Any]]) -> tuple[dict[tuple[str, str], str], int]:
    """Every node connects to the next one and to the one before: failures, and how many were tried."""
    import ray

    if len(alive) < 2:
        return {}, 0
    names = [node["NodeManagerHostname"] for node in alive]
    doors = [_on(node, Door).remote() for node in alive]
    addresses = ray.get([door.address.remote() for door in doors], timeout=_WAIT_S)
    pairs = sorted({pair for i in range(len(doors)) for pair in _neighbours(i, len(doors))})
    said = ray.get([doors[i].knock.remote(addresses[j]) for i, j in pairs], timeout=_WAIT_S)
    return {(names[i], names[j]): why for (i, j), why in zip(pairs, said) if why}, len(pairs)


def _neighbours(i: int, n: int) -> Iterator[tuple[int, int]]:
    yield i, (i + 1) % n
    yield (i + 1) % n, i
