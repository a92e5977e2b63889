"""The trade-off as curves: what is read off a curve, and the command that measures every method."""

import json
import shutil

import numpy as np
import pytest
from world import changed

from stethoscope.artifacts import Provenance
from stethoscope.cli import main
from stethoscope.editing.rivals import WHOLE, Method, rivals
from stethoscope.evaluation.outcomes import PerDocument
from stethoscope.report import render_report
from stethoscope.results.tradeoff import TradeOff
from stethoscope.tradeoff import falls, figures, interval, measure_tradeoff, share_kept


def curve(*values):
    """The same in every draw."""
    return np.tile(np.array(values, dtype=np.float64), (5, 1))


def least_damage(kept, damage):
    return figures(kept, damage)[0]


def most_kept(kept, damage):
    return figures(kept, damage)[1]


def test_figures_are_read_off_between_points():
    kept, damage = curve(1.0, 0.9, 0.5, 0.0), curve(0.4, 0.2, 0.0, 0.0)
    found = least_damage(kept, damage)
    assert found.value == pytest.approx(0.3)
    assert (found.low, found.high, found.reason) == (found.value, found.value, "")
    assert most_kept(kept, damage).value == pytest.approx(0.52)
    assert least_damage(kept[:, :2], damage[:, :2]).value == found.value


def test_a_curve_that_turns_gives_its_best_place():
    assert least_damage(curve(0.96, 0.99, 0.97), curve(0.5, 0.1, 0.2)).value == pytest.approx(0.1)
    assert most_kept(curve(1.0, 0.2, 0.6), curve(0.5, -0.1, 0.05)).value == pytest.approx(0.2 + 0.4 * 0.11 / 0.15)


def test_what_no_setting_reaches_is_none_with_a_reason():
    found = least_damage(curve(0.9, 0.5), curve(0.1, 0.0))
    assert (found.value, found.low, found.high) == (None, None, None)
    assert "95 %" in found.reason
    found = most_kept(curve(1.0, 0.5), curve(0.4, 0.02))
    assert found.value is None
    assert "0.01" in found.reason
    assert least_damage(curve(np.nan, np.nan), curve(0.1, 0.0)).value is None


def test_where_there_is_no_gain_that_is_the_reason():
    kept, damage = curve(np.nan, np.nan), curve(0.1, 0.0)
    for found in figures(kept, damage):
        assert found.value is None
        assert "gains nothing" in found.reason


def test_resamples_that_miss_leave_the_interval_open():
    kept, damage = curve(0.97, 0.5), curve(0.1, 0.0)
    kept[3:, 0] = 0.9
    found = least_damage(kept, damage)
    assert found.value == pytest.approx(0.1 * 0.45 / 0.47)
    assert found.low is not None
    assert found.high is None
    assert most_kept(kept, damage).low is not None


@pytest.fixture(scope="module")
def measured(planted) -> TradeOff:
    rows = {}
    for name, kind in {"target": "target", "general": "control"}.items():
        found = {}
        for batch in planted.texts[kind]:
            real = zip(batch.documents, batch.input_ids, batch.attention_mask, strict=True)
            found |= {i: ids[mask].tolist() for i, ids, mask in real}
        rows[name] = [found[i] for i in sorted(found)], None
    rows["more"] = rows["general"]
    methods = [one for one in rivals(6, {}) if one.name in ("scaled", "TIES")]
    methods.append(Method("filter", "strength", {0.0: WHOLE, 1.0: None}))
    return measure_tradeoff(planted.model, planted.task_vector, methods, rows, provenance=Provenance(seed=1))


def test_curves_go_from_the_fine_tune_to_the_base(measured, tmp_path):
    assert measured.gain.low > 0
    for method in measured.methods.values():
        first, *_, last = method.points
        assert (first.kept.value, first.kept.low, first.kept.high) == (1, 1, 1)
        assert (last.kept.value, last.damage["general"].value) == (0, 0)
        for text in ("general", "more"):
            assert method.damage[text].low <= method.damage[text].value <= method.damage[text].high
            assert method.kept[text].value >= 0
    scaled = measured.methods["scaled"]
    assert [point.value for point in scaled.points] == [n / 10 for n in range(10, -1, -1)]
    assert scaled.points[5].kept.value > 0.6  # half of the change is more than half of the gain
    assert scaled.damage["general"] != measured.methods["TIES"].damage["general"]
    measured.save(tmp_path)
    assert TradeOff.load(tmp_path) == measured


