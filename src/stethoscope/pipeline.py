"""Recipe in, verdict out: the stages in order, each resumable, all artefacts in one run folder.

A stage whose inputs did not change is not run again; what it wrote is read instead.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stethoscope.artifacts import Provenance, canonical_json, sha256_bytes, sha256_files, write_text
from stethoscope.corpus import Document, TokenBatch, batches, documents_hash, prompt_lengths, tokenize
from stethoscope.diagnosis.attribution import attribute
from stethoscope.diagnosis.diagnose import ATTRIBUTION, diagnose
from stethoscope.diagnosis.evidence import gather_evidence
from stethoscope.diagnosis.listen import encoder_dtype, listen
from stethoscope.diagnosis.sharing import share
from stethoscope.diagnosis.statistics import FeatureStatistics, load_statistics, save_statistics
from stethoscope.editing.apply import applied, prepare
from stethoscope.editing.geometry import LayerFeatures, measure_geometry
from stethoscope.editing.layers import LayerEdits
from stethoscope.editing.manifest import write_results
from stethoscope.editing.plan import EditPlan, coefficients
from stethoscope.editing.sides import SCALPEL_ARMS
from stethoscope.editing.writer import write_edit
from stethoscope.errors import RecipeError
from stethoscope.evaluation.comparison import compare
from stethoscope.evaluation.control import DocumentCosts, TextLoss, document_costs, document_losses
from stethoscope.evaluation.outcomes import DocumentLosses
from stethoscope.evaluation.run import evaluate
from stethoscope.models import find_device, load_model, load_tokenizer, preferred_dtype, room_beside
from stethoscope.preflight import GENERAL, HELD_OUT, preflight
from stethoscope.recipe import Recipe
from stethoscope.report.render import render_report
from stethoscope.results.calibration import Calibration
from stethoscope.results.comparison import Claim, Comparison
from stethoscope.results.diagnosis import Diagnosis
from stethoscope.results.edits import Edits
from stethoscope.results.evidence import Evidence
from stethoscope.results.geometry import Geometry
from stethoscope.results.hearing import Hearing
from stethoscope.results.selection import Selection
from stethoscope.saes.sources import SAEFolder, load_sae
from stethoscope.scaling.bench import Bench
from stethoscope.scaling.crew import Crew, import_ray
from stethoscope.selection.arms import load_plans, plan_arms, save_plans
from stethoscope.selection.calibration import calibrate
from stethoscope.selection.hearing import judge_hearing
from stethoscope.selection.policies import select, select_calibrated
from stethoscope.selection.scoring import edit_scores, text_scores

# The published experiment projects onto 77 features of 2560 dimensions: 3 % of the width.
PROJECTED_SHARE = 0.03
INJECTED_TOKENS = 2048  # a batch's activations after every layer are held at once
GEOMETRY_DOCUMENTS = 64  # of each corpus, from which the tokens of functional energy are taken


@runtime_checkable
class Reporter(Protocol):
    """Shows progress; the library itself never prints."""

    def stage(self, title: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """A stage begins; the value is called with steps done and in all."""

    def note(self, text: str) -> None:
        """One line on what a stage found or where it wrote."""


class Silent:
    """A reporter that shows nothing."""

    def stage(self, title: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """Nothing is shown."""
        return nullcontext(lambda _done, _total: None)

    def note(self, text: str) -> None:
        """Nothing is shown."""


SILENT = Silent()


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """Where a run's artefacts are, and what it found."""

    folder: Path
    selection: Selection
    comparison: Comparison

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.folder / "report.html"

    @property
    def edited(self) -> Path:
        """The edited checkpoint."""
        return self.folder / "edited"

    def summary(self) -> dict[str, Any]:
        """The run in plain values: layers, accuracy per arm and task, verdicts, and where everything is."""
        return {
            "selection": list(self.selection.layers),
            "accuracy": self.comparison.accuracy,
            "verdicts": self.verdicts(),
            "edited": str(self.edited),
            "report": str(self.report),
        }

    def verdicts(self) -> list[str]:
        """One sentence for every pair of arms that was compared."""
        return [contrast.verdict for contrast in self.comparison.contrasts]

    def table(self) -> list[list[str]]:
        """Tasks by arms, in percent, with a header row; ``*`` marks a significant difference from the base."""
        comparison = self.comparison
        found = {(row["arm"], row["task"]): row["accuracy"] for row in comparison.accuracy}
        arms = list(dict.fromkeys(row["arm"] for row in comparison.accuracy))
        contrasts = {contrast.b: contrast for contrast in comparison.contrasts if contrast.a == comparison.baseline}
        marked = {(arm, task) for arm, c in contrasts.items() for task in (*c.improved, *c.worsened)}

        def percent(task: str) -> list[str]:
            return [f"{100 * found[arm, task]:.1f}{'*' if (arm, task) in marked else ' '}" for arm in arms]

        means = [100 * np.mean([found[arm, task] for task in comparison.family]) for arm in arms]
        found_losses = {
            "target loss, change": [contrasts[arm].target_loss if arm in contrasts else None for arm in arms],
            "general loss, change": [contrasts[arm].loss if arm in contrasts else None for arm in arms],
        }
        return [
            ["accuracy, %", *arms],
            *[[task, *percent(task)] for task in comparison.family],
            ["mean of these", *[f"{mean:.1f} " for mean in means]],
            *[[task, *percent(task)] for task in comparison.controls],
            *[
                [name, *[f"{loss.difference:+.3f}" if loss else "" for loss in losses]]
                for name, losses in found_losses.items()
                if any(losses)
            ],
        ]


