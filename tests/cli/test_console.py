"""What a person at a terminal meets: help, errors, quiet, progress, Ctrl-C, completion; each as the program does it."""

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
from rich.console import Console
from world import interrupt

from stethoscope.cli import app, console, main
from stethoscope.cli.console import ConsoleReporter
from stethoscope.errors import StethoscopeError

PAIR = ("--base", "x", "--tuned", "y", "--out", "z")


def test_help_groups_the_commands_and_says_the_exit_codes(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    main(["--help"])
    shown = capsys.readouterr().out
    for said in ("A recipe, end to end", "One stage of a recipe", "Weights", "Proof", "0 done", "130 interrupted"):
        assert said in shown
    options = {
        command.name or command.callback.__name__.replace("_", "-"): set(command.callback.__annotations__)
        for command in app.registered_commands
    }
    assert {name for name, given in options.items() if "as_json" not in given} == set()
    assert {name for name, given in options.items() if "quiet" not in given} == {
        "check", "report", "compare", "show",
    }  # fmt: skip


def test_without_a_command_the_help_is_shown_and_no_error(capsys):
    main([])
    shown = capsys.readouterr()
    assert "A recipe, end to end" in shown.out
    assert shown.err == ""


def test_the_version_is_that_of_the_package(capsys):
    main(["--version"])
    assert capsys.readouterr().out.split() == ["stethoscope", version("sae-stethoscope")]


def test_a_missing_package_is_named_with_the_extra_that_has_it(tmp_path):
    code = "import sys; sys.modules['sae_lens'] = None; from stethoscope.cli import main; main(sys.argv[1:])"
    options = ["--base", str(tmp_path), "--text", "a.jsonl", "--out", str(tmp_path / "saes")]
    ended = subprocess.run([sys.executable, "-c", code, "train-saes", *options], capture_output=True, text=True)
    assert ended.returncode == 2
    assert "`sae_lens`" in ended.stderr
    assert "sae-stethoscope[run]" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "said", "hint"),
    [
        (["sing"], "error: no such command `sing`", "`stethoscope --help`"),
        (["run"], "error: missing argument `RECIPE.yaml`", "`stethoscope run --help`"),
        (["check", "x.yaml", "--offlin"], "--offline)", "`stethoscope check --help`"),
        (["check", "nowhere.yaml"], "error: the recipe `nowhere.yaml` cannot be read", ""),
        (["run", "bad.yaml"], "tuned: Field required", ""),
        (["check", "bad.yaml", "--json"], "tuned: Field required", ""),
        (["edit", *PAIR, "--layers", "all", "--field", "x"], "`--field`", "name the text to keep"),
        (["compare", "a", "b", "--margin", "2"], "the margin `2`", "`--margin 0.02`"),
        (["compare", "a", "b", "--margin", "task=inf"], "the margin `task=inf`", "`TASK=0.05`"),
        (["evaluate", "--model", "a", "--tasks", "b", "--out", "c", "--batch-size", "0"], "--batch-size", "--help`"),
        (["train-saes", "--base", "a", "--text", "b", "--out", "c", "--width", "0"], "--width", "--help`"),
        (
            [
                "train-saes",
                "--base",
                "a",
                "--text",
                "x.jsonl",
                "--out",
                "c",
                "--held-out",
                "x.jsonl=n",
                "--held-out",
                "y.jsonl=n",
            ],
            "the same name",
            "`--held-out FILE=NAME`",
        ),
    ],
)
def test_wrong_usage_is_said_as_any_other_error(arguments, said, hint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text("base: x\n")
    Path("x.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    shown = capsys.readouterr()
    assert stopped.value.code == 2
    if "--json" in arguments:
        assert any(said in problem for problem in json.loads(shown.out)["problems"])
    else:
        assert shown.out == ""
    assert said in shown.err
    assert hint in shown.err
    assert "Traceback" not in shown.err


def test_quiet_hushes_libraries_until_the_command_ends(monkeypatch, capfd):
    library = logging.getLogger("some.library")
    handler = logging.StreamHandler(sys.stderr)  # as transformers has one of its own
    library.addHandler(handler)

    def report(_: Path) -> Path:
        library.warning("a warning by logging")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("a warning by warnings", stacklevel=1)
        with ConsoleReporter(quiet=True).stage("Stage"):
            pass
        raise StethoscopeError("what matters")

    monkeypatch.setattr("stethoscope.checkpoints.open.open_checkpoint", report)
    try:
        with pytest.raises(SystemExit):
            main(["edit", "--base", "x", "--tuned", "x", "--layers", "all", "--out", "y", "--quiet"])
        assert capfd.readouterr().err == "error: what matters\n"
        library.warning("after it")
        assert capfd.readouterr().err == "after it\n"
    finally:
        library.removeHandler(handler)


def test_what_the_library_warns_of_is_said_unless_quiet(monkeypatch, capfd):
    def report(_: Path) -> Path:
        logging.getLogger("stethoscope.text").warning("12 rows are skipped")
        raise StethoscopeError("what matters")

    monkeypatch.setattr("stethoscope.checkpoints.open.open_checkpoint", report)
    for quiet, said in (
        (["--quiet"], ""),
        ([], "warning: 12 rows are skipped\n"),
        ([], "warning: 12 rows are skipped\n"),
    ):
        with pytest.raises(SystemExit):
            main(["edit", "--base", "x", "--tuned", "x", "--layers", "all", "--out", "y", *quiet])
        assert capfd.readouterr().err == f"{said}error: what matters\n"


def test_one_plain_line_a_stage_or_one_bar_on_a_terminal(monkeypatch, capsys):
    seconds = iter(range(0, 10_000, 45))
    with monkeypatch.context() as patched:
        patched.setattr(console.time, "perf_counter", lambda: float(next(seconds)))
        with ConsoleReporter().stage("Collect") as advance:
            for done in range(1, 5):
                advance(done, 4)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[:2] for line in lines] == [["Collect", "90.0"], ["Collect", "225.0"]]
    assert lines[0].endswith("s, 50%, about 0:01:30 left")
    monkeypatch.setattr(console, "_err", Console(stderr=True, force_terminal=True, width=100))
    with ConsoleReporter().stage("Collect") as advance:
        advance(1, 4)
    shown = capsys.readouterr().err
    assert "25%" in shown
    assert "-:--:--" in shown  # time left, which one step cannot tell
    assert "Collect" in shown.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["run", "a b.yaml", "--out", "runs/x"], "go on with"),
        (["train-saes", "--base", "a", "--text", "b", "--out", "c"], "go on with"),
        (["--debug", "run", "a b.yaml"], "go on with"),
        (["verify", "edited"], "nothing was written"),
        (["edit", *PAIR, "--layers", "1"], "nothing was written"),
        (["verify", "run"], "nothing was written"),
    ],
)
def test_ctrl_c_says_the_exact_command(arguments, word, monkeypatch, capsys):
    for name in ("recipe.Recipe.from_yaml", "editing.verify.verify", "text.documents.read_documents",
                 "checkpoints.open.open_checkpoint"):  # fmt: skip
        monkeypatch.setattr(f"stethoscope.{name}", interrupt)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 130
    shown = capsys.readouterr().err
    assert word in shown
    assert shlex.split(shown.splitlines()[-1]) == ["stethoscope", *arguments]


