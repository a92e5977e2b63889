"""What a user runs first: `check` from names and headers, fast and all at once, and the rehearsal of a run."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from world import changed, write_task

from stethoscope.check import check_recipe, check_run
from stethoscope.cli import main
from stethoscope.diagnosis.scores import SCORES
from stethoscope.errors import RecipeError
from stethoscope.estimate import estimate
from stethoscope.evaluation.names import unknown_tasks
from stethoscope.models.speeds import measure
from stethoscope.recipe import Recipe
from stethoscope.saes.releases import read_release, release_texts

# PyTorch, with which `check` measures this machine, is not among them
HEAVY = ("transformers", "lm_eval", "datasets", "pandas", "sae_lens", "peft", "pyarrow")
ON_THE_HUB = {
    "base": "google/gemma-3-4b-it",
    "tuned": "me/gemma-3-4b-it-math",
    "saes": "gemma-scope-2-4b-it-res-all",
    "sae_id": "layer_{layer}_width_16k_l0_small",
    "target": {"dataset": "me/math:train"},
    "control": {"dataset": "me/general:train"},
    "select": {"policy": "top_k", "k": 5},
    "arms": ["base", "selected", "projected"],
    "evaluate": {"tasks": ["minerva_math", "gsm8k"], "control_tasks": ["mmlu"]},
}


def write(folder: Path, **changes: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(ON_THE_HUB | changes))
    return path


def test_check_imports_nothing_heavy(world, tmp_path):
    code = (
        "import sys; from stethoscope.cli import main;"
        f" main(['check', {str(world / 'recipe.yaml')!r}, '--out', {str(tmp_path / 'run')!r}, '--json']);"
        f" print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    found = json.loads(done.stdout)
    assert found["ok"] is True
    assert (found["layers"], found["hidden_size"], found["saes"]) == (4, 32, [0, 1, 2, 3])
    assert found["texts"] == {"target": 24, "control": 24, "general": 24}
    assert found["edit"]["tensors"] == 14
    assert not (tmp_path / "run").exists()


def test_offline_takes_what_lies_on_the_hub_by_its_name(tmp_path, capsys):
    main(["check", "--offline", str(write(tmp_path))])
    shown = capsys.readouterr().out
    assert "google/gemma-3-4b-it: on the hub, not looked at" in shown
    assert "has no mistake in its form" in shown
    assert f"next: stethoscope check {tmp_path / 'recipe.yaml'}" in shown


def test_offline_says_all_that_names_tell(tmp_path):
    path = write(
        tmp_path,
        base="google gemma",
        sae_id="layer_{layer}_width_17k",
        target={"dataset": "data/math.jsonl"},
        score="mass_shft",
        evaluate={"tasks": ["minerva_mth"], "include_path": None, "data": "MATH"},
    )
    with pytest.raises(RecipeError) as caught:
        check_recipe(Recipe.from_yaml(path), tmp_path / "run", offline=True)
    said = "\n".join(caught.value.problems)
    for part in (
        "there is no folder `google gemma`",
        "no SAE of the release `gemma-scope-2-4b-it-res-all` is called `layer_{layer}_width_17k`",
        "math.jsonl` cannot be read",
        "unknown score `mass_shft`; did you mean `mass_shift`?",
        "the task `minerva_mth` is not known; did you mean `minerva_math`",
        "MATH` does not exist",
    ):
        assert part in said


def test_a_release_parsed_alone_is_the_same():
    spec = importlib.util.find_spec("sae_lens")
    text = (Path(spec.origin).parent / "pretrained_saes.yaml").read_text(encoding="utf-8")
    whole = yaml.load(text, Loader=yaml.CSafeLoader)
    names = list(release_texts())
    assert names == list(whole)
    assert all(read_release(name) == whole[name] for name in [*names[::12], "gemma-scope-2-4b-it-res-all"])


def test_tasks_are_known_by_name(tmp_path):
    """Names of every kind that the harness has: tasks, groups, tags, and what included files without an ending tag."""
    own = tmp_path / "tasks"
    own.mkdir()
    (own / "mine.yaml").write_text("task: mine\ntag: [ours, 'theirs']\n")
    (own / "quoted.yaml").write_text('"task": "quoted"\n"tag":\n- listed\n- "below"\n')
    known = ["minerva_math", "minerva_math_algebra", "gsm8k", "mmlu", "mmlu_stem_tasks", "arc_easy", "ai2_arc"]
    known += ["leaderboard", "acp_bench_hard", "truthfulqa_mc2", "winogrande", str(own / "mine.yaml")]
    assert unknown_tasks(known) == {}
    assert unknown_tasks(["mine", "ours", "theirs", "quoted", "listed", "below", "gsm8k"], own) == {}
    assert "gsm8k" in unknown_tasks(["gsm8kk"])["gsm8kk"]
    assert list(unknown_tasks(["mine"])) == ["mine"]


def test_scores_of_ones_own_and_any_repository_of_saes_are_taken(tmp_path, monkeypatch):
    monkeypatch.setitem(SCORES, "my_score", SCORES["lift"])
    path = write(tmp_path, score="my_score", saes="me/saes", sae_id="layer_{layer}")
    assert check_recipe(Recipe.from_yaml(path), tmp_path, offline=True).unseen["saes"] == "me/saes"


def test_a_rehearsal_builds_the_tasks_starts_nothing_and_can_be_really_quiet(world, tmp_path):
    """In a process of its own: libraries ask at import whether they may draw bars."""
    command = [sys.executable, "-m", "stethoscope.cli", "run", str(world / "recipe.yaml"), "--dry-run"]
    command += ["--out", str(tmp_path / "run"), "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["tasks"] == ["tiny_sum"]
    assert found["control_tasks"] == ["tiny_and"]
    assert found["seen_items"] == {}
    assert done.stderr == ""
    assert not (tmp_path / "run").exists()


def test_a_window_shorter_than_the_documents_may_be_is_noted(world, tmp_path):
    for most, noted in ((4096, 0), (4097, 1)):
        recipe = Recipe.from_yaml(changed(world, tmp_path, diagnose={"block_size": 4, "max_tokens": most}))
        assert sum("4096 tokens at most" in note for note in check_recipe(recipe, tmp_path / "run").notes) == noted


def test_a_task_that_leaves_no_room_for_its_prompt_is_refused_before_any_work(world, tmp_path):
    write_task(tmp_path, "long", [{"problem": "a", "answer": "b"}], generation_kwargs={"max_gen_toks": 4096})
    evaluate = {"tasks": ["long"], "control_tasks": [], "include_path": str(tmp_path)}
    with pytest.raises(RecipeError, match=r"`long` .*4096 tokens"):
        check_run(Recipe.from_yaml(changed(world, tmp_path, evaluate)), tmp_path / "run")


def test_check_names_the_python_of_task_files_and_refuses_it_unless_allowed(world, tmp_path):
    write_task(tmp_path, "own", [{"problem": "a", "answer": "b"}], doc_to_text="TEXT")
    task = tmp_path / "own.yaml"
    task.write_text(task.read_text().replace("TEXT", "!function own.text"))
    evaluate = {"tasks": ["own"], "control_tasks": [], "include_path": str(tmp_path)}
    recipe = Recipe.from_yaml(changed(world, tmp_path, evaluate))
    with pytest.raises(RecipeError) as caught:
        check_recipe(recipe, tmp_path / "run")
    (problem,) = caught.value.problems
    assert "`own.text`" in problem
    assert "task_code" in problem
    allowed = Recipe.from_yaml(changed(world, tmp_path, evaluate | {"task_code": True}))
    assert any("`own.text`" in note for note in check_recipe(allowed, tmp_path / "run").notes)


def test_check_says_what_every_stage_will_take(world, tmp_path, capsys):
    main(["check", str(world / "recipe.yaml"), "--json"])
    stages = {one["stage"]: one for one in json.loads(capsys.readouterr().out)["estimates"]}
    answers = stages.pop("Evaluate: arms on tasks")
    assert answers["seconds"] is None, "which takes tasks that are built"
    assert {"Diagnose: score every layer", "Edit: write the checkpoint", "Evaluate: loss on text"} <= set(stages)
    assert all(one["seconds"] > 0 for one in stages.values())
    assert stages["All of these"]["memory"] >= stages["Edit: write the checkpoint"]["memory"] > 0
    main(["check", str(world / "recipe.yaml")])
    shown = capsys.readouterr().out
    assert "peak memory" in shown
    assert "not known" in shown


def test_more_text_more_items_and_more_arms_are_estimated_to_take_longer(world, tmp_path):
    def seconds(evaluate: dict[str, object] | None = None, **changes: object) -> list[float]:
        recipe = Recipe.from_yaml(changed(world, tmp_path, {"exploratory": True, **(evaluate or {})}, **changes))
        stages = {
            one.stage: one.seconds
            for one in estimate(recipe, check_run(recipe, tmp_path / "run", headers_only=True), speeds)
        }
        names = ("Diagnose: score every layer", "Evaluate: arms on tasks", "Evaluate: loss on text")
        return [stages[name] for name in names]

    speeds = measure(torch.device("cpu"), torch.float32, batch=4)
    assert all(speed > 0 for speed in speeds.values())
    diagnose, answers, losses = seconds()
    long = {"dataset": str(tmp_path / "long.jsonl")}
    text = (world / "data" / "other.jsonl").read_text()
    (tmp_path / "long.jsonl").write_text(text * 3)
    assert seconds({"control": long})[:2] == [diagnose, answers]
    assert seconds({"control": long})[2] > losses
    assert seconds({"limit": 1})[1] < answers
    assert seconds(control=long)[0] > diagnose
    fewer = seconds(arms=["base", "selected"], edit={"filter": "none"})
    assert fewer[1] < answers
    assert fewer[2] < losses