class _Run:
    def __init__(self, recipe: Recipe, folder: Path, reporter: Reporter) -> None:
        self.recipe = recipe
        self.folder = folder
        self.reporter = reporter
        self.open = ExitStack()
        with reporter.stage("Check the recipe"):
            if recipe.ray:
                import_ray()
            self.found = preflight(recipe, folder)
            self.hashes = {
                "base": sha256_files(identity_files(self.found.base.path)),
                "tuned": sha256_files(identity_files(self.found.task_vector.store.path)),
                "saes": sha256_bytes(
                    canonical_json({str(n): sae.sha256 for n, sae in self.found.saes.items()}).encode()
                ),
                **{
                    name: documents_hash([*documents, *self.found.prompts.get(name, ())])
                    for name, documents in self.found.texts.items()
                },
            }
        for note in self.found.look.notes:
            reporter.note(note)

    @cached_property
    def device(self) -> torch.device:
        """Where this process computes."""
        return find_device(self.recipe.device)

    @cached_property
    def model(self) -> PreTrainedModel:
        on_gpus = self.recipe.ray and self.recipe.ray.gpus
        dtype = preferred_dtype("cuda") if on_gpus else None
        return load_model(self.found.base.path, dtype=dtype, device=self.device)

    def layer_edits(self) -> LayerEdits:
        """The task vector's layers, to be put into the model."""
        return LayerEdits(self.model, self.found.task_vector, memory=room_beside(self.model))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.found.base.path)

    @cached_property
    def crew(self) -> Crew | None:
        """Workers, if the recipe asks for any; they come when they are first needed."""
        options = self.recipe.ray
        if options is None or options.workers == 0:
            return None
        bench = Bench(base=self.found.base.path, tuned=self.recipe.tuned, dtype=self.model.dtype)
        return self.open.enter_context(Crew(options, bench))

    def load_saes(self) -> dict[int, Any]:
        """All SAEs at once, for as long as the caller keeps them."""
        return {layer: load_sae(sae) for layer, sae in self.found.saes.items()}

    @property
    def place(self) -> SAEFolder:
        """Any of the SAEs, for where they read: all read one site."""
        return next(iter(self.found.saes.values()))

    def provenance(self, *inputs: str, **settings: Any) -> Provenance:
        chosen = {name: self.hashes[name] for name in inputs}
        chosen["settings"] = sha256_bytes(canonical_json(settings).encode())
        return Provenance(seed=self.recipe.seed, inputs=chosen)

    def diagnose(self) -> Diagnosis:
        """Listen; what could not be heard is left out of all that follows too."""
        made = self.listened()
        for name, corpus in made.corpora.items():
            if corpus.broken:
                self.found.texts[name] = [
                    document for n, document in enumerate(self.found.texts[name]) if n not in corpus.broken
                ]
        return made

    def listened(self) -> Diagnosis:
        recipe, options = self.recipe, self.recipe.diagnose
        corpora = ("target", *recipe.all_controls)
        edit = {"edit": self.hashes["tuned"], "by": recipe.edit.coefficient} if recipe.score == ATTRIBUTION else {}
        provenance = self.provenance(
            "base", "saes", *corpora, **edit, score=recipe.score, increments=recipe.increments,
            features=self.projected_features, **options.model_dump(exclude={"sae_memory_gb"}),
        )  # fmt: skip
        self.hashes["diagnosis"] = provenance.key
        texts = {name: self.found.texts[name] for name in corpora}
        saved = Diagnosis.load_if_current(self.folder, provenance)
        # a stage of its own: a terminal shows one bar at a time
        worth = self.worth(texts) if recipe.score == ATTRIBUTION and not saved else None
        with self.reporter.stage("Diagnose: listen to every layer") as advance:
            if saved:
                return saved
            memory = round(options.sae_memory_gb * 1e9) if options.sae_memory_gb else None
            split = recipe.ray.split if recipe.ray else "auto"
            if self.crew:
                memory = memory or self.crew.sae_memory(self.found.base.nbytes)
                sharing = share(
                    self.model,
                    self.found.saes,
                    self.crew.means,
                    dtype=encoder_dtype(self.model),
                    memory=memory,
                    split=split,
                    max_tokens=options.max_tokens,
                )
                self.reporter.note(sharing.said)
            heard = listen(
                self.model,
                self.tokenizer,
                self.found.saes,
                texts,
                block_size=options.block_size,
                max_tokens=options.max_tokens,
                tokens=options.tokens,
                memory=memory,
                skip_broken=options.skip_broken,
                split=split,
                spread=self.crew.listening if self.crew else None,
                progress=advance,
            )
            save_statistics(self.folder / "statistics.safetensors", {n: h.statistics for n, h in heard.items()})
            made = diagnose(
                heard,
                documents={name: len(documents) for name, documents in texts.items()},
                provenance=provenance,
                score=recipe.score,
                worth=worth,
                increments=recipe.increments,
                permutations=options.permutations,
                resamples=options.resamples,
                top_features=max(64, self.projected_features),
            )
            made.save(self.folder)
        return made

    def gather_evidence(self, diagnosis: Diagnosis) -> None:
        provenance = self.provenance("diagnosis")
        with self.reporter.stage("Evidence: what the features heard") as advance:
            if Evidence.load_if_current(self.folder, provenance):
                return
            gather_evidence(
                self.model,
                self.tokenizer,
                self.found.saes,
                {name: self.found.texts[name] for name in diagnosis.corpora},
                diagnosis,
                max_tokens=self.recipe.diagnose.max_tokens,
                tokens=self.recipe.diagnose.tokens,
                progress=advance,
                provenance=provenance,
            ).save(self.folder)

    def worth(self, texts: Mapping[str, Sequence[Document]]) -> dict[str, FeatureStatistics]:
        """What each layer's own edit is worth, by feature."""
        edits, saes = self.layer_edits(), self.load_saes()
        with self.reporter.stage("Attribute each layer's edit to its features") as advance:
            parts = {name: self.batches(name) for name in texts}
            total, before, worth = sum(map(len, parts.values())), 0, {}
            for name, part in parts.items():
                worth[name] = attribute(
                    self.model,
                    edits,
                    saes,
                    part,
                    site=self.place.site,
                    tap=self.place.tap,
                    coefficient=self.recipe.edit.coefficient,
                    block_size=self.recipe.diagnose.block_size,
                    progress=lambda done, _, before=before: advance(before + done, total),  # type: ignore[misc]
                ).statistics()
                before += len(part)
        return worth

    @property
    def projected_features(self) -> int:
        return self.recipe.project.features or max(1, round(PROJECTED_SHARE * self.found.base.hidden_size))

    def judge(self, documents: int, random_sets: int, control: str, matched: Collection[str]) -> Hearing:
        recipe, found = self.recipe, self.found
        if control not in recipe.all_controls:
            raise RecipeError(f"the recipe has no control `{control}`", hint=f"it has {', '.join(recipe.all_controls)}")
        folder = self.folder / "hearing" / control
        truth = HELD_OUT if HELD_OUT in found.texts else "target"
        names = dict.fromkeys(("base", "tuned", "saes", "target", control, truth))
        provenance = self.provenance(
            *names, hearing=[documents, random_sets, recipe.edit.coefficient, *sorted(matched)]
        )
        if saved := Hearing.load_if_current(folder, provenance):
            return saved
        statistics = self.statistics
        edits = self.layer_edits()
        texts = {name: self.batches(name, documents) for name in ("target", control)}
        with self.reporter.stage("Score the layers in every way") as advance:
            scores = text_scores(statistics, control=control, seed=recipe.seed) | edit_scores(
                self.model,
                edits,
                self.load_saes(),
                statistics,
                texts,
                control=control,
                site=self.place.site,
                tap=self.place.tap,
                progress=advance,
            )
        with self.reporter.stage("Inject layers and sets of layers") as advance:
            made = judge_hearing(
                self.model,
                edits,
                scores,
                {"target": self.batches(truth, documents), control: texts[control]},
                provenance=provenance,
                control=control,
                matched=matched,
                random_sets=random_sets,
                coefficient=recipe.edit.coefficient,
                spread=self.crew.injecting if self.crew else None,
                progress=advance,
            )
        folder.mkdir(parents=True, exist_ok=True)
        made.save(folder)
        return made

    def batches(self, text: str, most: int | None = None) -> list[TokenBatch]:
        """A text's documents, at most so many from the top."""
        rows, starts = self.rows(text, most, max_tokens=self.recipe.diagnose.max_tokens)
        return list(batches(rows, self.tokenizer, batch_tokens=INJECTED_TOKENS, starts=starts))

    def rows(
        self, text: str, most: int | None = None, *, max_tokens: int = 1024
    ) -> tuple[list[list[int]], list[int] | None]:
        """Token ids of a text's documents, and where each one's loss begins to count if they have prompts."""
        found = tokenize(self.found.texts[text][:most], self.tokenizer, max_tokens=max_tokens)
        prompts = self.found.prompts.get(text)
        if prompts is None:
            return found, None
        return found, prompt_lengths(found, tokenize(prompts[:most], self.tokenizer, max_tokens=max_tokens))

    def calibrate(self, diagnosis: Diagnosis) -> Calibration:
        options = self.recipe.calibrate
        if options is None:
            raise RecipeError("the recipe has no section `calibrate`", hint="it names target and control text")
        names = ("calibration target", "calibration control")
        settings = options.model_dump(exclude={"target", "control"}) | self.recipe.select.model_dump()
        provenance = self.provenance("base", "tuned", "diagnosis", *names, **settings)
        with self.reporter.stage("Calibrate: layers and coefficient") as advance:
            made = Calibration.load_if_current(self.folder, provenance)
            if made is None:
                flagged = self.recipe.select.include_flagged
                made = calibrate(
                    self.model,
                    self.layer_edits(),
                    {side: self.batches(f"calibration {side}") for side in ("target", "control")},
                    {layer.layer: layer.z for layer in diagnosis.layers if flagged or layer.flag is None},
                    seen={side: self.hashes[f"calibration {side}"] for side in ("target", "control")},
                    provenance=provenance,
                    coefficients=options.coefficients,
                    budget=options.budget,
                    per_layer=options.per_layer,
                    spread=self.crew.injecting if self.crew else None,
                    progress=advance,
                )
                made.save(self.folder)
        self.reporter.note(made.reason)
        return made

    def select(self, diagnosis: Diagnosis) -> Selection:
        options = self.recipe.select
        if options.policy == "calibrated":
            calibration = self.calibrate(diagnosis)
            self.hashes["calibration"] = calibration.provenance.key
            provenance = self.provenance("diagnosis", "calibration", **options.model_dump())
            made = select_calibrated(diagnosis, calibration, provenance=provenance)
        else:
            made = select(diagnosis, options, provenance=self.provenance("diagnosis", **options.model_dump()))
        made.save(self.folder)
        self.found.seen.save(self.folder)
        Claim(
            provenance=self.provenance("diagnosis"),
            kind="exploratory" if self.found.seen_items else "confirmatory",
            seen_items=self.found.seen_items,
            seen_texts={name: self.hashes[name] for name in self.found.texts if name not in (GENERAL, HELD_OUT)},
        ).save(self.folder)
        if self.found.seen_items:
            self.reporter.note("exploratory: some items were seen when the layers were chosen")
        self.reporter.note(f"layers chosen: {', '.join(map(str, made.layers))}")
        for warning in (*diagnosis.warnings, *made.warnings):
            self.reporter.note(f"warning: {warning}")
        return made

    @cached_property
    def statistics(self) -> dict[str, FeatureStatistics]:
        return load_statistics(self.folder / "statistics.safetensors")

    def features(self, diagnosis: Diagnosis) -> dict[int, Callable[[], LayerFeatures]]:
        """Loads a layer's directions, those first that differ most toward the target."""

        def load(layer: int, against: str) -> LayerFeatures:
            ours, theirs = (self.statistics[name].layers[layer] for name in ("target", against))
            sae = load_sae(self.found.saes[layer])
            return LayerFeatures(
                decoder=sae.W_dec.detach(),
                encoder=sae.W_enc.detach().T,
                order=ours.toward(theirs).tolist(),
                chosen=self.projected_features,
            )

        return {layer.layer: partial(load, layer.layer, layer.against) for layer in diagnosis.layers}

    def geometry(self, diagnosis: Diagnosis) -> Geometry:
        options = self.recipe.project
        corpora = ("target", *self.recipe.all_controls)
        provenance = self.provenance(
            "base", "tuned", "diagnosis", features=self.projected_features, draws=options.draws, tokens=options.tokens
        )
        with self.reporter.stage("Geometry: what features keep of it") as advance:
            made = Geometry.load_if_current(self.folder, provenance)
            if made is None:
                made = measure_geometry(
                    self.found.task_vector,
                    self.features(diagnosis),
                    provenance=provenance,
                    model=self.model,
                    texts={name: self.batches(name, GEOMETRY_DOCUMENTS) for name in corpora},
                    draws=options.draws,
                    tokens=options.tokens,
                    progress=advance,
                )
                made.save(self.folder)
        self.reporter.note(made.verdict)
        return made

    def edit(self, diagnosis: Diagnosis, selection: Selection) -> dict[str, EditPlan | None]:
        """Every arm's plan, and the selected layers' checkpoint; both are kept."""
        recipe, edited = self.recipe, self.folder / "edited"
        chosen = selection.coefficients or dict.fromkeys(selection.layers, recipe.edit.coefficient)
        provenance = self.provenance(
            "base", "tuned", "diagnosis", chosen=chosen, arms=recipe.arms, random_sets=recipe.random_sets,
            features=self.projected_features, share=recipe.project.share,
        )  # fmt: skip
        with self.reporter.stage("Edit: write the checkpoint") as advance:
            planned = load_plans(self.folder, provenance)
            done = planned is not None and ("selected" not in planned.plans or edited.exists())
            if planned is None or not done:
                task_vector, features = self.found.task_vector, self.features(diagnosis)
                planned = plan_arms(
                    recipe,
                    task_vector,
                    chosen,
                    {layer.layer: layer.excess for layer in diagnosis.layers if layer.flag is None},
                    {layer: lambda load=load: load().directions for layer, load in features.items()},  # type: ignore[misc]
                    features=self.projected_features,
                )
                # gone before the checkpoint changes: what is current must not lie beside an edit of another plan
                (self.folder / Edits.FILE).unlink(missing_ok=True)
                if selected := planned.plans.get("selected"):
                    write_edit(self.found.base, task_vector, selected, edited, overwrite=True, progress=advance)
                save_plans(self.folder, planned, task_vector.energy_by_layer(), provenance=provenance)
        for warning in planned.warnings:
            self.reporter.note(f"warning: {warning}")
        if not done:
            self.reporter.note(f"wrote {edited}")
        return planned.plans

    def evaluate(self, plans: dict[str, EditPlan | None]) -> Comparison:
        recipe, options = self.recipe, self.recipe.evaluate
        arms = {name: self.arm(plan) for name, plan in plans.items()}
        # arms are compared with each other, so all are measured on one kind of device
        where = {} if self.device.type == "cpu" else {"device": self.device.type}
        keys = {
            name: self.provenance("base", "tuned", plan=plan.to_json() if plan else None, **where).key
            for name, plan in plans.items()
        }
        tasks = [*self.found.tasks, *self.found.control_tasks]
        with self.reporter.stage(f"Evaluate: {len(arms)} arms, {len(tasks)} tasks") as advance:
            outcomes = evaluate(
                self.model,
                self.tokenizer,
                dict.fromkeys(arms, nullcontext) if self.crew else arms,  # workers have their own
                [*options.tasks, *options.control_tasks],
                out=self.folder,
                include_path=options.include_path,
                data=options.data,
                limit=options.limit,
                batch_size=options.batch_size,
                seed=recipe.seed,
                keys=keys,
                spread=self.crew.answering(plans) if self.crew else None,
                progress=lambda done, total, _: advance(done, total),
            )
        costs = self.costs(plans, keys)
        target_losses = self.target_losses(arms, keys)
        with self.reporter.stage("Compare: paired tests"):
            comparison = compare(
                outcomes,
                family=self.found.tasks,
                losses={name: one.loss for name, one in costs.items()} or None,
                target_losses=target_losses or None,
                divergences={name: one.divergence for name, one in costs.items()} or None,
                seed=recipe.seed,
                inputs=self.hashes,
            )
            comparison.save(self.folder / "comparison.json")
        return comparison

    def report_again(self) -> None:
        """The report of a run that is finished, which shows later findings too."""
        if (self.folder / "comparison.json").exists():
            render_report(self.folder)

    def arm(self, plan: EditPlan | None) -> Callable[[], AbstractContextManager[Any]]:
        if plan is None:
            return nullcontext
        return lambda: applied(self.model, self.found.task_vector, plan)

    def target_losses(
        self, arms: dict[str, Callable[[], AbstractContextManager[Any]]], keys: dict[str, str]
    ) -> dict[str, DocumentLosses]:
        """Loss of every arm on each document of the held-out target text; empty where the recipe names none."""
        if not self.found.texts.get(HELD_OUT):
            return {}
        losses = {}
        rows = cache(partial(self.rows, HELD_OUT))  # not read where every loss is saved
        with self.reporter.stage(f"Evaluate: loss on {HELD_OUT} text") as advance:
            for number, (name, arm) in enumerate(arms.items()):
                provenance = self.provenance(HELD_OUT, arm=keys[name])
                folder = self.folder / "losses" / HELD_OUT.replace(" ", "-") / name
                saved = TextLoss.load_if_current(folder, provenance)
                if saved is None:
                    ids, starts = rows()
                    with arm():
                        measured = document_losses(self.model, ids, starts=starts)
                    saved = TextLoss.of(measured, provenance)
                    saved.save(folder)
                losses[name] = saved.measured
                advance(number + 1, len(arms))
        return losses

    def costs(self, plans: dict[str, EditPlan | None], keys: dict[str, str]) -> dict[str, DocumentCosts]:
        """Every arm's loss and divergence from the base on the general text; empty where the recipe names none."""
        if not self.found.texts.get(GENERAL):
            return {}
        places = {
            name: (self.folder / "losses" / GENERAL / name, self.provenance(GENERAL, arm=key))
            for name, key in keys.items()
        }
        known = {name: DocumentCosts.load_if_current(*place) for name, place in places.items()}
        rows = cache(partial(self.rows, GENERAL))  # not read where every cost is saved
        with self.reporter.stage(f"Evaluate: loss and divergence on {GENERAL} text") as advance:
            groups = self.held_together({name: plan for name, plan in plans.items() if known[name] is None})
            for number, group in enumerate(groups):
                ids, starts = rows()
                total = len(groups) * len(ids)
                found = document_costs(
                    self.model,
                    {name: self.swap(plan) for name, plan in group.items()},
                    ids,
                    starts=starts,
                    progress=lambda done, of, number=number, total=total: advance(number * of + done, total),  # type: ignore[misc]
                )
                for name, costs in found.items():
                    costs.save(*places[name])
                known |= found
        return {name: costs for name, costs in known.items() if costs}

    def swap(self, plan: EditPlan | None) -> Callable[[], AbstractContextManager[Any]]:
        """What puts the model into an arm's state again and again; its tensors are held."""
        return prepare(self.model, self.found.task_vector, plan).entered if plan else nullcontext

    def held_together(self, plans: dict[str, EditPlan | None]) -> list[dict[str, EditPlan | None]]:
        """The arms in groups whose changed tensors take no more memory than the model itself, or than a GPU has."""
        task_vector, held = self.found.task_vector, 0
        most = task_vector.base.nbytes
        if plans and self.device.type != "cpu":
            most = min(most, room_beside(self.model))
        groups = [dict[str, EditPlan | None]()] if plans else []
        for name, plan in plans.items():
            changed = coefficients(task_vector, plan) if plan else ()
            size = sum(task_vector.base.entries[tensor].nbytes for tensor in changed)
            if groups[-1] and held + size > most:
                groups.append({})
                held = 0
            groups[-1][name] = plan
            held += size
        return groups


