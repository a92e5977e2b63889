"""The main job on small real models: every artefact, resumption, identical second runs, and wrong input named early."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import combinations
from typing import NamedTuple

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM
from world import GEMMA, changed, flip, interrupt, save_adapter, write_lines, write_saes, write_texts

from stethoscope.artifacts import sha256_file
from stethoscope.check import OTHERS, check_recipe, check_run
from stethoscope.checkpoints.checkpoint import hash_tensor
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.cli import main
from stethoscope.context import open_context
from stethoscope.editing.apply import prepare
from stethoscope.editing.plan import EditPlan
from stethoscope.errors import RecipeError, StethoscopeError
from stethoscope.estimate import estimate
from stethoscope.evaluation.contamination import Seen
from stethoscope.evaluation.text_loss import TextDivergence, TextLoss
from stethoscope.models.device import preferred_dtype
from stethoscope.recipe import SCALPEL_ARMS, Recipe
from stethoscope.results.calibration import Calibration
from stethoscope.results.comparison import Claim, Comparison
from stethoscope.results.comparison_tables import accuracy_table
from stethoscope.results.diagnosis import Diagnosis
from stethoscope.results.edits import Edits
from stethoscope.results.geometry import Geometry
from stethoscope.results.selection import Selection
from stethoscope.results.validation import ScoreValidation
from stethoscope.run import run_recipe
from stethoscope.selection.arms import CONTROL_ARMS, load_plans, plan_arms

LAYERS, HIDDEN = 4, 32
FEW = {"control_tasks": [], "limit": 2}


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


def run(path, folder, **options):
    return run_recipe(Recipe.from_yaml(path), folder, **{"reporter": Recorder(), **options})


def refusal(path, folder) -> str:
    with pytest.raises(RecipeError) as error:
        check_run(Recipe.from_yaml(path), folder)
    return str(error.value)


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def test_every_artefact_is_written(finished):
    names = {path.name for path in finished.iterdir()}
    assert {
        "recipe.yaml", "diagnosis.json", "statistics.safetensors", "peaks.safetensors", "selection.json", "edits.json",
        "edited", "outcomes.parquet", "comparison.json", "report.html",
    } <= names  # fmt: skip
    comparison = Comparison.load(finished / "comparison.json")
    arms = {row["arm"] for row in comparison.accuracy}
    assert arms == {"base", "tuned", "selected", "random_layers_1", "random_layers_2", "scaled", "projected"}
    assert comparison.family == ["tiny_sum"]
    assert comparison.contrast("tuned").loss is not None
    assert comparison.contrast("tuned").divergence.difference > 0


def test_edited_checkpoint_is_base_outside_and_tuned_inside_the_selection(world, finished):
    from peft import PeftModel

    selection = Selection.load(finished)
    assert len(selection.layers) == 2
    base, edited = open_checkpoint(world / "base"), open_checkpoint(finished / "edited")
    model = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, world / "tuned").merge_and_unload().state_dict()
    inside = 0
    for name, entry in base.entries.items():
        if entry.layer in selection.layers and entry.kind in ("attention", "mlp"):
            inside += 1
            assert not torch.equal(edited.read(name), base.read(name))
            torch.testing.assert_close(edited.read(name), merged[f"model.{name}"].to(torch.bfloat16), rtol=0, atol=0)
        else:
            assert hash_tensor(edited, edited.entries[name]) == hash_tensor(base, entry)
    assert inside == 14
    model = AutoModelForCausalLM.from_pretrained(finished / "edited")
    assert model.generate(torch.tensor([[1, 50, 60]]), max_new_tokens=3, do_sample=False).shape == (1, 6)


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
    fresh = write_lines(
        tmp_path / "fresh.jsonl", [{"prompt": f"{i}+1=", "text": f"{i + 1} as it happens"} for i in range(50, 74)]
    )
    evaluate = {"target": {"dataset": str(fresh), "prompt": "prompt"}, "control_tasks": [], "limit": 4}
    path = changed(world, tmp_path, evaluate, arms=arms, project={"features": 3, "draws": 20, "tokens": 64})
    result = run(path, tmp_path / "run")
    comparison = result.comparison
    assert {row["arm"] for row in comparison.accuracy} == set(arms)
    plans = Edits.load(tmp_path / "run").plans
    for arm in SCALPEL_ARMS:
        layers = range(LAYERS) if arm == "hybrid" else result.selection.layers
        assert set(plans[arm]["layers"]) == {str(layer) for layer in layers}, arm
    assert comparison.contrast("projected_energy_matched", "projected").target_loss.n == 24
    assert len({comparison.contrast(arm).target_loss.difference for arm in ("selected", *SCALPEL_ARMS)}) == 8
    losses = TextLoss.load(tmp_path / "run" / "losses" / "held-out-target" / "base")
    assert set(losses.tokens) == {len("52 as it happens")}  # a character is a token
    fewer = Recipe.from_yaml(path, ["validation.documents=24", "validation.random_sets=10"])
    validated = run_recipe(fewer, tmp_path / "run", until="validate").results["validate"]
    chosen = validated.scores["mass_shift"].sets[2].effect  # the truth is measured as the arm's loss is
    assert chosen.layers == tuple(result.selection.layers)
    assert chosen.target_gain == pytest.approx(-comparison.contrast("selected").target_loss.difference, rel=1e-3)
    assert "loss on held-out target text" in {row[0] for row in accuracy_table(comparison)}
    assert Geometry.load(tmp_path / "run").layers[0].features == 3


def test_controls_put_as_much_change_elsewhere_or_everywhere(world, tmp_path):
    result = run(changed(world, tmp_path, FEW, arms=["base", "selected", *CONTROL_ARMS]), tmp_path / "run")
    edits, chosen = Edits.load(tmp_path / "run"), set(result.selection.layers)
    energy = {layer.layer: layer.energy for layer in edits.energy}
    plans = {arm: plan for arm, plan in edits.plans.items() if plan}
    layers = {arm: {int(layer) for layer in plan["layers"]} for arm, plan in plans.items()}
    assert layers["scaled"] == set(range(LAYERS))
    (coefficient,) = {value for parts in plans["scaled"]["layers"].values() for value in parts.values()}
    wanted = sum(energy[layer] for layer in chosen)
    assert coefficient**2 * sum(energy.values()) == pytest.approx(wanted)
    assert layers["norm_ranked"] == set(sorted(energy, key=lambda layer: -energy[layer])[:2])
    excess = {layer.layer: layer.excess for layer in Diagnosis.load(tmp_path / "run").layers}
    assert layers["bottom_layers"] == set(sorted(excess, key=lambda layer: excess[layer])[:2])
    others = [set(pair) for pair in combinations(range(LAYERS), 2) if set(pair) != chosen]
    assert layers["random_matched"] == min(others, key=lambda pair: abs(sum(energy[n] for n in pair) - wanted))


def test_arms_that_make_no_sense_where_every_layer_is_selected_are_left_out(world, tmp_path):
    arms = ["base", "tuned", "selected", "projected", *OTHERS]
    path = changed(world, tmp_path, FEW, arms=arms, select={"policy": "threshold", "z": -1000.0})
    assert not check_recipe(Recipe.from_yaml(path), tmp_path / "run").notes
    reporter = Recorder()
    result = run(path, tmp_path / "run", reporter=reporter)
    assert result.selection.layers == tuple(range(LAYERS))
    assert set(Edits.load(tmp_path / "run").plans) == {"base", "tuned", "selected", "projected"}
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    for arm in OTHERS:
        assert any(f"`{arm}` is left out" in note for note in reporter.stages), arm
        assert f"<code>{arm}</code> is left out" in page
    everything = changed(world, tmp_path, FEW, arms=arms, select={"policy": "top_k", "k": LAYERS})
    (note,) = check_recipe(Recipe.from_yaml(everything), tmp_path / "run").notes
    assert all(f"`{arm}`" in note for arm in OTHERS)
    saes = str(write_saes(tmp_path / "saes", layers=LAYERS - 1))
    recipe = changed(world, tmp_path, arms=arms, select={"policy": "top_k", "k": LAYERS - 1}, saes=saes)
    (note,) = check_recipe(Recipe.from_yaml(recipe), tmp_path / "run").notes
    assert [f"`{arm}`" in note for arm in OTHERS] == [arm in ("bottom_layers", "hybrid") for arm in OTHERS]


def test_geometry_can_be_measured_by_itself(world, tmp_path):
    path = changed(world, tmp_path, FEW, arms=["base", "selected"], project={"draws": 20})
    made = run(path, tmp_path / "run", until="geometry")
    assert Geometry.load(tmp_path / "run") == made.results["geometry"]
    reporter = Recorder()
    run(path, tmp_path / "other", reporter=reporter)
    assert not (tmp_path / "other" / "geometry.json").exists()  # no arm cuts
    assert not any("Geometry" in stage for stage in reporter.stages)


def test_a_second_run_is_identical(world, finished, tmp_path):
    run(world / "recipe.yaml", tmp_path / "again")
    files = sorted(path.relative_to(finished) for path in finished.rglob("*") if path.is_file())
    same = {str(f) for f in files if sha256_file(finished / f) == sha256_file(tmp_path / "again" / f)}
    assert {str(f) for f in files if f.parts[0] == "edited"} <= same
    results = ("diagnosis.json", "evidence.json", "selection.json", "edits.json", "comparison.json")
    assert {"statistics.safetensors", "peaks.safetensors", *results} <= same


def test_a_finished_stage_is_not_run_again(world, copy, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*.safetensors")}
    assert copy / "bases.safetensors" in before
    idle = {
        "context": ("load_model", "tokenize"),
        "diagnosis.collect": ("collect_activations",),
        "diagnosis.evidence": ("gather_evidence",),
        "editing.writer": ("write_edit",),
        "evaluation.text_loss": ("BaseText", "document_losses"),
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
    run(world / "recipe.yaml", copy)
    assert before == {path: path.stat().st_mtime_ns for path in copy.rglob("*.safetensors")}


def test_plans_follow_the_recipe_and_what_they_cut_along_is_whole(world, finished, copy, tmp_path, monkeypatch):
    planned = []

    def counted(recipe, *args, **options):
        planned.append(recipe.arms)
        return plan_arms(recipe, *args, **options)

    monkeypatch.setattr("stethoscope.selection.arms.plan_arms", counted)
    (copy / "bases.safetensors").write_bytes((copy / "bases.safetensors").read_bytes()[:-1])  # cut short
    run(world / "recipe.yaml", copy)
    assert len(planned) == 1
    assert Edits.load(copy) == Edits.load(finished)
    assert sha256_file(copy / "bases.safetensors") == sha256_file(finished / "bases.safetensors")
    path = changed(world, tmp_path, arms=["base", "selected", "projected"], edit={"coefficient": 0.5, "filter": "none"})
    for _ in range(2):
        run(path, copy)
    assert len(planned) == 2
    plans = Edits.load(copy).plans
    assert set(plans) == {"base", "selected", "projected"}
    assert {c for kinds in plans["selected"]["layers"].values() for c in kinds.values()} == {0.5}


def test_an_edit_that_another_recipe_left_behind_is_written_again(world, finished, copy, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("stethoscope.selection.arms.save_plans", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(changed(world, tmp_path, edit={"coefficient": 0.5, "filter": "none"}), copy)
    weights = "edited/model.safetensors"
    assert sha256_file(copy / weights) != sha256_file(finished / weights)
    run(world / "recipe.yaml", copy)
    assert sha256_file(copy / weights) == sha256_file(finished / weights)


def test_an_arm_whose_costs_are_known_is_not_run_again(world, finished, copy, monkeypatch):
    (copy / "losses/general/tuned/divergence.json").unlink()
    asked = []

    def counted(model, task_vector, plan):
        asked.append(plan)
        return prepare(model, task_vector, plan)

    monkeypatch.setattr("stethoscope.context.prepare", counted)
    run(world / "recipe.yaml", copy)
    assert asked == [EditPlan.everything()]  # tuned
    for kind in (TextLoss, TextDivergence):
        assert kind.load(copy / "losses/general/tuned") == kind.load(finished / "losses/general/tuned")
    assert sha256_file(copy / "comparison.json") == sha256_file(finished / "comparison.json")


def test_a_run_whose_edit_is_written_needs_no_room_for_another(world, copy, tmp_path, monkeypatch):
    class Usage(NamedTuple):
        total: int = 1000
        used: int = 1000
        free: int = 0

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage())
    (copy / "comparison.json").unlink()
    run(world / "recipe.yaml", copy)
    assert (copy / "comparison.json").exists()
    with pytest.raises(StethoscopeError, match="GB free"):  # another edit is to be written
        run(changed(world, tmp_path, edit={"coefficient": 0.5, "filter": "none"}), copy)
    assert open_checkpoint(copy / "edited").layers == LAYERS
    assert "GB free" in refusal(world / "recipe.yaml", tmp_path / "new")


def test_a_diagnosis_without_peaks_is_made_again(world, finished, copy):
    for name in ("peaks.safetensors", "evidence.json"):
        (copy / name).unlink()
    run(world / "recipe.yaml", copy, until="evidence")
    for name in ("peaks.safetensors", "statistics.safetensors", "diagnosis.json", "evidence.json"):
        assert sha256_file(copy / name) == sha256_file(finished / name)


def test_another_target_runs_the_diagnosis_again(world, finished, copy, tmp_path):
    text = write_texts(tmp_path / "other.jsonl", "something else entirely ")
    run(changed(world, tmp_path, target={"dataset": str(text)}), copy, until="diagnose")
    assert Diagnosis.load(copy).provenance.inputs["target"] != Diagnosis.load(finished).provenance.inputs["target"]


def test_everything_wrong_is_said_before_any_work(world, tmp_path, llama):
    llama(layers=LAYERS, hidden=64).save_pretrained(tmp_path / "other")
    path = changed(
        world,
        tmp_path,
        {"tasks": ["tiny_summ"], "control_tasks": []},
        saes=str(write_saes(tmp_path / "saes", 16)),
        tuned=str(tmp_path / "other"),
        target={"dataset": "nowhere.jsonl"},
        control={"dataset": str(world / "data/general.jsonl"), "field": "body"},
        select={"k": 9},
    )
    said = refusal(path, tmp_path / "run")
    misfit = "layers.0.self_attn.q_proj.weight"
    for part in ("nowhere.jsonl", "no text in field `body`", "hidden size", misfit, "tiny_summ", "select.k is `9`"):
        assert part in said


def test_what_cannot_be_run_is_refused_by_name(world, tmp_path, llama):
    out = tmp_path / "run"
    heads = str(write_saes(tmp_path / "heads", hook="blocks.{}.attn.hook_z"))
    path = changed(world, tmp_path, saes=heads, arms=["base", "selected", "projected", "complement"])
    assert "leave out `projected`, `complement` of `arms`" in refusal(path, out)
    target = {"target": {"dataset": str(world / "data/math.jsonl")}}
    assert "held-out target text" in refusal(changed(world, tmp_path, target), out)
    save_adapter(llama(layers=6, hidden=64), tmp_path, r=2, target_modules=["q_proj"])
    assert "q_proj" in refusal(changed(world, tmp_path, tuned=str(tmp_path / "adapter")), out)
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(world / "recipe.yaml", tmp_path / "file" / "run")
    with pytest.raises(RecipeError, match="needs a section `calibrate`"):
        Recipe.from_yaml(changed(world, tmp_path, select={"policy": "calibrated"}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_a_gpu_that_is_not_there_is_said_before_any_work(world, tmp_path, capsys):
    said = refusal(changed(world, tmp_path, device="cuda", select={"k": 9}), tmp_path / "run")
    assert "no device `cuda` here" in said
    assert "select.k is `9`" in said
    recipe = str(world / "recipe.yaml")
    model = ["--model", str(world / "base"), "--tasks", "tiny_sum"]
    commands = [[name, recipe] for name in ("run", "diagnose", "select", "validate")]
    for command in (*commands, ["run", recipe, "--dry-run"], ["evaluate", *model]):
        with pytest.raises(SystemExit) as stopped:
            main([*command, "--out", str(tmp_path / "run"), "--device", "cuda:1"])
        assert stopped.value.code == 2
        assert "no device `cuda:1` here" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_items_that_the_choice_has_seen_are_refused_by_name_or_said(world, tmp_path):
    """Item 7 of the task, `4 and 2`, stands in the control text; so does a general document."""
    control = {"dataset": str(tmp_path / "control.jsonl")}
    write_lines(tmp_path / "control.jsonl", [{"text": f"{i} Q: 4 and 2=6 and so on"} for i in range(24)])
    general = write_lines(tmp_path / "general.jsonl", [{"text": "Q: 4 and 2=6 and so on"}])
    task = yaml.safe_load((world / "tasks/tiny_and.yaml").read_text()) | {"doc_to_text": "Q: {{problem}}="}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/tiny_and.yaml").write_text(yaml.safe_dump(task))
    evaluate = {"tasks": ["tiny_and"], "control_tasks": [], "include_path": str(tmp_path / "tasks")}
    evaluate["control"] = {"dataset": str(general)}
    said = refusal(changed(world, tmp_path, evaluate, control=control), tmp_path / "run")
    assert "`general text`: item 0" in said
    assert "evaluate.exploratory: true" in said
    run(changed(world, tmp_path, evaluate | {"exploratory": True}, control=control), tmp_path / "run")
    claim = Claim.load(tmp_path / "run")
    assert claim.kind == "exploratory"
    assert claim.seen_items == {"general text": (0,)}


@pytest.mark.parametrize("until", ["diagnos", "calibrate", "recommend", "tradeoff"])
def test_a_stage_that_a_recipe_has_nothing_for_is_refused_before_any_work(world, tmp_path, until):
    reporter = Recorder()
    with pytest.raises(StethoscopeError) as refused:
        run(world / "recipe.yaml", tmp_path / "run", until=until, reporter=reporter)
    assert refused.value.hint
    assert not reporter.stages
    assert not (tmp_path / "run").exists()


def test_a_fine_tune_of_some_layers_is_run_and_validated(world, tmp_path, llama):
    save_adapter(llama().to(torch.bfloat16), tmp_path, r=4, target_modules=["up_proj"], layers_to_transform=[1, 2])
    arms = ["base", "selected", "scaled", "norm_ranked", "random_matched"]
    select = {"policy": "top_k", "k": 1}
    path = changed(world, tmp_path, FEW, tuned=str(tmp_path / "adapter"), arms=arms, select=select)
    chosen = run(path, tmp_path / "run").selection.layers
    edits = Edits.load(tmp_path / "run")
    assert [bool(layer.energy) for layer in edits.energy] == [False, True, True, False]
    assert ("scaled" in edits.plans) == (chosen[0] in (1, 2))
    fewer = Recipe.from_yaml(path, ["validation.documents=4", "validation.random_sets=10"])
    found = run_recipe(fewer, tmp_path / "run", until="validate").results["validate"]
    assert found.scores["norm"].values == {layer.layer: layer.energy for layer in edits.energy}


def test_an_estimate_counts_every_calibration_document(world, tmp_path):
    text = {"dataset": str(world / "data/code.jsonl"), "documents": 4}
    path = changed(world, tmp_path, edit={"filter": 1.0}, calibrate={"target": text, "control": text})
    recipe = Recipe.from_yaml(path)
    speeds = dict.fromkeys(("model", "decoding", "host", "memory", "single", "double"), math.inf) | {"model": 1.0}
    found = {one.stage: one.seconds for one in estimate(recipe, check_recipe(recipe, tmp_path / "run"), speeds)}
    assert found["Recommend: layers, coefficient and filter"] > 0


def test_what_no_layer_shows_is_refused(world, tmp_path, llama):
    save_adapter(llama().to(torch.bfloat16), tmp_path, r=4, target_modules=["embed_tokens"])
    said = refusal(changed(world, tmp_path, tuned=str(tmp_path / "adapter")), tmp_path / "run")
    assert "changes nothing in the layers" in said
    typo = changed(world, tmp_path, validation={"matched": ["mass_shift increment", "gradiant"]})
    assert "did you mean `gradient`?" in refusal(typo, tmp_path / "run")


def test_results_of_other_settings_beside_a_comparison_are_said(world, copy):
    warned = []
    for changes in ([], ["diagnose.permutations=19"]):
        reporter = Recorder()
        recipe = Recipe.from_yaml(world / "recipe.yaml", changes)
        run_recipe(recipe, copy, until="diagnose", reporter=reporter)
        warned.append(any(note.startswith("warning: the edit and the comparison") for note in reporter.stages))
    assert warned == [False, True]


def test_damaged_plans_are_no_plans(world, copy):
    base = open_checkpoint(world / "base")
    change, saved = open_task_vector(base, world / "tuned"), Edits.load(copy)
    whole = json.loads((copy / Edits.FILE).read_text())
    for damaged in ({"transform": []}, {"layers": []}, {"layers": {"x": {}}}, {"default": "1"}):
        plan = whole["plans"]["selected"] | damaged
        (copy / Edits.FILE).write_text(json.dumps(whole | {"plans": {"selected": plan}}))
        assert load_plans(copy, saved.provenance, change) is None


def test_every_stage_counts_the_tokens_and_leaves_out_the_documents_that_the_diagnosis_does(world, tmp_path):
    shutil.copytree(world / "base", tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").write_text(GEMMA)
    texts: dict[str, dict[str, str]] = {}
    for name in ("target", "control"):
        rows = [[("user", f"{name} {i}"), ("assistant", f"{i} as it happens")] for i in range(24)]
        rows[5] = [("assistant", "refused"), ("assistant", "by the template")]
        chats = ({"messages": [{"role": role, "content": said} for role, said in row]} for row in rows)
        texts[name] = {"dataset": str(write_lines(tmp_path / f"{name}.jsonl", chats)), "field": "messages"}
    path = changed(
        world, tmp_path, {"target": {"dataset": str(world / "data/calibration-math.jsonl")}}, **texts,
        base=str(tmp_path / "base"), score="attribution", edit={"filter": 1.0, "forwards": 3},
        diagnose={"block_size": 4, "permutations": 19, "resamples": 19, "tokens": "assistant", "skip_broken": True},
        validation={"documents": 8, "random_sets": 10}, tradeoff={"documents": 4, "strengths": [1.0]},
        ray={"workers": 0, "gpus": 1},
    )  # fmt: skip
    recipe = Recipe.from_yaml(path)
    with ExitStack() as stack:
        context = open_context(recipe, tmp_path, check_recipe(recipe, tmp_path / "run"), stack)
        counted = sum(int(batch.countable.sum()) for batch in context.batches("target", without=(5,)))
        assert counted == sum(len(f"{i} as it happens") for i in range(24) if i != 5)  # a character is a token
        assert context.dtype == preferred_dtype(context.device)
    for stage in ("recommend", "validate", "tradeoff"):
        results = run(path, tmp_path / "run", until=stage).results
    assert results["diagnose"].corpora["target"].broken == (5,)
    assert results["diagnose"].corpora["target"].tokens == counted


def test_a_claim_on_unseen_items_is_confirmatory(finished):
    claim = Claim.load(finished)
    assert claim.kind == "confirmatory"
    assert set(claim.seen_texts) == {"target", "control"}
    assert Seen.load(finished).holds("the cat sat on the mat the cat sat on the mat")


def test_layers_and_coefficients_by_calibration(world, tmp_path, capsys):
    texts = {
        side: {"dataset": str(world / f"data/calibration-{name}.jsonl")}
        for side, name in (("target", "math"), ("control", "general"))
    }
    options = {"calibrate": texts | {"budget": 0.5, "coefficients": [0.5, 1.0]}, "select": {"policy": "calibrated"}}
    path = changed(world, tmp_path, FEW, **options)
    main(["calibrate", str(path), "--out", str(tmp_path / "run"), "--json"])
    found = json.loads(capsys.readouterr().out)
    calibration = Calibration.load(tmp_path / "run")
    assert found["choice"] == calibration.choice
    assert set(calibration.seen) == {"target", "control"}
    if calibration.coefficients:  # random weights may be worth nothing, which is a result
        run(path, tmp_path / "run")
        assert Selection.load(tmp_path / "run").coefficients == calibration.coefficients
        plan = Edits.load(tmp_path / "run").plans["selected"]
        assert {int(k): v for k, v in plan["layers"].items()} == calibration.coefficients
    else:
        with pytest.raises(StethoscopeError, match="chooses no edit"):
            run(path, tmp_path / "run")


def test_layers_by_what_their_edit_is_worth(world, tmp_path):
    controls = {"other": {"dataset": str(world / "data/code.jsonl")}}
    run(changed(world, tmp_path, FEW, score="attribution", controls=controls), tmp_path / "run")
    diagnosis = Diagnosis.load(tmp_path / "run")
    assert diagnosis.score == "attribution"
    assert set(diagnosis.corpora) == {"target", "control", "other"}
    assert all(layer.score >= 0 for layer in diagnosis.layers)
    assert (tmp_path / "run/report.html").exists()


def test_scores_are_validated_from_the_command_line(world, copy, capsys):
    command = ["validate", str(world / "recipe.yaml"), "--out", str(copy)]
    command += ["--set", "validation.documents=4", "--set", "validation.random_sets=10"]
    main(command)
    shown = capsys.readouterr().out
    assert "`mass_shift`" in shown
    assert "gradient" in shown
    found = ScoreValidation.load(copy / "validation/control")
    assert {"injection", "attribution", "mass_shift increment"} <= set(found.scores)
    with pytest.raises(SystemExit):
        main([*command, "--set", "validation.control=other"])
    assert "no control `other`" in capsys.readouterr().err
    (copy / "report.html").unlink()
    main(["report", str(copy)])
    assert (copy / "report.html").exists()
    capsys.readouterr()
    main([*command, "--json"])  # done already
    assert json.loads(capsys.readouterr().out)["forwards"] == found.forwards


def test_the_run_command_prints_json(world, copy, capsys):
    main(["run", str(world / "recipe.yaml"), "--out", str(copy), "--json"])
    assert json.loads(capsys.readouterr().out)["selection"] == list(Selection.load(copy).layers)


def test_check_names_texts_that_no_layer_can_be_judged_on(world, tmp_path):
    chats = [{"messages": [{"role": "user", "content": f"question {i}"}]} for i in range(24)]
    target = {"dataset": str(write_lines(tmp_path / "chats.jsonl", chats)), "field": "messages"}
    path = changed(world, tmp_path, target=target, diagnose={"block_size": 8})
    with pytest.raises(RecipeError) as error:
        check_recipe(Recipe.from_yaml(path), tmp_path / "run")
    assert "no chat template, so the target text cannot be rendered" in str(error.value)
    assert "the 24 documents of the control text are 3 blocks of up to 8" in str(error.value)
    assert "set `diagnose.block_size` to 6 or less" in str(error.value)


def test_edit_undo_and_verify_from_the_command_line(world, tmp_path, capsys):
    base, edited, patch = (str(folder) for folder in (world / "base", tmp_path / "edited", tmp_path / "patch"))
    edit = ["edit", "--base", base, "--tuned", str(world / "tuned"), "--layers", "1,2-3"]
    main([*edit, "--out", edited, "--dry-run", "--json"])
    assert json.loads(capsys.readouterr().out)["tensors"] == 21
    assert not (tmp_path / "edited").exists()
    main([*edit, "--out", edited])
    main([*edit, "--out", patch, "--kind", "patch"])
    main(["verify", edited, "--base", base])
    assert "17 of them are the base's" in capsys.readouterr().out
    main(["undo", patch, "--edited", edited, "--out", str(tmp_path / "undone")])
    main(["apply", patch, "--base", base, "--out", str(tmp_path / "applied")])
    weights = "model.safetensors"
    assert sha256_file(tmp_path / "undone" / weights) == sha256_file(world / "base" / weights)
    assert sha256_file(tmp_path / "applied" / weights) == sha256_file(tmp_path / "edited" / weights)
    flip(tmp_path / "edited" / weights)
    with pytest.raises(SystemExit) as stopped:
        main(["verify", edited])
    assert stopped.value.code == 2
    assert "is not what its manifest says" in capsys.readouterr().err


@pytest.mark.parametrize("layers", ["x", "3-", "1,,2", "9", "3-1", "\u00b2", "0-999999999999"])
def test_layers_that_are_none_are_refused(world, tmp_path, capsys, layers):
    options = ["--base", str(world / "base"), "--tuned", str(world / "tuned"), "--layers", layers]
    with pytest.raises(SystemExit) as stopped:
        main(["edit", *options, "--out", str(tmp_path / "edited")])
    assert stopped.value.code == 2
    assert not (tmp_path / "edited").exists()
    assert "layer" in capsys.readouterr().err
