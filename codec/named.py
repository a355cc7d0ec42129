"""What a setting of the form `package.module:name` names: a user's own part, in the place of one of ours. No torch."""

from __future__ import annotations

from importlib import import_module


def imported(name: str, setting: str) -> object:
    """Raises ValueError, naming the setting and the reason, if it cannot be imported in this process."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except Exception as error:  # a module of the user's can fail in any way
        raise ValueError(f"{setting} = {name!r} cannot be imported here: {type(error).__name__}: {error}") from error
