"""The command finds the demo by the entry point that the demo's package declares, and says so where there is none."""

import tomllib
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from stethoscope.cli import main

PROJECT = tomllib.loads((Path(__file__).parents[2] / "demo/pyproject.toml").read_text())["project"]


def declared() -> EntryPoint:
    (group,) = PROJECT["entry-points"]
    return EntryPoint("demo", PROJECT["entry-points"][group]["demo"], group)


def offer(monkeypatch: pytest.MonkeyPatch, *found: EntryPoint) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **chosen: EntryPoints(found).select(**chosen))


def test_the_package_declares_what_it_needs_and_what_the_command_looks_for(monkeypatch, tmp_path, capsys):
    assert "sae-stethoscope[run]" in PROJECT["dependencies"]
    assert declared().load().__name__ == "prepare_demo"
    offer(monkeypatch, declared())
    cache = tmp_path / "cache"
    cache.write_text("a file where the cache should be: preparing the demo fails at once")
    monkeypatch.setenv("STETHOSCOPE_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="cache"):
        main(["demo", "--quick"])
    assert "not installed" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "there", [[], [EntryPoint("demo", "no_such_package.recipe:prepare_demo", "stethoscope.demos")]]
)
def test_a_missing_package_is_said_with_what_to_do(monkeypatch, capsys, there):
    offer(monkeypatch, *there)
    with pytest.raises(SystemExit):
        main(["demo"])
    said = capsys.readouterr().err
    assert "error: the demo's package is not installed" in said
    assert "pip install" in said
    assert "sae-stethoscope[demo]" in said
