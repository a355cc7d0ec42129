"""Which package may import which, read from the syntax trees: nothing is imported to find out."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BEFORE = {  # what each package may import beside itself
    "codec": set(),
    "merger": {"codec"},
    "rl": {"codec"},
    "anchor_service": {"codec", "merger", "rl"},
    "swarm": {"codec", "merger", "rl", "anchor_service"},
    "experiments": {"codec", "rl"},  # what a run left behind, read without the code that made it
    "deploy": {"codec", "merger", "rl", "anchor_service", "swarm", "experiments"},
}
FILES = sorted(file.relative_to(ROOT).as_posix() for package in BEFORE for file in (ROOT / package).rglob("*.py"))
CONFIGS = [name for name in FILES if name.endswith("/config.py")]
LIGHT = [
    *CONFIGS,
    "rl/grpo_config.py",
    "rl/tasks.py",
    "rl/reward.py",
    "rl/reward_function.py",
    "rl/task_config.py",
    "rl/gguf_files.py",
    "rl/model_files.py",
    "rl/model_shape.py",
    "rl/stored_weights.py",
    *(n for n in FILES if n.startswith("merger/")),
    "deploy/cluster/sweep_runs.py",
    "swarm/run_config.py",
    "deploy/resume.py",
]
HEAVY = {"torch", "ray", "transformers", "llvmlite"}
RAY_ALLOWED = {
    "anchor_service/actor.py",
    "anchor_service/calls.py",
    "anchor_service/line.py",
    "anchor_service/places.py",
    "anchor_service/stacks.py",
    "swarm/worker.py",
    "swarm/coordinator.py",
}
PICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "torch.save"}


def imports(tree: ast.AST, module_level: bool = False) -> set[str]:
    """Dotted names that a source imports; at module level: what runs when it is imported, not for type checkers."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and name_of(node.func) in {
            "__import__",
            "import_module",
            "importlib.import_module",
        }:
            found |= {a.value for a in node.args if isinstance(a, ast.Constant)}
        if module_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if module_level and isinstance(node, ast.If) and name_of(node.test).endswith("TYPE_CHECKING"):
            found |= set().union(*(imports(ast.Module([n], []), True) for n in node.orelse), set())
            continue
        found |= imports(node, module_level)
    return found


def calls(tree: ast.AST) -> set[str]:
    return {name_of(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def name_of(node: ast.AST) -> str:
    """`torch.load` of the expression torch.load; empty for what is no dotted name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = name_of(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def tops(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


@cache
def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(), file)


def file_of(dotted: str) -> set[str]:
    """Files of this repository that importing `dotted` runs: the module and the packages around it."""
    parts, found = dotted.split("."), set()
    for i in range(1, len(parts) + 1):
        base = "/".join(parts[:i])
        found |= {name for name in (f"{base}.py", f"{base}/__init__.py") if name in FILES}
    return found


def edges(source: ast.Module) -> set[str]:
    """Files of this repository that a source names in imports of any kind: inside functions, for type checkers too."""
    found = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            found |= {our_file(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {our_file(f"{node.module}.{alias.name}") or our_file(node.module) for alias in node.names}
    return found - {None}


def our_file(dotted: str) -> str | None:
    base = dotted.replace(".", "/")
    return next((name for name in (f"{base}.py", f"{base}/__init__.py") if name in FILES), None)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of files each of which imports itself by way of the others."""

    def reached(start: str) -> set[str]:
        seen, waiting = set(), set(graph[start])
        while waiting:
            here = waiting.pop()
            seen.add(here)
            waiting |= graph[here] - seen
        return seen

    from_here = {file: reached(file) for file in graph}
    groups = {frozenset(f for f in seen if file in from_here[f]) for file, seen in from_here.items() if file in seen}
    return sorted(map(sorted, groups))


def outside_world(file: str) -> set[str]:
    """Every package outside this repository that importing `file` imports in turn."""
    waiting, seen, found = {file, f"{file.partition('/')[0]}/__init__.py"} & set(FILES), set(), set()
    while waiting:
        here = waiting.pop()
        seen.add(here)
        names = imports(tree(here), module_level=True)
        found |= tops(names) - set(BEFORE)
        waiting |= {f for name in names for f in file_of(name)} - seen
    return found


# --- the checker itself ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "import torch",
        "import numpy, torch.nn as nn",
        "from torch import nn",
        "try:\n    import torch\nexcept ImportError:\n    pass",
        "class A:\n    import torch",
        "if True:\n    from torch.nn import Linear",
        "x = __import__('torch')",
        "import importlib\nm = importlib.import_module('torch.nn')",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ray\nelse:\n    import torch",
    ],
)
def test_the_checker_sees_every_form_of_import_at_module_level(source: str):
    assert "torch" in tops(imports(ast.parse(source), module_level=True))


