"""The write-up follows from the raw outcomes, and its measures are what they are called."""

import numpy as np
import pandas as pd
import pytest
import results


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
