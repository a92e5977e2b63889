"""Makes each stage's result from the context and the results of earlier stages.

Functions import what they need when they are called, so that listing the stages imports nothing heavy.
"""

from collections.abc import Callable, Collection, Mapping
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.artifacts import Provenance, file_name
from stethoscope.recipe import ATTRIBUTION, GENERAL, HELD_OUT

if TYPE_CHECKING:
    from stethoscope.context import Context
    from stethoscope.diagnosis.statistics import FeatureStatistics
    from stethoscope.editing.plan import EditPlan
    from stethoscope.editing.subspace import LayerFeatures
    from stethoscope.evaluation.outcomes import Outcomes
    from stethoscope.evaluation.text_loss import ArmLosses
    from stethoscope.results.calibration import Calibration
    from stethoscope.results.comparison import Claim, Comparison
    from stethoscope.results.diagnosis import Diagnosis
    from stethoscope.results.evidence import Evidence
    from stethoscope.results.geometry import Geometry
    from stethoscope.results.selection import Selection
    from stethoscope.results.tradeoff import TradeOff
    from stethoscope.results.validation import ScoreValidation
    from stethoscope.selection.arms import Planned

GEOMETRY_DOCUMENTS = 64  # of each corpus, from which the tokens of functional energy are taken
GEOMETRY_TOKENS = 4  # read for each that is taken: what reading costs, measuring does not

Progress = Callable[[int, int], None]
Results = Mapping[str, Any]


def diagnosis(context: "Context", _: Results, provenance: Provenance, progress: Progress) -> "Diagnosis":
    """Collect every layer's SAE activations on target and control text, and score the layers."""
    from stethoscope.diagnosis.collect import collect_activations
    from stethoscope.diagnosis.diagnose import diagnose
    from stethoscope.diagnosis.statistics import save_layers

    recipe, options, executor = context.recipe, context.recipe.diagnose, context.executor
    texts = {name: context.found.texts[name] for name in recipe.corpora}
    memory = options.sae_memory or (executor.sae_memory(context.base.nbytes) if executor else None)
    collected = collect_activations(
        context.model,
        context.tokenizer,
        context.found.saes,
        texts,
        block_size=options.block_size,
        max_tokens=options.max_tokens,
        tokens=options.tokens,
        memory=memory,
        skip_broken=options.skip_broken,
        executor=executor,
        progress=progress,
    )
    broken = {name: one.broken for name, one in collected.items()}
    attribution = _attribution(context, broken, progress) if recipe.score == ATTRIBUTION else None
    (context.folder / "diagnosis.json").unlink(missing_ok=True)  # of other files than those beside it from now on
    save_layers(context.folder / "peaks.safetensors", {n: one.peaks for n, one in collected.items()})
    save_layers(context.folder / "statistics.safetensors", {n: one.statistics.layers for n, one in collected.items()})
    return diagnose(
        collected,
        provenance=provenance,
        score=recipe.score,
        attribution=attribution,
        increments=recipe.increments,
        permutations=options.permutations,
        resamples=options.resamples,
        top_features=max(64, context.projected_features),
    )


def _attribution(
    context: "Context", broken: Mapping[str, Collection[int]], progress: Progress
) -> "dict[str, FeatureStatistics]":
    """Attribute target and control loss to each layer's own edit, by feature."""
    from stethoscope.diagnosis.attribution import attribute

    edits, saes = context.layer_edits(), context.load_saes()
    parts = {name: context.batches(name, without=some) for name, some in broken.items()}
    total, before, found = sum(map(len, parts.values())), 0, {}
    for name, part in parts.items():
        found[name] = attribute(
            context.model,
            edits,
            saes,
            part,
            site=context.sae_site.site,
            tap=context.sae_site.tap,
            coefficient=context.recipe.edit.coefficient,
            block_size=context.recipe.diagnose.block_size,
            progress=lambda done, _, before=before: progress(before + done, total),  # type: ignore[misc]
        ).features
        before += len(part)
    return found