@pytest.mark.parametrize(
    "source", ["def f():\n    import torch", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"]
)
def test_the_checker_tells_apart_what_runs_on_import_and_what_does_not(source: str):
    assert "torch" not in tops(imports(ast.parse(source), module_level=True))
    assert "torch" in tops(imports(ast.parse(source)))


def test_the_checker_follows_imports_from_file_to_file():
    assert {"torch", "transformers"} <= outside_world("swarm/tick.py")  # transformers only by way of rl/policy.py
    assert "transformers" not in tops(imports(tree("swarm/tick.py")))


def test_the_checker_sees_calls_by_their_dotted_name_and_not_methods_of_that_name():
    assert calls(ast.parse("torch.load(x)\neval('1')")) == {"torch.load", "eval"}
    assert not calls(ast.parse("model.eval()\nself.engine.load(x)\nf().eval()")) & FORBIDDEN_CALLS


def test_the_checker_sees_circles_of_any_length_and_only_those():
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": {"d"}, "f": {"f"}, "g": {"a"}}
    assert circles(graph) == [["a", "b", "c"], ["d", "e"], ["f"]]


def test_the_checker_draws_imports_for_type_checkers_and_inside_functions_as_well():
    source = "if TYPE_CHECKING:\n    from deploy.resume import Resume\ndef f():\n    from deploy import export, config as c\n"
    assert edges(ast.parse(source)) == {"deploy/resume.py", "deploy/export.py", "deploy/config.py"}
    assert edges(ast.parse("import codec.frames, os\nfrom merger import MERGERS")) == {
        "codec/frames.py",
        "merger/__init__.py",
    }


# --- the rules ---------------------------------------------------------------------------------


def test_every_package_of_the_layout_is_there_and_looked_at():
    assert {file.partition("/")[0] for file in FILES} == set(BEFORE)
    assert {f"{p}/config.py" for p in ("codec", "merger", "rl", "anchor_service", "swarm", "deploy")} == set(CONFIGS)


@pytest.mark.parametrize("file", LIGHT)
def test_configs_tasks_and_mergers_import_neither_torch_nor_ray_nor_transformers_not_even_in_turn(file: str):
    assert not outside_world(file) & HEAVY


@pytest.mark.parametrize("file", FILES)
def test_imports_point_one_way_through_the_packages(file: str):
    package = file.partition("/")[0]
    ours = tops(imports(tree(file))) & set(BEFORE)
    assert ours <= BEFORE[package] | {package}


def test_no_two_files_import_each_other_neither_by_way_of_others_nor_for_type_checkers():
    assert circles({file: edges(tree(file)) for file in FILES}) == []


@pytest.mark.parametrize("file", [name for name in FILES if name.partition("/")[0] in {"rl", "merger", "experiments"}])
def test_policies_losses_and_mergers_get_a_boundary_as_an_argument_if_at_all(file: str):
    assert "codec/boundary.py" not in edges(tree(file))


def test_the_command_imports_nothing_of_ours_before_it_is_known_to_be_ours():
    source = ast.parse((ROOT / "northstar.py").read_text())
    assert not tops(imports(source, module_level=True)) & set(BEFORE)
    assert tops(imports(tree("deploy/packages.py"))) <= set(sys.stdlib_module_names)


def read_keys(source: ast.AST) -> set[str]:
    """Constants that a source reads from a mapping: `m["k"]`, `m.get("k")`, `"k" in m`."""
    found: list[ast.expr] = []
    for node in ast.walk(source):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            found.append(node.slice)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop"):
            found += node.args[:1]
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
            found.append(node.left)
    return {key.value for key in found if isinstance(key, ast.Constant) and isinstance(key.value, str)}


def test_the_checker_sees_what_is_read_by_name():
    assert read_keys(ast.parse("m['a/b'], m.get('c'), 'd' in m, 'e' not in m\nm['f'] = 1\n")) == {"a/b", "c", "d", "e"}


@pytest.mark.parametrize("file", [name for name in FILES if name.startswith(("swarm/", "anchor_service/"))])
def test_what_a_run_does_is_not_decided_by_the_name_of_a_metric(file: str):
    """Renaming a plot must not change a run. Memory is passed on to people under its name."""
    named = {key for key in read_keys(tree(file)) if re.match(r"\w+/\w", key)}
    assert {key for key in named if not key.startswith("perf/")} == set()


@pytest.mark.parametrize("file", FILES)
def test_nothing_imports_tests_or_benchmarks(file: str):
    assert not tops(imports(tree(file))) & {"tests", "benchmarks"}


@pytest.mark.parametrize("file", FILES)
def test_ray_is_imported_only_where_actors_are(file: str):
    uses_ray = "ray" in tops(imports(tree(file)))
    assert not uses_ray or file in RAY_ALLOWED or file.startswith("deploy/")


@pytest.mark.parametrize("file", [name for name in FILES if name.partition("/")[0] in {"codec", "merger", "rl"}])
def test_the_pure_packages_make_no_process_groups(file: str):
    assert not {n for n in imports(tree(file)) if n.startswith("torch.distributed")}
    assert not {n for n in calls(tree(file)) if n.startswith(("dist.", "torch.distributed."))}


@pytest.mark.parametrize("file", FILES)
def test_nothing_is_pickled_or_evaluated(file: str):
    names = imports(tree(file))
    assert not tops(names) & PICKLERS
    assert not names & {"torch.load", "torch.save", "torch.serialization"}
    assert not calls(tree(file)) & FORBIDDEN_CALLS
    allowed = [
        k for n in ast.walk(tree(file)) if isinstance(n, ast.Call) for k in n.keywords if k.arg == "allow_pickle"
    ]
    assert not allowed
