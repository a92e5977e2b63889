"""What strangers write, as plain values: JSON and YAML that cannot take all memory or time, paths that can exist."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

DEEPEST = 64  # containers in one another
MOST_BYTES = 1 << 17  # of YAML, which takes seconds to read then
MOST_VALUES = 20_000  # of YAML, with every alias written out: nine lines can stand for a billion values


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, or too deep.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from None
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        tables = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [child for children in tables for child in children]
    if level:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels")
    return value


def read_yaml(path: Path) -> Any:
    """The value in a YAML file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not YAML, or beyond the limits.
    """
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
    return parse_yaml(data.decode("utf-8"))


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: it is not YAML, or beyond the limits.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {})
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from None
    except (AttributeError, IndexError, KeyError, TypeError, OverflowError) as error:
        # what PyYAML raises for a value that is not what its tag or its form promises, such as `!!bool maybe`
        raise ValueError(f"a value is not of its own type: {error}") from error


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """The number of values and of levels of a node, its aliases written out; an anchor stands before its aliases."""
    if id(node) in known:
        if (found := known[id(node)]) is None:
            raise ValueError("an alias stands inside its own anchor")
        return found
    known[id(node)] = None
    children: Iterable[yaml.Node] = ()
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := {name for name in names if names.count(name) > 1} - {"<<"}:
            raise ValueError(f"`{min(twice)}` is given twice")
    elif isinstance(node, yaml.CollectionNode):
        children = node.value
    sizes, depths = zip((0, 0), *(_measure(child, known) for child in children), strict=False)
    size, depth = 1 + sum(sizes), 1 + max(depths)
    if size > MOST_VALUES:
        raise ValueError(f"it stands for more than {MOST_VALUES:,} values")
    if depth > DEEPEST:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels")
    known[id(node)] = size, depth
    return size, depth


def set_value(value: Any, change: str) -> None:
    """Set one value in nested tables, named as in `select.k=3`; the new value is YAML, missing tables are made.

    Raises:
        ValueError: the change names no place in the tables, or its value is not YAML.
    """
    place, equals, given = change.partition("=")
    *sections, key = place.split(".")
    for section in sections:
        if isinstance(value, dict) and value.get(section) is None:
            value[section] = {}
        value = value[section] if isinstance(value, dict) else None
    if not (equals and key and isinstance(value, dict)):
        raise ValueError("is not `section.key=value`")
    try:
        value[key] = parse_yaml(given)
    except ValueError as error:
        raise ValueError(f"has a value that is not YAML: {error}") from error


def local_path(folder: Path, path: Path) -> Path:
    """A path as seen from a folder, ``~`` understood; there may be nothing.

    Raises:
        ValueError: there can be no such path: no such user, a NUL, too long, or no permission to look.
    """
    try:
        found = folder / path.expanduser()
        found.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return found
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"this cannot be a path: {getattr(error, 'strerror', None) or error}") from error
    return found
