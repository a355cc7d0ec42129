"""What keeps the house in order: lengths, names, one test folder a package, dates of decisions. From the syntax trees."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ("codec", "merger", "rl", "anchor_service", "swarm", "experiments", "deploy")
SOURCES = sorted(f.relative_to(ROOT).as_posix() for p in (*PACKAGES, "benchmarks") for f in (ROOT / p).rglob("*.py"))
TESTS = sorted(file.relative_to(ROOT).as_posix() for file in (ROOT / "tests").rglob("*.py"))
UNIT = [name for name in TESTS if re.fullmatch(r"tests/unit/\w+/test_\w+\.py", name)]
LINES, LINES_OF_FUNCTION = 300, 40
UNCLEAR = {  # names that said nothing of what is in the file, and what it is
    "walk": "delta_size",
    "trial": "codec_trial",
    "lanes": "sweep_lanes",
    "crossing": "boundary_cost",
    "shapes": "published_models",
    "way": "interface",
    "context": "symbol_statistics",
    "sources": "diagnosis_sources",
    "utils": "its noun",
    "helpers": "its noun",
    "common": "its noun",
}
SAYS_IT_HERE = {"codec/transform/way.py"}  # one way through a boundary, as codec/interface.py calls it
FILES_ALIKE = {  # files of one name in several packages, and why
    "__init__": "Python's",
    "config": "each package has its own",
    "interface": "what a codec, and what a merger, has to do",
    "delta": "the merger of that name in the configs; how two snapshots of weights differ",
    "messages": "what each package's actors send, both ends named",
    "schedule": "when Q is refreshed; the order of passes through the pipeline",
    "sweep": "reading one, and showing one",
    "tables": "what both ends of the transform hold; what a command prints",
}
NAMES_ALIKE = {  # public names that several packages define, and why
    "main": "what `python -m` runs",
    "write": "always used with its module's name in front: run_table.write, manifest.write",
}


@cache
def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(), file)


def functions(file: str) -> dict[str, int]:
    """`name:line` to number of lines, decorators and docstring included."""
    found = [node for node in ast.walk(tree(file)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    first = {f: min(n.lineno for n in (f, *f.decorator_list)) for f in found}
    return {f"{f.name}:{first[f]}": (f.end_lineno or 0) - first[f] + 1 for f in found}


def public(file: str) -> set[str]:
    """Classes and functions that others can import. Commands of the command line have their users' names."""
    found = [n for n in tree(file).body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    commands = {node.name for node in found for d in node.decorator_list if ast.unparse(d).startswith("app.")}
    return {node.name for node in found if not node.name.startswith("_")} - commands


def alike(named: dict[str, set[str]]) -> dict[str, list[str]]:
    """Of names that files have: those in more than one top-level package, and where."""
    return {name: sorted(files) for name, files in named.items() if len({f.partition("/")[0] for f in files}) > 1}


@pytest.mark.parametrize("file", [*SOURCES, *TESTS])
def test_no_function_is_longer_than_a_screen(file: str):
    assert {name: lines for name, lines in functions(file).items() if lines > LINES_OF_FUNCTION} == {}


@pytest.mark.parametrize("file", SOURCES)
def test_no_file_is_long(file: str):
    lines = (ROOT / file).read_text().count("\n")
    assert lines <= LINES


@pytest.mark.parametrize("file", SOURCES)
def test_no_file_has_a_name_that_says_nothing(file: str):
    assert Path(file).stem not in UNCLEAR or file in SAYS_IT_HERE, f"{file}: call it {UNCLEAR.get(Path(file).stem)}"


def test_files_of_different_packages_have_different_names():
    named: dict[str, set[str]] = defaultdict(set)
    for file in SOURCES:
        named[Path(file).stem].add(file)
    assert {stem: files for stem, files in alike(named).items() if stem not in FILES_ALIKE} == {}


def test_public_names_of_different_packages_differ():
    """So that a name found by search is the thing, and not another of that name."""
    named: dict[str, set[str]] = defaultdict(set)
    for file in SOURCES:
        for name in public(file):
            named[name].add(file)
    assert {name: files for name, files in alike(named).items() if name not in NAMES_ALIKE} == {}
    assert [name for name in NAMES_ALIKE if name not in alike(named)] == []  # what is no longer alike leaves the list


def test_the_distribution_is_made_of_every_package_that_is_there_by_name():
    there = {f.rpartition("/")[0].replace("/", ".") for f in SOURCES if f.endswith("/__init__.py")} - {"benchmarks"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == there
    assert {file.partition("/")[0] for file in SOURCES} == {*PACKAGES, "benchmarks"}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_has_a_docstring_types_and_a_folder_of_tests(package: str):
    assert ast.get_docstring(tree(f"{package}/__init__.py")) is not None
    assert (ROOT / package / "py.typed").exists()
    assert any(name.startswith(f"tests/unit/{package}/") for name in UNIT)


@pytest.mark.parametrize("file", UNIT)
def test_unit_tests_lie_with_the_package_that_they_test(file: str):
    package = file.split("/")[2]
    imported = {n.module or "" for n in ast.walk(tree(file)) if isinstance(n, ast.ImportFrom)}
    imported |= {a.name for n in ast.walk(tree(file)) if isinstance(n, ast.Import) for a in n.names}
    as_a_folder = re.search(rf'"{package}["/]', (ROOT / file).read_text())  # of files that are no Python
    assert package in {name.partition(".")[0] for name in imported} or as_a_folder


def test_every_decision_has_a_number_of_its_own_and_a_date():
    text = (ROOT / "docs" / "decisions" / "README.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if re.match(r"\| \d", line)]
    assert [row for row in rows if not re.fullmatch(r"\d{4}-\d\d-\d\d", row[1])] == []
    assert [row[0] for row in rows] == [f"| {number}" for number in range(1, len(rows) + 1)]
    assert [head for head in re.findall(r"^## .*", text, re.M) if not re.search(r"\d{4}-\d\d-\d\d$", head)] == []