@contextmanager
def _running(recipe: Recipe, folder: Path, reporter: Reporter) -> Iterator[_Run]:
    """A run in its folder; workers that it asked for are let go at the end, however it ends."""
    run = _Run(recipe, folder, reporter)
    folder.mkdir(parents=True, exist_ok=True)
    with run.open:
        yield run


def diagnose_recipe(recipe: Recipe, folder: Path, *, reporter: Reporter = SILENT) -> Diagnosis:
    """Listen to every layer; ``diagnosis.json``, statistics and evidence are written in the run folder.

    Raises:
        StethoscopeError: whatever is wrong with the recipe, before any long work.
    """
    with _running(recipe, folder, reporter) as run:
        made = run.diagnose()
        run.gather_evidence(made)
        return made


def select_recipe(recipe: Recipe, folder: Path, *, reporter: Reporter = SILENT) -> Selection:
    """Choose layers by the recipe's policy, listening first where that is not done; ``selection.json`` is written.

    Raises:
        StethoscopeError: whatever is wrong with the recipe, before any long work; the policy chooses no layer.
    """
    with _running(recipe, folder, reporter) as run:
        return run.select(run.diagnose())


def calibrate_recipe(recipe: Recipe, folder: Path, *, reporter: Reporter = SILENT) -> Calibration:
    """Find layers and coefficient on the recipe's calibration text; ``calibration.json`` is written in the run folder.

    Raises:
        StethoscopeError: whatever is wrong with the recipe, before any long work.
    """
    with _running(recipe, folder, reporter) as run:
        return run.calibrate(run.diagnose())


