"""Calibration chooses exactly the planted layers at any depth, obeys budget and standard error, and counts its cost."""

import json

import numpy as np
import pytest
from world import Planted, plant

from stethoscope.artifacts import Provenance
from stethoscope.editing.layers import LayerEdits
from stethoscope.errors import StethoscopeError
from stethoscope.models.load import decoder_layers
from stethoscope.results.calibration import Calibration
from stethoscope.selection.calibrate import calibrate
from stethoscope.selection.injection import Gains, measure, standard_error

MEASURE = "stethoscope.selection.calibrate.measure"
SEEN = {"target": "a" * 64, "control": "b" * 64}


def z_of(made: Planted, seed: int = 0) -> dict[int, float]:
    """Planted layers stand far above chance; the others are what chance gives."""
    noise = np.random.default_rng(seed).normal(size=len(decoder_layers(made.model)))
    return {layer: float(noise[layer]) + (8 if layer in made.layers else 0) for layer in range(len(noise))}


def run(made: Planted, z: dict[int, float], **options) -> Calibration:
    edits = LayerEdits(made.model, made.task_vector)
    return calibrate(made.model, edits, made.texts, z, seen=SEEN, provenance=Provenance(), **options)


@pytest.fixture(scope="module")
def planted(tmp_path_factory, tokenizer) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"), tokenizer, count=8, batch_tokens=4096)


@pytest.mark.parametrize(
    ("family", "depth", "layers"), [("Gemma3", 6, (2, 3)), ("Llama", 12, (2, 7)), ("Llama", 24, (5, 14, 16))]
)
def test_the_planted_layers_are_chosen_at_any_depth(family, depth, layers, tmp_path, tokenizer):
    made = plant(
        tmp_path, tokenizer, family=family, depth=depth, layers=layers, seed=depth, count=16, batch_tokens=4096
    )
    found = run(made, z_of(made))
    assert tuple(found.coefficients) == layers
    assert 5 < found.points[found.choice].threshold < 12
    assert found.forwards <= 45


def test_points_are_true_errors_are_paired_and_all_survives_the_disk(planted, tmp_path):
    found = run(planted, z_of(planted), coefficients=(0.5, 1.0))
    found.save(tmp_path)
    assert Calibration.load(tmp_path) == found
    assert json.loads((tmp_path / "calibration.json").read_text())["seen"] == SEEN
    edits = LayerEdits(planted.model, planted.task_vector)
    truth = measure(planted.model, edits, planted.texts, [point.coefficients for point in found.points])
    for i, point in enumerate(found.points):
        assert point.target_gain == pytest.approx(truth.mean("target")[i])
        assert point.target_error == pytest.approx(standard_error(truth.sums["target"], truth.tokens["target"])[i])
        assert point.control_cost == pytest.approx(-truth.mean("control")[i])
        assert point.control_increase == pytest.approx(point.control_cost / found.base_loss["control"])
    front = sorted((point for point in found.points if point.on_front), key=lambda point: point.control_cost)
    costs = [point.control_cost for point in front]
    gains = [point.target_gain for point in front]
    assert costs == sorted(costs)
    assert gains == sorted(gains)
    for point in found.points:
        if point not in front:
            assert any(p.target_gain >= point.target_gain and p.control_cost <= point.control_cost for p in front)


@pytest.mark.parametrize("most", [6.0, 60.0])
def test_forwards_are_what_was_run(planted, most):
    runs = []
    handles = [
        block.self_attn.register_forward_hook(lambda *_: runs.append(1)) for block in decoder_layers(planted.model)
    ]
    found = run(planted, z_of(planted), most_forwards=most)
    for handle in handles:
        handle.remove()
    assert found.forwards == pytest.approx(len(runs) / 6 / sum(map(len, planted.texts.values())))
    assert 2 < found.forwards <= most


def test_layers_without_the_skill_are_not_chosen(planted):
    z = {layer: 5.0 for layer in range(6) if layer not in planted.layers}
    found = run(planted, z, coefficients=(0.5, 1.0))
    assert found.coefficients == {}
    assert found.points[found.choice].threshold is None
    assert found.reason.startswith("no edit")


