"""The names of our own packages, and whether a folder of somebody else's would be imported in their place.

Imports none of them: it is what tells that they cannot be. `northstar.py` runs this file before it imports `deploy`.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

PACKAGES = ("codec", "merger", "rl", "anchor_service", "swarm", "deploy", "experiments")
IN_ACTORS = tuple(name for name in PACKAGES if name != "experiments")
HOME = Path(__file__).resolve().parents[1]


def check_packages(path: Sequence[str], names: Sequence[str] = PACKAGES) -> None:
    """Raises ValueError if an import along `path` would find another package or module by one of our `names`."""
    for name in names:
        spec = PathFinder.find_spec(name, list(path))
        if spec is None:  # none there: a later finder has ours, as an editable install does
            continue
        found = spec.origin or next(iter(spec.submodule_search_locations or ()))
        folder = Path(found).resolve()
        if folder not in (HOME / name, HOME / name / "__init__.py"):
            raise ValueError(
                f"{found} would be imported in place of northstar's own package {name!r}: rename it, run from another "
                f"folder, or take its folder off PYTHONPATH"
            )


def check_installed() -> None:
    """Raises ValueError if another distribution was installed over one of our packages: pip lets it, without a word."""
    try:
        ours = distribution("northstar")
    except PackageNotFoundError:  # a clone on the path
        return
    files = {str(file): file for file in ours.files or ()}
    for name in PACKAGES:
        file = files.get(f"{name}/__init__.py")
        there = HOME / name / "__init__.py"
        if file is None or file.hash is None or Path(str(file.locate())).resolve() != there:
            continue
        digest = base64.urlsafe_b64encode(hashlib.new(file.hash.mode, there.read_bytes()).digest()).decode().rstrip("=")
        if digest != file.hash.value:
            others = ", ".join(sorted(set(packages_distributions()[name]) - {"northstar"})) or "another distribution"
            raise ValueError(
                f"{there} is no longer northstar's own: {others} was installed over its package {name!r}: uninstall "
                f"that, then pip install --force-reinstall --no-deps northstar, or give each an environment of its own"
            )