def test_task_names_and_paths_are_no_markup(capsys):
    console.show_rows([["[b]task[/b]", "n"], ["[red]x[/red]", "1"]])
    console.say("runs/[demo]/report.html")
    shown = capsys.readouterr().out
    for said in ("[red]x[/red]", "[b]task[/b]", "runs/[demo]/report.html"):
        assert said in shown


@pytest.mark.skipif(shutil.which("bash") is None, reason="completion is tried in bash")
def test_the_shell_completes_commands_and_options(tmp_path):
    """Installed as a user would, then asked as the shell asks."""
    program = Path(sys.executable).parent
    here = {"HOME": str(tmp_path), "PATH": f"{program}{os.pathsep}{os.environ['PATH']}"}

    def bash(script: str) -> str:
        command = ["bash", "--norc", "-c", script]
        return subprocess.run(command, env=here, capture_output=True, text=True, check=True).stdout

    bash("stethoscope --install-completion; true")  # it looks for the shell above it, which must not give way to it
    ask = f"source {tmp_path}/.bash_completions/stethoscope.sh; COMP_WORDS=(stethoscope {{}}); COMP_CWORD={{}};"
    ask += " _stethoscope_completion stethoscope; echo ${{COMPREPLY[@]}}"
    assert bash(ask.format("cal", 1)).split() == ["calibrate"]
    assert bash(ask.format("check --of", 2)).split() == ["--offline"]
