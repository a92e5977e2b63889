"""Imports point down one way, the library never prints, and the command line starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import stethoscope

SOURCE = Path(stethoscope.__file__).parent
# From the top: a room may import rooms below it and nothing beside or above it.
ORDER = [
    {"cli"},
    {"keep"},
    {"run", "estimate"},
    {"stages"},
    {"make"},
    {"tradeoff"},
    {"filtering"},
    {"context"},
    {"check"},
    {"selection", "evaluation"},
    {"diagnosis"},
    {"executor"},
    {"editing"},
    {"saes"},
    {"checkpoints", "text", "models", "recipe"},
    {"report"},  # it reads saved values and no room that makes them
    {"results"},
    {"charts"},
    {"artifacts"},
    {"errors", "lazy", "display", "parsing"},
]


FILES = {
    ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}


def imported_by(module: str) -> set[str]:
    """The names that a module's import statements reach for, those inside functions and for types included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def module_of(name: str) -> str | None:
    """The module of the library that a name is or lies in."""
    home = name if name in FILES else name.rpartition(".")[0]
    return home if home in FILES else None


IMPORTS = {module: {found for name in imported_by(module) if (found := module_of(name))} for module in FILES}


def level(module: str) -> int:
    room = module.split(".")[1]
    return next(i for i, rooms in enumerate(ORDER) if room in rooms)


@pytest.mark.parametrize("module", [module for module in FILES if module != "stethoscope"])
def test_imports_between_rooms_point_down(module):
    room = module.split(".")[1]
    for other in IMPORTS[module] - {"stethoscope"}:
        assert other.split(".")[1] == room or level(module) < level(other), f"{module} imports {other}"


def test_no_modules_import_each_other_in_a_circle():
    left = {module: set(others) for module, others in IMPORTS.items()}
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"these import each other, or what does: {sorted(left)}"


def test_the_library_does_not_know_the_demo():
    assert not {m for m in FILES for name in imported_by(m) if name.startswith("stethoscope_demo")}


RESULTS = ", ".join(f"stethoscope.results.{path.stem}" for path in (SOURCE / "results").glob("[a-z]*.py"))


@pytest.mark.parametrize(
    "modules",
    [
        "stethoscope.cli",
        f"stethoscope.report, {RESULTS}",
        "stethoscope.editing.writer, stethoscope.editing.patch",
        "stethoscope.checkpoints.names",
    ],
)
def test_what_starts_without_torch(modules):
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_there():
    assert sorted(stethoscope._HOME) == sorted(stethoscope.__all__)
    for name in stethoscope.__all__:
        assert getattr(stethoscope, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute `collect`"):
        _ = stethoscope.collect
