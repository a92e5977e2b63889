"""The write-up follows from the raw outcomes, and its measures are what they are called."""

import numpy as np
import pandas as pd
import pytest
import results

from stethoscope.results.comparison import PairedDifference
from stethoscope.results.hearing import Beaten


@pytest.mark.timeout(600)
def test_every_number_follows_from_the_outcomes() -> None:
    assert results.render() == (results.HERE / "RESULTS.md").read_text(encoding="utf-8")


def test_the_share_beaten_is_counted_from_the_random_sets() -> None:
    found = results.scores().query("k == 5")
    for vector in results.vectors_of("choice"):
        here = found[found.vector == vector]
        own = here[(here.set == "score") & (here.score == "mass_shift")].iloc[0]
        for kind in ("equal_size", "equal_energy"):
            drawn = here[here.set == f"random, {kind.replace('_', ' ')}"]
            assert len(drawn) == 100
            assert own[f"beats_{kind}_share"] == pytest.approx((own.worth > drawn.worth).mean())


def test_energy_that_explains_all_leaves_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    energy = np.linspace(0.1, 0.5, 21)
    made = pd.DataFrame({"vector": "code", "set": "random, equal size", "k": 5, "score": None, "energy": energy})
    made = pd.concat([made, pd.DataFrame([{"vector": "code", "set": "score", "k": 5, "score": "big", "energy": 0.9}])])
    made = made.assign(gain=2 * made.energy, cost=0.0)
    made.loc[made.set != "score", "gain"] += np.tile([0.01, -0.01, 0.0], 7)
    monkeypatch.setattr(results, "table", lambda _name: made)
    assert results.adjusted(5).loc["big", "code"] == pytest.approx(0.5, abs=0.2)


def test_a_difference_the_other_way_round_has_its_interval_turned() -> None:
    found = PairedDifference(
        n=10, clusters=10, difference=0.05, low=-0.01, high=0.08, standard_error=0.02, confidence=0.95, method="by hand"
    )
    assert results.points(found) == "+5.0 (-1.0 to +8.0)"
    assert results.points(found, flip=True) == "-5.0 (-8.0 to +1.0)"


def test_the_share_of_drawn_sets_beaten_has_its_exact_interval() -> None:
    found = Beaten.of(0.5, np.linspace(0.0, 1.0, 101).tolist())
    assert (found.share, found.low, found.high) == pytest.approx((50 / 101, 0.394, 0.596), abs=1e-3)


def test_spread_is_judged_beside_both_kinds_of_chance() -> None:
    found = results.table("spread").query("vector == 'words' and k == 5").assign(worth=lambda f: f.gain - f.cost)
    own = found[found.score == "mass_shift"].query("set == 'score'").worth.iloc[0]
    random = results.scores().query("vector == 'words' and k == 5 and set == 'random, equal size'")
    row = results.spread_primary().set_index("vector").loc["words"]
    assert row["beats random layers"].startswith(f"{100 * (own > random.worth).mean():.0f} %")
    stretched = found[found.set == "random, one a stretch"]
    assert {len(layers) for layers in stretched.layers} == {5}
    assert all(layer // 6 == place for layers in stretched.layers for place, layer in enumerate(layers))
    assert row["beats random ones of each stretch"].startswith(f"{100 * (own > stretched.worth).mean():.0f} %")
