"""The config reference, from the code: `python -m deploy.reference > docs/config.md`."""

from __future__ import annotations

from typing import Any, get_args

from deploy.config import RunConfig, Section

HEAD = """# Config reference

Made from the code by `python -m deploy.reference > docs/config.md`; a test holds it current.
Set a key in a TOML file, or with `--set section.key=value`. Unknown keys and impossible values are refused.
A file may begin with `extends = "PRESET"` and then say only what differs.
"""


def reference() -> str:
    """Markdown: one table a section, with type, default and meaning of every key."""
    parts = [HEAD]
    for name, field in RunConfig.model_fields.items():
        parts += _section(name, field.annotation)
    return "\n".join(parts) + "\n"


def _section(name: str, section: type[Section]) -> list[str]:
    lines = [
        f"\n## [{name}]\n".replace(" []", ""),
        section.__doc__.strip().splitlines()[0],
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
        else:
            lines.append(f"| `{key}` | {_kind(field)} | {_default(field)} | {field.description} |")
    return lines + nested


def _kind(field: Any) -> str:
    text = field.annotation.__name__ if isinstance(field.annotation, type) else str(field.annotation)
    return text.replace("typing.", "").replace("|", "or")


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    return f"`{field.get_default(call_default_factory=True)!r}`"


if __name__ == "__main__":
    print(reference(), end="")
