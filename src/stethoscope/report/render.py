"""The page: artefacts in, one HTML file out, the same bytes for the same artefacts."""

import base64
import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import altair as alt
import jinja2
import vl_convert
import yaml
from markupsafe import Markup, escape

from stethoscope.artifacts import read_json, write_text
from stethoscope.errors import StethoscopeError
from stethoscope.report import tables, words
from stethoscope.report.choice import (
    calibration_front,
    calibration_rows,
    score_profiles,
    validation_plane,
    validation_rows,
)
from stethoscope.report.gains import gain_rows, gain_split
from stethoscope.report.look import COLOURS, FONT
from stethoscope.report.profile import layer_profile
from stethoscope.report.scalpel import answers, energy_by_layer, energy_curves, geometry_rows
from stethoscope.report.trade import is_crowded, trade_off
from stethoscope.results.calibration import Calibration
from stethoscope.results.comparison import Claim, Comparison
from stethoscope.results.diagnosis import Diagnosis
from stethoscope.results.edits import Edits
from stethoscope.results.evidence import Evidence
from stethoscope.results.geometry import Geometry
from stethoscope.results.selection import Selection
from stethoscope.results.validation import ScoreValidation

# What replaces each colour of the charts on a dark screen; the page's own colours stand in the style sheet.
_DARK = {
    "ink": "#e8eaed",
    "muted": "#a4a9b0",
    "line": "#3c4046",
    "paper": "#16181b",
    "null": "#2b2f35",
    "selected": "#56b4e9",
    "other": "#9aa0a8",
    "tuned": "#f0894a",
    "projected": "#e39ac6",
    "edit": "#4cc2a0",
}


def render_report(run_dir: Path) -> Path:
    """Write ``report.html`` in a run's folder from what the run saved there.

    Reads ``diagnosis.json``, ``selection.json``, ``comparison.json``, and where they exist ``evidence.json``,
    ``geometry.json``, ``edits.json``, ``claim.json``, ``calibration.json``, ``validation/*/validation.json``,
    ``recipe.yaml`` and ``edited/manifest.json``.

    Returns:
        the path of the report.

    Raises:
        StethoscopeError: a result is missing, damaged, or of another schema version.
    """
    diagnosis = Diagnosis.load(run_dir)
    selection = Selection.load(run_dir)
    comparison = Comparison.load(run_dir / "comparison.json")
    calibration = None
    if selection.policy == "calibrated":  # one that was only tried is not this selection's
        calibration = Calibration.load(run_dir)
    validated = {
        path.parent.name: ScoreValidation.load(path.parent)
        for path in sorted(run_dir.glob("validation/*/validation.json"))
    }
    recipe = _recipe(run_dir / "recipe.yaml")
    manifest = run_dir / "edited" / "manifest.json"
    changed = tables.scalars(read_json(manifest)) if manifest.exists() else []
    more = _More(
        evidence=Evidence.find(run_dir),
        edits=Edits.find(run_dir),
        geometry=Geometry.find(run_dir),
        claim=Claim.find(run_dir),
        calibration=calibration,
        validation=validated,
    )
    page = _page(diagnosis, selection, comparison, more, recipe=recipe, manifest=changed)
    path = run_dir / "report.html"
    write_text(path, page)
    return path


@dataclass(frozen=True, kw_only=True)
class _More:
    """What a run may have written beside its three results; ``validate`` is by control."""

    evidence: Evidence | None
    edits: Edits | None
    geometry: Geometry | None
    claim: Claim | None
    calibration: Calibration | None
    validation: dict[str, ScoreValidation]


