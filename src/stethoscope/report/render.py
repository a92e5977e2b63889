"""The page: artefacts in, one HTML file out, the same bytes for the same artefacts."""

import base64
import hashlib
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import altair as alt
import jinja2
import vl_convert
from markupsafe import Markup, escape

from stethoscope.artifacts import Artifact, read_json, write_text
from stethoscope.charts.style import COLOURS, DARK, FONT
from stethoscope.display import NONE, Rows, number, numeric, percent, table_of
from stethoscope.errors import StethoscopeError
from stethoscope.parsing import parse_yaml
from stethoscope.report import charts, wording
from stethoscope.results.calibration import Calibration
from stethoscope.results.comparison import Claim, Comparison
from stethoscope.results.comparison_tables import by_task, contrast_rows, gain_rows
from stethoscope.results.diagnosis import Diagnosis, FeatureDifference, LayerDiagnosis
from stethoscope.results.edits import Edits
from stethoscope.results.evidence import Evidence
from stethoscope.results.filtering import Filtering
from stethoscope.results.geometry import Geometry
from stethoscope.results.overview import headline, overview
from stethoscope.results.selection import Selection
from stethoscope.results.tradeoff import TradeOff
from stethoscope.results.validation import ScoreValidation

CORNER = 0.3  # share of the trade-off's width that is too narrow to tell several arms apart
Found = TypeVar("Found", bound=Artifact)

PAGES = "https://www.neuronpedia.org/"  # a saved link that leads elsewhere is not shown


def render_report(run_dir: Path) -> Path:
    """Write ``report.html`` in a run's folder from what the run saved there.

    Reads ``diagnosis.json``, ``selection.json``, ``comparison.json``, and where they exist ``evidence.json``,
    ``geometry.json``, ``filter/filter.json``, ``filter/evidence.json``, ``edits.json``, ``claim.json``,
    ``calibration.json``, ``recommended/calibration.json``, ``validation/*/validation.json``, ``tradeoff.json``,
    ``recipe.yaml`` and ``edited/manifest.json``. Of those that exist, results that an earlier recipe left in the
    folder are not shown.

    Returns:
        the path of the report.

    Raises:
        StethoscopeError: a result is missing, damaged, or of another schema version, or results contradict each other.
    """
    path = run_dir / "report.html"
    try:
        write_text(path, _page(run_dir))
    except (LookupError, ValueError, ArithmeticError, TypeError, AttributeError) as error:
        raise StethoscopeError(
            f"the results in `{run_dir}` contradict each other: {type(error).__name__}: {error}",
            hint="remove the file that was changed and run the recipe again, which makes it again",
        ) from error
    return path


