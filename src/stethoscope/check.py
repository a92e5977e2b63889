"""Opens everything that a recipe refers to by headers alone, and checks that it fits together, before any long work.

check_recipe(recipe, Path("runs/mine"))   # in a second or two: no weights read, no tasks built, nothing heavy imported
check_run(recipe, Path("runs/mine"))      # the first step of a run: also builds the tasks and looks for seen items
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from stethoscope.checkpoints.checkpoint import Checkpoint, config_value
from stethoscope.checkpoints.files import read_json_object
from stethoscope.checkpoints.hub import require_hub_id
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.preview import Preview, preview
from stethoscope.editing.residual_axis import residual_axes
from stethoscope.errors import RecipeError, StethoscopeError, require
from stethoscope.evaluation.contamination import Seen, refuse_seen, seen_items
from stethoscope.evaluation.names import task_functions, unknown_tasks
from stethoscope.recipe import (
    ATTRIBUTION,
    FEWEST_BLOCKS,
    GENERAL,
    HELD_OUT,
    SCALPEL_ARMS,
    ArmName,
    LossText,
    Recipe,
)
from stethoscope.saes.open import SAEFolder, check_fit, open_saes
from stethoscope.text.documents import Document, read_documents, read_prompted

# There are no such arms where every layer is selected, at one coefficient: they would be the selected edit, or nothing.
OTHERS: tuple[ArmName, ...] = ("random_layers", "scaled", "norm_ranked", "bottom_layers", "random_matched", "hybrid")
VALIDATED = (  # what `validate` compares beside the scores that a recipe can name
    "attribution net", "tuned_shift", "norm", "residual_shift", "gradient", "local_effect", "functional_specificity",
    "injection",
)  # fmt: skip
FEWEST_HELD_BACK = 10  # documents of a text of which every fifth is held back: two are


@dataclass(kw_only=True)
class Check:
    """What a recipe refers to, opened by headers, and everything that is wrong.

    Attributes:
        problems: reasons why the recipe cannot be run.
        notes: what will differ from what the recipe asks, though it can be run.
        unseen: names on the hub that were not opened, by the recipe's key.
        base, task_vector, edit: None where they could not be opened, or were not because they are on the hub.
        prompts: the prompts with which the documents of some texts begin.
        tasks, control_tasks: names of the tasks that were built, groups expanded.
        answers: of a check: by task its items, characters of a prompt and of its item alone, most tokens of an answer.
        seen: the texts that the choice of layers may see, so that no claim is tested on them.
        seen_items: numbers of the test items that occur in those texts, by task.
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
    tasks: list[str] = field(default_factory=list)
    control_tasks: list[str] = field(default_factory=list)
    answers: dict[str, tuple[int, int, int, int]] = field(default_factory=dict)
    seen: Seen = field(default_factory=lambda: Seen.of([]))
    seen_items: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def window(self) -> int | None:
        """How many tokens the base reads, if its config says so."""
        names = ("max_position_embeddings", "n_positions", "n_ctx")
        return config_value(self.base.config, *names) if self.base else None

    def attempt(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """The value of a call, or None if it raises an error for the user, which becomes a problem."""
        try:
            return function(*args, **options)
        except StethoscopeError as error:
            self.problems.append(str(error).replace("\n\n", "\n").replace("\n", "\n    "))
            return None

    def raise_problems(self) -> None:
        """Raise all problems at once.

        Raises:
            RecipeError: there are problems.
        """
        if self.problems:
            raise RecipeError("the recipe cannot be run", problems=self.problems)

    def summary(self) -> dict[str, Any]:
        """What was found, as plain values."""
        return {
            "layers": self.base and self.base.layers,
            "hidden_size": self.base and self.base.hidden_size,
            "tensors": self.task_vector and len(self.task_vector.names),
            "saes": sorted(self.saes),
            "texts": {name: len(documents) for name, documents in self.texts.items()},
            "unseen": self.unseen,
            "edit": self.edit and asdict(self.edit),
            "notes": self.notes,
            **({name: getattr(self, name) for name in ("tasks", "control_tasks", "seen_items")} if self.tasks else {}),
        }

    def table(self) -> list[list[str]]:
        """What was found, one row each, with a header row."""
        base, change, edit, tasks = self.base, self.task_vector, self.edit, self.tasks
        found = {
            "base": base and f"{base.layers} layers of width {base.hidden_size}",
            "task vector": change and f"{len(change.names)} tensors",
            "SAEs": self.saes and f"for {len(self.saes)} layers",
            **{f"{name} text": f"{len(documents)} documents" for name, documents in self.texts.items()},
            **{what: f"{name}: on the hub, not looked at" for what, name in self.unseen.items()},
            "edited checkpoint": edit and f"changes {edit.tensors} tensors ({edit.bytes_changed / 1e6:,.1f} MB)",
            "writing it": edit and f"{edit.bytes_written / 1e9:,.2f} GB in about {edit.seconds:.0f} s",
            "disk": edit and f"{edit.disk_needed / 1e9:,.2f} GB of {edit.disk_free / 1e9:,.2f} GB free",
            "tasks": ", ".join(tasks),
            "control tasks": tasks and (", ".join(self.control_tasks) or "none"),
        }
        return [["what", "found"], *([what, str(text)] for what, text in found.items() if text)]


def check_recipe(recipe: Recipe, folder: Path, *, offline: bool = False) -> Check:
    """Check everything that a recipe refers to, by names, configs and headers.

    From the hub only the headers of the models are read; SAEs and texts there are not opened.

    Args:
        folder: the run's folder.
        offline: do not open models on the hub either.

    Raises:
        RecipeError: everything that is missing or does not fit, at once.
    """
    found, options = Check(), recipe.evaluate
    _open(found, recipe, folder, headers_only=True, hub_texts=False, offline=offline)
    if options.include_path is not None and not options.include_path.is_dir():
        found.problems.append(f"the folder of tasks `{options.include_path}` does not exist")
    else:
        for name, near in unknown_tasks([*options.tasks, *options.control_tasks], options.include_path).items():
            hint = f"; did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else ""
            found.problems.append(f"the task `{name}` is not known{hint}")
        for file, functions in task_functions([*options.tasks, *options.control_tasks], options.include_path).items():
            said = f"`{file}` runs Python when its task is built: {', '.join(f'`{name}`' for name in functions)}"
            if options.task_code:
                found.notes.append(f"note: {said}")
            else:
                found.problems.append(f"{said}\n    hint: read it, then set `evaluate: {{task_code: true}}`")
    if options.data is not None and not options.data.exists():
        found.problems.append(f"the data `{options.data}` does not exist")
    found.raise_problems()
    return found


def check_run(recipe: Recipe, folder: Path, *, headers_only: bool = False) -> Check:
    """Open everything that a recipe refers to, without reading weights, and build its tasks.

    Args:
        folder: the run's folder.
        headers_only: fetch no weights of models or SAEs from the hub; enough for a check, not for a run.

    Raises:
        RecipeError: everything that is missing or does not fit, at once.
    """
    found, options = Check(), recipe.evaluate
    _open(found, recipe, folder, headers_only=headers_only, hub_texts=True, offline=False)
    # the harness takes seconds to import
    from stethoscope.evaluation.tasks import load_tasks, new_tokens, prompt_size
    from stethoscope.models.device import find_device

    found.attempt(find_device, recipe.device)
    where: dict[str, Any] = {name: getattr(options, name) for name in ("include_path", "data", "task_code")}
    where["seed"] = recipe.seed
    tasks = found.attempt(load_tasks, options.tasks, **where) or {}
    controls = (found.attempt(load_tasks, options.control_tasks, **where) if options.control_tasks else {}) or {}
    found.tasks, found.control_tasks = list(tasks), list(controls)
    for name, task in {**tasks, **controls}.items():
        items, most = len(task.eval_docs), new_tokens(task)
        if headers_only:  # only a check says how long answers take
            found.answers[name] = (min(options.limit or items, items), *prompt_size(task), most)
        if found.window and most >= found.window:
            found.problems.append(
                f"`{name}` lets a model write {most} tokens, but the base's window has {found.window} with the prompt\n"
                "    hint: give the task's `generation_kwargs` a smaller `max_gen_toks`"
            )
    held_out = (GENERAL, HELD_OUT)
    found.seen = Seen.of(text for name, texts in found.texts.items() if name not in held_out for text in texts)
    found.seen_items = seen_items({**tasks, **controls}, found.seen, limit=options.limit)
    for name in held_out:
        if numbers := tuple(i for i, text in enumerate(found.texts.get(name, ())) if found.seen.holds(str(text))):
            found.seen_items[f"{name} text"] = numbers
    if not options.exploratory:
        found.attempt(refuse_seen, found.seen_items)
    found.raise_problems()
    return found


def _open(found: Check, recipe: Recipe, folder: Path, *, headers_only: bool, hub_texts: bool, offline: bool) -> None:
    found.attempt(require, "sae_lens", "lm_eval", "altair", "vl_convert", extra="run")
    for name in ("base", "tuned") if offline else ():
        source = getattr(recipe, name)
        if not Path(source).is_absolute():  # local paths are absolute once a recipe is read
            found.attempt(require_hub_id, source)
            found.unseen[name] = source
    if "base" not in found.unseen:
        found.base = found.attempt(open_checkpoint, recipe.base, headers_only=headers_only)
    if found.base and "tuned" not in found.unseen:
        found.task_vector = found.attempt(open_task_vector, found.base, recipe.tuned, headers_only=headers_only)
    found.saes = found.attempt(open_saes, recipe.saes, recipe.sae_id, local=headers_only) or {}
    if not found.saes and not Path(recipe.saes).is_absolute():
        found.unseen["saes"] = recipe.saes
    _check_saes(found, recipe)
    _check_choices(found, recipe)
    _read_texts(found, recipe, hub_texts=hub_texts)
    if found.base and found.task_vector:
        # whichever layers are chosen: those with most bytes, or all, where their number is not known yet
        size: Counter[int] = Counter()
        for name in found.task_vector.names:
            entry = found.base.entries[name]
            if entry.layer is not None:
                size[entry.layer] += entry.nbytes
        if not size:
            found.problems.append(
                f"`{recipe.tuned}` changes nothing in the layers\n    hint: `edit --keep` filters the other tensors"
            )
        layers = [layer for layer, _ in size.most_common(None if recipe.filters else recipe.select.k)]
        plan = EditPlan.for_layers(layers, coefficient=recipe.edit.coefficient)
        found.edit = preview(found.base, found.task_vector, plan, folder / "edited", overwrite=True, resumes=True)
        found.problems += found.edit.problems
        found.notes += [f"warning: {text}" for text in found.edit.warnings]


def _check_saes(found: Check, recipe: Recipe) -> None:
    """Check that the SAEs fit the base, and the arms and ``k`` that the recipe asks for."""
    base, saes = found.base, found.saes
    projected = [arm for arm in recipe.arms if arm in SCALPEL_ARMS]
    if projected and any(sae.site == "attn_z" for sae in saes.values()):
        found.problems.append(
            "the SAEs read the attention heads' outputs before they are mixed into the residual stream, so nothing can"
            f" be projected onto them: leave out {', '.join(f'`{arm}`' for arm in projected)} of `arms`"
        )
    if saes and recipe.select.k is not None and recipe.select.k > len(saes):
        found.problems.append(f"select.k is `{recipe.select.k}`, but there are SAEs for {len(saes)} layers only")
    if base and saes:
        found.attempt(check_fit, saes, base)
        if projected and found.task_vector:
            found.attempt(residual_axes, found.task_vector, saes, base.hidden_size)


def _check_choices(found: Check, recipe: Recipe) -> None:
    """Check the scores, and that arms of other layers than the selected ones have such layers."""
    from stethoscope.diagnosis.scores import SCORES

    known = (*SCORES, ATTRIBUTION)
    validated = (*known, *(f"{score} increment" for score in SCORES), *VALIDATED)
    given = [(recipe.score, known), *((score, validated) for score in recipe.validation.matched or ())]
    for score, names in given:
        if score not in names:
            near = get_close_matches(score, names, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known scores: {', '.join(names)}"
            found.problems.append(f"unknown score `{score}`; {hint}")
    k = recipe.select.k if recipe.select.chooses_k else None
    every = found.base is not None and k == found.base.layers
    without = OTHERS if every else ("bottom_layers", "hybrid") if found.saes and k == len(found.saes) else ()
    if none := [f"`{arm}`" for arm in recipe.arms if arm in without]:
        found.notes.append(
            f"note: `select` takes all {k} layers{'' if every else ' that have SAEs'}, so {', '.join(none)} will be"
            " left out: there are no other layers for them"
        )


def _read_texts(found: Check, recipe: Recipe, *, hub_texts: bool) -> None:
    """Read every text with its prompts, and check that there are enough documents and a chat template for chats."""
    for name, text in recipe.texts.items():
        if not hub_texts and not Path(text.dataset).is_absolute():
            found.unseen[f"{name} text"] = text.dataset
            continue
        options: dict[str, Any] = {"limit": text.documents, "split": text.split}
        if isinstance(text, LossText) and text.prompt:
            options |= {"prompt": text.prompt}
            documents, prompts = found.attempt(read_prompted, text.dataset, field=text.field, **options) or ([], [])
        else:
            documents, prompts = found.attempt(read_documents, text.dataset, field=text.field, **options), None
        if prompts:
            found.prompts[name] = prompts
        if documents:
            found.texts[name] = documents
    for corpus, name in recipe.judged.items() if recipe.filters else ():
        if 0 < (count := len(found.texts.get(name, ()))) < FEWEST_HELD_BACK and corpus == name:
            found.problems.append(
                f"the {count} documents of the {name} text are fewer than {FEWEST_HELD_BACK}: a fifth judges edits\n"
                "    hint: give more, or set `edit: {filter: none}`"
            )
    if (window := found.window) and window < recipe.diagnose.max_tokens:
        found.notes.append(f"note: the base reads {window} tokens at most, and documents are cut there")
    size = recipe.diagnose.block_size
    for name in recipe.corpora:
        count = len(found.texts.get(name, ()))
        if count and (blocks := -(-count // size)) < FEWEST_BLOCKS:
            largest = count // FEWEST_BLOCKS
            hint = f"set `diagnose.block_size` to {largest} or less, or give more" if largest else "give more"
            found.problems.append(
                f"the {count} documents of the {name} text are {blocks} blocks of up to {size}; {FEWEST_BLOCKS} blocks"
                f" or more are needed to tell a difference from chance\n    hint: {hint}"
            )
    chats = [name for name, documents in found.texts.items() if not isinstance(documents[0], str)]
    settings = found.base.path / "tokenizer_config.json" if found.base else None
    if chats and settings is not None and settings.is_file():
        templates = (settings.with_name(f"chat_template.{suffix}") for suffix in ("jinja", "json"))
        config = found.attempt(read_json_object, settings, hint="it belongs to the base's tokenizer")
        if config is not None and "chat_template" not in config and not any(path.is_file() for path in templates):
            found.problems.append(
                f"the base's tokenizer has no chat template, so the {', '.join(chats)} text cannot be rendered\n"
                "    hint: give texts, or an instruction-tuned model"
            )