def evidence(context: "Context", results: Results, provenance: Provenance, progress: Progress) -> "Evidence":
    """Show the contexts in which each layer's most specific features are strongest."""
    from stethoscope.diagnosis.evidence import gather_evidence
    from stethoscope.diagnosis.peaks import Peaks
    from stethoscope.diagnosis.statistics import load_layers

    return gather_evidence(
        context.model,
        context.tokenizer,
        context.found.saes,
        context.found.texts,
        results["diagnose"],
        load_layers(context.folder / "peaks.safetensors", Peaks),
        max_tokens=context.recipe.diagnose.max_tokens,
        progress=progress,
        provenance=provenance,
    )


def calibration(context: "Context", results: Results, provenance: Provenance, progress: Progress) -> "Calibration":
    """Find layers and coefficient on the recipe's calibration text."""
    from stethoscope.selection.calibrate import calibrate

    options = context.recipe.calibrate
    assert options is not None  # its texts are among what the stage needs
    flagged = context.recipe.select.include_flagged
    return calibrate(
        context.model,
        context.layer_edits(),
        {side: context.batches(f"calibration {side}") for side in ("target", "control")},
        {layer.layer: layer.z for layer in results["diagnose"].layers if flagged or layer.flag is None},
        seen={side: context.hashes[f"calibration {side}"] for side in ("target", "control")},
        provenance=provenance,
        coefficients=options.coefficients,
        budget=options.budget,
        per_layer=options.per_layer,
        executor=context.executor,
        progress=progress,
    )


def selection(context: "Context", results: Results, provenance: Provenance, _: Progress) -> "Selection":
    """Choose layers by the recipe's policy."""
    from stethoscope.selection.policies import select, select_calibrated

    if context.recipe.select.policy == "calibrated":
        return select_calibrated(results["diagnose"], results["calibrate"], provenance=provenance)
    return select(results["diagnose"], context.recipe.select, provenance=provenance)


def claim(context: "Context", _: Results, provenance: Provenance, __: Progress) -> "Claim":
    """List the test items that occur in the texts the layers were chosen by."""
    from stethoscope.results.comparison import Claim

    context.found.seen.save(context.folder)
    return Claim(
        provenance=provenance,
        kind="exploratory" if context.found.seen_items else "confirmatory",
        seen_items=context.found.seen_items,
        seen_texts={name: context.hashes[name] for name in context.found.texts if name not in (GENERAL, HELD_OUT)},
    )


def geometry(context: "Context", results: Results, provenance: Provenance, progress: Progress) -> "Geometry":
    """Measure how much of the task vector lies in the SAE feature subspace."""
    from stethoscope.editing.geometry import measure_geometry

    diagnosis: Diagnosis = results["diagnose"]
    read = GEOMETRY_TOKENS * context.recipe.project.tokens
    return measure_geometry(
        context.task_vector,
        _features(context, diagnosis),
        provenance=provenance,
        model=context.model,
        texts={
            name: context.batches(name, GEOMETRY_DOCUMENTS, diagnosis.corpora[name].broken, most=read)
            for name in context.recipe.corpora
        },
        draws=context.recipe.project.draws,
        tokens=context.recipe.project.tokens,
        progress=progress,
    )


def _features(context: "Context", diagnosis: "Diagnosis") -> "dict[int, Callable[[], LayerFeatures]]":
    """By layer, a function that loads its feature directions, those first that differ most toward the target."""
    from stethoscope.diagnosis.statistics import load_statistics
    from stethoscope.editing.subspace import LayerFeatures
    from stethoscope.saes.open import load_sae

    statistics = cache(lambda: load_statistics(context.folder / "statistics.safetensors"))

    def load(layer: int, against: str) -> LayerFeatures:
        ours, theirs = (statistics()[name].layers[layer] for name in ("target", against))
        sae = load_sae(context.found.saes[layer])
        return LayerFeatures(
            decoder=sae.W_dec.detach(),
            encoder=sae.W_enc.detach().T,
            order=ours.toward(theirs).tolist(),
            chosen=context.projected_features,
        )

    return {layer.layer: partial(load, layer.layer, layer.against) for layer in diagnosis.layers}