def closed_form(gain, cost, *, spread=0.0, units=16):
    """A `measure` in which effects are known functions of the coefficients."""

    def known(_model, _edits, _texts, changes, **_where):
        wobble = np.linspace(-1, 1, units)[:, None]
        target = np.array([[gain(change) for change in changes]]) * (1 + spread * wobble)
        control = -np.array([[cost(change) for change in changes]]) * np.ones((units, 1))
        tokens = {name: np.ones(units, dtype=np.int64) for name in SEEN}
        losses = {name: np.full(units, 2.0) for name in SEEN}
        return Gains(changes=tuple(changes), sums={"target": target, "control": control}, losses=losses, tokens=tokens)

    return known


def test_the_budget_decides_how_much_is_bought(planted, monkeypatch):
    monkeypatch.setattr(MEASURE, closed_form(lambda c: sum(c.values()), lambda c: 0.01 * sum(c.values()) ** 2))
    z = {layer: 6.0 - layer for layer in range(6)}
    for budget, most in ((0.005, 1.0), (0.02, 2.0), (0.1, 4.0)):
        found = run(planted, z, budget=budget)
        choice = found.points[found.choice]
        assert choice.control_increase <= budget
        assert choice.target_gain > 0.8 * most
    assert run(planted, z, budget=0.0).coefficients == {}


def test_what_is_not_clearly_better_is_not_bought(planted, monkeypatch):
    gains = [0, 0.8, 0.99, 1.0, 1.0, 1.0, 0.9]
    z = {layer: 6.0 - layer for layer in range(6)}

    def gain(change):
        return gains[len(change)] * (1 - (max(change.values()) - 1) ** 2)

    for spread, size in ((0.0, 3), (0.5, 2), (30.0, 0)):
        # the paired error of a difference is about spread * difference / 6.6, so it hides one below a tenth at 0.5
        known = closed_form(gain, lambda c: 1e-6 * len(c), spread=spread)
        noisy = np.random.default_rng(0).normal(scale=0.05 * bool(spread), size=(16, 7))

        def with_noise(*args, known=known, noisy=noisy, **where):
            found = known(*args, **where)
            found.sums["target"][:] += np.stack([noisy[:, len(c)] - noisy[:, len(c)].mean() for c in args[3]], axis=1)
            return found

        monkeypatch.setattr(MEASURE, with_noise)
        assert len(run(planted, z).coefficients) == size


def test_each_layer_gets_its_own_coefficient_if_asked(planted, monkeypatch):
    ideal = {0: 0.5, 1: 1.0, 2: 1.5}

    def gain(change):
        return sum(ideal.get(n, 0) ** 2 - (c - ideal.get(n, 0)) ** 2 for n, c in change.items())

    monkeypatch.setattr(MEASURE, closed_form(gain, lambda _: 0.0))
    z = {layer: 6.0 - layer for layer in range(6)}
    assert len(set(run(planted, z).coefficients.values())) == 1
    found = run(planted, z, per_layer=True)
    assert found.coefficients == ideal
    assert "one layer's coefficient at a time" in found.rule
    assert found.forwards <= 60


def test_all_that_is_wrong_is_said_at_once(planted):
    edits = LayerEdits(planted.model, planted.task_vector)
    texts, z = {"target": planted.texts["target"]}, {9: 1.0, 0: float("nan")}
    options = {"seen": {}, "provenance": Provenance(), "coefficients": (-1.0,), "budget": -0.1}
    with pytest.raises(StethoscopeError, match="cannot calibrate") as caught:
        calibrate(planted.model, edits, texts, z, **options)
    said = str(caught.value)
    for wanted in ("control text has fewer", "target text has no hash", "layer 9", "layer 0", "-1.0", "-0.1"):
        assert wanted in said
    with pytest.raises(StethoscopeError, match="too few"):
        run(planted, {0: 1.0}, most_forwards=1.5)
