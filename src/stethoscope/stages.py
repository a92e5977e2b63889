"""The stages of a run as values: what each needs, what decides its result, and the function that makes it.

A stage is added by writing that function and one entry of `STAGES`; `run.py` derives its key, skips it where its
result is current, shows its progress and saves it, and the command line gets a command for it.

Functions import what they need when they are called, so that listing the stages imports nothing heavy.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope import filtering, make
from stethoscope.artifacts import Provenance, file_name
from stethoscope.checkpoints.header import read_header
from stethoscope.checkpoints.open import open_checkpoint
from stethoscope.editing.manifest import read_manifest
from stethoscope.make import Progress, Results
from stethoscope.recipe import ATTRIBUTION, GENERAL, HELD_OUT, SCALPEL_ARMS, Recipe

if TYPE_CHECKING:
    from stethoscope.context import Context
    from stethoscope.results.filtering import Filtering
    from stethoscope.results.validation import ScoreValidation
    from stethoscope.selection.arms import Planned

_COLLECTED = ("statistics.safetensors", "peaks.safetensors")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a run.

    Attributes:
        name: its command, and its key among the results.
        title: the text beside its bar.
        needs: names of inputs and of earlier stages, whose hashes make its key.
        make: makes the result with a given provenance from the context and earlier results.
        settings: values of the recipe that also decide the result.
        load: reads a saved result if it has this provenance, else returns None; without, the result is always made.
        check: raises a StethoscopeError where other files that belong to a saved result are missing or damaged.
        save: writes a result in the run's folder; without, ``make`` saves it.
        wanted: whether a whole run includes it.
        notes: lines that the reporter shows about a result.
        also: stages to run with it when a run ends with it.
        help: help of its command; a stage without help has no command.
        says: sentences at the end of its command.
        rows: its command's table.
        wrote: files in the run's folder that its command names.
        then: the command that its command suggests next.
    """

    name: str
    title: str
    needs: Callable[[Recipe], Sequence[str]]
    make: "Callable[[Context, Results, Provenance, Progress], Any]"
    settings: Callable[[Recipe], Mapping[str, Any]] = lambda _recipe: {}
    load: "Callable[[Context, Provenance], Any] | None" = None
    check: "Callable[[Context, Any], object]" = lambda _context, _made: None
    save: Callable[[Path, Recipe, Any], Any] | None = None
    wanted: Callable[[Recipe], bool] = lambda _recipe: True
    notes: Callable[[Any], Iterable[str]] = lambda _made: ()
    also: tuple[str, ...] = ()
    help: str = ""
    says: Callable[[Any, Recipe], Iterable[str]] = lambda made, _recipe: [made.verdict]
    rows: Callable[[Any, Recipe], list[list[str]]] = lambda made, _recipe: made.table()
    wrote: Callable[[Recipe], Sequence[str]] = lambda _recipe: ()
    then: str = "run"


def _load_plans(context: "Context", provenance: Provenance) -> "Planned | None":
    from stethoscope.selection.arms import load_plans

    return load_plans(context.folder, provenance, context.task_vector)


def _check_edit(context: "Context", planned: "Planned") -> None:
    if "selected" in planned.plans:
        open_checkpoint(context.folder / "edited")
        read_manifest(context.folder / "edited")


def _check_filter(context: "Context", made: "Filtering") -> None:
    from stethoscope.editing.filter import check_files

    check_files(context.filters, made)


def _artifact(module: str, name: str, place: Callable[[Recipe], str] = lambda _recipe: "") -> dict[str, Any]:
    """The options ``load`` and ``save`` of a stage whose result is an `Artifact` in a place of the run's folder."""

    def load(context: "Context", provenance: Provenance) -> Any:
        folder = context.folder / place(context.recipe)
        return getattr(import_module(module), name).load_if_current(folder, provenance)

    def save(folder: Path, recipe: Recipe, made: Any) -> None:
        made.save(folder / place(recipe))

    return {"load": load, "save": save}


def _warnings(made: Any) -> list[str]:
    return [f"warning: {warning}" for warning in made.warnings]


def _verdict_and_warnings(made: Any, _: Recipe) -> list[str]:
    return [made.verdict, *_warnings(made)]


def _edited_layers(recipe: Recipe) -> dict[str, Any]:
    """The settings of the arms' plans, beside the selection."""
    arms = {"arms": recipe.evaluated, "random_sets": recipe.random_sets, "coefficient": recipe.edit.coefficient}
    return {**arms, **recipe.project.model_dump(include={"share", "features"})}