def edit(context: "Context", results: Results, provenance: Provenance, progress: Progress) -> "Planned":
    """Make every arm's plan, and write the checkpoint that is recommended, or else the selected layers'."""
    from stethoscope.editing.writer import write_edit
    from stethoscope.filtering import filtered_plans
    from stethoscope.results.edits import Edits
    from stethoscope.selection.arms import Planned, plan_arms, save_plans

    task_vector, diagnosis, selection = context.task_vector, results["diagnose"], results["select"]
    chosen = selection.amounts(context.recipe.edit.coefficient)
    planned = plan_arms(
        context.recipe,
        task_vector,
        chosen,
        {layer.layer: layer.excess for layer in diagnosis.layers if layer.flag is None},
        {n: lambda load=load: load().directions for n, load in _features(context, diagnosis).items()},  # type: ignore[misc]
        features=context.projected_features,
    )
    if context.recipe.filters:
        plans = {**planned.plans, **filtered_plans(context, results, chosen)}
        left_out = "`recommended` is left out, and the edit is `selected`: " + results["recommend"].reason
        planned = Planned(plans=plans, warnings=(*planned.warnings, *(() if "recommended" in plans else (left_out,))))
    # removed before the checkpoint changes: plans that are current must not lie beside another plan's edit
    (context.folder / Edits.FILE).unlink(missing_ok=True)
    if plan := planned.plans.get("recommended") or planned.plans.get("selected"):
        edited = context.folder / "edited"
        write_edit(context.base, task_vector, plan, edited, overwrite=True, progress=progress)
    save_plans(context.folder, planned, task_vector.energy_by_layer(), provenance=provenance)
    return planned


def _arm_keys(context: "Context", plans: "Mapping[str, EditPlan | None]", *texts: str) -> dict[str, Provenance]:
    """Provenance of each arm's outcomes, or of its losses on texts, which no worker measures.

    Arms are compared, so all are measured on one kind of device.
    """
    ray = context.recipe.ray if context.has_workers and not texts else None
    device = "cuda" if ray and ray.gpus else context.device.type
    where = {"dtype": str(context.dtype), **({} if device == "cpu" else {"device": device})}
    return {
        name: context.provenance("base", "tuned", *texts, plan=plan.to_json() if plan else None, **where)
        for name, plan in plans.items()
    }


def outcomes(context: "Context", results: Results, _: Provenance, progress: Progress) -> "Outcomes":
    """Run every arm on every task; stored outcomes are read."""
    from stethoscope.evaluation.run import evaluate

    options, plans, executor = context.recipe.evaluate, results["edit"].plans, context.executor
    return evaluate(
        lambda: context.model,
        context.tokenizer,
        plans if executor else {name: context.arm(plan) for name, plan in plans.items()},
        [*options.tasks, *options.control_tasks],
        out=context.folder,
        include_path=options.include_path,
        task_code=options.task_code,
        data=options.data,
        limit=options.limit,
        batch_size=options.batch_size,
        seed=context.recipe.seed,
        keys={name: made.key for name, made in _arm_keys(context, plans).items()},
        executor=executor,
        progress=lambda done, total, _: progress(done, total),
    )


