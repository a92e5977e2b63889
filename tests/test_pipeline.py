"""The main job on small real models: every artefact, resumption, identical second runs, and wrong input named early."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from sae_lens import StandardSAE, StandardSAEConfig
from transformers import AutoModelForCausalLM, PreTrainedModel

from stethoscope.artifacts import sha256_file
from stethoscope.check import check_recipe, check_run
from stethoscope.checkpoints.open import open_checkpoint
from stethoscope.cli import main
from stethoscope.errors import RecipeError, StethoscopeError
from stethoscope.evaluation.contamination import Seen
from stethoscope.evaluation.text_loss import TextDivergence, TextLoss, document_costs
from stethoscope.recipe import OTHERS, SCALPEL_ARMS, Recipe
from stethoscope.results.calibration import Calibration
from stethoscope.results.comparison import Claim, Comparison
from stethoscope.results.comparison_tables import accuracy_table
from stethoscope.results.diagnosis import Diagnosis
from stethoscope.results.edits import Edits
from stethoscope.results.geometry import Geometry
from stethoscope.results.selection import Selection
from stethoscope.results.validation import ScoreValidation
from stethoscope.run import run_recipe
from stethoscope.selection.arms import CONTROL_ARMS, plan_arms

LAYERS = 4
HIDDEN = 32


class Recorder:
    """A reporter that keeps what it was told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.inside = False

    @contextmanager
    def stage(self, title: str) -> Iterator[Callable[[int, int], None]]:
        assert not self.inside, f"`{title}` inside `{self.stages[-1]}`: a terminal shows one bar at a time"
        self.stages.append(title)
        self.inside = True
        try:
            yield lambda _done, _total: None
        finally:
            self.inside = False

    def note(self, text: str) -> None:
        self.stages.append(text)


def write_saes(folder: Path, d: int) -> None:
    for layer in range(LAYERS):
        sae = StandardSAE(StandardSAEConfig(d_in=d, d_sae=2 * d, apply_b_dec_to_input=False))
        identity = torch.eye(d)
        sae.W_enc.data = torch.cat([identity, -identity], dim=1)
        sae.W_dec.data = torch.cat([identity, -identity], dim=0)
        sae.cfg.metadata.hook_name = f"model.layers.{layer}"
        sae.save_model(folder / f"layer_{layer}")


def write_texts(path: Path, words: str) -> None:
    rows = [{"text": words * (2 + i % 3) + f"{path.stem} {i}"} for i in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_task(folder: Path, name: str, operator: str) -> None:
    rows = [{"problem": f"{a}{operator}{b}", "answer": str(a + b)} for a in range(2, 6) for b in range(1, 4)]
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{problem}}=",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


