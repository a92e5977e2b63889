"""The page as text: what it says, that it says it safely, and that equal artefacts give equal bytes."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from made_choice import make_calibration, make_validation, save_choice
from made_geometry import CHOSEN, WIDTH, make_cuts, make_geometry
from made_results import ARMS, SUBJECTS, Results, make_comparison, make_diagnosis, make_evidence, make_selection

from stethoscope.artifacts import Provenance
from stethoscope.display import percent, short_names
from stethoscope.errors import StethoscopeError
from stethoscope.report import render_report, wording
from stethoscope.report.charts import energy_curves, gain_split
from stethoscope.report.render import PAGES, _ticks, _typeset
from stethoscope.report.wording import answers
from stethoscope.results import overview
from stethoscope.results.comparison_tables import gain_rows
from stethoscope.results.edits import Edits
from stethoscope.results.evidence import LayerEvidence
from stethoscope.results.filtering import Effect, Filtering, LayerFiltering
from stethoscope.results.selection import Selection

ONE = {"algebra": 0.3}


class Page(HTMLParser):
    """Tags that were opened, script texts, and the text that a reader sees."""

    VOID = frozenset({"meta", "img", "br", "wbr", "input", "link", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] == "script":
            self.scripts[-1] += data
        elif self._open and self._open[-1] != "style":
            self.text += data

    def data(self):
        return json.loads(self.scripts[0])


@pytest.fixture
def page(run_folder) -> Page:
    return Page(render_report(run_folder).read_text(encoding="utf-8"))


def test_the_verdict_comes_first_and_everything_is_there(page, results):
    text = " ".join(page.text.split())
    headline = overview.headline(results.comparison).replace("(-", "(\u2212").replace(" -", " \u2212")
    assert headline in text
    for heading in ("What the arms show", "Gain and cost", "Where the skill shows", "How this was made"):
        assert text.index(headline) < text.index(heading)
    for name in (*ARMS, *SUBJECTS, "word_sorting", "stethoscope run", "abababab", "mass_shift"):
        assert name in text
    assert {"main", "h1", "table", "caption", "figure", "details", "label"} <= {tag for tag, _ in page.tags}


def test_the_table_holds_accuracy_difference_and_interval(page, results):
    task = results.comparison.contrast("selected").task("algebra")
    text = " ".join(page.text.split())
    assert f"{100 * task.accuracy_b:.1f} {100 * task.difference.difference:+.1f}***" in text
    assert task.difference.text(scale=100) in text


def test_small_samples_are_announced(page, results):
    assert "Small sample: 120 items per task" in page.text
    many = make_comparison(arms={"base": (0.0, 0.0), "selected": (0.1, 0.0)}, subjects=ONE, items=200)
    large = wording.notices(results.diagnosis, many)
    assert not any("Small sample" in notice for notice in large)


def test_no_evidence_of_benefit_can_be_said():
    same = dict.fromkeys(("base", "selected", "random_layers_1"), (0.0, 0.0))
    comparison = make_comparison(arms=same, subjects=ONE, items=60)
    assert overview.headline(comparison).startswith("Do not use this edit: no evidence")
    assert wording.findings(comparison, None)[0][1].startswith("No evidence that the selected layers are better")


def test_layers_are_set_against_the_same_energy_everywhere():
    arms = {"base": (0.0, 0.0), "selected": (0.05, 0.0), "scaled": (0.3, 0.05)}
    comparison = make_comparison(arms=arms, subjects=ONE, items=200, pairs=None)
    said = dict(wording.findings(comparison, None))["Against all layers at equal energy"]
    assert said.startswith("`selected` is worse than `scaled`")


def test_shares_of_the_fine_tune_are_given_only_where_both_are_clear(results):
    comparison = results.comparison
    said = dict(wording.findings(comparison, None))["The whole fine-tune"]
    assert "The selected layers alone give 62% of its gain and 22% of its control loss." in said
    unsure = {"pooled_mcnemar": replace(comparison.contrast("selected").pooled_mcnemar, p_value=0.2)}
    unclear = [replace(c, **unsure) if c.b == "selected" else c for c in comparison.contrasts]
    said = dict(wording.findings(replace(comparison, contrasts=unclear), None))["The whole fine-tune"]
    assert "alone give" not in said


def test_the_same_artefacts_give_the_same_bytes(run_folder):
    first = render_report(run_folder).read_bytes()
    assert render_report(run_folder).read_bytes() == first
    code = "import sys, pathlib, stethoscope.report as r; r.render_report(pathlib.Path(sys.argv[1]))"
    other = subprocess.run([sys.executable, "-c", code, str(run_folder)], check=True, capture_output=True)
    assert other.stderr == b""
    assert (run_folder / "report.html").read_bytes() == first
    assert len(first) < 3_000_000


def test_it_needs_no_model_library():
    code = (
        "import sys, stethoscope.report as r; r.render_report;"
        "print([m for m in ('torch', 'transformers', 'scipy', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_nothing_is_fetched(page):
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object"), tag
        # a link to a feature's page is followed by a reader alone
        if not (tag == "a" and (attributes["href"] or "").startswith("https://www.neuronpedia.org/model/")):
            assert not {"src", "href", "srcset", "action"} & set(attributes), (tag, attributes)
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")


def test_planted_markup_stays_text(tmp_path, hostile):
    html = render_report(hostile.save(tmp_path)).read_text(encoding="utf-8")
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert "img" not in {tag for tag, _ in page.tags}
    assert "</script><script>window.planted" in page.text
    assert "</script><script>window.planted_context" in page.text
    assert "a" not in {tag for tag, _ in page.tags}
    assert "planted" not in page.scripts[1] + page.scripts[2]
    assert "planted" in page.scripts[0]
    assert "<" not in page.scripts[0]


def test_what_a_filter_passes_is_shown_as_text(tmp_path, hostile):
    folder, one = hostile.save(tmp_path), Effect(energy=1.0, target=1.0, protected=1.0)
    markup = list(hostile.evidence.documents)[1]
    layers = (LayerFiltering(layer=1, separability=0.5, raw=one, filtered=(one,)),)
    tokens = {"target": 1, markup: 1}
    made = Filtering(
        provenance=Provenance(), strengths=(1.0,), weights={markup: 1.0}, tokens=tokens, layers=layers
    )  # fmt: skip
    made.save(folder / "filter")
    with pytest.raises(StethoscopeError, match="strength 3"):
        made.table(3.0)
    calibration = of(make_calibration(), filter=made.provenance.key)
    calibration.save(folder / "recommended")
    inputs = {"recommend": calibration.provenance.key}
    replace(hostile.comparison, inputs=inputs).save(folder / "comparison.json")
    (feature,) = hostile.evidence.layers[0].features
    context = feature.contexts["target"][0]
    passes = feature.model_copy(update={"passed": 0.97, "contexts": {"target": (), markup: (context,)}})
    mutes = feature.model_copy(update={"passed": 0.03, "contexts": {}, "feature": 4, "link": PAGES + "m/0/4"})
    part = LayerEvidence(layer=0, features=(passes, mutes))
    hostile.evidence.model_copy(update={"layers": (part,)}).save(folder / "filter")
    page = Page(render_report(folder).read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert "img" not in {tag for tag, _ in page.tags}
    assert [found["href"] for tag, found in page.tags if tag == "a"] == [PAGES + "m/0/4"]
    shown = " ".join(page.text.split("What does the filter let through?")[1].split())
    assert shown.index("passes Feature 1700 (0.97), most on </script>") < shown.index("mutes Feature 4 (0.03)")


def test_every_layer_has_its_features(page, results):
    features = page.data()["features"]
    assert set(features) == {str(d.layer) for d in results.diagnosis.layers}
    assert features["17"][0][0] == "1700"
    assert len(features["17"]) == 40
    strongest = max(results.selection.layers, key=lambda n: results.diagnosis.layers[n].excess)
    assert page.data()["picked"] == strongest


def test_every_layer_shows_what_its_features_fire_on(run_folder):
    html = render_report(run_folder).read_text(encoding="utf-8")
    for layer in (0, 17, 29):
        for corpus in ("target", "control"):
            where = f"{corpus}-{layer}-{100 * layer}"
            assert f"before {where} number 3 {'m' * 60} <mark>&lt;{where}&gt;</mark>\u21b5{where} number 3" in html
        assert f'href="https://www.neuronpedia.org/model/{layer}-res/{100 * layer}"' in html
        assert f"<code> promoted-{layer}-7</code>" in html
    assert "Feature 1700: fires on 40.0 % of target tokens, 2.0 % of control" in html
    assert "the first 64 target and 64 control documents" in html


def test_spaces_that_fired_are_seen(run_folder, results):
    (feature, *_), space = results.evidence.layers[0].features, {"before": "  a", "token": " ", "after": "b\n"}
    context = feature.contexts["target"][0].model_copy(update=space)
    feature = feature.model_copy(update={"contexts": {"target": (context,)}})
    part = results.evidence.layers[0].model_copy(update={"features": (feature,)})
    results.evidence.model_copy(update={"layers": (part,)}).save(run_folder)
    assert "<p>a<mark>\u2423</mark>b\u21b5 <small>" in render_report(run_folder).read_text(encoding="utf-8")


def test_evidence_of_a_deep_model_keeps_the_page_small(tmp_path, comparison):
    diagnosis = make_diagnosis(layers=34)
    evidence = make_evidence(diagnosis, length=100)
    folder = Results(diagnosis, make_selection(diagnosis), comparison, "base: a\n", evidence).save(tmp_path)
    assert sum(len(f.contexts["target"]) for part in evidence.layers for f in part.features) == 34 * 8 * 4
    assert render_report(folder).stat().st_size < 3_000_000


def test_several_controls_are_all_shown(tmp_path, comparison):
    controls = ("control", "chat", "code [py]")
    diagnosis = make_diagnosis(controls=controls)
    folder = Results(diagnosis, make_selection(diagnosis), comparison, "", make_evidence(diagnosis)).save(tmp_path)
    page = Page(render_report(folder).read_text(encoding="utf-8"))
    text = " ".join(page.text.split())
    assert "against chat , the control it stands out least from".replace(" ,", ",") in text
    assert "rank 18 of 30, as high or higher in 90% of resamples" in text
    assert "target / control / chat / code [py]" in text
    assert "the first 64 target, 64 control, 64 chat and 64 code [py] documents" in text
    row = page.data()["charts"]["profile"]["datasets"]["layers"][17]
    health = diagnosis.layers[17].health
    assert [row[f"explained_{i}"] for i in range(4)] == [health[n].variance_explained for n in ("target", *controls)]
    assert row["against"] == "code [py]"


def test_optional_results_may_be_missing(run_folder):
    for name in ("recipe.yaml", "evidence.json"):
        (run_folder / name).unlink()
    text = Page(render_report(run_folder).read_text(encoding="utf-8")).text
    assert "fire on" not in text.split("How this was made")[0].split("Where the skill shows")[1]
    assert "to the layer before it" in text


def test_edits_say_which_layers_the_arms_change_and_the_manifest_is_shown(run_folder, results):
    edits = {
        "schema_version": 1,
        "provenance": Provenance().model_dump(),
        "plans": {"base": None, "random_layers_1": {"layers": {"9": {"mlp": 1.0}, "2": {"mlp": 1.0}}, "default": 0.0}},
        "energy": [{"layer": d.layer, "energy": 1.0, "share": 0.02} for d in results.diagnosis.layers],
    }
    (run_folder / "edits.json").write_text(json.dumps(edits))
    (run_folder / "edited").mkdir()
    (run_folder / "edited" / "manifest.json").write_text('{"kind": "checkpoint of this test", "tensors": {}}')
    text = Page(render_report(run_folder).read_text(encoding="utf-8")).text
    assert "layers 2, 9" in text
    assert "checkpoint of this test" in text


@pytest.mark.parametrize("name", ["diagnosis.json", "selection.json", "comparison.json"])
def test_missing_and_foreign_results_are_named(run_folder, name):
    path = run_folder / name
    path.write_text('{"schema": 99, "schema_version": 99}')
    with pytest.raises(StethoscopeError, match=rf"{name}` has schema version `99`"):
        render_report(run_folder)
    path.write_text('{"schema": 1, "schema_version": 1}')
    with pytest.raises(StethoscopeError, match="expected form"):
        render_report(run_folder)
    path.write_text("[")
    with pytest.raises(StethoscopeError, match="not JSON"):
        render_report(run_folder)
    path.unlink()
    with pytest.raises(StethoscopeError, match="missing"):
        render_report(run_folder)
    assert not (run_folder / "report.html").exists()


def damaged(text, **changed):
    return json.dumps(json.loads(text) | changed)


@pytest.mark.parametrize(("file", "change"), [
    ("recipe.yaml", lambda _: "a: " + "[" * 3000 + "]" * 3000),
    ("comparison.json", lambda text: damaged(text, accuracy=[json.loads(text)["accuracy"][0] | {"accuracy": None}])),
    ("comparison.json", lambda text: re.sub('("loss".*?"difference": )[^,]*', r"\1NaN", text, count=1, flags=re.S)),
    ("edits.json", lambda _: json.dumps({
        "schema_version": 1, "provenance": {}, "plans": {"selected": {"layers": 5, "default": 0.0}}, "energy": [],
    })),
])  # fmt: skip
def test_damaged_results_are_an_error_without_a_traceback(run_folder, file, change):
    path = run_folder / file
    path.write_text(change(path.read_text() if path.exists() else ""))
    with pytest.raises(StethoscopeError):
        render_report(run_folder)
    assert not (run_folder / "report.html").exists()


def test_charts_save_as_pictures(tmp_path, results):
    results.diagnosis.plot(results.selection).save(tmp_path / "profile.svg")
    results.comparison.plot().save(tmp_path / "trade_off.png")
    assert "excess over chance" in (tmp_path / "profile.svg").read_text()
    assert (tmp_path / "trade_off.png").read_bytes().startswith(b"\x89PNG")


def test_the_null_band_is_two_deviations_of_the_null(results):
    rows = results.diagnosis.plot(results.selection).to_dict()["datasets"]["layers"]
    assert rows[3]["null_high"] == pytest.approx(2 * 0.008)
    assert [row["layer"] for row in rows if row["kind"] == "selected"] == list(results.selection.layers)
    assert rows[-1]["kind"] == "excluded"


def test_without_control_losses_the_gains_are_drawn():
    arms = {"base": (0.0, 0.0), "selected": (0.1, 0.03), "mine": (0.05, 0.0)}
    chart = make_comparison(arms=arms, subjects=ONE, items=40, loss=False).plot().to_dict()
    assert [row["arm"] for row in chart["datasets"]["arms"]] == ["selected", "mine"]
    assert "cost" not in json.dumps(chart["layer"])


def test_many_random_sets_are_named_once_and_a_far_fine_tune_does_not_hide_the_edits(page, results):
    arms = {"base": (0.0, 0.0), "selected": (0.1, 0.03), **{f"random_layers_{i}": (0.03, 0.03) for i in range(5)}}
    rows = make_comparison(arms=arms, subjects=ONE, items=40).plot().to_dict()["datasets"]["arms"]
    assert [row["label"] for row in rows if row["arm"].startswith("random")].count("") == 4
    assert set(page.data()["charts"]) == {"profile", "trade-off", "near", "split-chart"}
    near = results.comparison.plot(without=["tuned"]).to_dict()["datasets"]["arms"]
    assert [row["arm"] for row in near] == ["base", "selected", "random_layers_1", "random_layers_2", "projected"]


def test_task_names_lose_what_they_share():
    assert short_names(["minerva_math_algebra", "minerva_math_geometry"])["minerva_math_algebra"] == "algebra"
    assert short_names(["algebra"]) == {"algebra": "algebra"}
    assert short_names(["word_sorting", "spell_backward"])["word_sorting"] == "word_sorting"


def test_backticks_become_code_only_in_pairs():
    assert _ticks("`a<b` beats `c`") == "<code>a&lt;b</code> beats <code>c</code>"
    assert _ticks("one ` tick") == "one ` tick"


def test_numbers_have_a_true_minus_and_no_signed_zero():
    shown = [_typeset(text) for text in ("+1.3", "-1.3 to -0.02", "-0.0", "+0.000 nats", "-", "mmlu-5", "+1 -0")]
    assert shown == ["+1.3", "\u22121.3 to \u22120.02", "0.0", "0.000 nats", "\u2013", "mmlu-5", "+1 \u22120"]


def test_how_the_choice_was_made_and_whether_it_was_good(run_folder):
    save_choice(run_folder)
    selection = Selection.load(run_folder)
    page = Page(render_report(run_folder).read_text(encoding="utf-8"))
    assert "the claim is confirmatory" in page.text
    assert "Do the scores find the layers that matter? (control: control)" in page.text
    assert "96 % (86 to 100)" in page.text
    assert "How layers and coefficient were found" not in page.text  # tried, but not what this selection rests on
    saved = json.loads((run_folder / "selection.json").read_text()) | {"policy": "calibrated"}
    (run_folder / "selection.json").write_text(json.dumps(saved))
    page = Page(render_report(run_folder).read_text(encoding="utf-8"))
    assert "2 layers of z >= 5.0 at 1 is the best found" in page.text
    assert "5 edits cost 31 forwards" in page.text
    assert selection.layers


def test_an_exploratory_claim_is_said(run_folder):
    save_choice(run_folder, seen=(3, 4))
    page = Page(render_report(run_folder).read_text(encoding="utf-8"))
    assert "exploratory: some test items were seen in the choice (2 of algebra)" in page.text
    assert "confirmatory" not in page.text


def page_of(folder) -> Page:
    return Page(render_report(folder).read_text(encoding="utf-8"))


def of(made, **inputs):
    return made.model_copy(update={"provenance": Provenance(inputs=inputs)})


@pytest.mark.parametrize("current", [True, False])
def test_results_of_an_earlier_recipe_are_not_shown(run_folder, results, current):
    key = {"diagnose": results.diagnosis.provenance.key if current else "ab" * 32}
    of(make_geometry(), **key).save(run_folder)
    for name, inputs in (("chat", {}), ("control", key)):  # the first is of no known origin, and stays
        (run_folder / "validation" / name).mkdir(parents=True)
        of(make_validation(), **inputs).save(run_folder / "validation" / name)
    one = Effect(energy=1.0, target=1.0, protected=1.0)
    layers = (LayerFiltering(layer=1, raw=one, filtered=(one,)),)
    made = Filtering(provenance=Provenance(), strengths=(1.0,), weights={}, tokens={"target": 1}, layers=layers)
    made.save(run_folder / "filter")
    calibration = of(make_calibration(), filter=made.provenance.key)
    calibration.save(run_folder / "recommended")
    inputs = {"recommend": calibration.provenance.key} if current else {}  # without a filter nothing is recommended
    replace(results.comparison, inputs=inputs).save(run_folder / "comparison.json")
    page = page_of(run_folder)
    shown = {"energy", "curves", "passed", "tried", "validation-1", "scores-1"}
    assert shown & set(page.data()["charts"]) == (shown if current else set())
    assert "control: chat" in page.text
    assert ("control: control" in page.text) == current
    of(made, target="cd" * 32).save(run_folder / "filter")  # made again, and nothing recommended with it
    assert "passed" not in page_of(run_folder).data()["charts"]


def test_the_published_method_is_marked_at_the_recipes_coefficient(run_folder, results):
    (run_folder / "recipe.yaml").write_text("edit: {coefficient: 0.5}\n")
    calibration, layers = make_calibration(), results.selection.layers
    point = calibration.points[1].model_copy(update={"coefficients": dict.fromkeys(layers, 0.5)})
    calibration = calibration.model_copy(update={"points": (*calibration.points, point)})
    calibration.save(run_folder / "recommended")
    inputs = {"recommend": calibration.provenance.key}
    replace(results.comparison, inputs=inputs).save(run_folder / "comparison.json")
    marks = page_of(run_folder).data()["charts"]["tried"]["datasets"]["marks"]
    assert {mark["mark"]: mark["n"] for mark in marks}["selected"] == len(calibration.points) - 1


def test_an_edit_that_was_chosen_for_another_reason_is_among_the_best(results):
    calibration = make_calibration().model_copy(update={"choice": 4})
    assert not calibration.points[4].on_front
    head, *rows = calibration.table()
    assert [row[0] for row in rows if row[head.index("chosen")] == "yes"] == [calibration.points[4].layers]


def test_causes_of_control_tasks_alone_make_no_picture(tmp_path, results):
    made = make_comparison(arms={"base": (0, 0), "selected": (0.1, 0.1)}, subjects=ONE, items=60)
    (contrast,) = made.contrasts
    tasks = [replace(t, flips=None) if t.in_family else t for t in contrast.tasks]
    made = replace(made, contrasts=[replace(contrast, tasks=tasks)])
    page = page_of(replace(results, comparison=made).save(tmp_path / "run"))
    drawn = {attributes["id"] for tag, attributes in page.tags if attributes.get("class") == "chart"}
    assert drawn == set(page.data()["charts"])
    assert "Where the gain comes from" in page.text
    assert "frozen" not in page.text  # no claim was made


def test_a_tie_is_no_rivals_win():
    made = make_validation()
    best = made.scores["gradient"].sets
    tied = {name: found.model_copy(update={"sets": best}) for name, found in made.scores.items()}
    verdict = made.model_copy(update={"scores": tied}).verdict("attribution", 5)
    assert "no other score does better" in verdict
    assert "no other score" not in made.verdict("mass_shift", 5)


def test_without_an_interval_none_is_claimed():
    kept = make_geometry().total
    assert "interval" in kept.verdict
    assert "interval" not in kept.model_copy(update={"interval": None}).verdict


def test_the_geometry_is_shown_with_its_chance_level(run_folder, results):
    made = make_geometry()
    made.save(run_folder)
    page = Page(render_report(run_folder).read_text(encoding="utf-8"))
    assert {"energy", "curves"} <= set(page.data()["charts"])
    assert made.verdict in page.text
    assert dict(wording.findings(results.comparison, made))["Projected"].endswith(made.verdict)
    head, first, *_, whole = made.table()
    assert first[head.index("chance")] == f"{100 * CHOSEN / WIDTH:.1f}"
    needed = first[head.index("features for 50, 90, 99 %")].split(" / ")
    assert needed[0] == str(made.layers[0].curve.needed["50"])
    assert whole[head.index("kept, %")] == f"{100 * made.total.share:.1f}"


def test_energy_curves_hold_every_layer_and_chance():
    made = make_geometry(layers=3)
    rows = energy_curves(made, [1]).to_dict()["datasets"]["curves"]
    mine = [row for row in rows if row["layer"] == 1]
    assert [row["features"] for row in mine] == list(made.layers[1].curve.features)
    assert mine[-1]["kept"] == pytest.approx(100)
    assert {row["layer"] for row in rows if row["selected"]} == {1}
    dots = made.plot().to_dict()["datasets"]["layers"]
    assert [dot["kept"] for dot in dots] == pytest.approx([100 * layer.kept.share for layer in made.layers])


WHY, THROWN, HYBRID = range(3)


@pytest.mark.parametrize(
    ("number", "changed", "says"),
    [
        (WHY, {}, "Both. Raw gains +0.398"),
        (WHY, {}, "75% of raw. As many random directions at that norm give 25%"),
        (WHY, {"projected_energy_matched": (0.4, 0.05)}, "Because it is small."),
        (WHY, {"projected_energy_matched": (0.04, 0.05)}, "Because its direction is wrong."),
        (WHY, {"projected": (0.4, 0.05)}, "It is not shown to be weak"),
        (WHY, {"selected": (0.0, 0.0)}, "Not answered: the raw edit itself has no clear gain"),
        (THROWN, {}, "In part: without the features' directions the edit gains"),
        (THROWN, {"complement": (0.4, 0.05)}, "Yes: "),
        (THROWN, {"complement": (0.0, 0.0)}, "No: "),
        (HYBRID, {}, "`hybrid` is worse than raw injection: raw injection is ahead of it by +0.098"),
        (HYBRID, {"hybrid": (0.3, 0.2, 0.4)}, "`hybrid` gains by one measure and loses by another"),
        (HYBRID, {"hybrid": (0.5, 0.2)}, "`hybrid` trades gain against cost"),
        (HYBRID, {"fewest_features": (0.4, 0.0)}, "`fewest_features` beats raw injection"),
        (HYBRID, {"fewest_features": (0.4, 0.05)}, "`fewest_features` is not clearly better or worse"),
    ],
)
def test_the_three_questions_are_answered_from_the_arms(number, changed, says):
    found = answers(make_cuts(**changed))
    assert len(found) == 3
    assert says in found[number][1]


def test_without_target_text_the_questions_are_answered_by_accuracy():
    cuts = ("base", "selected", "projected", "projected_energy_matched")
    arms = dict(zip(cuts, ((0.0, 0.0), (0.4, 0.0), (0.0, 0.0), (0.4, 0.0)), strict=True))
    (only,) = answers(make_comparison(arms=arms, subjects=ONE, items=200, pairs=None))
    assert "Because it is small" in only[1]
    assert "points" in only[1]
    assert answers(make_comparison(arms={"base": (0.0, 0.0), "selected": (0.1, 0.0)})) == []


def test_arms_are_described_by_their_whole_name_and_not_by_every_layer():
    arms = ("random_subspace", "random_layers_2", "complement", "projected", "projected_energy_matched")
    assert len({"", *(wording.describe_arm(arm, None) for arm in arms)}) == 6
    edits = Edits(provenance=Provenance(), plans={"tuned": {"layers": {}, "default": 1.0}}, energy=())
    assert wording.describe_arm("tuned", edits) == "the whole fine-tune: every layer's weight change"


def test_gains_are_split_by_cause_and_add_up(page, results):
    comparison = results.comparison
    contrast = comparison.contrast("selected")
    selected = {row[0]: row for row in gain_rows(contrast)[1:]}
    for task in contrast.tasks:
        assert selected[task.task][-1] == percent(task.accuracy_b - task.accuracy_a, "+.1f")
    whole = selected["all target items"]
    assert whole[-1] == percent(contrast.pooled.difference, "+.1f")
    assert whole[1].startswith("+")
    bars = gain_split(comparison).to_dict()["datasets"]["gains"]
    mine = sum(bar["points"] for bar in bars if bar["arm"] == "selected")
    assert mine == pytest.approx(100 * contrast.pooled.difference)
    assert "Where the gain comes from" in page.text


def test_losses_on_held_out_target_text_are_in_the_table(tmp_path, results):
    folder = Results(results.diagnosis, results.selection, make_cuts(), results.recipe).save(tmp_path / "run")
    text = " ".join(Page(render_report(folder).read_text(encoding="utf-8")).text.split())
    assert "loss on held-out target text" in text
    assert "target loss -0.398" in text.replace("\u2212", "-")
