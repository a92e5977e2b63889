"""The write-up: every number in `RESULTS.md` from the raw outcomes in `outcomes/`.

    python studies/results.py [--check]

`RESULTS.md.j2` has the words; tables and figures are put in here. `--check` writes nothing and fails where the text
would change.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import altair as alt
import jinja2
import numpy as np
import pandas as pd
from common import NAMES, OUTCOMES, TEXTS
from scipy.stats import linregress, spearmanr

from stethoscope.evaluation import DocumentLosses, Outcomes, compare
from stethoscope.evaluation.inference import ratio_difference
from stethoscope.results.comparison import Comparison, Contrast, PairedDifference
from stethoscope.results.hearing import Beaten

HERE = Path(__file__).parent
PRIMARY, K = "mass_shift", 5
SIZES = (3, 5, 8, 15)
CONTROL_TASKS = ("stethoscope_word_sorting", "stethoscope_letter_counting")
CHANGES = {"falls": "target loss falls by", "rises": "general loss"}
ARMS = {"random_layers_1": "random 1", "random_layers_2": "random 2"}  # as the tables call them


@cache
def table(name: str) -> pd.DataFrame:
    """A study's outcomes."""
    return pd.read_parquet(OUTCOMES / f"{name}.parquet")


def have(name: str) -> bool:
    """Whether a study has been run."""
    return (OUTCOMES / f"{name}.parquet").exists()


