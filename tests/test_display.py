"""Results in a notebook: frames, pictures, text and HTML of each, and the notebook in docs/ on a tiny run."""

import json
import runpy
from pathlib import Path

import pandas as pd
import pytest

from stethoscope import Comparison, Diagnosis, Geometry, Outcomes, Selection
from stethoscope.display import ranged

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "scripts" / "run_notebook.py"))


@pytest.fixture(scope="module")
def results(finished) -> dict[str, object]:
    return {
        "diagnosis": Diagnosis.load(finished),
        "geometry": Geometry.load(finished),
        "outcomes": Outcomes.load(finished / "outcomes.parquet"),
        "comparison": Comparison.load(finished / "comparison.json"),
    }


@pytest.mark.parametrize("name", ["diagnosis", "geometry", "outcomes", "comparison"])
def test_every_result_has_a_frame_a_picture_and_a_look(results, name):
    result = results[name]
    frame = result.to_frame()
    assert isinstance(frame, pd.DataFrame)
    assert len(frame) > 0
    chart = result.plot()
    assert chart.to_dict()["$schema"].startswith("https://vega.github.io/schema/vega-lite/")
    assert len(chart.to_json()) < 200_000
    text, html = repr(result), result._repr_html_()
    assert text == str(result)
    assert text.startswith(f"{type(result).__name__}: ")
    assert len(text.splitlines()) < 50
    assert html.count("<table") == 1


def test_frames_hold_the_results_own_values(results):
    diagnosis, geometry, outcomes, comparison = results.values()
    frame = diagnosis.to_frame().set_index("layer")
    for layer in diagnosis.layers:
        row = frame.loc[layer.layer]
        assert (row["excess"], row["low"], row["high"]) == (layer.excess, *layer.interval)
        assert row["l0_control"] == layer.health["control"].l0
    frame = geometry.to_frame().set_index("layer")
    for layer in geometry.layers:
        assert frame.loc[layer.layer, "kept"] == layer.kept.share
        assert frame.loc[layer.layer, "functional_target"] == layer.functional["target"]
    copy = outcomes.to_frame()
    copy["arm"] = "other"
    assert "other" not in outcomes.arms
    pooled = comparison.to_frame().query("task == 'pooled'").set_index(["a", "b"])
    assert pooled.loc[("base", "selected"), "difference"] == comparison.contrast("selected").pooled.difference


def test_verdicts_are_sentences_that_can_say_no(results):
    diagnosis = results["diagnosis"]
    none = diagnosis.model_copy(
        update={"layers": tuple(layer.model_copy(update={"p_familywise": 1.0}) for layer in diagnosis.layers)}
    )
    assert none.verdict.startswith("No evidence by `mass_shift` that any of 4 layers is specific to the target")
    one = diagnosis.layers[2].model_copy(update={"p_familywise": 0.01, "flag": None})
    some = none.model_copy(update={"layers": (*none.layers[:2], one, none.layers[3])})
    assert some.verdict.startswith("1 of 4 layers stand out from chance by `mass_shift`, strongest first: 2")
    assert results["comparison"].verdict == results["comparison"].contrast("selected").verdict


def test_what_models_and_tasks_say_is_escaped(results):
    evil = "<script>alert(1)</script>"
    outcomes = results["outcomes"]
    planted = Outcomes(frame=outcomes.frame.assign(task=evil + outcomes.frame["task"]))
    comparison = results["comparison"]
    for result in (planted, Comparison(**{**vars(comparison), "contrasts": [_renamed(comparison.contrasts[0], evil)]})):
        assert evil not in result._repr_html_()
        assert "&lt;script&gt;" in result._repr_html_()


def _renamed(contrast, name):
    return type(contrast)(**{**vars(contrast), "b": name, "verdict": f"{name} wins"})


def test_selected_layers_are_marked(results, finished):
    selection = Selection.load(finished)
    (rows,) = (data for key, data in results["diagnosis"].plot(selection).to_dict()["datasets"].items())
    assert {row["layer"] for row in rows if row["kind"] == "selected"} == set(selection.layers)
    (rows,) = (data for key, data in results["geometry"].plot(selection).to_dict()["datasets"].items())
    assert {row["layer"] for row in rows if row["selected"]} == set(selection.layers)


def test_the_notebook_runs_and_names_no_place_of_the_machine_that_ran_it(finished):
    path = SCRIPT["NOTEBOOK"]
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 500_000
    kept = json.loads(text)
    assert not any(place in text for place in ("/home/", "/tmp/", "/work/", "/root/"))
    made = SCRIPT["run_notebook"](kept, finished)
    for cell, again in zip(kept["cells"], made["cells"], strict=True):
        if cell["cell_type"] == "code":
            kinds = [[sorted(output.get("data", {})) for output in one["outputs"]] for one in (cell, again)]
            assert kinds[0] == kinds[1], "".join(cell["source"])


def test_numbers_in_a_row_are_a_range():
    assert ranged([7, 0, 1, 3, 2, 9, 8, 12, 13]) == "0-3, 7-9, 12, 13"
    assert ranged([]) == ""
