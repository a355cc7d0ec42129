"""The wheel, installed on its own and used far from the clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from deploy.packages import PACKAGES
from tests.commands.documents import ROOT
from tests.commands.test_documents import SIZES

pytestmark = pytest.mark.slow


def _called(*command: object, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | more
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=280
    )


def _do(*command: object, cwd: Path) -> str:
    done = _called(*command, cwd=cwd)
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def northstar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of an environment that has the wheel, and of the present one all that the wheel depends on."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(
        ".*", "__pycache__", "*.egg-info", "build", "dist", "docs", "models", "runs", "tests"
    )
    shutil.copytree(ROOT, folder / "clone", ignore=ignored)  # a build leaves files in its folder
    return _installed(folder)


def _installed(folder: Path) -> Path:
    pip = sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"
    _do(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "clone", cwd=folder)
    (wheel,) = folder.glob("*.whl")
    shutil.rmtree(folder / "clone")
    _do(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    _do(*pip, "--python", folder / "venv" / "bin" / "python", "install", "--no-deps", wheel, cwd=folder)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(
        sysconfig.get_path("purelib")
    )  # its own .pth files, the clone's, do not count
    return folder / "venv" / "bin" / "northstar"


def test_the_wheel_runs_without_the_clone(northstar: Path, tmp_path: Path, record_property: Any):
    where = _do(northstar.parent / "python", "-c", "import deploy, experiments; print(deploy.__file__)", cwd=tmp_path)
    assert Path(where).is_relative_to(northstar.parents[1])
    assert "demo" in _do(northstar, "presets", cwd=tmp_path)
    assert "boundary_fwd" in _do(northstar, "plan", "demo", cwd=tmp_path)
    sets = [x for size in ("run.steps=1", *SIZES) for x in ("--set", size)]
    assert "completed" in _do(northstar, "run", "demo", *sets, "--out", "run", cwd=tmp_path)
    assert (tmp_path / "run" / "report.html").exists()
    assert "demo" in _do(northstar, "report", "run", "--html", "page.html", cwd=tmp_path)
    assert (tmp_path / "page.html").exists()
    text = "northstar presets; northstar plan demo; northstar run demo; northstar report run"
    record_property("command", ["wheel:1", text, "ran", 0.0])


def test_the_wheel_holds_the_licence_the_marker_of_types_and_nothing_that_is_not_ours(northstar: Path):
    (site,) = northstar.parents[1].glob("lib/python*/site-packages")
    (info,) = site.glob("northstar-*.dist-info")
    metadata = (info / "METADATA").read_text()
    assert "License-Expression: Apache-2.0" in metadata and (info / "licenses" / "LICENSE").exists()
    record = [line.partition(",")[0] for line in (info / "RECORD").read_text().splitlines()]
    tops = {name.partition("/")[0] for name in record if not name.startswith("..")} - {"__pycache__"}
    assert tops == {*PACKAGES, "northstar.py", info.name}
    assert {f"{name}/py.typed" for name in PACKAGES} <= set(record)


@pytest.mark.parametrize("package", ["deploy", "rl"])
def test_a_package_of_the_same_name_is_named_wherever_it_lies(northstar: Path, package: str, tmp_path: Path):
    """The package index has others of these names."""
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("")
    done = _called(northstar, "presets", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and f"{tmp_path / package}/__init__.py would be imported in place" in done.stderr
    assert "demo" in _do(northstar, "presets", cwd=tmp_path)  # in the working directory alone it is no matter
    (site,) = northstar.parents[1].glob("lib/python*/site-packages")
    ours = site / package / "__init__.py"
    kept = ours.read_bytes()
    ours.write_text('"""Of another distribution, installed over ours."""')
    done = _called(northstar, "presets", cwd=tmp_path)
    ours.write_bytes(kept)
    assert done.returncode == 2 and f"{ours} is no longer northstar's own" in done.stderr
    assert f"installed over its package {package!r}" in done.stderr and "Traceback" not in done.stderr
