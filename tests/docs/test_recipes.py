"""The recipes in recipes/: valid by themselves and by the schema, and every name in them is one that exists."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import jsonschema
import lm_eval.tasks
import pytest
import torch
import transformers
import yaml
from pages import ROOT, blocks
from safetensors.torch import save_file
from world import BYTES, GEMMA, make_world, save_adapter, stir, stored, write_lines, write_task

from stethoscope.cli import main
from stethoscope.models.load import load_model
from stethoscope.recipe import Recipe
from stethoscope.saes import open as opening
from stethoscope.saes import releases
from stethoscope.saes.open import open_saes

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
def test_a_recipe_is_valid_its_tasks_are_there_and_editors_are_told_so(path, tmp_path, monkeypatch, capsys):
    recipe = Recipe.from_yaml(path)
    assert len(set(recipe.arms)) > 3
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    jsonschema.validate(yaml.safe_load(text), json.loads((FOLDER / "recipe.schema.json").read_text()))
    monkeypatch.chdir(tmp_path)
    main(["check", "--offline", str(path)])
    assert "no mistake in its form" in capsys.readouterr().out
    evaluate = recipe.evaluate
    if evaluate.include_path is None:  # the harness' own
        for task in (*evaluate.tasks, *evaluate.control_tasks):
            known = [*(TASKS / task).glob("**/*.yaml"), *(TASKS / "benchmarks").glob(f"{task}.yaml")]
            assert any(re.search(rf"^(?:task|group): {task}$", p.read_text(), re.M) for p in known), task


@pytest.mark.parametrize(
    ("name", "layers"), [("gemma-3-4b-it", 34), ("llama-3.1-8b", 32), ("qwen3-1.7b", 28)], ids=lambda value: str(value)
)
def test_saes_are_a_release_of_sae_lens_with_one_for_each_layer(name, layers, monkeypatch):
    recipe = Recipe.from_yaml(FOLDER / f"{name}.yaml")
    release = releases.read_release(recipe.saes)
    assert release["model"] == recipe.base

    def fetched(repository: str, wanted: list[str]) -> Path:
        assert repository == release["repo_id"]
        found = {int(match[0]) for path in wanted for match in [re.findall(r"(?:layer_?|-L)(\d+)", path)] if match}
        assert len(wanted) == layers
        assert found == set(range(layers))
        raise LookupError

    monkeypatch.setattr(opening, "fetch", fetched)
    with pytest.raises(LookupError):  # as far as what would be fetched
        open_saes(recipe.saes, recipe.sae_id)


def test_the_recipe_for_an_own_model_runs_where_its_names_are_folders(tmp_path, tokenizer, capsys):
    world = make_world(tmp_path, tokenizer)
    task = yaml.safe_load(
        next(block.text for block in blocks(ROOT / "docs/quickstart.md") if "task: my_" in block.text)
    )
    task["dataset_kwargs"]["data_files"]["test"] = str(world / "tasks/tiny_sum.test.jsonl")
    (world / "tasks/my_task.yaml").write_text(yaml.safe_dump(task))
    recipe = yaml.safe_load((FOLDER / "own-model.yaml").read_text())
    recipe |= {"base": "./base", "tuned": "./tuned", "saes": "./saes", "diagnose": {"block_size": 4}}
    recipe |= {side: {"dataset": f"data/{name}.jsonl"} for side, name in (("target", "math"), ("control", "general"))}
    for side, name in (("target", "math"), ("control", "general")):
        recipe["calibrate"][side] = {"dataset": f"data/calibration-{name}.jsonl"}
    recipe["evaluate"] |= {"tasks": ["my_task"], "include_path": "tasks", "control": {"dataset": "data/other.jsonl"}}
    path = world / "own.yaml"
    path.write_text(yaml.safe_dump(recipe))
    for options in (["--offline"], []):
        main(["check", str(path), *options, "--out", str(world / "run")])
    assert "can be run" in capsys.readouterr().out
    main(["calibrate", str(path), "--out", str(world / "run"), "--json"])
    assert json.loads(capsys.readouterr().out)["budget"] == 0.01


def test_the_gemma_recipe_runs_on_a_tiny_gemma_up_to_its_report(tmp_path, chat_tokenizer):
    """Published names, tied head, vision tower, a window of 16 tokens, Gemma Scope 2's folders, chats with a BOS."""
    torch.manual_seed(0)
    sizes = {name: BYTES[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    config = transformers.Gemma3Config(
        text_config={**BYTES, "num_hidden_layers": 6, "head_dim": 8, "sliding_window": 16},
        vision_config={**sizes, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    model = stir(transformers.Gemma3ForConditionalGeneration(config).eval().requires_grad_(False)).to(torch.bfloat16)
    save_adapter(model, tmp_path, "tuned", r=2, target_modules=r".*language_model.*_proj")
    base = tmp_path / "base"
    chat_tokenizer(GEMMA).save_pretrained(base)
    w = torch.cat([torch.eye(32), -torch.eye(32)])
    for layer in range(6):
        folder = tmp_path / f"saes/layer_{layer}_width_16k_l0_small"
        folder.mkdir(parents=True)
        zeros = {"b_enc": torch.zeros(64), "b_dec": torch.zeros(32), "threshold": torch.zeros(64)}
        save_file({"w_enc": w.T.contiguous(), "w_dec": w, **zeros}, folder / "params.safetensors")
        about = {"architecture": "jump_relu", "hf_hook_point_in": f"model.layers.{layer}.output"}
        (folder / "config.json").write_text(json.dumps(about))
    (tmp_path / "tasks").mkdir()
    rows = [{"problem": f"{n}+1", "answer": str(n + 1)} for n in range(8)]
    write_task(tmp_path / "tasks", "tiny_sum", rows)

    def chats(name: str, words: str) -> dict[str, Any]:
        said = ({"role": "user", "content": f"{name} {n}"} for n in range(24))
        answers = ({"role": "assistant", "content": words * (2 + n % 3)} for n in range(24))
        path = write_lines(tmp_path / f"{name}.jsonl", ({"messages": pair} for pair in zip(said, answers, strict=True)))
        return {"dataset": str(path), "field": "messages"}

    recipe = yaml.safe_load((FOLDER / "gemma-3-4b-it.yaml").read_text())
    recipe |= {"base": str(base), "tuned": str(tmp_path / "tuned"), "saes": str(tmp_path / "saes")}
    recipe |= {"target": chats("target", "3+4=7 and "), "control": chats("control", "the cat sat ")}
    recipe["controls"] = {"code": chats("code", "def f(x): ")}
    recipe["select"]["k"], recipe["random_sets"], recipe["diagnose"]["block_size"] = 2, 2, 4
    recipe["evaluate"] = {"tasks": ["tiny_sum"], "include_path": str(tmp_path / "tasks")}
    recipe["evaluate"]["control"] = chats("other", "a sea ")
    path = tmp_path / "gemma.yaml"
    path.write_text(yaml.safe_dump(recipe))
    main(["run", str(path), "--out", str(tmp_path / "run")])
    assert (tmp_path / "run/report.html").exists()
    before, after = stored(base), stored(tmp_path / "run/edited")
    assert before.keys() == after.keys()
    different = {name for name in before if not torch.equal(before[name], after[name])}
    assert different
    assert all(name.startswith("language_model.model.layers.") for name in different)
    assert load_model(tmp_path / "run/edited").dtype