def losses(context: "Context", results: Results, _: Provenance, progress: Progress) -> "ArmLosses":
    """Measure every arm's loss on held-out target text, and loss and divergence from the base on general text.

    An arm is made once, and dropped before the next; of equal arms the first is measured for all.
    """
    from stethoscope.evaluation.text_loss import ArmLosses, BaseText, DocumentCosts, TextLoss, document_losses

    plans, found = results["edit"].plans, ArmLosses(general={}, target={})
    folders = {text: context.folder / "losses" / text.replace(" ", "-") for text in (GENERAL, HELD_OUT)}
    keys = {text: _arm_keys(context, plans, text) for text in folders if context.found.texts.get(text)}
    # neither is read where every loss is saved
    base_text = cache(lambda: BaseText(context.model, *context.rows(GENERAL)))
    held_out = cache(partial(context.rows, HELD_OUT))
    firsts: dict[str, str] = {}  # key -> arm
    measured = {name: firsts.setdefault(made.key, name) for name, made in _arm_keys(context, plans).items()}
    for number, name in enumerate(firsts.values(), 1):
        enter = cache(partial(context.held_arm, plans[name]))
        if GENERAL in keys:
            folder, key = folders[GENERAL] / file_name(name), keys[GENERAL][name]
            costs = DocumentCosts.load_if_current(folder, key)
            if costs is None:
                costs = base_text().costs(enter())
                costs.save(folder, key)
            found.general[name] = costs
        if HELD_OUT in keys:
            folder, key = folders[HELD_OUT] / file_name(name), keys[HELD_OUT][name]
            saved = TextLoss.load_if_current(folder, key)
            if saved is None:
                ids, starts = held_out()
                with enter()():
                    saved = TextLoss.of(document_losses(context.model, ids, starts=starts), key)
                saved.save(folder)
            found.target[name] = saved.measured
        progress(number, len(firsts))
    return ArmLosses(
        general={name: found.general[first] for name, first in measured.items() if GENERAL in keys},
        target={name: found.target[first] for name, first in measured.items() if HELD_OUT in keys},
    )


def comparison(context: "Context", results: Results, _: Provenance, __: Progress) -> "Comparison":
    """Compare the arms with paired tests."""
    from stethoscope.editing.manifest import write_results
    from stethoscope.evaluation.comparison import compare

    losses: ArmLosses = results["losses"]
    made = compare(
        results["outcomes"],
        family=context.found.tasks,
        losses={name: one.loss for name, one in losses.general.items()} or None,
        target_losses=losses.target or None,
        divergences={name: one.divergence for name, one in losses.general.items()} or None,
        seed=context.recipe.seed,
        inputs={
            **context.hashes,
            **{n: results[n].provenance.key for n in ("diagnose", "calibrate", "recommend") if n in results},
        },
    )
    made.save(context.folder / "comparison.json")
    if made.edit in results["edit"].plans:
        write_results(context.folder / "edited", made.contrast(made.edit).summary())
    return made


def validation(context: "Context", results: Results, provenance: Provenance, progress: Progress) -> "ScoreValidation":
    """Compare every score with the effect of injecting the layers."""
    from stethoscope.diagnosis.statistics import load_statistics
    from stethoscope.selection.baselines import edit_scores, text_scores
    from stethoscope.selection.validate import validate_scores

    recipe, options, corpora = context.recipe, context.recipe.validation, results["diagnose"].corpora
    statistics = load_statistics(context.folder / "statistics.safetensors")
    edits = context.layer_edits()
    names = ("target", options.control)
    texts = {name: context.batches(name, options.documents, corpora[name].broken) for name in names}
    truth = context.batches(HELD_OUT, options.documents) if HELD_OUT in context.found.texts else texts["target"]
    scores = text_scores(statistics, control=options.control, seed=recipe.seed) | edit_scores(
        context.model,
        edits,
        context.load_saes(),
        statistics,
        texts,
        control=options.control,
        site=context.sae_site.site,
        tap=context.sae_site.tap,
        coefficient=recipe.edit.coefficient,
        progress=progress,
    )
    return validate_scores(
        context.model,
        edits,
        scores,
        {"target": truth, options.control: texts[options.control]},
        provenance=provenance,
        control=options.control,
        matched=options.matched if options.matched is not None else (recipe.scored_by, ATTRIBUTION),
        random_sets=options.random_sets,
        coefficient=recipe.edit.coefficient,
        executor=context.executor,
        progress=progress,
    )


def tradeoff(context: "Context", results: Results, provenance: Provenance, progress: Progress) -> "TradeOff":
    """Measure the filter and its rivals over their strengths."""
    from stethoscope.tradeoff import recipe_tradeoff

    directions = {n: lambda load=load: load().directions for n, load in _features(context, results["diagnose"]).items()}
    return recipe_tradeoff(context, results["diagnose"], results["select"], directions, provenance, progress=progress)


def report(context: "Context", _: Results, __: Provenance, ___: Progress) -> Path:
    """Write the report from what is saved."""
    from stethoscope.report.render import render_report

    return render_report(context.folder)