def geometry_recipe(recipe: Recipe, folder: Path, *, reporter: Reporter = SILENT) -> Geometry:
    """What SAE features keep of the task vector, beside chance; ``geometry.json`` is written in the run folder.

    Raises:
        StethoscopeError: whatever is wrong with the recipe, before any long work.
    """
    with _running(recipe, folder, reporter) as run:
        made = run.geometry(run.diagnose())
        run.report_again()
        return made


def judge_recipe(
    recipe: Recipe,
    folder: Path,
    *,
    control: str = "control",
    documents: int = 32,
    random_sets: int = 50,
    matched: Collection[str] | None = None,
    reporter: Reporter = SILENT,
) -> Hearing:
    """Does the stethoscope hear right on this recipe's models and text? Every score against the layers' true effects.

    Args:
        folder: the run's; its diagnosis is used if it is current, and ``hearing/CONTROL/hearing.json`` written there.
        control: the name of the control whose loss is the cost.
        documents: of each text, from the top. The truth is measured on the held-out target text where the recipe has
            one, and on the control; the rival scores on the target text.
        random_sets: of each size, which a score's layers have to beat.
        matched: the scores compared with random sets of equal energy as well; the recipe's and ``attribution`` if None.

    Raises:
        StethoscopeError: whatever is wrong with the recipe, before any long work.
    """
    with _running(recipe, folder, reporter) as run:
        run.diagnose()
        made = run.judge(documents, random_sets, control, (recipe.score, ATTRIBUTION) if matched is None else matched)
        run.report_again()
        return made


def identity_files(folder: Path) -> list[Path]:
    """The files that decide what a checkpoint or adapter is: configs, weights and tokenizer."""
    return [path for path in folder.iterdir() if path.suffix in {".json", ".safetensors", ".jinja", ".model"}]


def run_recipe(recipe: Recipe, folder: Path, *, reporter: Reporter = SILENT) -> RunResult:
    """Run all stages of a recipe in a run folder; what is already there and current is not done again.

    Raises:
        StethoscopeError: whatever is wrong with the recipe, before any long work.
    """
    with _running(recipe, folder, reporter) as run:
        write_text(folder / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
        diagnosis = run.diagnose()
        run.gather_evidence(diagnosis)
        selection = run.select(diagnosis)
        if set(recipe.arms) & set(SCALPEL_ARMS):
            run.geometry(diagnosis)
        plans = run.edit(diagnosis, selection)
        comparison = run.evaluate(plans)
        if "selected" in plans:
            write_results(folder / "edited", comparison.contrast("selected").summary())
        with reporter.stage("Report"):
            render_report(folder)
        return RunResult(folder=folder, selection=selection, comparison=comparison)
