"""States of parts in one state: each under a name of its own. No torch."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


def prefixed(name: str, state: dict[str, T]) -> dict[str, T]:
    """Of a part that is called `name`: `name.…`."""
    return {f"{name}.{key}": value for key, value in state.items()}


def under(name: str, state: dict[str, T]) -> dict[str, T]:
    """Its inverse: what is called `name.…`, without that."""
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
