"""What the documents say of the code is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from deploy.config import preset_names
from deploy.reference import reference
from rl.config import TableParams
from rl.model_files import FAMILIES
from rl.tasks import TASKS

ROOT = Path(__file__).parent.parent.parent


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


def test_every_make_target_that_the_readme_names_exists():
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", (ROOT / "README.md").read_text(), re.M)) <= targets
