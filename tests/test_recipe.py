"""Recipes: paths relative to the file, and every mistake at once."""

from pathlib import Path

import pytest

from stethoscope.errors import RecipeError
from stethoscope.recipe import INPUTS, TAKEN, Recipe
from stethoscope.stages import STAGES

GOOD = """
base: models/base
tuned: org/tuned-on-the-hub
saes: ./saes
target: {dataset: data/math.jsonl}
control: {dataset: /data/general.jsonl, field: body}
select: {policy: top_k, k: 5}
evaluate: {tasks: [arithmetic], control: {dataset: general.txt}}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_paths_are_relative_to_the_recipe(tmp_path):
    (tmp_path / "models/base").mkdir(parents=True)
    recipe = Recipe.from_yaml(written(tmp_path, GOOD))
    assert recipe.base == str(tmp_path / "models/base")
    assert recipe.tuned == "org/tuned-on-the-hub"
    assert recipe.saes == str(tmp_path / "saes")
    assert recipe.target.dataset == str(tmp_path / "data/math.jsonl")
    assert recipe.control.dataset == "/data/general.jsonl"
    assert recipe.evaluate.control is not None
    assert recipe.evaluate.control.dataset == str(tmp_path / "general.txt")
    assert Recipe.from_yaml(written(tmp_path, GOOD.replace("data/math.jsonl", "org/math:test"))).target.dataset == (
        "org/math:test"  # a dataset on the hub
    )


def test_all_mistakes_are_reported_at_once_with_the_nearest_key(tmp_path):
    text = GOOD.replace("control: {dataset: /data", "contrl: {dataset: /data").replace("k: 5", "k: 0, polcy: x")
    with pytest.raises(RecipeError) as error:
        Recipe.from_yaml(written(tmp_path, text))
    shown = str(error.value)
    assert "contrl: unknown key; did you mean `control`?" in shown
    assert "control: Field required" in shown
    assert "select.polcy: unknown key; did you mean `policy`?" in shown
    assert "select.k: Input should be greater than or equal to 1 (given: `0`)" in shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("- a", "is not a mapping"),
        (GOOD + "arms: [tuned]", "must hold `base`"),
        (GOOD + "device: gpu", "device"),
        (GOOD + "seed: 1\nseed: 2", "`seed` is given twice"),
        (GOOD.replace("top_k", "topk"), "did you mean `top_k`"),
        *((GOOD + f"controls: {{{name}: {{dataset: a.jsonl}}}}", f"cannot be called `{name}`") for name in TAKEN),
        (GOOD + "controls: {dataset: {dataset: a.jsonl, feld: body}}", "controls.dataset.feld: unknown key"),
        (GOOD + "tradeoff: {strengths: [1, -1]}", "tradeoff.strengths.1"),
        (GOOD + "calibrate: {target: {dataset: a}, control: {dataset: b}, coefficients: [0]}", "coefficients.0"),
        (None, "recipe.yaml"),
    ],
)
def test_other_mistakes(tmp_path, text, message):
    path = written(tmp_path, text) if text else tmp_path / "recipe.yaml"
    with pytest.raises(RecipeError) as error:
        Recipe.from_yaml(path)
    assert message in str(error.value)


def test_no_text_has_the_name_of_anything_else_that_decides_a_result():
    assert set(TAKEN) == {*INPUTS, *(stage.name for stage in STAGES), "settings"}


def test_changes_reach_into_sections_that_are_empty_and_no_further_than_sections(tmp_path):
    path = written(tmp_path, GOOD + "ray: null\n")
    changed = Recipe.from_yaml(path, ["ray.workers=2", "calibrate.target.dataset=a", "calibrate.control.dataset=b"])
    assert changed.ray is not None
    assert changed.ray.workers == 2
    assert changed.calibrate is not None
    for change in ("base.x=1", "base.x.y=1", "arms.0=base"):
        with pytest.raises(RecipeError):
            Recipe.from_yaml(path, [change])


def test_a_recommendation_follows_the_coefficient_of_the_edit_it_is_compared_with(tmp_path):
    (stage,) = (stage for stage in STAGES if stage.name == "recommend")
    recipes = [Recipe.from_yaml(written(tmp_path, GOOD), [f"edit.coefficient={c}"]) for c in (1, 0.5)]
    assert stage.settings(recipes[0]) != stage.settings(recipes[1])


def test_the_score_that_chooses_is_the_one_that_is_validated(tmp_path):
    path = written(tmp_path, GOOD)
    for changes, name in (
        ([], "mass_shift"),
        (["increments=true"], "mass_shift increment"),
        (["increments=true", "score=attribution"], "attribution"),
    ):
        assert Recipe.from_yaml(path, changes).scored_by == name
