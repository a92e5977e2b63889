"""The documentation's code blocks, as data."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
_BLOCK = re.compile(
    r"(?P<notes>(?:^[ ]*<!--[^\n]*-->\n+)*)"
    r"^(?P<indent>[ ]*)```(?P<language>\S*)[^\n]*\n(?P<text>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced code block.

    Attributes:
        not_run: why it is not run, from `<!-- not run: why -->` before it; such a block's commands are parsed only.
        file: what it is written as, from `<!-- file: name -->`.
        into: the recipe that it is added to, from `<!-- into: name -->`.
    """

    line: int
    language: str
    text: str
    not_run: str | None
    file: str | None
    into: str | None


def blocks(page: Path) -> list[Block]:
    """A page's fenced code blocks, in order."""
    source = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(source):
        notes = dict(re.findall(r"<!-- (not run|file|into): (.+?) -->", match["notes"]))
        text = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
        line = source.count("\n", 0, match.start("language")) + 1
        noted = {name.replace(" ", "_"): notes.get(name) for name in ("not run", "file", "into")}
        found.append(Block(line=line, language=match["language"], text=text, **noted))
    return found


def commands(text: str) -> list[str]:
    """The commands of a shell block: a line each, continued lines joined, comments and prompts taken off."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    stripped = (re.sub(r"\s+#.*", "", line).strip().removeprefix("$ ") for line in lines)
    return [line for line in stripped if line and not line.startswith("#")]
