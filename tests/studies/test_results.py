"""The write-up follows from the raw outcomes, and its measures are what they are called."""

import numpy as np
import pandas as pd
import pytest
import results

from stethoscope.results.paired import PairedDifference
from stethoscope.results.validation import Beaten


@pytest.mark.timeout(600)
def test_every_number_follows_from_the_outcomes():
    assert results.render() == (results.HERE / "RESULTS.md").read_text(encoding="utf-8")


def test_the_share_beaten_is_the_one_that_the_product_found():
    for kind in ("equal_size", "equal_energy"):
        found = results.chances("choice", f"random, {kind.replace('_', ' ')}")
        for vector, beaten in found.items():
            (own,) = results.pick("choice", vector=vector, set="score", score="mass_shift", k=5).to_dict("records")
            said = [own[f"beats_{kind}_{part}"] for part in ("share", "low", "high")]
            assert (beaten.share, beaten.low, beaten.high) == pytest.approx(said)


def test_energy_that_explains_all_leaves_no_choice(monkeypatch):
    energy = np.linspace(0.1, 0.5, 21)
    made = pd.DataFrame({"vector": "code", "set": "random, equal size", "k": 5, "score": None, "energy": energy})
    made = pd.concat([made, pd.DataFrame([{"vector": "code", "set": "score", "k": 5, "score": "big", "energy": 0.9}])])
    made = made.assign(gain=2 * made.energy, cost=0.0)
    made.loc[made.set != "score", "gain"] += np.tile([0.01, -0.01, 0.0], 7)
    made = made.assign(worth=made.gain - made.cost)
    monkeypatch.setattr(results, "table", lambda _name: made)
    assert results.adjusted(5).loc["big", "code"] == pytest.approx(0.5, abs=0.2)


def test_a_difference_the_other_way_round_has_its_interval_turned():
    found = PairedDifference(
        n=10, clusters=10, difference=0.05, low=-0.01, high=0.08, standard_error=0.02, confidence=0.95, method="by hand"
    )
    assert results.points(found) == "+5.0 (-1.0 to +8.0)"
    assert results.points(found, flip=True) == "-5.0 (-8.0 to +1.0)"


def test_the_share_of_drawn_sets_beaten_has_its_exact_interval():
    found = Beaten.of(0.5, np.linspace(0.0, 1.0, 101).tolist())
    assert (found.share, found.low, found.high) == pytest.approx((50 / 101, 0.394, 0.596), abs=1e-3)


def test_spread_is_judged_beside_both_kinds_of_chance():
    own = results.pick("spread", vector="words", k=5, set="score", score="mass_shift").worth.item()
    random = results.pick("choice", vector="words", k=5, set="random, equal size")
    segmented = results.pick("spread", vector="words", k=5, set=results.ONE_A_SEGMENT)
    assert {len(layers) for layers in segmented.layers} == {5}
    assert all(layer // 6 == place for layers in segmented.layers for place, layer in enumerate(layers))
    for chance, drawn in (("random, equal size", random), (results.ONE_A_SEGMENT, segmented)):
        assert len(drawn) == 100
        assert results.chances("spread", chance)["words"].share == pytest.approx((own > drawn.worth).mean())
