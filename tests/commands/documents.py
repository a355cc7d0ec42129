"""What the documents print: fenced blocks by kind, the commands in them, and commands inside a line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_SPAN = re.compile(r"(?<!`)`((?:\.venv/bin/)?(?:northstar|make) [^`]+)`(?!`)")


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is that of its fence."""

    page: str
    line: int
    kind: str  # what stands behind the fence
    text: str


@dataclass(frozen=True)
class Command:
    """One command as it is printed, its continued lines joined."""

    page: str
    line: int
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    found, start, kind, body = [], 0, "", []
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        fence = line.startswith("```")
        if fence and not start:
            start, kind, body = number, line.removeprefix("```"), []
        elif fence:
            found.append(Block(_name(page), start, kind, "\n".join(body)))
            start = 0
        elif start:
            body.append(line)
    assert not start, f"{page}:{start}: the fence is never closed"
    return found


def commands(block: Block) -> list[Command]:
    """Of a `bash` block all lines, of a `console` block those behind a dollar sign."""
    found: list[Command] = []
    begun = ""
    for number, line in enumerate(block.text.splitlines(), start=block.line + 1):
        if block.kind == "console":
            if line.startswith("$ "):
                found.append(Command(block.page, number, line.removeprefix("$ ")))
            continue
        begun = f"{begun}\n{line}" if begun else line
        if not line.endswith("\\"):
            found += [Command(block.page, number - begun.count("\n"), begun)] if begun.strip() else []
            begun = ""
    return found


def spans(page: Path) -> list[Command]:
    """Commands of ours inside a line of text, also where they are broken over two."""
    text = re.sub(r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), page.read_text(), flags=re.M | re.S)
    return [
        Command(_name(page), text.count("\n", 0, m.start()) + 1, " ".join(m[1].split())) for m in _SPAN.finditer(text)
    ]


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()
