"""Every command and snippet of the documentation runs, on tiny real models that bear the names which the text uses.

A block that cannot run says why in the page's source, `<!-- not run: why -->`; its commands must at least parse.
A page's blocks run in their order, in a folder made anew for each page.
"""

import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml
from pages import PAGES, ROOT, Block, blocks, commands
from world import MATH, make_world, write_logs

from stethoscope.cli import app, main
from stethoscope.diagnosis.scores import SCORES
from stethoscope.recipe import Recipe
from stethoscope.stages import STAGES

LANGUAGES = {"sh", "python", "yaml", "json", "text"}
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
QUICKSTART = ROOT / "docs" / "quickstart.md"
# Numbers that only a real model needs, and what stands for them here.
TINY = {"--tokens": "2000", "--limit": "1"}
TINY_VALIDATION = ("--set", "validation.documents=2", "--set", "validation.random_sets=10")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer) -> tuple[Path, Path]:
    """Where pages run, and what is put there for each: the tiny world, and in it one finished run of the quickstart."""
    here, kept = tmp_path_factory.mktemp("docs") / "here", tmp_path_factory.mktemp("docs") / "kept"
    make_world(here, tokenizer)
    shutil.copytree(MATH, here / "math")
    shutil.copy(here / "tasks/tiny_sum.test.jsonl", here / "tasks/sums.jsonl")
    written = {block.file: block.text for block in blocks(QUICKSTART) if block.file}
    (here / "tasks" / "my_task.yaml").write_text(written["tasks/my_task.yaml"])
    (here / "recipe.yaml").write_text(written["recipe.yaml"])
    before = Path.cwd()
    os.chdir(here)  # as a user would: tasks name their files relative to it
    try:
        for name in ("logs/a", "logs/b"):
            write_logs(here / "base", here / "tasks", here / name, ["my_task"], batch_size=16)
        main(["run", "recipe.yaml", "--out", "runs/mine", "--quiet"])
        main(["validate", "recipe.yaml", "--out", "runs/mine", *TINY_VALIDATION, "--quiet"])
        main(["edit", "--base", "base", "--tuned", "tuned", "--layers", "2-3", "--out", "edited", "--quiet"])
    finally:
        os.chdir(before)
    shutil.copytree(here, kept)
    return here, kept


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_runs_in_order_or_says_why_not(page, world, monkeypatch, capsys):
    here, kept = world
    shutil.rmtree(here)
    shutil.copytree(kept, here)  # in the same place, which tasks' settings name
    monkeypatch.chdir(here)
    monkeypatch.setattr("stethoscope.evaluation.run.SharedPrefixLM.max_gen_toks", 8)
    monkeypatch.setattr("stethoscope.diagnosis.scores.SCORES", dict(SCORES))  # a page adds one, and a stage
    monkeypatch.setattr("stethoscope.stages.STAGES", STAGES)
    names: dict[str, Any] = {"__name__": "documentation"}
    for block in blocks(page):
        where = f"{name_of(page)}, line {block.line}"
        assert block.language in LANGUAGES, f"{where}: a block of `{block.language}` is not known here"
        if block.file:
            fresh(here / block.file).write_text(block.text)
        if block.language == "sh":
            for command in commands(block.text):
                run_command(command, only_parse=block.not_run is not None, where=where)
        elif block.language == "python" and block.not_run is None:
            exec(compile(block.text, where, "exec"), names)
        elif block.language == "python":
            compile(block.text, where, "exec")
        elif block.language == "yaml":
            check_yaml(block, here, where)
        elif block.language == "json":
            [json.loads(line) for line in block.text.splitlines()]
    capsys.readouterr()


def fresh(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def run_command(command: str, *, only_parse: bool, where: str) -> None:
    program, *arguments = shlex.split(command)
    if program != "stethoscope":
        assert only_parse, f"{where}: `{command}` is not a command of this package: say why it is not run"
        if program == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(arguments) <= set(targets), f"{where}: make has no {arguments}"
        return
    parse(arguments, where)
    if only_parse:
        return
    for option, value in TINY.items():
        if option in arguments:
            arguments[arguments.index(option) + 1] = value
    if arguments[0] == "validate":
        arguments += TINY_VALIDATION
    try:
        main(arguments)
    except SystemExit as stopped:
        if stopped.code:
            pytest.fail(f"{where}: `{command}` ended with {stopped.code}")


def parse(arguments: list[str], where: str) -> None:
    """Make sure that a command and its options exist."""
    first, *rest = arguments
    found = typer.main.get_command(app)
    if not first.startswith("-"):
        assert first in found.commands, f"{where}: there is no command `{first}`"
        found, arguments = found.commands[first], rest
    try:
        found.make_context(first, list(arguments), resilient_parsing="--help" in arguments)
    except Exception as error:  # of a private module of typer's
        raise AssertionError(f"{where}: `stethoscope {first} {shlex.join(rest)}`: {error}") from error


def check_yaml(block: Block, here: Path, where: str) -> None:
    """A whole recipe must be one; part of one must fit into the quickstart's."""
    value = yaml.safe_load(block.text)
    if block.file and not block.file.endswith("recipe.yaml"):
        return
    if "base" not in value:
        value = yaml.safe_load((here / "recipe.yaml").read_text()) | value
    path = here / (block.into or "checked.yaml")
    path.write_text(yaml.safe_dump(value))
    try:
        Recipe.from_yaml(path)
        jsonschema.validate(value, json.loads((ROOT / "recipes" / "recipe.schema.json").read_text()))
    except Exception as error:
        raise AssertionError(f"{where}: {error}") from error


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_commands_in_a_recipes_comments_parse(path):
    said = re.findall(r"^#\s+(stethoscope .+)", path.read_text(), re.MULTILINE)
    assert said
    for command in commands("\n".join(said)):
        run_command(command, only_parse=True, where=name_of(path))


def test_a_block_that_is_not_run_says_why():
    reasons = [block.not_run for page in PAGES for block in blocks(page)]
    assert all(reason is None or len(reason.split()) > 1 for reason in reasons)
    assert sum(reason is None for reason in reasons) > len(reasons) / 2