def _page(run_dir: Path) -> str:
    """The page as text."""
    diagnosis, selection = Diagnosis.load(run_dir), Selection.load(run_dir)
    comparison = Comparison.load(run_dir / "comparison.json")
    evidence, edits = Evidence.find(run_dir), Edits.find(run_dir)
    known = comparison.inputs | {"diagnose": diagnosis.provenance.key, "select": selection.provenance.key}
    geometry, tradeoff = _current(Geometry.find(run_dir), known), _current(TradeOff.find(run_dir), known)
    # a calibration that was only tried is not this selection's
    calibration = Calibration.load(run_dir) if selection.policy == "calibrated" else None
    recommended, filtering = Calibration.find(run_dir / "recommended"), Filtering.find(run_dir / "filter")
    if recommended and recommended.provenance.key == known.get("recommend"):
        calibration, known["filter"] = recommended, recommended.provenance.inputs.get("filter", "")
    if filtering and filtering.provenance.key != known.get("filter"):
        filtering = None
    passed = _current(Evidence.find(run_dir / "filter"), known)
    manifest = run_dir / "edited" / "manifest.json"
    recipe = run_dir / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8") if recipe.exists() else None
    try:
        parsed = parse_yaml(text or "")
    except ValueError as error:
        raise StethoscopeError(f"the run's `recipe.yaml` cannot be read: {error}") from error
    settings = parsed if isinstance(parsed, dict) else {}
    coefficient = (settings.get("edit") or {}).get("coefficient", 1.0)

    pictures: dict[str, Any] = {
        "profile": diagnosis.plot(selection),
        "trade-off": comparison.plot(),
        "near": comparison.plot(without=["tuned"]) if _is_crowded(comparison) else None,
        "split-chart": charts.gain_split(comparison),
        "energy": geometry.plot(selection) if geometry else None,
        "curves": charts.energy_curves(geometry, selection.layers) if geometry else None,
        "passed": filtering.plot() if filtering else None,
        "tried": calibration.plot(selection.amounts(coefficient)) if calibration else None,
    }
    if tradeoff:
        pictures |= {f"methods-{n}": tradeoff.plot(text) for n, text in enumerate(tradeoff.protected)}
    validations: list[dict[str, Any]] = []
    for path in sorted(run_dir.glob("validation/*/validation.json")):
        if not (found := _current(ScoreValidation.load(path.parent), known)):
            continue
        n, k = len(validations), found.size(len(selection.layers))
        pictures[f"validation-{n}"] = charts.validation_plane(found, k)
        chosen_by = f"{diagnosis.score} increment" if diagnosis.increments else diagnosis.score
        picked = chosen_by if chosen_by in found.scores else diagnosis.score
        pictures[f"scores-{n}"] = charts.score_profiles(found, picked=picked)
        validations.append({"control": path.parent.name, "k": k, "rows": found.table(k), "documents": found.documents})

    strongest = max(diagnosis.layers, key=lambda layer: (layer.layer in selection.layers, layer.excess))
    features = {layer.layer: [_feature_row(f) for f in layer.features] for layer in diagnosis.layers}
    against_baseline = [contrast for arm in comparison.arms if (contrast := comparison.find(arm))]
    drawn = {name: _transparent(chart) for name, chart in pictures.items() if chart}
    return _fill(
        {"charts": drawn, "features": features, "picked": strongest.layer},
        diagnosis=diagnosis,
        selection=selection,
        comparison=comparison,
        claim=Claim.find(run_dir),
        calibration=calibration,
        curves=calibration is not None and calibration.whole is not None,
        geometry=geometry,
        filtering=filtering,
        edits=edits,
        validations=validations,
        tradeoff=tradeoff,
        strongest=strongest,
        recipe=text,
        settings=settings,
        manifest=_scalars(read_json(manifest)) if manifest.exists() else [],
        headline=headline(comparison),
        overview=overview(comparison),
        findings=wording.findings(comparison, geometry),
        notices=wording.notices(diagnosis, comparison, selection, edits),
        answers=wording.answers(comparison),
        arms=[(arm, wording.describe_arm(arm, edits)) for arm in comparison.arms],
        results=by_task(comparison),
        tests=[contrast_rows(contrast) for contrast in comparison.contrasts],
        gains=[rows for contrast in against_baseline if (rows := gain_rows(contrast))],
        facts={layer.layer: wording.layer_facts(layer, diagnosis) for layer in diagnosis.layers},
        health={layer.layer: _health(layer) for layer in diagnosis.layers},
        evidence=evidence,
        passed=passed,
        rates={(layer.layer, f.feature): f for layer in diagnosis.layers for f in layer.features},
        provenance=_provenance(diagnosis, evidence, selection, geometry, filtering, edits),
    )


def _current(made: Found | None, known: Mapping[str, str]) -> Found | None:
    """A result if nothing that it was made from has another hash than is known, else None."""
    return made if made and all(known.get(n, hash_) == hash_ for n, hash_ in made.provenance.inputs.items()) else None


