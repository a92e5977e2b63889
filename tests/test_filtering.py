"""The recommended edit of a recipe: a planted skill is kept, protected text is spared, and nothing peeks."""

import json
import shutil

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM
from world import exact_sae, plant, planted_documents, write_lines, write_saes, write_task

from stethoscope.check import check_recipe, check_run
from stethoscope.cli import main
from stethoscope.diagnosis.statistics import load_statistics
from stethoscope.editing.filter import FilteredChange
from stethoscope.editing.layers import Filtered, LayerEdits
from stethoscope.editing.passage import passed_shares
from stethoscope.errors import RecipeError
from stethoscope.evaluation.outcomes import Outcomes
from stethoscope.recipe import Recipe
from stethoscope.results.calibration import Calibration
from stethoscope.results.comparison import Claim, Comparison
from stethoscope.results.edits import Edits
from stethoscope.results.evidence import Evidence
from stethoscope.results.filtering import Filtering
from stethoscope.results.selection import Selection
from stethoscope.run import run_recipe
from stethoscope.selection.injection import measure

OTHER = [f"{n} green lamps stood in a row by gate {n * 7}" for n in range(40)]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A recipe over a planted skill."""
    folder = tmp_path_factory.mktemp("recommended")
    made = plant(folder, tokenizer)
    tokenizer.save_pretrained(folder / "base")
    write_saes(folder / "saes", layers=6)
    for name in ("target", "control"):
        write_lines(folder / f"{name}.jsonl", [{"text": text} for text in planted_documents(name, 60, 5)])
    write_lines(folder / "other.jsonl", [{"text": text} for text in OTHER])
    (folder / "tasks").mkdir()
    write_task(folder / "tasks", "sums", [{"problem": f"{a} and {a}", "answer": str(2 * a)} for a in range(4)])
    recipe = {
        **{name: name for name in ("base", "tuned", "saes")},
        **{name: {"dataset": f"{name}.jsonl"} for name in ("target", "control")},
        "diagnose": {"block_size": 4, "permutations": 19, "resamples": 19},
        "select": {"policy": "top_k", "k": 2, "include_flagged": True},
        "arms": ["base", "selected", "filtered", "selected_filtered", "projected", "fewest_features"],
        "project": {"draws": 20, "tokens": 64},
        "evaluate": {"tasks": ["sums"], "include_path": "tasks", "limit": 2},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run_recipe(Recipe.from_yaml(folder / "recipe.yaml"), folder / "run")
    return folder, made


def other(folder, out, **changes):
    """The recipe with other values."""
    value = yaml.safe_load((folder / "recipe.yaml").read_text()) | changes
    path = folder / f"{out}.yaml"
    path.write_text(yaml.safe_dump(value))
    return path


def test_the_recommended_edit_is_what_is_written_compared_and_said_first(place):
    folder, _ = place
    found = Calibration.load(folder / "run" / "recommended")
    edit = found.edit
    assert edit.target_gain > 0.5 * max(point.target_gain for point in found.points)
    assert edit.control_cost <= found.budget == 0.01
    assert any(point.strength for point in found.points)
    assert any(point.strength is None and point.coefficients for point in found.points)
    plans = Edits.load(folder / "run").plans
    assert set(plans) == {
        "base", "selected", "filtered", "selected_filtered", "projected", "fewest_features", "recommended"
    }  # fmt: skip
    assert {int(n) for n in plans["filtered"]["layers"]} == set(range(6))
    assert plans["selected_filtered"]["layers"] == plans["selected"]["layers"]
    manifest = json.loads((folder / "run/edited/manifest.json").read_text())
    assert manifest["plan"] == plans["recommended"]
    comparison = Comparison.load(folder / "run/comparison.json")
    assert comparison.arms[:3] == ["base", "recommended", "selected"]
    assert comparison.verdict == comparison.contrast("recommended").verdict
    assert comparison.find("recommended", "selected")
    page = (folder / "run/report.html").read_text()
    assert "How layers and amount were found" in page
    card = (folder / "run/edited/README.md").read_text()
    assert comparison.verdict in card
    assert edit.strength is None or f"filter of strength {edit.strength:g} that protects control" in card


def test_of_equal_arms_one_is_measured_for_all(place):
    folder, _ = place
    run = shutil.copytree(folder / "run", folder / "twins")
    arms = ["base", "selected", "filtered", "selected_filtered"]
    evaluate = {"tasks": ["sums"], "include_path": "tasks", "limit": 2, "control": {"dataset": "other.jsonl"}}
    select = {"policy": "top_k", "k": 6, "include_flagged": True}  # all layers
    path = other(folder, "twins", arms=arms, select=select, evaluate=evaluate)
    comparison = run_recipe(Recipe.from_yaml(path), run).comparison
    plans = Edits.load(run).plans
    same = [name for name, plan in plans.items() if plan == plans["filtered"]]
    assert same[:2] == ["filtered", "selected_filtered"]
    once = set(plans) - set(same[1:])
    assert {path.name for path in (run / "losses/general").iterdir()} == once
    outcomes = Outcomes.load(run / "outcomes.parquet")
    assert set(outcomes.arms) == set(plans)
    said = [comparison.contrast(name).verdict.replace(name, "") for name in same[:2]]
    assert said[0] == said[1]
    assert run_recipe(Recipe.from_yaml(path), run).comparison == comparison


def test_what_was_measured_in_memory_is_what_is_written(place, tokenizer):
    folder, made = place
    found = Calibration.load(folder / "run" / "recommended").edit
    edits = LayerEdits(made.model, made.task_vector, filters=folder / "run/filter")
    amounts = {n: Filtered(c, found.strength) if found.strength else c for n, c in found.coefficients.items()}
    written = AutoModelForCausalLM.from_pretrained(folder / "run/edited").eval()
    ids = made.texts["target"][0].input_ids
    with torch.no_grad(), edits.entered(amounts):
        inside = made.model(ids).logits
        torch.testing.assert_close(inside, written(ids).logits)
    raw = measure(made.model, edits, made.texts, [{1: 1.0}, {1: Filtered(1.0, 10.0)}])
    assert abs(raw.mean("control")[1]) < abs(raw.mean("control")[0])


def test_held_back_documents_make_no_filter(place):
    folder, _ = place
    lines = (folder / "target.jsonl").read_text().splitlines()
    other_text = write_lines(
        folder / "changed.jsonl",
        [{"text": "9+9=18;" * 3} if n % 5 == 4 else json.loads(line) for n, line in enumerate(lines)],
    )
    path = other(folder, "held", target={"dataset": str(other_text)})
    run_recipe(Recipe.from_yaml(path), folder / "held", until="recommend")
    before, after = (Filtering.load(folder / name / "filter") for name in ("run", "held"))
    assert before.layers == after.layers  # which stand for the moments
    assert before.provenance != after.provenance
    points = [Calibration.load(folder / name / "recommended").base_loss["target"] for name in ("run", "held")]
    assert points[0] != points[1]


def test_protected_text_is_filtered_for_judged_and_seen(place, capsys):
    folder, _ = place
    protect = {"lamps": {"dataset": "other.jsonl", "weight": 2.0}}
    path = other(folder, "protected", edit={"filter": 3, "protect": protect})
    main(["recommend", str(path), "--out", str(folder / "protected"), "--json"])
    assert json.loads(capsys.readouterr().out)["seen"].keys() == {"target", "control", "lamps"}
    filtering = Filtering.load(folder / "protected" / "filter")
    assert filtering.weights == {"control": 1.0, "lamps": 2.0}
    assert filtering.strengths == (3.0,)
    found = Calibration.load(folder / "protected" / "recommended")
    assert {point.strength for point in found.points if point.coefficients} == {3.0}
    assert all(set(point.damage) == {"control", "lamps"} for point in found.points)
    worst = max(found.points, key=lambda point: point.control_cost)
    assert worst.control_cost == max(worst.damage.values())
    items = [{"problem": OTHER[0], "answer": "1"}]
    write_task(folder / "tasks", "seen", items, doc_to_text="{{problem}}")
    evaluate = {"tasks": ["seen"], "include_path": "tasks"}
    with pytest.raises(RecipeError, match="seen"):
        check_run(Recipe.from_yaml(other(folder, "peeks", edit={"protect": protect}, evaluate=evaluate)), folder / "x")
    assert set(Claim.load(folder / "run").seen_texts) == {"target", "control"}


def test_features_that_the_filter_passes_and_mutes_are_shown_with_what_they_fire_on(place):
    folder, made = place
    run = folder / "run"
    found, filtering, statistics = (
        Evidence.load(run / "filter"), Filtering.load(run / "filter"), load_statistics(run / "statistics.safetensors")
    )  # fmt: skip
    apart = max(filtering.layers[1:6], key=lambda one: one.separability).layer
    shown = {part.layer + 1 for part in found.layers}
    assert shown == {*Selection.load(run).layers, apart} - {0}
    change = FilteredChange(run / "filter", filtering.middle, made.task_vector)
    for part in found.layers:
        directions = exact_sae().W_dec.detach()
        shares, lengths = passed_shares(made.model, made.task_vector, change, part.layer + 1, directions)
        rates = [corpus.layers[part.layer].rate for corpus in statistics.values()]
        fires = [n for n in range(64) if max(rate[n] for rate in rates) >= 0.001]
        judged = sorted(fires, key=lambda n: -lengths[n])[:20]
        ranked = sorted(float(shares[n]) for n in judged)
        for one in part.features:  # the run's norms are in bfloat16
            assert one.passed == pytest.approx(float(shares[one.feature]), rel=2e-3)
            assert one.feature in fires
        wanted = [*reversed(ranked[-5:]), *reversed(ranked[:5])]
        assert [one.passed for one in part.features] == pytest.approx(wanted, rel=2e-3)
        assert wanted[4] > 1.1 * wanted[5]
    frame = found.to_frame()
    assert len(frame) == 10 * len(shown)
    assert frame.passed.tolist() == [one.passed for part in found.layers for one in part.features]
    page = (run / "report.html").read_text()
    for part in found.layers:
        assert f"at the input of layer {part.layer + 1} that" in page
        for one in part.features:
            corpus, context = one.strongest
            assert context.activation == max(c.activation for some in one.contexts.values() for c in some)
            assert f"Feature {one.feature} ({one.passed:.2f}), most on {corpus}" in page


def test_saes_elsewhere_or_a_result_of_before_leave_the_run_whole(place):
    folder, _ = place
    write_saes(folder / "mlp", layers=6, hook="model.layers.{}.mlp")
    path = other(folder, "elsewhere", saes="mlp", arms=["base", "selected"], edit={"filter": 1})
    run_recipe(Recipe.from_yaml(path), folder / "elsewhere")
    assert not Evidence.load(folder / "elsewhere/filter").layers
    page = (folder / "elsewhere/report.html").read_text()
    assert "What does the filter let through?" in page
    assert "passes most" not in page
    (folder / "elsewhere/filter/evidence.json").unlink()
    main(["report", str(folder / "elsewhere")])
    run_recipe(Recipe.from_yaml(path), folder / "elsewhere")
    assert (folder / "elsewhere/filter/evidence.json").exists()


def test_nothing_recommended_is_said_and_the_published_edit_is_written(place):
    folder, _ = place
    texts = {"target": {"dataset": "other.jsonl"}, "control": {"dataset": "target.jsonl"}}
    path = other(folder, "nothing", calibrate=texts | {"budget": 1e-9}, arms=["base", "selected"])
    run_recipe(Recipe.from_yaml(path), folder / "nothing")
    found = Calibration.load(folder / "nothing" / "recommended")
    edits = Edits.load(folder / "nothing")
    assert set(found.base_loss) == {"target", "control"}
    if found.edit is None:
        assert set(edits.plans) == {"base", "selected"}
        assert any("no edit" in warning for warning in edits.warnings)
    manifest = json.loads((folder / "nothing/edited/manifest.json").read_text())
    assert manifest["plan"] == edits.plans["selected" if found.edit is None else "recommended"]


def test_a_second_run_makes_nothing_again_and_a_filter_that_is_gone_is_made_again(place, monkeypatch):
    folder, _ = place
    recipe = Recipe.from_yaml(folder / "recipe.yaml")
    with monkeypatch.context() as patched:
        made = "editing.filter.write_filters selection.calibrate.calibrate editing.writer.write_edit"
        for name in (*made.split(), "diagnosis.evidence.gather_evidence"):
            patched.setattr(f"stethoscope.{name}", None)
        run_recipe(recipe, folder / "run")
    before = Evidence.load(folder / "run/filter")
    for gone in ("filter.json", next((folder / "run/filter").rglob("*.safetensors"))):
        (folder / "run/filter" / gone).unlink()
        run_recipe(recipe, folder / "run")
        assert (folder / "run/filter" / gone).exists()
        assert Evidence.load(folder / "run/filter") == before


def test_without_a_filter_all_is_as_before_and_what_makes_no_sense_is_refused(place):
    folder, _ = place
    plain = Recipe.from_yaml(other(folder, "plain", edit={"filter": "none"}, arms=["base", "selected"]))
    assert plain.evaluated == ("base", "selected")
    run_recipe(plain, folder / "plain")
    assert not (folder / "plain/filter").exists()
    assert (folder / "plain/evidence.json").exists()
    assert set(Edits.load(folder / "plain").plans) == {"base", "selected"}
    for edit in ({"filter": "none"}, {"coefficient": -1.0}):
        with pytest.raises(RecipeError, match="`filtered`, `selected_filtered`"):
            Recipe.from_yaml(other(folder, "wrong", edit=edit))
    with pytest.raises(RecipeError, match=r"edit\.filter"):
        Recipe.from_yaml(other(folder, "wrong", edit={"filter": -1}))
    with pytest.raises(RecipeError, match="cannot be called `control`"):
        Recipe.from_yaml(other(folder, "wrong", edit={"protect": {"control": {"dataset": "other.jsonl"}}}))
    few = {"dataset": "target.jsonl", "documents": 8}
    with pytest.raises(RecipeError, match="fewer than 10"):
        check_recipe(Recipe.from_yaml(other(folder, "few", target=few, diagnose={"block_size": 1})), folder / "x")
