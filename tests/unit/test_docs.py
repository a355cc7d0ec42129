"""What the documents say of the code is what the code says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from deploy.config import preset_names
from deploy.reference import reference
from rl.model_shape import FAMILIES
from rl.task_config import TableParams
from rl.tasks import TASKS
from swarm.run_config import RunConfig

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def is_key(dotted: str) -> bool:
    """Whether it is a key of a run's config, of whatever kind a section with kinds has."""
    sections: list[Any] = [RunConfig]
    for part in dotted.split("."):
        fields = [s.model_fields[part] for s in sections if part in getattr(s, "model_fields", {})]
        if not fields:
            return False
        kinds = [getattr(f.annotation, "__args__", (f.annotation,)) for f in fields]
        sections = [kind for group in kinds for kind in group if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return True


def test_the_config_reference_is_current():
    assert (ROOT / "docs" / "config.md").read_text() == reference()


def test_presets_and_files_that_the_readme_names_exist():
    readme = (ROOT / "README.md").read_text()
    for name in re.findall(r"northstar run ([a-z0-9.-]+) ", readme):
        assert name in preset_names() or name == "$preset"
    for link in re.findall(r"\]\((docs/[^)#]*)\)", readme):
        assert (ROOT / link).exists(), link


def test_the_page_of_models_names_every_family_task_and_column():
    page = (ROOT / "docs" / "models.md").read_text()
    rows = dict(re.findall(r"^\| `([a-z0-9_]+)` \| ([^|]+) \|", page, re.M))
    assert {kind: rows[kind] for kind in FAMILIES} == FAMILIES
    assert set(TableParams.model_fields) <= set(rows)
    assert set(TASKS) == set(re.findall(r"^\| `([a-z_]+)(?::[A-Z]|` \| built)", page, re.M))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_make_target_that_a_page_names_exists(page: str):
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", (ROOT / page).read_text(), re.M)) <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_source_file_that_a_page_names_is_there(page: Path):
    files = re.findall(r"`((?:\w+/)+\w+\.py)(?:::\w+)?`", page.read_text())
    assert [file for file in files if not (ROOT / file).exists() and "NAME" not in file] == []


def test_the_registries_are_where_the_page_for_contributors_says():
    named = re.findall(r"`(\w+)`\s(?:in|of|\()\s?`?((?:\w+/)+\w+\.py)`?", (ROOT / "CONTRIBUTING.md").read_text())
    assert {"CODECS", "COSTS", "MERGERS", "LAGS", "ENGINES", "Task", "Engine"} <= {name for name, _ in named}
    assert [(name, file) for name, file in named if not re.search(rf"\b{name}\b", (ROOT / file).read_text())] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_key_that_is_set_on_a_page_exists(page: Path):
    set_here = set(re.findall(r"--set[ =]([\w.]+)=", page.read_text())) - {"KEY", "section.key"}
    assert [key for key in set_here if not is_key(key)] == []


@pytest.mark.parametrize("page", ["verl.md", "trl.md"])
def test_every_key_on_the_pages_for_users_of_others_exists(page: str):
    column = [line.split("|")[2] for line in (ROOT / "docs" / page).read_text().splitlines() if line.count("|") == 4]
    keys = [key for cell in column for key in re.findall(r"`([a-z_]+\.[a-z_.]+)`", cell)]
    assert len(keys) > 30 and [key for key in keys if not is_key(key)] == []


def test_whatever_is_said_beside_other_libraries_names_its_test():
    rows = [line for line in (ROOT / "docs" / "comparison.md").read_text().splitlines() if line.startswith("| ")]
    assert (
        len(rows) > 10 and [row for row in rows[1:] if "](../tests/" not in row.rstrip(" |").rpartition(" | ")[2]] == []
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_page_links_to_files_that_are_there(page: Path):
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    local = [link for link in links if link and "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []
