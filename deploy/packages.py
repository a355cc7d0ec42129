"""The names of our own packages, and whether a folder of somebody else's would be imported in their place.

Imports none of them: it is what tells that they cannot be.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.machinery import PathFinder
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
