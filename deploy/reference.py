"""The config reference, from the code: `python -m deploy.reference > docs/config.md`."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from codec.config import Section
from deploy.unread import READERS
from swarm.run_config import RunConfig

PREAMBLE = """# Config reference

Made from the code by `python -m deploy.reference > docs/config.md`; a test holds it current.
Set a key in a TOML file, or with `--set section.key=value`. Unknown keys and impossible values are refused.
A file may begin with `extends = "PRESET"` and then say only what differs.

A key that the chosen kinds do not read (`codec.rank` beside `codec.kind = "transform"`) is refused where it is set in the
file itself or with `--set`, and goes back to its default without a word where a preset brings it. Set to its default it
changes nothing and is let through: so the `config.toml` of a run folder, which has all keys, runs as it is. `links` and
the `resource` of a role are taken by every config. In a sweep the keys of a cell are its own; those of `--set` and of the
grid are dropped in a cell that does not read them, and refused if none does.
"""


def reference() -> str:
    """Markdown: one table a section, with type, default and meaning of every key."""
    parts = [PREAMBLE]
    for name, field in RunConfig.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        parts += _section(name, field.annotation)
    return "\n".join(parts) + "\n"


def _section(name: str, section: type[Section]) -> list[str]:
    lines = [
        f"\n## [{name}]\n".replace(" []", ""),
        (section.__doc__ or "").strip().splitlines()[0],
        "",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    ]
    nested: list[str] = []
    for key, field in section.model_fields.items():
        kinds = get_args(field.annotation) if "kind" in str(field.discriminator) else ()
        for kind in kinds:
            nested += _section(f'{name}.{key}] kind = "{kind.model_fields["kind"].default}" [', kind)
        if kinds:
            continue
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            nested += _section(f"{name}.{key}", field.annotation)
        elif named := [
            part for part in get_args(field.annotation) if isinstance(part, type) and issubclass(part, Section)
        ]:
            nested += _section(f"{name}.{key}.NAME", named[0])
        else:
            read = _read_by(f"{name}.{key}")
            lines.append(f"| `{key}` | {_kind(field)} | {_default(field)} | {field.description}{read} |")
    return lines + nested


def _read_by(key: str) -> str:
    """Under which settings it is read, if not always."""
    ways = [" and ".join(sorted({f"`{when.key}`" for when in way})) for way in READERS.get(key, ())]
    return f" *(depends on {', or '.join(dict.fromkeys(ways))})*" if ways else ""


def _kind(field: FieldInfo) -> str:
    return _type(field.annotation).replace("typing.", "").replace("|", "or")


def _type(annotation: Any) -> str:
    """As it is written, without the bounds of its parts."""
    if isinstance(annotation, type) and not get_args(annotation):
        return "None" if annotation is NoneType else annotation.__name__
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(map(_type, get_args(annotation)))
    return str(annotation)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return f"`{field.get_default(call_default_factory=True)!r}`"


if __name__ == "__main__":
    print(reference(), end="")
