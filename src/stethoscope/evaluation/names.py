"""Which tasks the harness knows by name, from its YAML files alone: importing the harness takes seconds."""

import importlib.util
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from os.path import isfile
from pathlib import Path

# `task: gsm8k`, `"group": "mmlu"`, `tag: [a, b]`, and `tag:` with its names on the lines below; a group's own list of
# tasks names nothing new.
_PLAIN = re.compile(r"""^["']?(?:task|group|tag)["']?[ \t]*:[ \t]*["']?([^\s"'\[#]+)""", re.MULTILINE)
_LIST = re.compile(r"""^["']?tag["']?[ \t]*:[ \t]*(?:\[([^\]]*)\]|((?:\r?\n[ \t]*-[ \t]+\S+)+))""", re.MULTILINE)

_FUNCTION = re.compile(r"!function[ \t]+([^\s,\]}#]+)")
_INCLUDE = re.compile(r"""^["']?include["']?[ \t]*:[ \t]*["']?([^\s"'#]+)""", re.MULTILINE)


def unknown_tasks(names: Sequence[str], include_path: Path | None = None) -> dict[str, list[str]]:
    """The names that are no task, group or tag of the harness, none of ``include_path``, and no YAML file.

    Returns:
        those by name, each with known names that are close to it.
    """
    missing = [name for name in names if not isfile(name)]  # noqa: PTH113 - a Path raises for a long name
    known = _named(include_path.rglob("*.yaml")) if include_path is not None else set()
    # Most tasks lie in a folder called as they begin, or in `benchmarks`; to read all 14,000 files takes a second.
    starts = {"benchmarks", *(re.split(r"[_-]", name)[0] for name in missing)}
    near = {folder for start in starts if start.isalnum() for folder in _harness().glob(f"{start}*")}
    for folders in (set(), near, {_harness()}):
        known |= _named(path for folder in folders for path in folder.rglob("*"))
        missing = [name for name in missing if name not in known]
        if not missing:
            break
    return {name: get_close_matches(name, known, n=3) for name in missing}


def task_functions(names: Sequence[str], include_path: Path | None = None) -> dict[str, list[str]]:
    """Python functions (`!function`) in the files of tasks that are not the harness' own, and in what those include.

    Returns:
        their names by file. A group's tasks are not followed.
    """
    files = [Path(name) for name in names if isfile(name)]  # noqa: PTH113
    if include_path is not None:
        files += [path for path in sorted(include_path.rglob("*.yaml")) if _named([path]) & set(names)]
    found: dict[Path, list[str]] = {}
    for path in files:  # which grows
        if path not in found and path.is_file() and _harness() not in path.resolve().parents:
            text = path.read_text(encoding="utf-8", errors="replace")
            found[path] = _FUNCTION.findall(text)
            files += [path.parent / name for name in _INCLUDE.findall(text)]
    return {str(path): functions for path, functions in found.items() if functions}


def _harness() -> Path:
    spec = importlib.util.find_spec("lm_eval")  # finds it and does not import it
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "tasks"


def _named(files: Iterable[Path]) -> set[str]:
    found: set[str] = set()
    for path in files:
        if path.suffix not in ("", ".yaml") or not path.is_file():  # what tasks include often has no ending
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        found.update(_PLAIN.findall(text))
        for inline, below in _LIST.findall(text):
            found.update(name.strip("\"' \t\r\n,-") for name in re.split(r"[,\n]", inline or below))
    return found - {""}
