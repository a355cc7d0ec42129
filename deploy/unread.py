"""Settings that nobody reads under the kinds that were chosen. Who reads what stands beside each package's sections."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import anchor_service.config
import codec.config
import merger.config
import rl.config
import rl.grpo_config
import rl.lora_config
import rl.task_config
import swarm.config
from codec.config import When

_RL = rl.config, rl.grpo_config, rl.lora_config, rl.task_config
SECTIONS = codec.config, merger.config, anchor_service.config, *_RL, swarm.config
READERS = {key: ways for sections in SECTIONS for key, ways in sections.READING.items()}


def unread(values: dict[str, Any]) -> set[str]:
    """Keys and tables of READERS that are not read. `values`: a whole config with dotted keys, defaults included."""
    return {key for key, ways in READERS.items() if not any(all(_holds(w, values) for w in way) for way in ways)}


def drop_unread(data: dict[str, Any], values: dict[str, Any], given: Collection[str]) -> None:
    """Take out of `data` (nested) what is not read, but for what was `given` (dotted keys): that is to be refused."""
    for key in unread(values):
        *tables, last = key.split(".")
        section: Any = data
        for table in tables:
            section = section.get(table) if isinstance(section, dict) else None
        if isinstance(section, dict) and not any(within(one, key) for one in given):
            section.pop(last, None)


def complaints(given: dict[str, Any], values: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    """A message for each of the `given` keys that is not read. One with its default value changes nothing: none."""
    dead = unread(values)
    found = [(key, table) for key in given for table in dead if within(key, table) and given[key] != defaults.get(key)]
    return [_explain(key, given[key], table, values) for key, table in sorted(found)]


def _explain(key: str, value: Any, table: str, values: dict[str, Any]) -> str:
    ways = [[when for when in way if not _holds(when, values)] for way in READERS[table]]
    why = ways[0][0]
    readers = " or ".join(map(_quoted, why.values))
    return (
        f"{key} = {_quoted(value)} is not read by {why.key} {_quoted(values.get(why.key))}: {why.key} {readers} "
        f"reads it; leave it out, or set {' or '.join(map(_settings, ways))}"
    )


def _settings(way: list[When]) -> str:
    """What to set, as --set has it; None is to be left unset."""
    first = {when.key: when.values[0] for when in way}
    return " and ".join(
        f"{k}={v if isinstance(v, str) else json.dumps(v)}" if v else f"no {k}" for k, v in first.items()
    )


def _quoted(value: Any) -> str:
    return repr(value) if isinstance(value, str) else json.dumps(value)


def within(key: str, table: str) -> bool:
    return key == table or key.startswith(f"{table}.")


def _holds(when: When, values: dict[str, Any]) -> bool:
    try:
        return when.holds(values.get(when.key))
    except TypeError:  # of a type that the key cannot have: refused for that
        return True
