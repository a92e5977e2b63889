"""Each stage as a command: table, verdict, paths, next command; interrupted and gone on with; and what a run leaves."""

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from world import interrupt, terminate

from stethoscope.cli import main
from stethoscope.cli.options import RecipeOptions
from stethoscope.editing.manifest import read_manifest
from stethoscope.editing.verify import verify
from stethoscope.recipe import Ray
from stethoscope.results.comparison import Comparison
from stethoscope.results.diagnosis import Diagnosis
from stethoscope.results.geometry import Geometry
from stethoscope.results.overview import headline, overview
from stethoscope.results.selection import Selection


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def lines_of(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_diagnose_ends_with_table_verdict_paths_and_next(world, run, capsys):
    main(["diagnose", str(world / "recipe.yaml"), "--out", str(run)])
    shown = lines_of(capsys)
    diagnosis = Diagnosis.load(run)
    assert shown[0].split()[:2] == ["layer", "excess"]
    assert [line.split()[0] for line in shown[1:5]] == ["0", "1", "2", "3"]
    assert diagnosis.verdict in shown
    assert f"wrote {run / 'diagnosis.json'}" in shown
    after = shlex.split(shown[-1].removeprefix("next: "))
    assert after == ["stethoscope", "select", str(world / "recipe.yaml"), "--out", str(run)]
    main([*after[1:], "--json"])  # it is one
    assert json.loads(capsys.readouterr().out)["layers"] == list(Selection.load(run).layers)


def test_a_finished_run_is_shown_without_loading_a_model(finished, tmp_path):
    code = "import sys; from stethoscope.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    ended = subprocess.run([sys.executable, "-c", code, "show", str(finished)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    comparison = Comparison.load(finished / "comparison.json")
    assert comparison.verdict in ended.stdout
    rows = [line.split()[0] for line in ended.stdout.splitlines() if line]
    assert {row[0] for row in overview(comparison)[1:]} <= set(rows)
    assert headline(comparison) in ended.stdout
    with pytest.raises(SystemExit):
        main(["show", str(tmp_path)])


def test_what_is_not_there_is_not_suggested_and_nothing_is_said_twice(run, capsys):
    shutil.rmtree(run / "edited")
    comparison = Comparison.load(run / "comparison.json")
    others = replace(comparison, contrasts=[c for c in comparison.contrasts if c.b != comparison.edit])
    others.save(run / "comparison.json")
    main(["show", str(run)])
    shown = lines_of(capsys)
    assert shown.count(others.verdict) == 1
    assert not any(line.startswith("next:") for line in shown)


@pytest.mark.parametrize("place", ["evidence.json", "losses", "parts/new.parquet"])
def test_links_that_lead_out_of_a_run_are_refused(world, run, tmp_path, capsys, place):
    outside = tmp_path / "outside"
    outside.mkdir()
    if (run / place).is_dir():
        shutil.rmtree(run / place)
        (run / place).symlink_to(outside)
    else:
        (run / place).unlink(missing_ok=True)
        (run / place).symlink_to(world / "recipe.yaml")
    before = (run / "report.html").read_bytes()
    for command in (["run", str(world / "recipe.yaml"), "--out", str(run)], ["show", str(run)], ["report", str(run)]):
        with pytest.raises(SystemExit) as stopped:
            main(command)
        assert stopped.value.code == 2
        assert f"`{place}` leads to" in capsys.readouterr().err
    assert (run / "report.html").read_bytes() == before
    assert not list(outside.iterdir())


def test_select_says_why_and_geometry_what_is_kept(world, run, capsys):
    main(["select", str(world / "recipe.yaml"), "--out", str(run)])
    shown = lines_of(capsys)
    selection = Selection.load(run)
    for choice in selection.choices:
        assert any(line.split()[0] == str(choice.layer) and choice.reason in line for line in shown[1:5])
    assert selection.verdict in shown
    (run / Geometry.FILE).unlink(missing_ok=True)
    main(["geometry", str(world / "recipe.yaml"), "--out", str(run)])
    shown = lines_of(capsys)
    geometry = Geometry.load(run)
    assert geometry.verdict in shown
    (whole,) = (line.split() for line in shown if line.startswith("all  "))
    assert f"{100 * geometry.total.share:.1f}" in whole


@pytest.mark.parametrize(("ends", "code", "word"), [(interrupt, 130, "interrupted"), (terminate, 143, "terminated")])
def test_a_run_stopped_goes_on_with_the_command_that_it_names(ends, code, word, world, tmp_path, monkeypatch, capsys):
    arguments = ["run", str(world / "recipe.yaml"), "--out", str(tmp_path / "a run")]
    with monkeypatch.context() as patched:
        patched.setattr("stethoscope.evaluation.comparison.compare", ends)
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
    assert stopped.value.code == code
    said = capsys.readouterr().err
    assert f"{word}: finished work is kept" in said
    command = shlex.split(said.splitlines()[-1])
    assert command == ["stethoscope", *arguments]
    monkeypatch.setattr("stethoscope.diagnosis.collect.collect_activations", None)  # it is not done again
    main(command[1:])
    shown = capsys.readouterr()
    assert f"wrote {tmp_path / 'a run' / 'report.html'}" in shown.out
    assert shlex.split(shown.out.splitlines()[-1].removeprefix("next: "))[1] == "verify"
    verdicts = [line for line in shown.out.splitlines() if line.startswith(("No evidence", "`selected`", "Mixed"))]
    assert len(verdicts) == 4  # against the base, two random sets, and all layers at equal energy


def test_the_edited_folder_has_the_results_on_its_card_and_still_verifies(finished):
    edited = finished / "edited"
    contrast = Comparison.load(finished / "comparison.json").contrast("selected")
    card = (edited / "README.md").read_text(encoding="utf-8")
    metadata = yaml.safe_load(card.split("---")[1])
    (index,) = metadata["model-index"]
    found = {result["dataset"]["type"]: result["metrics"][0] for result in index["results"]}
    assert found == {t.task: {"type": t.metric, "value": t.accuracy_b} for t in contrast.tasks}
    assert contrast.verdict in card
    assert verify(edited).ok
    assert read_manifest(edited)["results"]["verdict"] == contrast.verdict


def test_the_next_command_is_of_the_same_recipe():
    given = {"ray": "auto", "workers": 0, "gpus": 0.5, "device": "cpu", "changes": ["select.k=3", "seed=1"]}
    words = shlex.split(RecipeOptions(recipe=Path("a b.yaml"), out=Path("c"), **given).next("run", "--dry-run"))
    assert words[:3] == ["stethoscope", "run", "a b.yaml"]
    pairs = set(zip(words[3:-1:2], words[4:-1:2], strict=True))
    assert pairs == {("--out", "c"), ("--ray", "auto"), ("--workers", "0"), ("--gpus", "0.5"), ("--device", "cpu"),
                     ("--set", "select.k=3"), ("--set", "seed=1")}  # fmt: skip


def test_a_family_and_margins_of_tasks_are_read_as_they_are_meant(finished, capsys):
    task, *_ = Comparison.load(finished / "comparison.json").family
    compare = ["compare", f"{finished}=base", f"{finished}=selected", "--json"]
    main([*compare, "--family", f" {task}, {task},", "--margin", f"{task}=0.3"])
    found = json.loads(capsys.readouterr().out)
    assert found["family"] == [task]
    with pytest.raises(SystemExit):
        main([*compare, "--margin", f"{task}=2"])
    assert task in capsys.readouterr().err


def test_workers_on_the_command_line_override_the_recipe(tmp_path):
    text = {"dataset": "a.jsonl"}
    recipe = dict.fromkeys(("base", "tuned", "saes"), "x") | {"target": text, "control": text, "select": {"k": 1}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | {"evaluate": {"tasks": ["x"]}}))
    assert RecipeOptions(recipe=path).read()[0].ray is None
    assert RecipeOptions(recipe=path, workers=2, gpus=0.5).read()[0].ray == Ray(workers=2, gpus=0.5)
    path.write_text(yaml.safe_dump(recipe | {"evaluate": {"tasks": ["x"]}, "ray": {"workers": 8, "threads": 3}}))
    assert RecipeOptions(recipe=path).read()[0].ray == Ray(workers=8, threads=3)
    assert RecipeOptions(recipe=path, ray="here:1", workers=0).read()[0].ray == Ray(
        address="here:1", workers=0, threads=3
    )
