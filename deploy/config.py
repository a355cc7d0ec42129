"""A run's config read from TOML: presets, files on top of them, overrides. Checked before anything heavy starts.

No torch, no Ray.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import tomli_w
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from codec.config import Section
from deploy.unread import complaints, drop_unread
from experiments.sweep import flat
from swarm.run_config import RunConfig

PRESETS = Path(__file__).parent.parent / "experiments" / "presets"
Location = tuple[int | str, ...]  # of pydantic, where in a config an error is
_OF_A_KIND = {"lag"}  # sections that are one of several kinds with keys of their own: another kind starts afresh


class ConfigError(ValueError):
    """One readable message for everything that is wrong with a config."""


def load(
    source: str,
    overrides: list[str] | None = None,
    tables: Sequence[dict[str, Any]] = (),
    given: Collection[str] | None = None,
) -> RunConfig:
    """A preset name or a TOML file, with `section.key=value` overrides, then tables, on top. Raises ConfigError.

    A key that nobody reads under the kinds chosen is refused where it was `given` (dotted keys; default: by the file
    itself, the overrides and the tables), and has its default where it was inherited from a preset.
    """
    data = _layered(_read(source), overrides, tables)
    own = {k: v for k, v in own_settings(source, overrides, tables).items() if given is None or k in given}
    defaults = RunConfig.model_construct().model_dump(mode="json")
    drop_unread(data, flat(_overlay(defaults, data)), own)
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, source)) from None
    if wrong := complaints(own, flat(config.model_dump(mode="json")), flat(defaults)):
        raise ConfigError(f"{source}: " + "\n".join(wrong))
    return config


def own_settings(
    source: str, overrides: list[str] | None = None, tables: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """{dotted key: value} of what is said for this run itself; what a preset says is inherited."""
    shipped = (PRESETS / f"{source}.toml").exists()
    return flat(_layered({} if shipped else _parse(source)[0], overrides, tables))


def names_in(source: str, overrides: list[str], *tables: str) -> list[str]:
    """The keys of a table of the config as it is written, presets included; none where it is not there."""
    found: Any = _layered(_read(source), overrides)
    for table in tables:
        found = found.get(table, {}) if isinstance(found, dict) else {}
    return list(found) if isinstance(found, dict) else []


def preset_names() -> list[str]:
    return sorted(p.stem for p in PRESETS.glob("*.toml"))


def _read(source: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """TOML of a preset or file, on top of the preset that its `extends` names."""
    if source in seen:
        raise ConfigError(f"{source!r} extends itself: {' -> '.join([*seen, source])}")
    data, base = _parse(source)
    return _overlay(_read(base, (*seen, source)), data) if base else data


def _parse(source: str) -> tuple[dict[str, Any], str | None]:
    """What a preset or file itself says, and what it extends."""
    file = PRESETS / f"{source}.toml"
    if not file.exists():
        file = Path(source).expanduser()
        if not file.is_file():
            near = difflib.get_close_matches(source, preset_names(), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"no preset or TOML file {source!r}: presets are {', '.join(preset_names())}{hint}")
    try:
        data = tomllib.loads(file.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from None
    base = data.pop("extends", None)
    if base is not None and not isinstance(base, str):
        raise ConfigError(f"{file}: extends = {base!r}: must be the name of a preset or a TOML file")
    return data, base


def _layered(
    data: dict[str, Any], overrides: list[str] | None = None, tables: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    for override in sorted(overrides or [], key=lambda text: not _chooses_a_kind(text)):  # a kind clears its section
        _apply(data, override)
    for table in tables:
        data = _overlay(data, table)
    return data


def _overlay(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        if both and key in _OF_A_KIND and value.get("kind", merged[key].get("kind")) != merged[key].get("kind"):
            both = False
        merged[key] = _overlay(merged[key], value) if both else value
    return merged


def _chooses_a_kind(override: str) -> bool:
    *_, section, key = ["", *override.partition("=")[0].strip().split(".")]
    return section in _OF_A_KIND and key == "kind"


def _apply(data: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise ConfigError(f"--set {override!r}: write it as section.key=value, for example merger.dose=0.5")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string
    for key in keys[:-1]:
        section: object = data.setdefault(key, {})
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override!r}: {key!r} is not a section")
        data = section
        if key in _OF_A_KIND and keys[-1] == "kind" and data.get("kind") != value:
            data.clear()
    data[keys[-1]] = value


def to_toml(config: RunConfig) -> str:
    """The resolved config, re-runnable as it is."""
    return tomli_w.dumps(config.model_dump(exclude_none=True, mode="json"))


def _explain(error: ValidationError, source: str) -> str:
    lines = [_explain_one(e) for e in error.errors()]
    return f"{source}: " + "\n".join(lines)


def _explain_one(e: ErrorDetails) -> str:
    where, context = ".".join(str(part) for part in e["loc"]), e.get("ctx", {})
    if e["type"] == "extra_forbidden":
        allowed = _fields_at(e["loc"][:-1])
        return f"unknown key {where!r}{_near(e['loc'][-1], allowed)} (allowed: {', '.join(allowed)})"
    if e["type"] == "literal_error":
        return f"{where} = {e['input']!r}: must be {context['expected']}{_near(e['input'], _literals_at(e['loc']))}"
    if e["type"] == "union_tag_not_found":
        return f"{where}.kind is missing: the other keys of {where} belong to a kind, set it too"
    if e["type"] == "union_tag_invalid":
        kinds = [kind.strip("' ") for kind in context["expected_tags"].split(",")]
        return f"{where}.kind = {context['tag']!r}: must be one of {', '.join(kinds)}{_near(context['tag'], kinds)}"
    message = e["msg"].removeprefix("Value error, ")
    if e["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where} = {e['input']!r}: {message}"


def _near(value: Any, allowed: list[str]) -> str:
    found = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.3)
    return f"; did you mean {found[0]!r}?" if found else ""


def _section_at(loc: Location) -> type[Section]:
    """The section at a pydantic location; behind a union of kinds comes the kind that was chosen."""
    section: Any = RunConfig
    for part in loc:
        if get_origin(section) is dict:  # of sections by names of the user's own
            section = get_args(section)[1]
            continue
        kinds = {kind.model_fields["kind"].default: kind for kind in get_args(section)}
        section = kinds[part] if kinds else section.model_fields[part].annotation
    return section


def _fields_at(loc: Location) -> list[str]:
    return sorted(_section_at(loc).model_fields)


def _literals_at(loc: Location) -> list[str]:
    *sections, key = [part for part in loc if isinstance(part, str)]  # an item of a list has a number at its end
    return [str(value) for value in _leaves(_section_at(tuple(sections)).model_fields[key].annotation)]


def _leaves(kind: Any) -> list[Any]:
    """The values of a Literal, wherever it is in a type."""
    return [leaf for part in get_args(kind) for leaf in (_leaves(part) if get_args(part) else [part])]