def markdown(frame: pd.DataFrame) -> str:
    """A Markdown table; the first column to the left, numbers to the right."""
    rows = [
        list(map(str, frame.columns)),
        ["---", *["---:"] * (frame.shape[1] - 1)],
        *frame.astype(str).values.tolist(),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def percent(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """A share, with its interval."""
    if value is None or np.isnan(value):
        return ""
    return f"{100 * value:.0f} %" + (
        f" ({100 * low:.0f} to {100 * high:.0f})" if low is not None and high is not None else ""
    )


def nats(found: PairedDifference | None, *, falls: bool = False) -> str:
    """A change of loss, or by how much it falls, with its interval."""
    return _difference(found, -1 if falls else 1, "+.3f")


def points(found: PairedDifference | None, *, flip: bool = False) -> str:
    """A difference of accuracy in points, or the same the other way round, with its interval."""
    return _difference(found, -100 if flip else 100, "+.1f")


def _difference(found: PairedDifference | None, scale: float, form: str) -> str:
    if found is None:
        return ""
    ends = sorted(scale * end for end in (found.low, found.high) if end is not None)
    return f"{scale * found.difference:{form}}" + (f" ({ends[0]:{form}} to {ends[1]:{form}})" if ends else "")


def vectors_of(study: str) -> list[str]:
    """The vectors of a study's outcomes so far."""
    return _vectors(table(study)) if have(study) else []


# 1: the choice


def scores() -> pd.DataFrame:
    """Every score's sets, with their trade-off."""
    found = table("choice")
    return found.assign(worth=found.gain - found.cost)


def primary() -> pd.DataFrame:
    """The primary measure by vector and size."""
    found = scores().query("set == 'score' and score == @PRIMARY and k in @SIZES")
    rows = []
    for vector in _vectors(found):
        for _, one in found[found.vector == vector].sort_values("k").iterrows():
            rows.append(
                {
                    "vector": vector,
                    "layers": f"{one.k}: {', '.join(map(str, one.layers))}" if one.k <= K else f"{one.k}",
                    "gain": f"{one.gain:+.3f}",
                    "cost": f"{one.cost:+.3f}",
                    "beats, equal size": percent(
                        one.beats_equal_size_share, one.beats_equal_size_low, one.beats_equal_size_high
                    ),
                    "beats, equal energy": percent(
                        one.beats_equal_energy_share, one.beats_equal_energy_low, one.beats_equal_energy_high
                    ),
                }
            )
    return pd.DataFrame(rows)


def claims(k: int = K, kind: str = "equal_size") -> dict[str, str]:
    """How `mass_shift` chooses beside chance, by vector: better, worse, or neither is shown."""
    found = scores().query("set == 'score' and score == @PRIMARY and k == @k").set_index("vector")
    lows, highs = found[f"beats_{kind}_low"], found[f"beats_{kind}_high"]
    return {vector: _claim(lows[vector], highs[vector]) for vector in vectors_of("choice")}


def _claim(low: float, high: float) -> str:
    return "better" if low > 0.5 else "worse" if high < 0.5 else "neither"


def those(found: Mapping[str, str], what: str) -> str:
    """The vectors of which something was found."""
    return ", ".join(f"`{vector}`" for vector, one in found.items() if one == what) or "none"


def beats(vector: str, k: int = K, score: str = PRIMARY, kind: str = "equal_size") -> str:
    """The share of random sets that a score's set beats, with its interval."""
    (one,) = scores().query("set == 'score' and score == @score and k == @k and vector == @vector").to_dict("records")
    return percent(*(one[f"beats_{kind}_{part}"] for part in ("share", "low", "high")))


def every_score(k: int = K) -> pd.DataFrame:
    """The share of random sets of equal size that each score's set beats, by vector; the best on average first."""
    found = scores().query("set == 'score' and k == @k")
    shares, lows = (
        found.pivot_table(index=["score", "kind"], columns="vector", values=f"beats_equal_size_{part}")
        for part in ("share", "low")
    )
    shares = shares[[name for name in NAMES if name in shares]]
    residual = adjusted(k).reindex(shares.index.get_level_values("score"))
    order = (-shares.mean(axis=1)).sort_values(kind="stable").index
    rows = []
    for score, kind in order:
        one = shares.loc[score, kind]
        worst = lows.loc[score, kind].min()
        rows.append(
            {
                "score": score,
                "kind": kind,
                **{vector: percent(share) for vector, share in one.items()},
                "mean": percent(one.mean()),
                "mean, energy accounted for": percent(residual.loc[score].mean()),
                "least lower end": percent(worst),
            }
        )
    return pd.DataFrame(rows)


def nearest(k: int = K) -> dict[str, str]:
    """The score, but for the truth, whose least lower end is highest."""
    found = [row for row in every_score(k).to_dict("records") if row["kind"] != "truth"]
    best = max(found, key=lambda row: int(row["least lower end"].split()[0]))
    return {str(name): str(value) for name, value in best.items()}


def adjusted(k: int) -> pd.DataFrame:
    """The same share after the straight line of trade-off on energy over all random sets is taken off; exploratory."""
    found = scores().query("k == @k")
    shares: dict[str, dict[str, float]] = {}
    for vector in _vectors(found):
        here = found[found.vector == vector]
        drawn, judged = here[here.set.str.startswith("random")], here[here.set == "score"]
        line = linregress(drawn.energy, drawn.worth)
        rest = (drawn.worth - line.slope * drawn.energy).to_numpy()
        for one in judged.itertuples():
            own = one.worth - line.slope * one.energy
            shares.setdefault(one.score, {})[vector] = float((own > rest).mean())
    return pd.DataFrame(shares).T


def correlations() -> pd.DataFrame:
    """Each score's rank correlation with what layers gain alone, by vector."""
    found = scores().query("set == 'score' and k == @K")
    rhos = found.pivot_table(index="score", columns="vector", values="rho", dropna=False)
    rhos = rhos[[name for name in NAMES if name in rhos]]
    rhos = rhos.loc[(-rhos.mean(axis=1)).sort_values(kind="stable").index]
    return rhos.map(lambda value: "" if np.isnan(value) else f"{value:+.2f}").reset_index()


def best_alone() -> pd.DataFrame:
    """The five layers that gain most alone, by vector."""
    rows = []
    for vector in vectors_of("choice"):
        best = _alone(vector).sort_values("gain", ascending=False).head(5)
        rows.append(
            {
                "vector": vector,
                "best alone": ", ".join(map(str, best.layer)),
                "gain of the first": f"{best.gain.iloc[0]:+.3f}",
            }
        )
    return pd.DataFrame(rows)


def _alone(vector: str) -> pd.DataFrame:
    found = scores().query("set == 'alone' and vector == @vector")
    return found.assign(layer=[int(layer) for (layer,) in found.layers])


def spread_of_chance(k: int = K) -> pd.DataFrame:
    """What random sets of equal size are worth: their middle, best and worst, beside the choice."""
    found = scores().query("k == @k")
    rows = []
    for vector in _vectors(found):
        here = found[found.vector == vector]
        drawn = here[here.set == "random, equal size"].worth
        own = here[(here.set == "score") & (here.score == PRIMARY)].worth.iloc[0]
        rows.append(
            {
                "vector": vector,
                PRIMARY: f"{own:+.3f}",
                "random: 5 %": f"{drawn.quantile(0.05):+.3f}",
                "middle": f"{drawn.median():+.3f}",
                "95 %": f"{drawn.quantile(0.95):+.3f}",
                "best of 100": f"{drawn.max():+.3f}",
            }
        )
    return pd.DataFrame(rows)


# 1b: spread over the stack


def _spread(k: int) -> Iterator[tuple[str, str, Beaten, Beaten, list[Beaten]]]:
    """By vector and score: how its best of every stretch do beside random layers and beside random ones of each
    stretch, and how these do beside random layers.
    """
    found = table("spread").query("k == @k").assign(worth=lambda f: f.gain - f.cost)
    for vector in vectors_of("spread"):
        here = found[found.vector == vector]
        anywhere = scores().query("vector == @vector and k == @k and set == 'random, equal size'").worth.tolist()
        stretched = here[here.set == "random, one a stretch"].worth.tolist()
        between = [Beaten.of(worth, anywhere) for worth in stretched]
        for one in here[here.set == "score"].itertuples():
            yield vector, one.score, Beaten.of(one.worth, anywhere), Beaten.of(one.worth, stretched), between


def spread_primary(k: int = K) -> pd.DataFrame:
    """The primary score's best of every stretch beside both kinds of chance."""
    return pd.DataFrame(
        {
            "vector": vector,
            "beats random layers": percent(anywhere.share, anywhere.low, anywhere.high),
            "beats random ones of each stretch": percent(stretched.share, stretched.low, stretched.high),
            "these beat random layers, on average": percent(np.mean([one.share for one in between])),
        }
        for vector, score, anywhere, stretched, between in _spread(k)
        if score == PRIMARY
    )


def spread_claims(kind: int, k: int = K) -> dict[str, str]:
    """As `claims`; of kind 0 against random layers, 1 against random ones of each stretch."""
    found = {vector: both[kind] for vector, score, *both, _ in _spread(k) if score == PRIMARY}
    return {vector: _claim(one.low, one.high) for vector, one in found.items()}


def spread_scores(k: int = K) -> pd.DataFrame:
    """Every score's best of every stretch: the share of random layers, and of random ones of each stretch, it beats."""
    rows: dict[str, dict[str, str]] = {}
    means: dict[str, list[float]] = {}
    for vector, score, anywhere, stretched, _ in _spread(k):
        rows.setdefault(score, {"score": score})[vector] = f"{100 * anywhere.share:.0f}, {percent(stretched.share)}"
        means.setdefault(score, []).append(stretched.share)
    order = sorted(rows, key=lambda score: -float(np.mean(means[score])))
    return pd.DataFrame([rows[score] for score in order])


# 1: the frozen choice on tasks


@cache
def compared(vector: str, pairs: tuple[tuple[str, str], ...] | None = None) -> Comparison:
    """The product's own comparison, from the raw outcomes."""
    frame = table("proof").query("vector == @vector").drop(columns="vector").reset_index(drop=True)
    frame = frame.dropna(axis=1, how="all")
    found = table("proof_losses").query("vector == @vector")
    losses = {text: _losses(found[found.text == text]) for text in TEXTS}
    family = [task for task in dict.fromkeys(frame.task) if task not in CONTROL_TASKS]
    return compare(
        Outcomes(frame=frame), pairs=pairs, family=family, losses=losses[TEXTS[1]], target_losses=losses[TEXTS[0]]
    )


def proof() -> pd.DataFrame:
    """Pooled accuracy and losses of every arm against the base."""
    rows = []
    for vector in _vectors(table("proof")):
        comparison = compared(vector)
        accuracy = {row["arm"]: [] for row in comparison.accuracy}  # type: dict[str, list[float]]
        for row in comparison.accuracy:
            if row["task"] in comparison.family:
                accuracy[row["arm"]].append(row["accuracy"])
        rows.append({"vector": vector, "arm": "base", "accuracy, %": f"{100 * np.mean(accuracy['base']):.1f}"})
        for contrast in _against_base(comparison):
            rows.append(
                {
                    "vector": vector,
                    "arm": ARMS.get(contrast.b, contrast.b),
                    "accuracy, %": f"{100 * np.mean(accuracy[contrast.b]):.1f}",
                    "gain, points": points(contrast.pooled),
                    "better on": f"{len(contrast.improved)} of {len(comparison.family)}",
                    "worse on": ", ".join(name.removeprefix("stethoscope_") for name in contrast.worsened),
                    "target loss": nats(contrast.target_loss),
                    "general loss": nats(contrast.loss),
                }
            )
    return pd.DataFrame(rows).fillna("")


def qualified() -> dict[str, dict[str, Any]]:
    """Whether each fine-tune is better on its tasks and worse somewhere, as the protocol wants."""
    found = {}
    for vector in _vectors(table("proof")):
        tuned = next(one for one in _against_base(compared(vector)) if one.b == "tuned")
        dearer = bool(tuned.loss and tuned.loss.low is not None and tuned.loss.low > 0)
        found[vector] = {
            "gain": 100 * tuned.pooled.difference,
            "better": bool(tuned.improved),
            "worse": bool(tuned.worsened) or dearer,
            "cost": tuned.loss.difference if tuned.loss else None,
        }
    return found


def ahead(vector: str, arm: str, of: str) -> str:
    """By how many points of accuracy an arm is better than another, pooled over a vector's tasks."""
    pairs = {(one.b, one.a): one.pooled for one in compared(vector).contrasts}
    return points(pairs[arm, of]) if (arm, of) in pairs else points(pairs[of, arm], flip=True)


def _costs() -> list[float]:
    return [one["cost"] for one in qualified().values() if one["cost"] is not None]


def cheapest() -> str:
    """The least that a whole fine-tune costs on general text."""
    return f"{min(_costs()):.2f}"


def dearest() -> str:
    """The most."""
    return f"{max(_costs()):.2f}"


def missing() -> list[str]:
    """What of the protocol has not been run, by study."""
    studies = {
        "study 1, choice": "choice", "study 1b": "spread", "study 1, tasks": "proof", "study 2": "scalpel",
        "study 3": "calibration",
    }  # fmt: skip
    found = []
    for study, name in studies.items():
        if left := [vector for vector in NAMES if vector not in vectors_of(name)]:
            found.append(f"{study}, for {' and '.join(f'`{vector}`' for vector in left)}")
    others = {"sites": "study 1, other SAEs", "listening_losses": "study 4, the choice"}
    parts = {"coefficient": "coefficients", "bits": "few bits", "two": "two edits"}
    found += [study for name, study in others.items() if not have(name)]
    return found + [f"study 4, {study}" for part, study in parts.items() if not has_part(part)]


def against(arm: str) -> pd.DataFrame:
    """An arm's layers against other choices of as many, and the same energy in all, paired over items."""
    rows = []
    for vector in vectors_of("proof"):
        there = set(table("proof").query("vector == @vector").arm)
        pairs = [(other, arm) for other in (*ARMS, "scaled", "selected") if other != arm and {other, arm} <= there]
        for one in compared(vector, tuple(pairs)).contrasts if pairs else ():
            rows.append(
                {
                    "vector": vector,
                    f"{arm} against": ARMS.get(one.a, one.a),
                    "accuracy, points": points(one.pooled),
                    "p (McNemar)": f"{one.pooled_mcnemar.p_value:.3g}" if one.pooled_mcnemar else "",
                    "target loss": nats(one.target_loss),
                    "general loss": nats(one.loss),
                }
            )
    return pd.DataFrame(rows)


# 1: sites and seeds


def sites(score: str = PRIMARY) -> pd.DataFrame:
    """Rank correlations of layers between sets of SAEs, by vector."""
    found = table("sites")
    rows = []
    for increments in ("", " increment"):
        by = found[found.score == score + increments].pivot_table(
            index=["vector", "layer"], columns="saes", values="excess"
        )
        for one, other in combinations(sorted(by.columns), 2):
            rows.append(
                {
                    "score": score + increments,
                    "between": f"{one} and {other}",
                    **{
                        vector: f"{spearmanr(by.loc[vector][one], by.loc[vector][other]).statistic:+.2f}"
                        for vector in _vectors(found)
                    },
                }
            )
    return pd.DataFrame(rows)


def sites_truth(score: str = PRIMARY) -> pd.DataFrame:
    """Each set's rank correlation with what layers gain alone, by vector."""
    found = table("sites")
    gains = {vector: _alone(vector).set_index("layer").gain for vector in vectors_of("choice")}
    rows = []
    for name in (score, f"{score} increment"):
        for saes, here in found[found.score == name].groupby("saes"):
            row = {"score": name, "SAEs": saes}
            for vector, gain in gains.items():
                excess = here[here.vector == vector].set_index("layer").excess
                row[vector] = f"{spearmanr(excess, gain[excess.index]).statistic:+.2f}"
            rows.append(row)
    return pd.DataFrame(rows)


def site_health() -> pd.DataFrame:
    """How well each set of SAEs explains the vectors' texts: the middle and the worst layer."""
    found = table("sites").query("score == @PRIMARY")
    rows = []
    for name, here in found.groupby("saes"):
        explained = here.groupby("layer").explained.min()
        rows.append(
            {
                "SAEs": name,
                "variance explained, middle layer": f"{explained.median():.2f}",
                "worst": f"{explained.min():.2f}",
            }
        )
    return pd.DataFrame(rows)


# 2: the scalpel


def scalpel(vector: str) -> pd.DataFrame:
    """Every arm against the base, and against the selected raw edit."""
    found = table("scalpel").query("vector == @vector")
    rows = []
    for arm in dict.fromkeys(found.arm):
        if arm == "base":
            continue
        target, general = (_change(found, arm, "base", text) for text in TEXTS)
        raw = _change(found, "selected", "base", TEXTS[0]).difference
        rows.append(
            {
                "arm": arm,
                "target loss falls by": nats(target, falls=True),
                "of the raw edit's": f"{100 * target.difference / raw:.0f} %",
                "against the raw edit": ""
                if arm == "selected"
                else nats(_change(found, arm, "selected", TEXTS[0]), falls=True),
                "general loss": nats(general),
            }
        )
    return pd.DataFrame(rows)


def share_of_raw(vector: str, arm: str) -> str:
    """An arm's fall of target loss as a share of the raw edit's."""
    here = table("scalpel").query("vector == @vector")
    one, raw = (_change(here, name, "base", TEXTS[0]).difference for name in (arm, "selected"))
    return f"{100 * one / raw:.0f} %"


def scalpel_shares() -> pd.DataFrame:
    """What share of the raw edit's fall of target loss each arm reaches, by vector."""
    found, rows = table("scalpel"), []
    arms = [arm for arm in dict.fromkeys(found.arm) if arm not in ("base", "selected") and not arm.startswith("all at")]
    for arm in arms:
        row: dict[str, Any] = {"arm": arm}
        for vector in _vectors(found):
            here = found[found.vector == vector]
            raw = _change(here, "selected", "base", TEXTS[0]).difference
            row[vector] = f"{100 * _change(here, arm, 'base', TEXTS[0]).difference / raw:.0f} %"
        rows.append(row)
    return pd.DataFrame(rows)


def hybrid() -> pd.DataFrame:
    """The hybrid beside what the whole change pays for the same fall of target loss, and beside random directions."""
    found, rows = table("scalpel"), []
    for vector in _vectors(found):
        here = found[found.vector == vector]
        curve = sorted(
            (-_change(here, arm, "base", TEXTS[0]).difference, _change(here, arm, "base", TEXTS[1]).difference)
            for arm in dict.fromkeys(here.arm)
            if arm.startswith("all at") or arm == "tuned"
        )
        gains, costs = zip(*curve, strict=True)
        for arm in ("selected", "hybrid", "hybrid, random of equal rank", "scaled"):
            gain = -_change(here, arm, "base", TEXTS[0]).difference
            cost = _change(here, arm, "base", TEXTS[1])
            rows.append(
                {
                    "vector": vector,
                    "arm": arm,
                    "target loss falls by": f"{gain:.3f}",
                    "general loss": nats(cost),
                    "the whole change, weaker, pays for as much": (
                        f"{np.interp(gain, (0.0, *gains), (0.0, *costs)):+.3f}"
                        if gain <= max(gains)
                        else "never falls so far"
                    ),
                }
            )
    return pd.DataFrame(rows)


def kept_energy() -> pd.DataFrame:
    """The share of energy that features keep in a layer, beside chance."""
    found = table("geometry")
    rows = []
    for vector in _vectors(found):
        here = found[found.vector == vector]
        rows.append(
            {
                "vector": vector,
                "kept, middle layer": f"{100 * here.kept.median():.1f} %",
                "least": f"{100 * here.kept.min():.1f} %",
                "most": f"{100 * here.kept.max():.1f} %",
                "chance": f"{100 * here.chance.median():.1f} %",
            }
        )
    return pd.DataFrame(rows)


# 3: calibration


@cache
def _worth(vector: str) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """Edits tried on a vector, and for each corpus documents x edits of gains and tokens, in the edits' order."""
    found = table("calibration").query("vector == @vector")
    edits = found.drop_duplicates(["kind", "edit"])
    wide = {
        text: found[found.text == text].pivot_table(
            index="document", columns=["kind", "edit"], values=["gain", "tokens"]
        )
        for text in ("target", "control")
    }
    return edits, wide


def _compare_worths(vector: str, one: tuple[str, str], other: tuple[str, str] | None = None) -> tuple[float, float]:
    """By how much an edit is worth more than another, or than none: target gain less control cost, and its error."""
    _, wide = _worth(vector)
    difference, variance = 0.0, 0.0
    for frame in wide.values():
        gains, tokens = frame["gain"], frame["tokens"][one].to_numpy()
        before = gains[other].to_numpy() if other else np.zeros(len(gains))
        change = ratio_difference(before, gains[one].to_numpy(), tokens, resamples=2)
        difference += change.difference
        variance += (change.standard_error or 0.0) ** 2
    return difference, float(np.sqrt(variance))


def worths(vector: str) -> dict[tuple[str, str], float]:
    """Every edit's worth on held-out text."""
    _, wide = _worth(vector)
    first = wide["target"]["gain"]
    return {
        edit: sum(float(frame["gain"][edit].sum() / frame["tokens"][edit].sum()) for frame in wide.values())
        for edit in first.columns
    }


def calibration() -> pd.DataFrame:
    """The automatic choice beside the best of its grid, both on held-out text."""
    rows = []
    for vector in _vectors(table("calibration")):
        edits, _ = _worth(vector)
        found = worths(vector)
        chosen = edits[edits.chosen]
        row: dict[str, Any] = {"vector": vector, "edits tried": int((edits.kind == "grid").sum())}
        if chosen.empty:
            rows.append({**row, "choice": "no edit"})
            continue
        own, best = ("grid", chosen.iloc[0].edit), max((e for e in found if e[0] == "grid"), key=lambda e: found[e])
        ahead, error = _compare_worths(vector, best, own)
        _, alone = _compare_worths(vector, best)
        rows.append(
            {
                **row,
                "choice": _edit(chosen.iloc[0]),
                "worth": f"{found[own]:+.3f}",
                "best of the grid": _edit(edits[(edits.kind == "grid") & (edits.edit == best[1])].iloc[0]),
                "its worth": f"{found[best]:+.3f}",
                "behind by": f"{ahead:.3f} ± {error:.3f}",
                "the best's own error": f"{alone:.3f}",
                "within that": "yes" if ahead <= alone else "no",
                "within the paired one": "yes" if ahead <= error else "no",
            }
        )
    return pd.DataFrame(rows).fillna("")


def transfer() -> pd.DataFrame:
    """What the choice made for one vector is worth on another, beside that one's own."""
    found = table("calibration")
    rows = []
    for vector in _vectors(found):
        values = worths(vector)
        row: dict[str, Any] = {"used on": vector}
        for name in NAMES:
            value = values.get(("choice of", name))
            row[f"chosen for {name}"] = "" if value is None else f"{value:+.3f}"
        rows.append(row)
    return pd.DataFrame(rows)


def _edit(row: Any) -> str:
    layers = list(map(int, row.layers))
    return f"{len(layers)} layers at {row.coefficient:g}"


# 4: what breaks


@cache
def listening() -> pd.DataFrame:
    """Each case: agreement with the ranking as it is, the layers, and what injecting them does."""
    found, losses = table("listening"), table("listening_losses")
    reference = found[found.case == "as it is"].iloc[0]
    rows = []
    for one in found.itertuples():
        row: dict[str, Any] = {"changed": one.case, "to": one.setting}
        if one.refused:
            rows.append({**row, "what the product said": _said(one.said)})
            continue
        rho = spearmanr(one.excess, reference.excess).statistic
        layers = sorted(map(int, one.best))
        rows.append(
            {
                **row,
                "rank correlation": f"{rho:+.2f}",
                "five layers": ", ".join(map(str, layers)),
                "as before": f"{len(set(layers) & set(map(int, reference.best)))} of 5",
                "target loss falls by": nats(_of_layers(losses, layers, TEXTS[0]), falls=True),
                "general loss": nats(_of_layers(losses, layers, TEXTS[1])),
                "flagged": f"{int(one.flags)}",
                "unsteady": f"{len(one.unsteady)}",
                "what the product said": _said(one.said),
            }
        )
    return pd.DataFrame(rows).fillna("")


def _said(said: Any) -> str:
    """The first clause of each message, which names what is wrong before it lists where."""
    return "; ".join(re.split(", layer |: |; |\n", str(text))[0] for text in said) or "nothing"


def _of_layers(losses: pd.DataFrame, layers: list[int], text: str) -> PairedDifference:
    keys = losses.layers.map(lambda one: tuple(map(int, one)))
    here = losses[losses.text == text]
    base, edited = (here[keys[here.index] == key].sort_values("document") for key in ((), tuple(layers)))
    return ratio_difference(base.nats, edited.nats, base.tokens)


def heard(case: str, setting: str) -> dict[str, str]:
    """A row of that table."""
    rows = {(row["changed"], row["to"]): row for row in listening().to_dict("records")}
    return {str(name): str(value) for name, value in rows[case, setting].items()}


def heard_fall(case: str, setting: str = "120 documents") -> str:
    """By how much the layers that a case chose lower the target loss."""
    one = table("listening").query("case == @case and setting == @setting").iloc[0]
    change = _of_layers(table("listening_losses"), sorted(map(int, one.best)), TEXTS[0])
    return f"{-change.difference:.2f}"


def has_part(part: str) -> bool:
    """Whether a part of the study of edited models has been run."""
    return have("edits") and part in set(table("edits").part)


@cache
def edits(part: str, vector: str) -> pd.DataFrame:
    """A part of the study of edited models: a row per setting and arm, against the base at the same setting."""
    found = table("edits").query("part == @part and vector == @vector")
    rows = []
    for setting in dict.fromkeys(found.setting):
        here = found[found.setting == setting]
        base = here if "base" in set(here.arm) else found
        for arm in dict.fromkeys(here.arm):
            if arm == "base":
                continue
            target, general = (_paired(_arm(base, "base", text), _arm(here, arm, text)) for text in TEXTS)
            rows.append(
                {
                    "setting": setting,
                    "arm": arm,
                    "target loss falls by": nats(target, falls=True),
                    "general loss": nats(general),
                }
            )
    return pd.DataFrame(rows)


def changed(part: str, vector: str, setting: str, arm: str = "selected") -> dict[str, str]:
    """By how much target loss falls and general loss rises in a row of that table, without intervals."""
    (row,) = (r for r in edits(part, vector).to_dict("records") if (r["setting"], r["arm"]) == (setting, arm))
    return {name: str(row[column]).split(" ")[0] for name, column in CHANGES.items()}


def bits_alone() -> pd.DataFrame:
    """What rounding costs the base itself."""
    found = table("edits").query("part == 'bits' and arm == 'base'")
    rows = []
    for vector in _vectors(found):
        here = found[found.vector == vector]
        whole = here[here.setting == "16 bits"]
        for setting in list(dict.fromkeys(here.setting))[1:]:
            some = here[here.setting == setting]
            rows.append(
                {
                    "vector": vector,
                    "base at": setting,
                    **{
                        f"{text} loss": nats(_paired(whole[whole.text == text], some[some.text == text]))
                        for text in TEXTS
                    },
                }
            )
    return pd.DataFrame(rows)


def two() -> pd.DataFrame:
    """Two edits after each other: the change of loss against the base."""
    found = table("edits").query("part == 'two'")
    rows = []
    for setting in dict.fromkeys(found.setting):
        here = found[found.setting == setting]
        first, second = setting.split(", then ")
        for arm, name in (("first", f"{first} alone"), ("second", f"{second} alone"), ("both", "both")):
            row: dict[str, Any] = {"edits": setting, "in the model": name}
            for label, text in (
                ("loss on the first's text", f"held-out target of {first}"),
                ("on the second's", f"held-out target of {second}"),
                ("on general text", TEXTS[1]),
            ):
                row[label] = nats(_paired(_arm(here, "base", text), _arm(here, arm, text)))
            rows.append(row)
    return pd.DataFrame(rows)


def undone() -> pd.DataFrame:
    """What undoing gave."""
    return pd.DataFrame(
        {
            "edits": one.setting,
            "undone": one.patch.removesuffix(" patch"),
            "from": one.edited,
            "shared layers": one["shared layers"],
            "result": "the bytes before"
            if one.exact
            else ("refused: " + _said([one.said]) if one.said else "other bytes"),
        }
        for _, one in table("undone").iterrows()
    )


# pictures


def chance_picture() -> alt.Chart:
    """The chosen five among random fives, by vector."""
    found = scores().query("k == @K and (set == 'random, equal size' or (set == 'score' and score == @PRIMARY))")
    base = alt.Chart(found.assign(what=np.where(found.set == "score", PRIMARY, "random fives"))).encode(
        x=alt.X("cost:Q", title="rise of control loss, nats per token"),
        y=alt.Y("gain:Q", title="fall of target loss"),
    )
    colours = alt.Scale(domain=[PRIMARY, "random fives"], range=["#0072b2", "#b6babf"])
    points = base.mark_circle(opacity=0.8).encode(
        color=alt.Color("what:N", scale=colours, title=None),
        size=alt.Size("what:N", scale=alt.Scale(domain=[PRIMARY, "random fives"], range=[120, 22]), legend=None),
        order=alt.Order("what:N", sort="descending"),
    )
    return (
        points.properties(width=170, height=150)
        .facet(alt.Facet("vector:N", sort=list(NAMES), title=None), columns=4)
        .resolve_scale(x="independent", y="independent")
    )


# helpers


def _vectors(frame: pd.DataFrame) -> list[str]:
    return [name for name in NAMES if name in set(frame.vector)]


def _against_base(comparison: Comparison) -> list[Contrast]:
    return [contrast for contrast in comparison.contrasts if contrast.a == "base"]


def _losses(found: pd.DataFrame) -> dict[str, DocumentLosses]:
    return {
        arm: DocumentLosses(sums=one.nats.to_numpy(), tokens=one.tokens.to_numpy())
        for arm, one in found.sort_values("document").groupby("arm", sort=False)
    }


def _arm(found: pd.DataFrame, arm: str, text: str) -> pd.DataFrame:
    return found[(found.arm == arm) & (found.text == text)]


def _paired(before: pd.DataFrame, after: pd.DataFrame) -> PairedDifference:
    one, other = before.sort_values("document"), after.sort_values("document")
    counted = one.tokens.to_numpy() > 0
    return ratio_difference(
        one.nats.to_numpy()[counted], other.nats.to_numpy()[counted], one.tokens.to_numpy()[counted]
    )


def _change(found: pd.DataFrame, arm: str, base: str, text: str) -> PairedDifference:
    return _paired(_arm(found, base, text), _arm(found, arm, text))


def render() -> str:
    """The whole text."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    functions: Mapping[str, Any] = {
        name: value for name, value in globals().items() if callable(value) and not name.startswith("_")
    }
    environment.globals.update(functions, NAMES=NAMES, SIZES=SIZES)
    environment.filters["table"] = markdown
    source = (HERE / "RESULTS.md.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render().rstrip() + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text, path = render(), HERE / "RESULTS.md"
    if options.check:
        sys.exit(None if path.read_text(encoding="utf-8") == text else "RESULTS.md does not follow from the outcomes")
    path.write_text(text, encoding="utf-8")
    chance_picture().save(HERE / "chance.svg")
