"""Which releases of SAEs SAELens knows, by name."""

import importlib.util
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml


class Releases(Mapping[str, dict[str, Any]]):
    """SAELens' directory of releases, each parsed when it is asked for: all together take a second."""

    def __init__(self, text: str) -> None:
        starts = list(re.finditer(r"^([^\s#:][^:\n]*):", text, re.MULTILINE))
        ends = [*(start.start() for start in starts[1:]), len(text)]
        self._texts = {start[1].strip("\"'"): text[start.end() : end] for start, end in zip(starts, ends, strict=True)}

    def __getitem__(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = yaml.load(self._texts[name], Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)


@cache
def releases() -> Releases:
    """The directory in SAELens' own file, found without importing it, which would bring torch."""
    spec = importlib.util.find_spec("sae_lens")
    assert spec is not None
    assert spec.origin is not None
    return Releases((Path(spec.origin).parent / "pretrained_saes.yaml").read_text(encoding="utf-8"))