def _diagnosis_needs(recipe: Recipe) -> tuple[str, ...]:
    return ("base", "saes", *recipe.corpora, *(["tuned"] if recipe.score == ATTRIBUTION else []))


def _diagnosis_settings(recipe: Recipe) -> dict[str, Any]:
    by = {"by": recipe.edit.coefficient} if recipe.score == ATTRIBUTION else {}
    return {
        **by,
        "score": recipe.score,
        "increments": recipe.increments,
        "features": recipe.project.features,
        **recipe.diagnose.model_dump(exclude={"sae_memory_gb"}),
    }


def _calibration_settings(recipe: Recipe) -> dict[str, Any]:
    options = recipe.calibrate.model_dump(exclude={"target", "control"}) if recipe.calibrate else {}
    return options | recipe.select.model_dump()


def _selection_needs(recipe: Recipe) -> tuple[str, ...]:
    return ("diagnose", "calibrate") if recipe.select.policy == "calibrated" else ("diagnose",)


def _filter_settings(recipe: Recipe) -> dict[str, Any]:
    options = recipe.diagnose.model_dump(include={"max_tokens", "tokens"})
    edit = recipe.edit.model_dump(include={"filter", "tokens"})
    return {"weights": recipe.protected, "judged": recipe.judged, **edit, **options}


def _recommendation_settings(recipe: Recipe) -> dict[str, Any]:
    share = recipe.calibrate.budget if recipe.calibrate else None
    edit = recipe.edit.model_dump(include={"budget", "coefficient", "forwards"})
    return {"judged": recipe.judged, "share": share, **edit}


def _validation_folder(recipe: Recipe) -> str:
    return f"validation/{file_name(recipe.validation.control)}"


def _set_size(made: "ScoreValidation", recipe: Recipe) -> int:
    return made.size(recipe.select.k or 5)


def _validation_says(made: "ScoreValidation", recipe: Recipe) -> list[str]:
    size = _set_size(made, recipe)
    return [made.verdict(score, size) for score in dict.fromkeys((recipe.scored_by, ATTRIBUTION))]


