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
    {"pipeline"},
    {"preflight"},
    {"scaling"},
    {"selection", "evaluation"},
    {"diagnosis"},
    {"editing"},
    {"saes"},
    {"replay"},
    {"sites", "losses", "seen"},
    {"checkpoints", "corpus", "models", "recipe"},
    {"documents"},
    {"report"},  # it reads saved values and no room that makes them
    {"results"},  # whose `plot` alone imports the report's charts, when called
    {"artifacts"},
    {"errors", "lazy", "shown", "work"},
]


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "stethoscope" and len(parts) > 1 else None


def level(room: str) -> int:
    return next(i for i, rooms in enumerate(ORDER) if room in rooms)


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path):
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "stethoscope"
                else [node.module]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for room in filter(None, map(room_of, names)):
            drawn = own == "results" and room == "report" and node not in tree.body
            assert drawn or room == own or own == "__init__" or level(own) < level(room), f"{own} imports {room}"


def test_the_command_line_starts_without_torch():
    code = "import sys, stethoscope.cli; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_results_and_their_report_need_no_torch():
    rooms = ["report", *(f"results.{path.stem}" for path in (SOURCE / "results").glob("[a-z]*.py"))]
    code = f"import sys, {', '.join(f'stethoscope.{room}' for room in rooms)}; "
    code += "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_copying_raw_layers_needs_no_torch():
    code = "import sys, stethoscope.editing.writer, stethoscope.editing.patch; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_public_name_is_there():
    assert sorted(stethoscope._HOME) == sorted(stethoscope.__all__)
    for name in stethoscope.__all__:
        assert getattr(stethoscope, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute `hear`"):
        _ = stethoscope.hear
