"""Files that lie: seeded damage to bytes and to JSON values, and what must come of it."""

import copy
import json
import random
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stethoscope.errors import StethoscopeError

DEEP, BOMB = "@deep@", "@bomb@"
ODD: list[Any] = [
    None, True, -1, 0, 3, 2**63, 10**30, 1.5, float("nan"), float("inf"), "", "x" * 5000, "\0", "../../esc", "/",
    "~nobody-at-all/x", "\ud83d", "2026-13-45", "layers", [], {}, [[]], [None], {"a": 1}, {"": []}, DEEP,
]  # fmt: skip


def chances(what: str, count: int) -> Iterator[random.Random]:
    """As many generators with fixed seeds, so that a case can be run again by its number."""
    return (random.Random(f"{what} {number}") for number in range(count))


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Bytes that a bad disk, a cut download or a stranger might have left: a few of one kind of change."""
    kind, at = chance.randrange(7), chance.randrange(len(data) + 1)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[at:]
    if kind == 2:
        return data[:at] + chance.randbytes(chance.choice([1, 8, 100])) + data[at:]
    if kind == 3:
        return data[:at] + bytes(chance.choice([1, 8, 100])) + data[at + 8 :]
    if kind == 4:
        return chance.choice([b"", b"\0", b"null", b"[]", b"{}", b"PK\x03\x04", chance.randbytes(64)])
    changed = bytearray(data)
    where = min(len(data), 400) if kind == 5 else len(data)  # headers stand in front
    for _ in range(chance.choice([1, 3, 20])):
        if where:
            changed[chance.randrange(where)] = chance.randrange(256)
    return bytes(changed)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container of a JSON value with every key in it."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in [(value, key), *places(value[key])]]


def odd(value: Any, chance: random.Random) -> str:
    """A JSON value as text, some of it replaced, left out, nested or of another name."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice([1, 1, 2, 4])):
        if not (found := places(value)):
            break
        container, key = chance.choice(found)
        kind = chance.randrange(5)
        if kind == 0:
            del container[key]
        elif kind == 1:
            container[key] = [container[key]]
        elif kind == 2 and isinstance(container, dict):
            container[chance.choice(["x", "", "../../esc", "\0", "layers.9.x"])] = container.pop(key)
        else:
            container[key] = copy.deepcopy(chance.choice(ODD))
    return as_text(value)


def contradicting(value: Any, chance: random.Random) -> str:
    """A JSON value of the same form that says something else: other numbers and names, lists and tables cut."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice([1, 2, 8])):
        container, key = chance.choice(places(value))
        old = container[key]
        if isinstance(old, bool):
            container[key] = not old
        elif isinstance(old, int):
            container[key] = chance.choice([0, 1, old + 1, 999, -3])
        elif isinstance(old, float):
            container[key] = chance.choice([0.0, -old, old * 1e9, 1e308, 5e-324])
        elif isinstance(old, str):
            container[key] = chance.choice(["", "tuned", "base", "target", "x", f"{old}2"])
        elif isinstance(old, list) and old:
            container[key] = chance.choice([old[1:], [], [*old, old[0]], old[::-1]])
        elif isinstance(old, dict) and old:
            name = chance.choice(list(old))
            rest = {other: one for other, one in old.items() if other != name}
            container[key] = chance.choice([rest, {}, {**rest, "7": old[name]}])
    return as_text(value)


def as_text(value: Any) -> str:
    return json.dumps(value).replace(f'"{DEEP}"', "[" * 3000 + "]" * 3000)


def outcome(function: Callable[[], object]) -> str:
    """`passed`, or the message of an error for the user; any other exception is the test's failure."""
    try:
        function()
    except StethoscopeError as error:
        return str(error)
    return "passed"


def damage(path: Path, chance: random.Random) -> None:
    """Damage a file in place: JSON by values or by bytes, anything else by bytes."""
    if path.suffix == ".json" and chance.random() < 0.7:
        path.write_text(odd(json.loads(path.read_text()), chance))
    else:
        path.write_bytes(damaged(path.read_bytes(), chance))


def assert_no_tracebacks(what: str, count: int, case: Callable[[random.Random], object]) -> None:
    """Run a case with as many seeds: it passes, or raises an error for the user."""
    found = []
    for number, chance in enumerate(chances(what, count)):
        try:
            outcome(lambda chance=chance: case(chance))
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            found.append(f"{number}: {type(error).__name__}: {str(error)[:200]} ({last.filename}:{last.lineno})")
    assert not found, "\n".join(found)
