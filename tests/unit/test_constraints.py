"""constraints.txt: what `make setup` installs, in the versions that the tests run with."""

from __future__ import annotations

import re

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.closure import CUDA, FIRST, ROOT, closure, ours, project

LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
PINS = dict(line.split("==") for line in LINES)


def test_it_names_one_version_of_each_distribution_in_order():
    assert all(re.fullmatch(r"[a-z0-9-]+==[a-z0-9.]+", line) for line in LINES)  # of a local version, 2.13.0+cpu, none
    assert list(PINS) == sorted(PINS) and len(PINS) == len(LINES)


def test_it_holds_what_is_installed_and_tested_here():
    """Else the versions that were tested are others than those that a user gets: `make setup`, or `make constraints`."""
    assert closure() == PINS


def test_its_versions_are_within_the_ranges_of_the_project():
    pinned = [r for r in ours() if not r.name.startswith(CUDA)]  # what goes with a torch for CUDA is pinned by it
    outside = [str(r) for r in pinned if Version(PINS[canonicalize_name(r.name)]) not in r.specifier]
    assert outside == []
    assert not FIRST & set(PINS)


def test_every_requirement_has_an_upper_bound_or_one_version():
    """So that an installation without constraints.txt is at least of the same major versions."""
    optional = [text for texts in project()["optional-dependencies"].values() for text in texts]
    open_ended = {
        r.name
        for r in map(Requirement, [*project()["dependencies"], *optional])
        if not any(spec.operator in ("==", "<") for spec in r.specifier)
    }
    assert open_ended <= {"packaging"}  # its versions are years, and it is compatible through them
