"""What the source of a module says without importing it: where it is, and which names it binds. No torch."""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

_DYNAMIC = {"globals", "vars", "setattr", "exec", "locals"}


def find_module(module: str) -> ModuleSpec | None:
    """Like importlib.util.find_spec, which would import the packages around `module`."""
    first, *rest = module.split(".")
    spec = importlib.util.find_spec(first)
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(part, list(spec.submodule_search_locations))
    return spec


def check_defines(name: str, function: str, file: Path) -> None:
    """Raises ValueError, with the setting's value `name`, unless the source in `file` binds `function`."""
    try:
        tree = ast.parse(file.read_bytes())
    except OSError as error:
        raise ValueError(f"{name!r}: the file {str(file)!r} cannot be read ({error.strerror})") from None
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}: {error.msg}" if isinstance(error, SyntaxError) else f": {error}"
        raise ValueError(f"{name!r}: {file}{line}") from None
    names = set(bound_names(tree))
    if function not in names and "*" not in names:
        near = difflib.get_close_matches(function, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name!r}: {file} defines no {function!r}{hint}")


def bound_names(tree: ast.AST) -> Iterator[str]:
    """Names bound at the top of a module, in whatever statement; `*` where the source alone cannot say which."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield "*" if node.name == "__getattr__" else node.name
            yield from (name for inner in ast.walk(node) if isinstance(inner, ast.Global) for name in inner.names)
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and (isinstance(node.ctx, ast.Store) or node.id in _DYNAMIC):
            yield "*" if node.id in _DYNAMIC else node.id
        elif isinstance(node, ast.MatchAs | ast.MatchStar | ast.ExceptHandler) and node.name:
            yield node.name
        elif isinstance(node, ast.MatchMapping) and node.rest:
            yield node.rest
        if not isinstance(node, ast.Lambda):
            yield from bound_names(node)
