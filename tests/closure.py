"""The distributions that `make setup` installs, with the versions that are there: what constraints.txt holds.

Without those of vLLM and verifiers, which ask for other versions of mcp, without what torch built for CUDA pins, and without pip and setuptools, which come first.
"""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
EXTRAS = "dev", "gguf", "datasets"  # those of `make setup`
FIRST = {"pip", "setuptools"}
CUDA = "nvidia-", "cuda-", "triton"
HEAD = """\
# The versions that the tests ran with: pip install -c constraints.txt …
# Written by `make constraints` from what is installed, after the tests passed with it; not by hand.
"""


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def ours() -> list[Requirement]:
    """What pyproject.toml asks for, in an environment made by `make setup`."""
    optional = project()["optional-dependencies"]
    return [Requirement(text) for text in [*project()["dependencies"], *(r for e in EXTRAS for r in optional[e])]]


def closure() -> dict[str, str]:
    """Name to version of all that we need here, in turn."""
    waiting, seen, found = ours(), set[tuple[str, frozenset[str]]](), dict[str, str]()
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if name in FIRST or name.startswith(CUDA) or (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            there = distribution(name)
        except PackageNotFoundError:
            raise SystemExit(f"{name} is not installed: run `make setup`") from None
        found[name] = Version(there.version).public  # 2.13.0+cpu is 2.13.0 elsewhere
        needed = map(Requirement, there.requires or [])
        waiting += [r for r in needed if not r.marker or any(r.marker.evaluate({"extra": e}) for e in ("", *extras))]
    return dict(sorted(found.items()))


if __name__ == "__main__":
    (ROOT / "constraints.txt").write_text(HEAD + "".join(f"{name}=={v}\n" for name, v in closure().items()))
