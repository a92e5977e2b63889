"""The recipes in recipes/: valid by themselves and by the schema, and every name in them is one that exists."""

import json
import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import jsonschema
import lm_eval.tasks
import pytest
import yaml
from pages import ROOT
from tiny_world import make_world

from stethoscope.cli import main
from stethoscope.recipe import Recipe
from stethoscope.saes import sources

FOLDER = ROOT / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
TASKS = Path(lm_eval.tasks.__file__).parent
write_schema = runpy.run_path(str(FOLDER / "scripts" / "write_schema.py"))


def name_of(path: Path) -> str:
    return path.stem


def test_the_schema_is_what_the_recipe_says():
    made = json.loads(json.dumps(write_schema["recipe_schema"]()))
    assert json.loads(write_schema["SCHEMA"].read_text()) == made, "run `python recipes/scripts/write_schema.py`"
    jsonschema.Draft202012Validator.check_schema(made)


def test_the_schema_refuses_what_a_recipe_refuses():
    schema = json.loads(write_schema["SCHEMA"].read_text())
    good = yaml.safe_load((FOLDER / "own-model.yaml").read_text())
    for change in ({"contrl": {}}, {"select": {"policy": "topk"}}, {"edit": {"coefficient": "all"}}, {"seed": -1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(good | change, schema)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_is_valid_and_editors_are_told_so(path):
    recipe = Recipe.from_yaml(path)
    assert len(set(recipe.arms)) > 3
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    jsonschema.validate(yaml.safe_load(text), json.loads((FOLDER / "recipe.schema.json").read_text()))


@pytest.mark.parametrize(
    ("name", "layers"), [("gemma-3-4b-it", 34), ("llama-3.1-8b", 32), ("qwen3-1.7b", 28)], ids=lambda value: str(value)
)
def test_saes_are_a_release_of_sae_lens_with_one_for_each_layer(name, layers, monkeypatch):
    recipe = Recipe.from_yaml(FOLDER / f"{name}.yaml")
    release = sources._releases()[recipe.saes]
    assert release["model"] == recipe.base

    def fetched(repository: str, wanted: list[str]) -> Path:
        assert repository == release["repo_id"]
        found = {int(match[0]) for path in wanted for match in [re.findall(r"(?:layer_?|-L)(\d+)", path)] if match}
        assert len(wanted) == layers
        assert found == set(range(layers))
        raise LookupError

    monkeypatch.setattr(sources, "_snapshot", fetched)
    with pytest.raises(LookupError):  # as far as what would be fetched
        sources.open_saes(recipe.saes, recipe.sae_id)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_tasks_are_the_harness_own(path):
    evaluate = Recipe.from_yaml(path).evaluate
    if evaluate.include_path is None:
        for task in (*evaluate.tasks, *evaluate.control_tasks):
            known = [*(TASKS / task).glob("**/*.yaml"), *(TASKS / "benchmarks").glob(f"{task}.yaml")]
            assert any(re.search(rf"^(?:task|group): {task}$", p.read_text(), re.M) for p in known), task


def test_the_recipe_for_an_own_model_runs(
    tmp_path: Path, llama: Callable, tokenizer: object, capsys: pytest.CaptureFixture[str]
):
    """Beside tiny models: as the file says, but for the names of its data."""
    world = make_world(tmp_path, llama(layers=4), tokenizer)
    names = {"target": "math", "control": "code"}
    names |= {"calibration-target": "calibration-math", "calibration-control": "calibration-general"}
    for name, made in names.items():
        shutil.copy(world / "data" / f"{made}.jsonl", world / "data" / f"{name}.jsonl")
    task = {"task": "my_task", "dataset_path": "json", "test_split": "test", "output_type": "generate_until",
            "dataset_kwargs": {"data_files": {"test": str(world / "tasks/sums.jsonl")}},
            "doc_to_text": "{{problem}}=", "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}  # fmt: skip
    (world / "tasks/my_task.yaml").write_text(yaml.safe_dump(task))
    recipe = shutil.copy(FOLDER / "own-model.yaml", world)
    main(["check", str(recipe), "--out", str(world / "run")])
    assert "can be run" in capsys.readouterr().out
    main(["calibrate", str(recipe), "--out", str(world / "run"), "--json"])
    assert json.loads(capsys.readouterr().out)["budget"] == 0.01
