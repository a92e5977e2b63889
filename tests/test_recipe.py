"""Recipes: paths relative to the file, and every mistake at once."""

from pathlib import Path

import pytest

from stethoscope.errors import RecipeError
from stethoscope.recipe import Recipe

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
        (None, "recipe.yaml"),
    ],
)
def test_other_mistakes(tmp_path, text, message):
    path = written(tmp_path, text) if text else tmp_path / "recipe.yaml"
    with pytest.raises(RecipeError) as error:
        Recipe.from_yaml(path)
    assert message in str(error.value)