STAGES: tuple[Stage, ...] = (
    Stage(
        name="diagnose",
        title="Diagnose: score every layer",
        needs=_diagnosis_needs,
        settings=_diagnosis_settings,
        make=make.diagnosis,
        **_artifact("stethoscope.results.diagnosis", "Diagnosis"),
        check=lambda context, _: [read_header(context.folder / name) for name in _COLLECTED],
        also=("evidence",),
        help="Score every layer with its SAE: how specific it is to the target, compared with chance.",
        says=_verdict_and_warnings,
        wrote=lambda _: ("diagnosis.json", *_COLLECTED, "evidence.json"),
        then="select",
    ),
    Stage(
        name="evidence",
        title="Evidence: strongest contexts",
        needs=lambda _: ("diagnose",),
        make=make.evidence,
        **_artifact("stethoscope.results.evidence", "Evidence"),
    ),
    Stage(
        name="calibrate",
        title="Calibrate: layers and coefficient",
        needs=lambda _: ("base", "tuned", "diagnose", "calibration target", "calibration control"),
        settings=_calibration_settings,
        make=make.calibration,
        **_artifact("stethoscope.results.calibration", "Calibration"),
        wanted=lambda recipe: recipe.select.policy == "calibrated",
        notes=lambda made: [made.reason],
        help="Find layers and coefficient on the recipe's calibration text: target loss gained per control loss paid.",
        says=lambda made, _: [made.rule, made.reason],
        wrote=lambda _: ("calibration.json",),
    ),
    Stage(
        name="select",
        title="Select layers",
        needs=_selection_needs,
        settings=lambda recipe: recipe.select.model_dump(),
        make=make.selection,
        **_artifact("stethoscope.results.selection", "Selection"),
        notes=lambda made: [f"layers chosen: {', '.join(map(str, made.layers))}", *_warnings(made)],
        also=("claim",),
        help="Choose layers by the recipe's policy, with the reason for each.",
        says=_verdict_and_warnings,
        wrote=lambda _: ("selection.json",),
    ),
    Stage(
        name="claim",
        title="Find test items that were seen",
        needs=lambda _: ("diagnose",),
        make=make.claim,
        save=lambda folder, _, made: made.save(folder),
        notes=lambda made: ["exploratory: the choice of layers has seen some test items"] if made.seen_items else [],
    ),
    Stage(
        name="geometry",
        title="Geometry: energy in the SAE subspace",
        needs=lambda _: ("base", "tuned", "diagnose"),
        settings=lambda recipe: recipe.project.model_dump(include={"features", "draws", "tokens"}),
        make=make.geometry,
        **_artifact("stethoscope.results.geometry", "Geometry"),
        wanted=lambda recipe: bool(set(recipe.arms) & set(SCALPEL_ARMS)),
        notes=lambda made: [made.verdict],
        help="Measure how much of the task vector lies in the SAE feature subspace, compared with chance.",
        wrote=lambda _: ("geometry.json",),
    ),
    Stage(
        name="filter",
        title="Filter: moments of target and protected text",
        needs=lambda recipe: ("base", "tuned", "diagnose", "target", *recipe.protected),
        settings=_filter_settings,
        make=filtering.make_filter,
        **_artifact("stethoscope.results.filtering", "Filtering", lambda _: "filter") | {"save": None},
        check=_check_filter,
        wanted=lambda recipe: recipe.filters,
        notes=lambda made: [made.verdict],
    ),
    Stage(
        name="passed",
        title="Evidence: what the filter passes and mutes",
        needs=lambda _: ("diagnose", "select", "filter"),
        make=filtering.passed_evidence,
        **_artifact("stethoscope.results.evidence", "Evidence", lambda _: "filter"),
        wanted=lambda recipe: recipe.filters,
    ),
    Stage(
        name="recommend",
        title="Recommend: layers, coefficient and filter",
        needs=lambda recipe: ("base", "tuned", "diagnose", "select", "filter", *recipe.judged.values()),
        settings=_recommendation_settings,
        make=filtering.recommendation,
        **_artifact("stethoscope.results.calibration", "Calibration", lambda _: "recommended"),
        wanted=lambda recipe: recipe.filters,
        notes=lambda made: [made.verdict],
        help="Find the layers, the coefficient and the filter's strength that gain most within a budget of damage.",
        wrote=lambda _: ("recommended/calibration.json",),
    ),
    Stage(
        name="edit",
        title="Edit: write the checkpoint",
        needs=lambda recipe: ("base", "tuned", "diagnose", "select", *(["recommend"] if recipe.filters else [])),
        settings=_edited_layers,
        make=make.edit,
        load=_load_plans,
        check=_check_edit,
        notes=_warnings,
    ),
    Stage(
        name="outcomes",
        title="Evaluate: arms on tasks",
        needs=lambda _: ("edit",),
        make=make.outcomes,
    ),
    Stage(
        name="losses",
        title="Evaluate: loss on text",
        needs=lambda _: ("edit",),
        make=make.losses,
    ),
    Stage(
        name="compare",
        title="Compare: paired tests",
        needs=lambda _: ("outcomes", "losses"),
        make=make.comparison,
    ),
    Stage(
        name="validate",
        title="Validate: inject layers and sets of layers",
        needs=lambda recipe: (
            "base", "tuned", "saes", "diagnose", "target", recipe.validation.control,
            *([HELD_OUT] if recipe.evaluate.target else []),
        ),
        settings=lambda recipe: {**recipe.validation.model_dump(), "coefficient": recipe.edit.coefficient},
        make=make.validation,
        **_artifact("stethoscope.results.validation", "ScoreValidation", _validation_folder),
        wanted=lambda _: False,
        help="Judge every score of the layers against what injecting them truly does.",
        says=_validation_says,
        rows=lambda made, recipe: made.table(_set_size(made, recipe)),
        wrote=lambda recipe: (f"{_validation_folder(recipe)}/validation.json",),
    ),
    Stage(
        name="tradeoff",
        title="Trade-off: every method over its strength",
        needs=lambda recipe: (
            "base", "tuned", "saes", "diagnose", "select", "target", *recipe.protected, HELD_OUT, GENERAL,
        ),
        settings=lambda recipe: {
            **recipe.tradeoff.model_dump(), **recipe.edit.model_dump(include={"coefficient", "tokens"}),
            "weights": recipe.protected,
        },
        make=make.tradeoff,
        **_artifact("stethoscope.results.tradeoff", "TradeOff"),
        wanted=lambda _: False,
        help="Measure what the filter and its rivals keep of the fine-tune's gain, and at what damage.",
        wrote=lambda _: ("tradeoff.json",),
    ),
    Stage(
        name="report",
        title="Report",
        needs=lambda _: ("compare",),
        make=make.report,
    ),
)  # fmt: skip