def _fill(data: dict[str, Any], **values: Any) -> str:
    """The template filled in; ``data`` is what the page's scripts read."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("stethoscope", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"ticks": _ticks, "breakable": _breakable, "model": _model, "typeset": _typeset}
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "allow_nan": False}  # browsers know no NaN
    environment.filters |= {"one_line": _one_line, "visible": _visible, "percent": percent}
    environment.globals |= {"numeric": numeric, "pages": PAGES}
    scripts = [_vega(), _resource("report.js")]
    return environment.get_template("report.html.jinja").render(
        **values, data=data, style=Markup(_style()), scripts=list(map(Markup, scripts)), policy=_policy(scripts)
    )


def _is_crowded(comparison: Comparison) -> bool:
    """Whether the edits lie in a corner of the trade-off's chart because the whole fine-tune is far away."""
    costs = {c.b: abs(c.loss.difference) for arm in comparison.arms if (c := comparison.find(arm)) and c.loss}
    edits = [cost for arm, cost in costs.items() if arm != "tuned"]
    return len(edits) > 1 and max(edits) < CORNER * max(costs.values())


def _feature_row(feature: FeatureDifference) -> list[str]:
    """Feature, firing rates and shares of activation mass in %, and the difference of the shares in points."""
    shares = (feature.target_rate, feature.control_rate, feature.target_mass, feature.control_mass)
    difference = percent(feature.target_mass - feature.control_mass, "+.2f")
    return [str(feature.feature), *(percent(share, ".2f") for share in shares), _typeset(difference)]


def _health(layer: LayerDiagnosis) -> Rows:
    """An SAE's health, a row per corpus."""
    forms = {"dead": ".1%", "dense": ".1%", "encoding_error": ".2%"}
    return table_of(
        {"SAE on": name, "variance explained": number(found.variance_explained, ".2f"), "L0": number(found.l0, ".0f")}
        | {field.replace("_", " "): number(getattr(found, field), form) for field, form in forms.items()}
        for name, found in layer.health.items()
    )


def _visible(token: str) -> str:
    """A token that is there to be seen, even one of spaces alone."""
    return _one_line(token) if token.strip(" ") else token.replace(" ", "\N{OPEN BOX}")


def _one_line(text: str) -> str:
    """Text with its line ends made visible."""
    return text.replace("\r", "").replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")


def _provenance(*results: Artifact | None) -> Rows:
    """What each result says of where it comes from."""
    return table_of(
        {"result": result.FILE, "what": what, "value": value}
        for result in results
        if result is not None
        for what, value in {
            "stethoscope": result.provenance.stethoscope,
            "seed": str(result.provenance.seed),
            **dict(sorted(result.provenance.inputs.items())),
        }.items()
    )


def _scalars(value: Any) -> Rows:
    """The entries of a mapping that are text or numbers, in its order."""
    entries = value.items() if isinstance(value, dict) else ()
    return table_of({"entry": str(k), "value": str(v)} for k, v in entries if isinstance(v, str | int | float))


def _transparent(chart: Any) -> dict[str, Any]:
    drawn: dict[str, Any] = chart.to_dict()
    drawn["config"]["background"] = None
    return drawn


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
    light, dark = (";".join(f"--{k}:{v}" for k, v in colours.items()) for colours in (COLOURS, DARK))
    swaps = "".join(
        f'.chart [fill="{COLOURS[name]}"]{{fill:{colour}}}.chart [stroke="{COLOURS[name]}"]{{stroke:{colour}}}'
        for name, colour in DARK.items()
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


def _typeset(text: str) -> str:
    """Text with true minus signs, zero without a sign, and a dash for what is not known."""
    if text == NONE:
        return "\N{EN DASH}"
    text = re.sub(r"(?<![\w.])[+-](?=0\.0+(?!\d))", "", text)
    return re.sub(r"(?<![\w.)-])-(?=\d)", "\N{MINUS SIGN}", text)


def _ticks(text: str) -> Markup:
    """Escaped and typeset text in which `backticks` become code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return escape(text)
    code = Markup("<code>{}</code>")
    return Markup("").join(code.format(part) if i % 2 else escape(_typeset(part)) for i, part in enumerate(parts))


def _breakable(name: str) -> Markup:
    """A name that a narrow column may break after an underscore or a slash."""
    return Markup("<wbr>").join(re.split(r"(?<=[_/])", name))


def _model(name: object) -> str:
    """A model's name: a hub id as it stands, of a path its last part."""
    text = str(name)
    return Path(text).name if Path(text).is_absolute() else text