@pytest.fixture(scope="module")
def world(tmp_path_factory, llama, tokenizer) -> Path:
    """A folder with a base, a LoRA sibling, SAEs, texts, tasks and a recipe over them."""
    folder = tmp_path_factory.mktemp("world")
    base = llama(layers=LAYERS, hidden=HIDDEN).to(torch.bfloat16)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "base"),
        LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False),
    )
    adapted.save_pretrained(folder / "adapter")
    write_saes(folder / "saes", HIDDEN)
    for name, words in {"target": "12+34=46 ", "control": "the cat sat on the mat ", "general": "a quiet day "}.items():
        write_texts(folder / f"{name}.jsonl", words)
    (folder / "tasks").mkdir()
    write_task(folder / "tasks", "tiny_sum", "+")
    write_task(folder / "tasks", "tiny_and", " and ")
    recipe = {
        "base": "base",
        "tuned": "adapter",
        "saes": "saes",
        "target": {"dataset": "target.jsonl"},
        "control": {"dataset": "control.jsonl"},
        "diagnose": {"block_size": 4},
        "select": {"policy": "top_k", "k": 2},
        "evaluate": {
            "tasks": ["tiny_sum"],
            "control_tasks": ["tiny_and"],
            "include_path": "tasks",
            "control": {"dataset": "general.jsonl"},
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def finished(world) -> Path:
    run_recipe(Recipe.from_yaml(world / "recipe.yaml"), world / "run", reporter=Recorder())
    return world / "run"


def changed(world: Path, folder: Path, **changes: object) -> Path:
    """The world's recipe with some keys changed, written elsewhere with absolute paths."""
    value = yaml.safe_load((world / "recipe.yaml").read_text())
    value |= {name: str(world / value[name]) for name in ("base", "tuned", "saes")}
    for name in ("target", "control"):
        value[name] = {"dataset": str(world / value[name]["dataset"])}
    value["evaluate"] |= {"include_path": str(world / "tasks"), "control": {"dataset": str(world / "general.jsonl")}}
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(value | changes))
    return path


def test_every_artefact_is_written(finished):
    names = {path.name for path in finished.iterdir()}
    assert {
        "recipe.yaml", "diagnosis.json", "statistics.safetensors", "selection.json", "edits.json", "edited",
        "outcomes.parquet", "comparison.json", "report.html",
    } <= names  # fmt: skip
    comparison = Comparison.load(finished / "comparison.json")
    arms = {row["arm"] for row in comparison.accuracy}
    assert arms == {"base", "tuned", "selected", "random_layers_1", "random_layers_2", "scaled", "projected"}
    assert comparison.family == ["tiny_sum"]
    assert comparison.contrast("tuned").loss is not None
    assert comparison.contrast("tuned").divergence.difference > 0


def test_edited_checkpoint_is_base_outside_and_tuned_inside_the_selection(world, finished):
    selection = Selection.load(finished)
    assert len(selection.layers) == 2
    base, edited = open_checkpoint(world / "base"), open_checkpoint(finished / "edited")
    merged = get_merged(world)
    inside = 0
    for name, entry in base.entries.items():
        if entry.layer in selection.layers and entry.kind in ("attention", "mlp"):
            inside += 1
            assert not torch.equal(edited.read(name), base.read(name))
            torch.testing.assert_close(edited.read(name), merged[f"model.{name}"].to(torch.bfloat16), rtol=0, atol=0)
        else:
            assert edited.read_bytes(name) == base.read_bytes(name)
    assert inside == 14
    model = AutoModelForCausalLM.from_pretrained(finished / "edited")
    assert model.generate(torch.tensor([[1, 50, 60]]), max_new_tokens=3, do_sample=False).shape == (1, 6)


def get_merged(world: Path) -> dict[str, torch.Tensor]:
    """PEFT's own merge, in float32."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)
    return PeftModel.from_pretrained(model, world / "adapter").merge_and_unload().state_dict()


def test_projection_energy_is_reported_beside_chance(finished):
    edits, geometry = Edits.load(finished), Geometry.load(finished)
    assert sum(layer.share for layer in edits.energy) == pytest.approx(1)
    assert [layer.layer for layer in geometry.layers] == list(range(LAYERS))
    for layer in geometry.layers:
        assert layer.kept.chance == pytest.approx(1 / HIDDEN)  # 3 % of 32 directions is 1
        assert 0 < layer.kept.share < 1
        assert layer.curve.share[-1] == pytest.approx(1)  # these features span everything
        assert set(layer.functional) == {"target", "control"}


def test_every_arm_that_cuts_is_an_ordinary_arm(world, tmp_path):
    arms = ["base", "selected", *SCALPEL_ARMS]
    rows = [{"prompt": f"{i}+1=", "text": f"{i + 1} as it happens"} for i in range(50, 74)]
    (tmp_path / "fresh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = changed(world, tmp_path, arms=arms, project={"features": 3, "draws": 20, "tokens": 64})
    recipe = yaml.safe_load(path.read_text())
    recipe["evaluate"] |= {"target": {"dataset": "fresh.jsonl", "prompt": "prompt"}, "control_tasks": [], "limit": 4}
    path.write_text(yaml.safe_dump(recipe))
    result = run_recipe(Recipe.from_yaml(path), tmp_path / "run", reporter=Recorder())
    comparison = result.comparison
    assert {row["arm"] for row in comparison.accuracy} == set(arms)
    plans = Edits.load(tmp_path / "run").plans
    assert set(plans["hybrid"]["layers"]) == {str(layer) for layer in range(LAYERS)}
    for arm in set(SCALPEL_ARMS) - {"hybrid"}:
        assert set(plans[arm]["layers"]) == {str(layer) for layer in result.selection.layers}, arm
    assert comparison.contrast("projected_energy_matched", "projected").target_loss.n == 24
    assert len({comparison.contrast(arm).target_loss.difference for arm in ("selected", *SCALPEL_ARMS)}) == 8
    losses = TextLoss.load(tmp_path / "run" / "losses" / "held-out-target" / "base")
    assert set(losses.tokens) == {len("52 as it happens")}  # a character is a token
    fewer = Recipe.from_yaml(path, ["validation.documents=24", "validation.random_sets=10"])
    heard = run_recipe(fewer, tmp_path / "run", until="validate", reporter=Recorder()).results["validate"]
    chosen = heard.scores["mass_shift"].sets[2].effect  # the truth is measured as the arm's loss is
    assert chosen.layers == tuple(result.selection.layers)
    assert chosen.target_gain == pytest.approx(-comparison.contrast("selected").target_loss.difference, rel=1e-3)
    assert "loss on held-out target text" in {row[0] for row in accuracy_table(comparison)}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Is what was thrown away what worked?" in page
    assert Geometry.load(tmp_path / "run").layers[0].features == 3


def test_controls_put_as_much_change_elsewhere_or_everywhere(world, tmp_path):
    arms = ["base", "selected", *CONTROL_ARMS]
    path = changed(world, tmp_path, arms=arms)
    recipe = yaml.safe_load(path.read_text())
    recipe["evaluate"] |= {"control_tasks": [], "limit": 2}
    path.write_text(yaml.safe_dump(recipe))
    result = run_recipe(Recipe.from_yaml(path), tmp_path / "run", reporter=Recorder())
    edits, chosen = Edits.load(tmp_path / "run"), set(result.selection.layers)
    energy = {layer.layer: layer.energy for layer in edits.energy}
    plans = {arm: plan for arm, plan in edits.plans.items() if plan}
    layers = {arm: {int(layer) for layer in plan["layers"]} for arm, plan in plans.items()}
    assert layers["scaled"] == set(range(LAYERS))
    (coefficient,) = {value for parts in plans["scaled"]["layers"].values() for value in parts.values()}
    assert coefficient**2 * sum(energy.values()) == pytest.approx(sum(energy[layer] for layer in chosen))
    assert layers["norm_ranked"] == set(sorted(energy, key=lambda layer: -energy[layer])[:2])
    excess = {layer.layer: layer.excess for layer in Diagnosis.load(tmp_path / "run").layers}
    assert layers["bottom_layers"] == set(sorted(excess, key=lambda layer: excess[layer])[:2])
    wanted = sum(energy[layer] for layer in chosen)
    others = [set(pair) for pair in combinations(range(LAYERS), 2) if set(pair) != chosen]
    assert layers["random_matched"] == min(others, key=lambda pair: abs(sum(energy[n] for n in pair) - wanted))


def test_arms_that_make_no_sense_where_every_layer_is_selected_are_left_out(world, tmp_path):
    arms = ["base", "tuned", "selected", "projected", *OTHERS]
    path = changed(world, tmp_path, arms=arms, select={"policy": "threshold", "z": -1000.0})
    recipe = yaml.safe_load(path.read_text())
    recipe["evaluate"] |= {"control_tasks": [], "limit": 2}
    path.write_text(yaml.safe_dump(recipe))
    assert not check_recipe(Recipe.from_yaml(path), tmp_path / "run").notes
    reporter = Recorder()
    result = run_recipe(Recipe.from_yaml(path), tmp_path / "run", reporter=reporter)
    assert result.selection.layers == tuple(range(LAYERS))
    assert set(Edits.load(tmp_path / "run").plans) == {"base", "tuned", "selected", "projected"}
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    for arm in OTHERS:
        assert any(f"`{arm}` is left out" in note for note in reporter.stages), arm
        assert f"<code>{arm}</code> is left out" in page
    everything = changed(world, tmp_path, arms=arms, select={"policy": "top_k", "k": LAYERS})
    (note,) = check_recipe(Recipe.from_yaml(everything), tmp_path / "run").notes
    assert all(f"`{arm}`" in note for arm in OTHERS)
    for layer in range(LAYERS - 1):
        shutil.copytree(world / f"saes/layer_{layer}", tmp_path / f"saes/layer_{layer}")
    chosen = {"policy": "top_k", "k": LAYERS - 1}
    heard = changed(world, tmp_path, arms=arms, select=chosen, saes=str(tmp_path / "saes"))
    (note,) = check_recipe(Recipe.from_yaml(heard), tmp_path / "run").notes
    assert [f"`{arm}`" in note for arm in OTHERS] == [arm in ("bottom_layers", "hybrid") for arm in OTHERS]


def test_geometry_can_be_measured_by_itself(world, tmp_path):
    path = changed(world, tmp_path, arms=["base", "selected"], project={"draws": 20})
    made = run_recipe(Recipe.from_yaml(path), tmp_path / "run", until="geometry")
    assert Geometry.load(tmp_path / "run") == made.results["geometry"]
    reporter = Recorder()
    run_recipe(Recipe.from_yaml(path), tmp_path / "other", reporter=reporter)
    assert not (tmp_path / "other" / "geometry.json").exists()  # no arm cuts
    assert not any("Geometry" in stage for stage in reporter.stages)


def test_saes_that_read_heads_cannot_be_projected_onto(world, tmp_path):
    for layer in range(LAYERS):
        sae = StandardSAE(StandardSAEConfig(d_in=HIDDEN, d_sae=2 * HIDDEN, apply_b_dec_to_input=False))
        sae.cfg.metadata.hook_name = f"blocks.{layer}.attn.hook_z"
        sae.save_model(tmp_path / "saes" / f"layer_{layer}")
    path = changed(world, tmp_path, saes=str(tmp_path / "saes"), arms=["base", "selected", "projected", "complement"])
    with pytest.raises(RecipeError, match="leave out `projected`, `complement` of `arms`"):
        check_run(Recipe.from_yaml(path), tmp_path / "run")


def test_held_out_target_text_is_new(world, tmp_path):
    path = changed(world, tmp_path)
    recipe = yaml.safe_load(path.read_text())
    recipe["evaluate"]["target"] = recipe["target"]
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match="held-out target text"):
        check_run(Recipe.from_yaml(path), tmp_path / "run")


def test_a_second_run_is_identical(world, finished, tmp_path):
    run_recipe(Recipe.from_yaml(world / "recipe.yaml"), tmp_path / "again", reporter=Recorder())
    files = sorted(path.relative_to(finished) for path in finished.rglob("*") if path.is_file())
    same = {str(f) for f in files if sha256_file(finished / f) == sha256_file(tmp_path / "again" / f)}
    assert {str(f) for f in files if f.parts[0] == "edited"} <= same
    assert {"diagnosis.json", "statistics.safetensors", "evidence.json", "selection.json", "edits.json"} <= same
    assert "comparison.json" in same


def test_a_finished_stage_is_not_run_again(world, finished, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    assert finished / "bases.safetensors" in before
    idle = {
        "context": ("load_model", "tokenize"),
        "diagnosis.listen": ("listen",),
        "diagnosis.evidence": ("gather_evidence",),
        "editing.writer": ("write_edit",),
        "evaluation.text_loss": ("document_costs",),
        "saes.open": ("load_sae",),
        "selection.arms": ("plan_arms",),
        "artifacts": ("sha256_file",),
        "evaluation.run": ("weights_hash", "SharedPrefixLM"),
        "editing.apply": ("prepare",),
        "checkpoints.task_vector.TaskVector": ("energy", "delta", "edited"),
    }
    for where, names in idle.items():
        for name in names:
            monkeypatch.setattr(f"stethoscope.{where}.{name}", None)  # would fail if called
    run_recipe(Recipe.from_yaml(world / "recipe.yaml"), finished, reporter=Recorder())
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}


def test_plans_follow_the_recipe_and_what_they_cut_along_is_whole(world, finished, tmp_path, monkeypatch):
    copy = shutil.copytree(finished, tmp_path / "run")
    planned = []

    def counted(recipe: Recipe, *args: object, **options: object) -> object:
        planned.append(recipe.arms)
        return plan_arms(recipe, *args, **options)

    monkeypatch.setattr("stethoscope.selection.arms.plan_arms", counted)
    (copy / "bases.safetensors").write_bytes((copy / "bases.safetensors").read_bytes()[:-1])  # cut short
    run_recipe(Recipe.from_yaml(world / "recipe.yaml"), copy, reporter=Recorder())
    assert len(planned) == 1
    assert Edits.load(copy) == Edits.load(finished)
    assert sha256_file(copy / "bases.safetensors") == sha256_file(finished / "bases.safetensors")
    path = changed(world, tmp_path, arms=["base", "selected", "projected"], edit={"coefficient": 0.5})
    for _ in range(2):
        run_recipe(Recipe.from_yaml(path), copy)
    assert len(planned) == 2
    plans = Edits.load(copy).plans
    assert set(plans) == {"base", "selected", "projected"}
    assert {c for kinds in plans["selected"]["layers"].values() for c in kinds.values()} == {0.5}


def test_an_edit_that_another_recipe_left_behind_is_written_again(world, finished, tmp_path, monkeypatch):
    copy = shutil.copytree(finished, tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr("stethoscope.selection.arms.save_plans", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(Recipe.from_yaml(changed(world, tmp_path, edit={"coefficient": 0.5})), copy)
    weights = "edited/model.safetensors"
    assert sha256_file(copy / weights) != sha256_file(finished / weights)
    run_recipe(Recipe.from_yaml(world / "recipe.yaml"), copy)
    assert sha256_file(copy / weights) == sha256_file(finished / weights)


def test_an_arm_whose_costs_are_known_is_not_run_again(world, finished, tmp_path, monkeypatch):
    copy = shutil.copytree(finished, tmp_path / "run")
    (copy / "losses/general/tuned/divergence.json").unlink()
    asked = []

    def counted(model: PreTrainedModel, arms: dict, *args: object, **options: object) -> object:
        asked.append(list(arms))
        return document_costs(model, arms, *args, **options)

    monkeypatch.setattr("stethoscope.evaluation.text_loss.document_costs", counted)
    run_recipe(Recipe.from_yaml(world / "recipe.yaml"), copy, reporter=Recorder())
    assert asked == [["tuned"]]
    for kind in (TextLoss, TextDivergence):
        assert kind.load(copy / "losses/general/tuned") == kind.load(finished / "losses/general/tuned")
    assert sha256_file(copy / "comparison.json") == sha256_file(finished / "comparison.json")


def test_a_run_interrupted_in_the_evaluation_goes_on(world, tmp_path, monkeypatch):
    recipe = Recipe.from_yaml(world / "recipe.yaml")
    with monkeypatch.context() as patched:
        patched.setattr("stethoscope.evaluation.comparison.compare", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe, tmp_path / "run", reporter=Recorder())
    assert not (tmp_path / "run/report.html").exists()
    with monkeypatch.context() as patched:
        patched.setattr("stethoscope.diagnosis.listen.listen", None)
        result = run_recipe(recipe, tmp_path / "run", reporter=Recorder())
    assert result.report.exists()


def interrupt(*_args: object, **_options: object) -> None:
    raise KeyboardInterrupt


def test_another_target_runs_the_diagnosis_again(world, finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "run")
    write_texts(world / "other.jsonl", "something else entirely ")
    path = changed(world, tmp_path, target={"dataset": str(world / "other.jsonl")})
    run_recipe(Recipe.from_yaml(path), copy, reporter=Recorder())
    assert Diagnosis.load(copy).provenance.inputs["target"] != Diagnosis.load(finished).provenance.inputs["target"]


def test_everything_wrong_is_said_before_any_work(world, tmp_path, llama):
    write_saes(tmp_path / "saes", 16)
    llama(layers=LAYERS, hidden=64).save_pretrained(tmp_path / "other")
    path = changed(
        world,
        tmp_path,
        saes=str(tmp_path / "saes"),
        tuned=str(tmp_path / "other"),
        target={"dataset": "nowhere.jsonl"},
        control={"dataset": str(world / "control.jsonl"), "field": "body"},
    )
    with pytest.raises(RecipeError) as error:
        check_run(Recipe.from_yaml(path), tmp_path / "run")
    shown = str(error.value)
    assert "nowhere.jsonl" in shown
    assert "no text in field `body`" in shown
    assert "hidden size" in shown
    assert "layers.0.self_attn.q_proj.weight" in shown


def test_an_adapter_for_another_model_is_refused(world, tmp_path, llama):
    other = get_peft_model(llama(layers=6, hidden=64), LoraConfig(r=2, target_modules=["q_proj"]))
    other.save_pretrained(tmp_path / "adapter")
    with pytest.raises(RecipeError) as error:
        check_run(Recipe.from_yaml(changed(world, tmp_path, tuned=str(tmp_path / "adapter"))), tmp_path / "run")
    assert "q_proj" in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_a_gpu_that_is_not_there_is_said_before_any_work(world, tmp_path, capsys):
    path = changed(world, tmp_path, device="cuda", select={"k": 9})
    with pytest.raises(RecipeError) as error:
        check_run(Recipe.from_yaml(path), tmp_path / "run")
    assert "no device `cuda` here" in str(error.value)
    assert "select.k is `9`" in str(error.value)
    options = ["--out", str(tmp_path / "run"), "--device", "cuda:1"]
    checkpoint = str(world / "base")
    for command in (
        *(["run"], ["run", "--dry-run"], ["diagnose"], ["calibrate"], ["validate"]),
        ["evaluate", "--model", checkpoint, "--tasks", "tiny_sum"],
    ):
        recipe = [] if command[0] == "evaluate" else [str(world / "recipe.yaml")]
        with pytest.raises(SystemExit) as stopped:
            main([*command, *recipe, *options])
        assert stopped.value.code == 2
        assert "no device `cuda:1` here" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_unknown_task_and_too_many_layers_are_named(world, tmp_path):
    evaluate = {"tasks": ["tiny_summ"], "include_path": str(world / "tasks")}
    path = changed(world, tmp_path, evaluate=evaluate, select={"k": 9})
    with pytest.raises(RecipeError) as error:
        check_run(Recipe.from_yaml(path), tmp_path / "run")
    assert "tiny_summ" in str(error.value)
    assert "select.k is `9`" in str(error.value)


def test_items_that_the_choice_has_seen_are_refused_by_name_or_said(world, tmp_path):
    """Item 7 of the task, `4 and 2`, stands in the control text; so does a general document."""
    rows = [{"text": f"{i} Q: 4 and 2=6 and so on"} for i in range(24)]
    (tmp_path / "control.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "general.jsonl").write_text(json.dumps({"text": "Q: 4 and 2=6 and so on"}) + "\n")
    task = yaml.safe_load((world / "tasks/tiny_and.yaml").read_text()) | {"doc_to_text": "Q: {{problem}}="}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/tiny_and.yaml").write_text(yaml.safe_dump(task))
    evaluate = {
        "tasks": ["tiny_and"], "include_path": str(tmp_path / "tasks"),
        "control": {"dataset": str(tmp_path / "general.jsonl")},
    }  # fmt: skip
    control = {"dataset": str(tmp_path / "control.jsonl")}
    path = changed(world, tmp_path, control=control, evaluate=evaluate)
    with pytest.raises(RecipeError) as error:
        check_run(Recipe.from_yaml(path), tmp_path / "run")
    assert "`general text`: item 0" in str(error.value)
    assert "evaluate.exploratory: true" in str(error.value)
    path = changed(world, tmp_path, control=control, evaluate=evaluate | {"exploratory": True})
    run_recipe(Recipe.from_yaml(path), tmp_path / "run", reporter=Recorder())
    claim = Claim.load(tmp_path / "run")
    assert claim.kind == "exploratory"
    assert claim.seen_items == {"general text": (0,)}


def test_a_claim_on_unseen_items_is_confirmatory(finished):
    claim = Claim.load(finished)
    assert claim.kind == "confirmatory"
    assert set(claim.seen_texts) == {"target", "control"}
    assert Seen.load(finished).holds("the cat sat on the mat the cat sat on the mat")


def test_layers_and_coefficients_by_calibration(world, tmp_path, capsys):
    texts = {side: {"dataset": str(tmp_path / f"{side}.jsonl")} for side in ("target", "control")}
    write_texts(tmp_path / "target.jsonl", "56+11=67 ")
    write_texts(tmp_path / "control.jsonl", "a dog lay on a rug ")
    options = {"calibrate": texts | {"budget": 0.5, "coefficients": [0.5, 1.0]}, "select": {"policy": "calibrated"}}
    path = changed(world, tmp_path, **options)
    main(["calibrate", str(path), "--out", str(tmp_path / "run"), "--json"])
    found = json.loads(capsys.readouterr().out)
    calibration = Calibration.load(tmp_path / "run")
    assert found["choice"] == calibration.choice
    assert set(calibration.seen) == {"target", "control"}
    if calibration.coefficients:  # random weights may be worth nothing, which is a result
        run_recipe(Recipe.from_yaml(path), tmp_path / "run", reporter=Recorder())
        selection = Selection.load(tmp_path / "run")
        assert selection.coefficients == calibration.coefficients
        plan = Edits.load(tmp_path / "run").plans["selected"]
        assert {int(k): v for k, v in plan["layers"].items()} == calibration.coefficients
    else:
        with pytest.raises(StethoscopeError, match="chooses no edit"):
            run_recipe(Recipe.from_yaml(path), tmp_path / "run", reporter=Recorder())
    with pytest.raises(RecipeError, match="needs a section `calibrate`"):
        Recipe.from_yaml(changed(world, tmp_path, select={"policy": "calibrated"}))


def test_layers_by_what_their_edit_is_worth(world, tmp_path):
    path = changed(world, tmp_path, score="attribution", controls={"other": {"dataset": str(tmp_path / "other.jsonl")}})
    write_texts(tmp_path / "other.jsonl", "a dog lay on a rug ")
    run_recipe(Recipe.from_yaml(path), tmp_path / "run", reporter=Recorder())
    diagnosis = Diagnosis.load(tmp_path / "run")
    assert diagnosis.score == "attribution"
    assert set(diagnosis.corpora) == {"target", "control", "other"}
    assert all(layer.score >= 0 for layer in diagnosis.layers)
    assert (tmp_path / "run/report.html").exists()


def test_scores_are_validated_from_the_command_line(world, finished, capsys):
    options = ["--out", str(finished), "--set", "validation.documents=4", "--set", "validation.random_sets=10"]
    main(["validate", str(world / "recipe.yaml"), *options])
    shown = capsys.readouterr().out
    assert "`mass_shift`" in shown
    assert "gradient" in shown
    found = ScoreValidation.load(finished / "validation/control")
    assert {"injection", "attribution", "mass_shift increment"} <= set(found.scores)
    with pytest.raises(SystemExit):
        main(["validate", str(world / "recipe.yaml"), *options, "--set", "validation.control=other"])
    assert "no control `other`" in capsys.readouterr().err
    assert "Do the scores find the layers that matter?" in (finished / "report.html").read_text(encoding="utf-8")
    (finished / "report.html").unlink()
    main(["report", str(finished)])
    assert (finished / "report.html").exists()
    capsys.readouterr()
    main(["validate", str(world / "recipe.yaml"), *options, "--json"])  # done already
    assert json.loads(capsys.readouterr().out)["forwards"] == found.forwards


def test_command_line_prints_json_and_a_short_error(world, finished, tmp_path, capsys):
    main(["run", str(world / "recipe.yaml"), "--out", str(finished), "--json"])
    shown = capsys.readouterr()
    assert json.loads(shown.out)["selection"] == list(Selection.load(finished).layers)
    (tmp_path / "bad.yaml").write_text((world / "recipe.yaml").read_text().replace("control:", "contrl:", 1))
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(tmp_path / "bad.yaml")])
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "did you mean `control`?" in shown.err
    assert "Traceback" not in shown.err


@pytest.mark.parametrize("command", [["check"], ["run", "--dry-run"]])
def test_check_reads_headers_only_and_says_what_the_edit_will_take(world, tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr("stethoscope.context.load_model", None)
    main([*command, str(world / "recipe.yaml"), "--out", str(tmp_path / "run")])
    shown = capsys.readouterr().out
    assert "4 layers of width 32" in shown
    assert "changes 14 tensors" in shown
    assert not (tmp_path / "run").exists()


def test_check_names_texts_that_no_layer_can_be_judged_on(world, tmp_path):
    chats = [{"messages": [{"role": "user", "content": f"question {i}"}]} for i in range(24)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    target = {"dataset": str(tmp_path / "chats.jsonl"), "field": "messages"}
    path = changed(world, tmp_path, target=target, diagnose={"block_size": 8})
    with pytest.raises(RecipeError) as error:
        check_recipe(Recipe.from_yaml(path), tmp_path / "run")
    assert "no chat template, so the target text cannot be rendered" in str(error.value)
    assert "the 24 documents of the control text are 3 blocks of up to 8" in str(error.value)
    assert "set `diagnose.block_size` to 6 or less" in str(error.value)


def test_check_names_an_output_that_cannot_be_written(world, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="is a file"):
        check_run(Recipe.from_yaml(world / "recipe.yaml"), tmp_path / "file" / "run")


def test_edit_undo_and_verify_from_the_command_line(world, tmp_path, capsys):
    options = ["--base", str(world / "base"), "--tuned", str(world / "adapter"), "--layers", "1,2-3"]
    main(["edit", *options, "--out", str(tmp_path / "edited"), "--dry-run", "--json"])
    assert json.loads(capsys.readouterr().out)["tensors"] == 21
    assert not (tmp_path / "edited").exists()
    main(["edit", *options, "--out", str(tmp_path / "edited")])
    main(["edit", *options, "--out", str(tmp_path / "patch"), "--kind", "patch"])
    main(["verify", str(tmp_path / "edited"), "--base", str(world / "base")])
    assert "17 of them are the base's" in capsys.readouterr().out
    main(["undo", str(tmp_path / "patch"), "--edited", str(tmp_path / "edited"), "--out", str(tmp_path / "undone")])
    main(["apply", str(tmp_path / "patch"), "--base", str(world / "base"), "--out", str(tmp_path / "applied")])
    weights = "model.safetensors"
    assert sha256_file(tmp_path / "undone" / weights) == sha256_file(world / "base" / weights)
    assert sha256_file(tmp_path / "applied" / weights) == sha256_file(tmp_path / "edited" / weights)
    damaged = bytearray((tmp_path / "edited" / weights).read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "edited" / weights).write_bytes(damaged)
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(tmp_path / "edited")])
    assert stopped.value.code == 2
    assert "is not what its manifest says" in capsys.readouterr().err


@pytest.mark.parametrize("layers", ["x", "3-", "1,,2", "9"])
def test_layers_that_are_none_are_refused(world, tmp_path, capsys, layers):
    options = ["--base", str(world / "base"), "--tuned", str(world / "adapter"), "--layers", layers]
    with pytest.raises(SystemExit) as stopped:
        main(["edit", *options, "--out", str(tmp_path / "edited")])
    assert stopped.value.code == 2
    assert not (tmp_path / "edited").exists()
    assert "layer" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["run"], ["run", "x.yaml", "--frobnicate"], ["sing"]])
def test_bad_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err