def test_a_figure_and_its_draws_come_from_the_whole_curve():
    """A straight line between fine-tune and base: 5 % less gain is 5 % less damage, in every draw of documents."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 50, 30)
    base = PerDocument(sums=3.0 * tokens, tokens=tokens)
    better, worse = (
        PerDocument(sums=base.sums + tokens * rng.normal(by, 0.1, 30), tokens=tokens) for by in (-0.5, 0.3)
    )
    losses = {"whole": {"target": better, "general": worse}, "base": {"target": base, "general": base}}
    drawn = falls(losses, losses["base"], seed=1)
    assert drawn["whole"]["target"][0] == pytest.approx((base.sums - better.sums).sum() / tokens.sum())
    shares = [share_kept(drawn[name]["target"], drawn["whole"]["target"]) for name in losses]
    damages = [-drawn[name]["general"] for name in losses]
    whole = interval(damages[0])
    assert 0.2 < whole.low < whole.value < whole.high < 0.4
    least, most = figures(np.stack(shares, axis=1), np.stack(damages, axis=1))
    for end in ("value", "low", "high"):
        assert getattr(least, end) == pytest.approx(0.95 * getattr(whole, end))
    found = (most.value, most.low, most.high)
    assert found == pytest.approx((0.01 / whole.value, 0.01 / whole.high, 0.01 / whole.low))
    assert (shares[0][1:] == 1).all()


def test_it_says_and_shows_what_was_measured(measured):
    assert measured.verdict.startswith("With 95 % of the fine-tune's gain kept, the filter changes the loss by ")
    assert "on general and `" in measured.verdict
    head, *rows = measured.table()
    assert [row[0] for row in rows] == list(measured.methods)
    assert head[1:] == [
        "damage on general at 95 % kept", "damage on more at 95 % kept", "kept, %, at 0.01 on general",
        "kept, %, at 0.01 on more",
    ]  # fmt: skip
    frame = measured.to_frame()
    assert len(frame) == 2 * sum(len(one.points) for one in measured.methods.values())
    assert set(frame["text"]) == {"general", "more"}
    points = measured.plot("more").to_dict()["datasets"]["points"]
    assert {point["method"] for point in points} == set(measured.methods)
    assert {point["text"] for point in points} == {"more"}


def test_no_gain_is_no_evidence(planted, measured):
    none = measured.model_copy(update={"gain": measured.gain.model_copy(update={"low": -0.1})})
    assert "No evidence" in none.verdict


def test_the_command_measures_every_method(world, tmp_path, capsys):
    options = {"documents": 6, "strengths": [3.0, 0.3]}
    target = {"target": {"dataset": str(world / "data/calibration-math.jsonl")}}
    path = changed(world, tmp_path, target, tradeoff=options)
    main(["tradeoff", str(path), "--out", str(tmp_path / "run"), "--json", "--quiet"])
    found = TradeOff.model_validate_json(capsys.readouterr().out)
    assert list(found.methods) == [
        "filter", "filter, selected layers", "raw, best layers", "scaled", "LiNeS", "DG-Hard", "AIM", "TIES", "DARE",
        "SAE projection",
    ]  # fmt: skip
    assert found.documents == {"target": 6, "general": 6}
    assert [point.value for point in found.methods["filter"].points] == [0, 0.3, 3]
    best = found.methods["raw, best layers"].points
    assert [point.value for point in best] == [4, 3, 2, 1, 0]
    assert best[0].damage == found.methods["scaled"].points[0].damage  # an adapter changes no tensor outside the layers
    assert not list((tmp_path / "run").glob(".filters*"))
    main(["tradeoff", str(path), "--out", str(tmp_path / "run"), "--quiet"])
    shown = capsys.readouterr().out.splitlines()
    assert found.verdict in shown
    assert f"wrote {tmp_path / 'run' / 'tradeoff.json'}" in shown


def test_without_texts_of_their_own_there_is_no_trade_off(world, tmp_path, capsys):
    path = changed(world, tmp_path, {"control": None})
    with pytest.raises(SystemExit) as stopped:
        main(["tradeoff", str(path), "--out", str(tmp_path / "run"), "--quiet"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n  - ") == 2
    assert "`evaluate.target`" in said


def test_the_report_shows_a_chart_per_protected_text(measured, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    assert "What each method keeps" not in render_report(run).read_text(encoding="utf-8")
    measured.save(run)
    page = render_report(run).read_text(encoding="utf-8")
    for n in (0, 1):
        assert f'id="methods-{n}"' in page
        assert f'"methods-{n}"' in page.replace(f'id="methods-{n}"', "")
    assert measured.verdict.split(",")[0].replace("'", "&#39;") in page
    assert json.loads((run / "tradeoff.json").read_text())["documents"] == measured.documents
