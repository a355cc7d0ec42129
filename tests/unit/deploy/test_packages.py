"""A folder of the user's own that would be imported in place of one of our packages is refused before anything starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from deploy.packages import HOME, PACKAGES, check_packages

RUN = ["run", "k5", "--set", "run.steps=1", "--out"]


def make(folder: Path, package: str, form: str) -> Path:
    if form == "module":
        (folder / f"{package}.py").write_text("")
    else:
        (folder / package).mkdir()
        (folder / package / ("__init__.py" if form == "package" else "rewards.py")).write_text("")
    return folder


def command(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    code = "from northstar import main; main()"
    path = env.get("PYTHONPATH", "") + os.pathsep + str(HOME)
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        cwd=cwd, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def test_the_packages_are_those_of_the_distribution():
    assert set(PACKAGES) == {file.parent.name for file in HOME.glob("*/__init__.py")} - {"tests", "benchmarks"}


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("form", ["package", "module"])
def test_one_that_comes_first_on_the_path_is_refused_with_the_fix(tmp_path: Path, package: str, form: str):
    path = [str(make(tmp_path, package, form)), str(HOME)]
    with pytest.raises(ValueError, match="rename it, run from another folder") as refused:
        check_packages(path)
    assert f"{tmp_path}/{package}" in str(refused.value) and repr(package) in str(refused.value)
    check_packages(path[::-1])


@pytest.mark.parametrize("path", [[], [str(HOME)], [str(HOME / "docs")]])
def test_our_own_and_none_at_all_are_no_matter(path: list[str]):
    check_packages(path)


def test_a_folder_without_init_is_in_the_way_only_where_ours_are_not_on_the_path(tmp_path: Path):
    make(tmp_path, "rl", "namespace")
    check_packages([str(tmp_path), str(HOME)])
    with pytest.raises(ValueError, match="'rl'"):  # as beside an editable install
        check_packages([str(tmp_path)])


def test_run_refuses_a_folder_whose_packages_the_workers_would_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(make(tmp_path, "rl", "package"))
    called = CliRunner().invoke(app, [*RUN, str(tmp_path / "out")])
    assert called.exit_code != 0
    assert f"{tmp_path}/rl/__init__.py would be imported in place of northstar's own package 'rl'" in called.output


@pytest.mark.parametrize(
    "package, form", [("rl", "package"), ("swarm", "package"), ("deploy", "package"), ("deploy", "module")]
)
def test_the_command_names_a_folder_on_pythonpath_instead_of_failing_to_import(tmp_path: Path, package: str, form: str):
    make(tmp_path, package, form)
    done = command("presets", cwd=HOME / "docs", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and "would be imported in place of northstar's own" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reward_beside_the_command_is_found_and_one_in_a_folder_of_our_name_is_not(tmp_path: Path):
    make(tmp_path, "rl", "namespace")
    done = command(*RUN, str(tmp_path / "out"), "--set", "task.reward=rl.rewards:score", cwd=tmp_path)
    assert done.returncode == 2 and "'rl' is a package of northstar's own" in done.stderr
    (tmp_path / "mine.py").write_text("def score(prompt, response, answer, metadata): return 1.0\n")
    done = command(*RUN, str(tmp_path / "out"), "--set", "task.reward=mine:scare", cwd=tmp_path)
    assert done.returncode == 2 and "did you mean 'score'" in done.stderr