def _page(
    diagnosis: Diagnosis,
    selection: Selection,
    comparison: Comparison,
    more: _More,
    *,
    recipe: str | None,
    manifest: list[tables.Row],
) -> str:
    strongest = max(diagnosis.layers, key=lambda layer: (layer.layer in selection.layers, layer.excess))
    scripts = [_vega(), _resource("report.js")]
    charts: dict[str, Any] = {"profile": layer_profile(diagnosis, selection), "trade-off": trade_off(comparison)}
    if is_crowded(comparison):
        charts["near"] = trade_off(comparison, without=["tuned"])
    if split := gain_split(comparison):
        charts["split-chart"] = split
    if more.geometry:
        charts["energy"] = energy_by_layer(more.geometry, selection.layers)
        charts["curves"] = energy_curves(more.geometry, selection.layers)
    if more.calibration:
        charts["front"] = calibration_front(more.calibration)
    validation = []
    for number, (control, validated) in enumerate(more.validation.items()):
        k = validated.size(len(selection.layers))
        charts[f"validation-{number}"] = validation_plane(validated, k)
        charts[f"scores-{number}"] = score_profiles(validated, picked=diagnosis.score)
        validation.append(
            {"control": control, "k": k, "rows": validation_rows(validated, k), "documents": validated.documents}
        )
    data = {
        "charts": {name: _transparent(chart.to_dict()) for name, chart in charts.items()},
        "features": {layer.layer: [tables.feature_row(f) for f in layer.features] for layer in diagnosis.layers},
        "picked": strongest.layer,
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("stethoscope", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"ticks": _ticks, "breakable": _breakable, "model": _model}
    return environment.get_template("report.html.jinja").render(
        diagnosis=diagnosis,
        selection=selection,
        comparison=comparison,
        claim=more.claim,
        calibration=more.calibration,
        front=calibration_rows(more.calibration) if more.calibration else [],
        geometry=more.geometry,
        geometry_rows=geometry_rows(more.geometry) if more.geometry else [],
        answers=answers(comparison),
        gains=gain_rows(comparison),
        validation=validation,
        strongest=strongest,
        settings=_settings(recipe),
        recipe=recipe,
        manifest=manifest,
        headline=words.headline(comparison),
        findings=words.findings(comparison, more.geometry),
        notices=words.notices(diagnosis, comparison, selection, more.edits),
        arms=[(arm, words.describe_arm(arm, more.edits)) for arm in comparison.arms],
        results=tables.results(comparison),
        tests=tables.tests(comparison),
        layers=tables.layers(diagnosis, selection, more.edits),
        costs=tables.costs(comparison),
        feature_rows=[tables.feature_row(f) for f in strongest.features],
        facts={layer.layer: words.layer_facts(layer, diagnosis) for layer in diagnosis.layers},
        health={layer.layer: tables.health(layer) for layer in diagnosis.layers},
        evidence=tables.evidence(more.evidence, diagnosis) if more.evidence else {},
        searched=more.evidence.documents if more.evidence else {},
        provenance=tables.provenance(diagnosis, more.evidence, selection, more.geometry, more.edits),
        data=data,
        style=Markup(_style()),
        scripts=[Markup(script) for script in scripts],
        policy=_policy(scripts),
    )


def _transparent(chart: dict[str, Any]) -> dict[str, Any]:
    chart["config"]["background"] = None
    return chart


def _policy(scripts: list[str]) -> str:
    """A content security policy: only our own scripts run, and nothing is fetched."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:;"
        " base-uri 'none'; form-action 'none'"
    )


def _style() -> str:
    """The style sheet, with the charts' colours as variables and their exchange on a dark screen."""
    light, dark = (";".join(f"--{k}:{v}" for k, v in colours.items()) for colours in (COLOURS, _DARK))
    swaps = "".join(
        f'.chart [fill="{COLOURS[name]}"]{{fill:{colour}}}.chart [stroke="{COLOURS[name]}"]{{stroke:{colour}}}'
        for name, colour in _DARK.items()
    )
    return (
        f":root{{{light};--font:{FONT}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}{swaps}}}\n"
        + _resource("report.css")
    )


@cache
def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script; about two seconds the first time."""
    version = alt.SCHEMA_VERSION.rsplit(".", 1)[0]
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version))


def _resource(name: str) -> str:
    return files("stethoscope.report").joinpath(name).read_text(encoding="utf-8")


def _recipe(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _settings(recipe: str | None) -> dict[str, Any]:
    """The recipe's top level, for the few lines that name the models; empty if it cannot be read."""
    try:
        value = yaml.safe_load(recipe) if recipe else {}
    except yaml.YAMLError as error:
        raise StethoscopeError(f"the run's `recipe.yaml` is not YAML: {error}") from error
    return value if isinstance(value, dict) else {}


def _breakable(name: str) -> Markup:
    """A name that a narrow column may break after an underscore or a slash."""
    pieces = re.split(r"(?<=[_/])", name)
    return Markup("<wbr>").join(escape(piece) for piece in pieces)


def _model(name: object) -> str:
    """A model's name: a hub id as it stands, of a path its last part."""
    text = str(name)
    return Path(text).name if Path(text).is_absolute() else text


def _ticks(text: str) -> Markup:
    """Escaped text in which `backticks` become code and numbers have a true minus."""
    parts = [escape(re.sub(r"(?<=[ (])-(?=\d)", words.MINUS, part)) for part in text.split("`")]
    if len(parts) % 2 == 0:
        return escape(text)
    return Markup("").join(Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts))
