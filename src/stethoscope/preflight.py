"""Everything that a recipe refers to, opened by headers alone and found to fit together, before any long work.

check_recipe(recipe, Path("runs/mine"))      # in a second or two: no weight read, no task built, nothing heavy imported
preflight(recipe, Path("runs/mine"))         # what a run does first: also builds the tasks and looks at their items
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from stethoscope.checkpoints.checkpoint import Checkpoint
from stethoscope.checkpoints.files import read_json_object
from stethoscope.checkpoints.hub import HUB_ID
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.documents import Document, read_documents
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.preview import Preview, preview
from stethoscope.editing.residual_axis import residual_axes
from stethoscope.errors import RecipeError, StethoscopeError
from stethoscope.evaluation.names import unknown_tasks
from stethoscope.recipe import (
    ATTRIBUTION,
    FEWEST_BLOCKS,
    GENERAL,
    HELD_OUT,
    OTHERS,
    SCALPEL_ARMS,
    LossText,
    Recipe,
    Text,
)
from stethoscope.saes.open import SAEFolder, check_fit, check_source, open_saes
from stethoscope.seen import Seen


@dataclass(kw_only=True)
class Look:
    """What a recipe refers to, as far as it was opened, and everything that is wrong.

    Attributes:
        base, task_vector, edit: None where they could not be opened, or lie on the hub and were not looked at.
        prompts: with which the documents of some texts begin.
        unseen: what lies on the hub and was not looked at, by the recipe's key.
        notes: what will not be as the recipe asks, though it can be run.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unseen: dict[str, str] = field(default_factory=dict)
    base: Checkpoint | None = None
    task_vector: TaskVector | None = None
    saes: dict[int, SAEFolder] = field(default_factory=dict)
    texts: dict[str, list[Document]] = field(default_factory=dict)
    prompts: dict[str, list[str]] = field(default_factory=dict)
    edit: Preview | None = None

    def attempt(self, open_it: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """What a call gives, or None if the user can mend what is wrong, which is noted."""
        try:
            return open_it(*args, **options)
        except StethoscopeError as error:
            self.problems.append(str(error).replace("\n\n", "\n").replace("\n", "\n    "))
            return None

    def refuse(self) -> None:
        """Raise if anything is wrong.

        Raises:
            RecipeError: it is; all of it.
        """
        if self.problems:
            raise RecipeError("the recipe cannot be run", problems=self.problems)

    def summary(self) -> dict[str, Any]:
        """What was found in plain values."""
        return {
            "layers": self.base and self.base.layers,
            "hidden_size": self.base and self.base.hidden_size,
            "tensors": self.task_vector and len(self.task_vector.names),
            "saes": sorted(self.saes),
            "texts": {name: len(documents) for name, documents in self.texts.items()},
            "unseen": self.unseen,
            "edit": self.edit and asdict(self.edit),
            "notes": self.notes,
        }

    def table(self) -> list[list[str]]:
        """What was found, a row for each thing, with a header row."""
        rows = [["what", "found"]]
        if self.base:
            rows.append(["base", f"{self.base.layers} layers of width {self.base.hidden_size}"])
        if self.task_vector:
            rows.append(["task vector", f"{len(self.task_vector.names)} tensors"])
        if self.saes:
            rows.append(["SAEs", f"for {len(self.saes)} layers"])
        rows += [[f"{name} text", f"{len(documents)} documents"] for name, documents in self.texts.items()]
        rows += [[what, f"{name}: on the hub, not looked at"] for what, name in self.unseen.items()]
        if edit := self.edit:
            rows += [
                ["edited checkpoint", f"changes {edit.tensors} tensors ({edit.bytes_changed / 1e6:,.1f} MB)"],
                ["writing it", f"{edit.bytes_written / 1e9:,.2f} GB in about {edit.seconds:.0f} s"],
                ["disk", f"{edit.disk_needed / 1e9:,.2f} GB of {edit.disk_free / 1e9:,.2f} GB free"],
                *(["warning", text] for text in edit.warnings),
            ]
        return rows


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What a recipe refers to, opened by headers alone and found to fit together; ``look`` has it as tables."""

    look: Look
    base: Checkpoint
    task_vector: TaskVector
    saes: dict[int, SAEFolder]
    texts: dict[str, list[Document]]
    prompts: dict[str, list[str]]
    tasks: list[str]
    control_tasks: list[str]
    seen: Seen
    seen_items: dict[str, tuple[int, ...]]


def check_recipe(recipe: Recipe, folder: Path, *, offline: bool = False) -> Look:
    """Look at everything that a recipe refers to, by names, configs and headers.

    Of the hub only the headers of the models are read: SAEs and texts there are taken by their names.

    Args:
        folder: where the run will lie.
        offline: take models on the hub by their names, too.

    Raises:
        RecipeError: everything that is missing or does not fit, at once.
    """
    found = _look(recipe, folder, headers_only=True, hub_texts=False, offline=offline)
    options = recipe.evaluate
    names = [*options.tasks, *options.control_tasks]
    if options.include_path is not None and not options.include_path.is_dir():
        found.problems.append(f"the folder of tasks `{options.include_path}` does not exist")
    elif unknown := unknown_tasks(names, options.include_path):
        found.problems += [
            f"the task `{name}` is not known"
            + (f"; did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else "")
            for name, near in unknown.items()
        ]
    if options.data is not None and not options.data.exists():
        found.problems.append(f"the data `{options.data}` does not exist")
    found.refuse()
    return found


def preflight(recipe: Recipe, folder: Path, *, headers_only: bool = False) -> Preflight:
    """Open everything that a recipe refers to, without reading a weight, and build its tasks.

    Args:
        folder: where the run will lie.
        headers_only: fetch no weights from the hub, of models or SAEs; good for a look, not for a run.

    Raises:
        RecipeError: everything that is missing or does not fit, at once.
    """
    # the harness takes seconds to import
    from stethoscope.evaluation.peeking import refuse_seen, seen_items
    from stethoscope.evaluation.tasks import load_tasks
    from stethoscope.models import find_device

    found = _look(recipe, folder, headers_only=headers_only, hub_texts=True, offline=False)
    found.attempt(find_device, recipe.device)
    options = recipe.evaluate
    where: dict[str, Any] = {"include_path": options.include_path, "data": options.data, "seed": recipe.seed}
    tasks = found.attempt(load_tasks, options.tasks, **where) or {}
    controls = (found.attempt(load_tasks, options.control_tasks, **where) if options.control_tasks else {}) or {}
    held_out = (GENERAL, HELD_OUT)
    seen = Seen.of(document for name, text in found.texts.items() if name not in held_out for document in text)
    peeked = seen_items({**tasks, **controls}, seen, limit=options.limit)
    for name in held_out:
        if held := tuple(i for i, text in enumerate(found.texts.get(name, ())) if seen.holds(str(text))):
            peeked[f"{name} text"] = held
    if not options.exploratory:
        found.attempt(refuse_seen, peeked)
    found.refuse()
    assert found.base is not None
    assert found.task_vector is not None
    return Preflight(
        look=found,
        base=found.base,
        task_vector=found.task_vector,
        saes=found.saes,
        texts=found.texts,
        prompts=found.prompts,
        tasks=list(tasks),
        control_tasks=list(controls),
        seen=seen,
        seen_items=peeked,
    )


def _look(recipe: Recipe, folder: Path, *, headers_only: bool, hub_texts: bool, offline: bool) -> Look:
    found = Look()
    _look_at_weights(found, recipe, headers_only=headers_only, offline=offline)
    _look_at_score(found, recipe)
    _look_at_arms(found, recipe)
    texts = {"target": recipe.target, **recipe.all_controls}
    if recipe.calibrate:
        texts |= {"calibration target": recipe.calibrate.target, "calibration control": recipe.calibrate.control}
    held_out = {GENERAL: recipe.evaluate.control, HELD_OUT: recipe.evaluate.target}
    texts |= {name: text for name, text in held_out.items() if text}
    for name, text in texts.items():
        # a recipe's own paths are absolute once it is read
        if not hub_texts and not Path(text.dataset).is_absolute():
            found.unseen[f"{name} text"] = text.dataset
        elif documents := found.attempt(_documents, text):
            found.texts[name] = documents
            if isinstance(text, LossText) and text.prompt:
                _put_prompts_before(found, name, text)
    _look_at_blocks(found, recipe)
    _look_at_chats(found)
    if found.base and found.task_vector:
        found.edit = _expected_edit(recipe, found.base, found.task_vector, folder)
        found.problems += found.edit.problems
    return found


def _look_at_arms(found: Look, recipe: Recipe) -> None:
    """Arms of other layers than the selected ones need such layers."""
    k = recipe.select.k if recipe.select.chooses_k else None
    every = found.base is not None and k == found.base.layers
    without = OTHERS if every else ("bottom_layers", "hybrid") if found.saes and k == len(found.saes) else ()
    if none := [f"`{arm}`" for arm in recipe.arms if arm in without]:
        found.notes.append(
            f"note: `select` takes all {k} layers{'' if every else ' that have SAEs'}, so {', '.join(none)} will be"
            " left out: there are no other layers for them"
        )


def _look_at_blocks(found: Look, recipe: Recipe) -> None:
    """Each text that layers are judged on needs enough blocks to tell a difference from chance."""
    size = recipe.diagnose.block_size
    for name in ("target", *recipe.all_controls):
        count = len(found.texts.get(name, ()))
        if count and (blocks := -(-count // size)) < FEWEST_BLOCKS:
            largest = count // FEWEST_BLOCKS
            hint = f"set `diagnose.block_size` to {largest} or less, or give more" if largest else "give more"
            found.problems.append(
                f"the {count} documents of the {name} text are {blocks} blocks of up to {size}; {FEWEST_BLOCKS} blocks"
                f" or more are needed to tell a difference from chance\n    hint: {hint}"
            )


def _look_at_chats(found: Look) -> None:
    """Chats need a template, which the base's files hold if they are here."""
    chats = [name for name, documents in found.texts.items() if not isinstance(documents[0], str)]
    settings = found.base.path / "tokenizer_config.json" if found.base else None
    if not chats or settings is None or not settings.is_file():
        return
    templates = (settings.with_name(f"chat_template.{suffix}") for suffix in ("jinja", "json"))
    config = found.attempt(read_json_object, settings, hint="it belongs to the base's tokenizer")
    if config is not None and "chat_template" not in config and not any(path.is_file() for path in templates):
        found.problems.append(
            f"the base's tokenizer has no chat template, so the {', '.join(chats)} text cannot be rendered\n"
            "    hint: give texts, or an instruction-tuned model"
        )


def _documents(text: Text) -> list[Document]:
    return read_documents(text.dataset, field=text.field, limit=text.documents, split=text.split)


def _put_prompts_before(found: Look, name: str, text: LossText) -> None:
    prompts = found.attempt(_documents, text.model_copy(update={"field": text.prompt}))
    documents = found.texts[name]
    if prompts is None:
        return
    if not all(isinstance(part, str) for part in (*prompts, *documents)):
        found.problems.append(f"the {name} text has chats, which take no `prompt`\n    hint: leave `prompt` out")
        return
    found.prompts[name] = prompts
    found.texts[name] = [f"{prompt}{document}" for prompt, document in zip(prompts, documents, strict=True)]


def _look_at_weights(found: Look, recipe: Recipe, *, headers_only: bool, offline: bool) -> None:
    for name in ("base", "tuned"):
        if offline and not Path(getattr(recipe, name)).is_absolute():
            found.attempt(_could_be_on_hub, getattr(recipe, name))
            found.unseen[name] = getattr(recipe, name)
    if "base" not in found.unseen:
        found.base = found.attempt(open_checkpoint, recipe.base, headers_only=headers_only)
    if found.base and "tuned" not in found.unseen:
        found.task_vector = found.attempt(open_task_vector, found.base, recipe.tuned, headers_only=headers_only)
    found.saes = found.attempt(check_source if headers_only else open_saes, recipe.saes, sae_id=recipe.sae_id) or {}
    if not found.saes and not Path(recipe.saes).is_absolute():
        found.unseen["saes"] = recipe.saes
    base, saes = found.base, found.saes
    cut = [arm for arm in recipe.arms if arm in SCALPEL_ARMS]
    if cut and any(sae.site == "attn_z" for sae in saes.values()):
        found.problems.append(
            "the SAEs read what heads say before it is mixed into the residual stream, so nothing can be"
            f" projected onto them: leave out {', '.join(f'`{arm}`' for arm in cut)} of `arms`"
        )
    if saes and recipe.select.k is not None and recipe.select.k > len(saes):
        found.problems.append(f"select.k is `{recipe.select.k}`, but there are SAEs for {len(saes)} layers only")
    if base and saes:
        heads = base.entries.get("layers.0.self_attn.o_proj.weight")
        found.attempt(
            check_fit,
            saes,
            hidden_size=base.hidden_size,
            num_layers=base.layers,
            model_name=recipe.base,
            attn_width=heads.shape[1] if heads else None,
        )
        if cut and found.task_vector:
            found.attempt(residual_axes, found.task_vector, saes, base.hidden_size)


def _could_be_on_hub(name: str) -> None:
    if not HUB_ID.fullmatch(name):
        raise RecipeError(f"there is no folder `{name}`", hint="give a folder, or a hub id like `owner/name`")


def _look_at_score(found: Look, recipe: Recipe) -> None:
    from stethoscope.diagnosis.scores import SCORES

    known = (*SCORES, ATTRIBUTION)
    if recipe.score not in known:
        near = get_close_matches(recipe.score, known, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known scores: {', '.join(known)}"
        found.problems.append(f"unknown score `{recipe.score}`; {hint}")


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
