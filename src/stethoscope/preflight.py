"""Everything that a recipe refers to, opened by headers alone and found to fit together, before any long work."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stethoscope.checkpoints.checkpoint import Checkpoint, open_checkpoint
from stethoscope.checkpoints.task_vector import TaskVector, open_task_vector
from stethoscope.corpus import Document, read_documents
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.preview import Preview, preview
from stethoscope.editing.projection import residual_sides
from stethoscope.editing.scalpel import SCALPEL_ARMS
from stethoscope.errors import RecipeError, StethoscopeError
from stethoscope.evaluation.peeking import refuse_seen, seen_items
from stethoscope.evaluation.run import load_tasks
from stethoscope.recipe import Recipe, Text
from stethoscope.saes.sources import SITES, SAEFolder, check_fit, open_saes
from stethoscope.seen import Seen


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What a recipe refers to, opened by headers alone and found to fit together."""

    base: Checkpoint
    task_vector: TaskVector
    saes: dict[int, SAEFolder]
    texts: dict[str, list[Document]]
    tasks: list[str]
    control_tasks: list[str]
    edit: Preview
    seen: Seen
    seen_items: dict[str, tuple[int, ...]]

    def describe(self) -> str:
        """One line for a person."""
        texts = ", ".join(f"{len(documents)} {name} documents" for name, documents in self.texts.items())
        return (
            f"{self.base.layers} layers of width {self.base.hidden_size}, {len(self.task_vector.names)} tensors in the"
            f" task vector, SAEs for {len(self.saes)} layers, {texts},"
            f" {len(self.tasks) + len(self.control_tasks)} tasks; the edited checkpoint changes"
            f" {self.edit.tensors} tensors ({self.edit.bytes_changed / 1e6:,.1f} MB), writes"
            f" {self.edit.bytes_written / 1e9:,.2f} GB in about {self.edit.seconds:.0f} s and needs"
            f" {self.edit.disk_needed / 1e9:,.2f} GB of {self.edit.disk_free / 1e9:,.2f} GB free"
        )


def preflight(recipe: Recipe, folder: Path, *, headers_only: bool = False) -> Preflight:
    """Open everything a recipe refers to, without reading a weight.

    Args:
        folder: where the run will lie.
        headers_only: fetch no weights of hub models either; good for a look, not for a run.

    Raises:
        RecipeError: everything that is missing or does not fit, at once.
    """
    problems: list[str] = []

    def attempt(open_it: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            return open_it(*args, **options)
        except StethoscopeError as error:
            problems.append(str(error).replace("\n\n", "\n").replace("\n", "\n    "))
            return None

    def documents(text: Text) -> list[Document]:
        return read_documents(text.dataset, field=text.field, limit=text.documents, split=text.split)

    base: Checkpoint | None = attempt(open_checkpoint, recipe.base, headers_only=headers_only)
    task_vector: TaskVector | None = (
        attempt(open_task_vector, base, recipe.tuned, headers_only=headers_only) if base else None
    )
    saes = attempt(open_saes, recipe.saes, sae_id=recipe.sae_id)
    if base and saes:
        heads = base.entries.get("layers.0.self_attn.o_proj.weight")
        attempt(
            check_fit,
            saes,
            hidden_size=base.hidden_size,
            num_layers=base.layers,
            model_name=recipe.base,
            sites=SITES,
            attn_width=heads.shape[1] if heads else None,
        )
        if cut := [arm for arm in recipe.arms if arm in SCALPEL_ARMS]:
            if task_vector:
                attempt(residual_sides, task_vector, saes, base.hidden_size)
            if any(sae.site == "attn_z" for sae in saes.values()):
                problems.append(
                    "the SAEs read what heads say before it is mixed into the residual stream, so nothing can be"
                    f" projected onto them: leave out {', '.join(f'`{arm}`' for arm in cut)} of `arms`"
                )
        if recipe.select.k is not None and recipe.select.k > len(saes):
            problems.append(f"select.k is `{recipe.select.k}`, but there are SAEs for {len(saes)} layers only")
    texts = {"target": recipe.target, **recipe.all_controls}
    if recipe.calibrate:
        texts |= {"calibration target": recipe.calibrate.target, "calibration control": recipe.calibrate.control}
    chosen_on = list(texts)
    held_out = {"general": recipe.evaluate.control, "held-out target": recipe.evaluate.target}
    texts |= {name: text for name, text in held_out.items() if text}
    read = {name: attempt(documents, text) for name, text in texts.items()}
    where, data = recipe.evaluate.include_path, recipe.evaluate.data
    tasks = attempt(load_tasks, recipe.evaluate.tasks, where, data=data, seed=recipe.seed)
    controls = (
        attempt(load_tasks, recipe.evaluate.control_tasks, where, data=data, seed=recipe.seed)
        if recipe.evaluate.control_tasks
        else {}
    )
    seen = Seen.of(document for name in chosen_on for document in read[name] or ())
    peeked = seen_items({**(tasks or {}), **(controls or {})}, seen, limit=recipe.evaluate.limit)
    for name in held_out:
        if held := tuple(i for i, text in enumerate(read.get(name) or ()) if seen.holds(str(text))):
            peeked[f"{name} text"] = held
    if not recipe.evaluate.exploratory:
        attempt(refuse_seen, peeked)
    edit = Preview()
    if base and task_vector:
        edit = _expected_edit(recipe, base, task_vector, folder)
        problems += edit.problems
    if problems or base is None or task_vector is None:
        raise RecipeError("the recipe cannot be run", problems=problems)
    return Preflight(
        base=base,
        task_vector=task_vector,
        saes=saes,
        texts=read,
        tasks=list(tasks),
        control_tasks=list(controls),
        edit=edit,
        seen=seen,
        seen_items=peeked,
    )


def _expected_edit(recipe: Recipe, base: Checkpoint, task_vector: TaskVector, folder: Path) -> Preview:
    """What writing the edit will take, whichever layers are chosen: those that hold most bytes."""
    size: Counter[int] = Counter()
    for name in task_vector.names:
        entry = base.entries[name]
        if entry.layer is not None:
            size[entry.layer] += entry.nbytes
    layers = [layer for layer, _ in size.most_common(recipe.select.k)]  # all, where k is not known yet
    plan = EditPlan.for_layers(layers, coefficient=recipe.edit.coefficient)
    return preview(base, task_vector, plan, folder / "edited", overwrite=True)
