"""An edit without recipe, SAEs or tasks: keep what a text gains from a fine-tune, protect other texts.

    kept = keep_skill(base, task_vector, Wanted(keep=documents, protect={"chat": other}), Path("edit"))

Of every five documents of a text, three make the filter, one chooses its strength and one is measured.
"""

import logging
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stethoscope.artifacts import Provenance, canonical_json, scratch_folder, sha256_bytes
from stethoscope.checkpoints.adapter import AdapterTaskVector
from stethoscope.checkpoints.checkpoint import Checkpoint, fingerprint
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.filter import STRENGTHS, TARGET, FilteredChange, write_filters
from stethoscope.editing.plan import EditPlan, coefficients
from stethoscope.editing.preview import preview
from stethoscope.editing.rivals import WHOLE
from stethoscope.editing.writer import Edit, OutputKind, write_edit
from stethoscope.errors import CheckpointError, StethoscopeError
from stethoscope.models.device import find_device
from stethoscope.models.load import load_model, load_tokenizer
from stethoscope.results.keeping import BASE, EDIT, SCALED, TUNED, Keeping, Variant
from stethoscope.run import Reporter, Silent
from stethoscope.text.documents import Document, documents_hash
from stethoscope.text.tokens import TokenBatch, batches, counted_tokens, prompt_lengths, tokenize, within
from stethoscope.tradeoff import Tokens, falls, interval, losses_under, share_kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FEWEST = 10  # documents of a text: two of them are measured
COEFFICIENTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the plain scaling
BATCH_TOKENS = 2048  # of a forward of one block

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What an edit should keep and protect.

    Attributes:
        keep: documents that use the fine-tune's skill.
        prompts: text that each document to keep begins with, if any; it is read, and its own loss does not count.
        protect: name -> documents on which the model should stay as it is.
        weights: name -> weight of a protected text, 1 if not given.
        strength: of the filter; chosen if None.
        share: of the fine-tune's gain that the chosen strength keeps at least.
        layers: those to edit; all, and the tensors outside the layers, if None.
        tokens: maximum tokens of each text, from the top.
        max_tokens: documents are cut to this many tokens.
    """

    keep: Sequence[Document]
    protect: Mapping[str, Sequence[Document]]
    prompts: Sequence[str] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    strength: float | None = None
    share: float = 0.95
    layers: tuple[int, ...] | None = None
    tokens: int = 20_000
    max_tokens: int = 1024

    @property
    def texts(self) -> dict[str, Sequence[Document]]:
        """The text to keep, then those to protect."""
        return {TARGET: self.keep, **self.protect}

    def plan(self, transform: FilteredChange | None = None, coefficient: float = 1.0) -> EditPlan:
        """The edit: the task vector transformed, times a coefficient; vision towers stay the base's."""
        if self.layers is not None:
            return EditPlan.for_layers(self.layers, coefficient=coefficient, transform=transform)
        return replace(WHOLE, default=coefficient, transform=transform)


def keep_skill(
    base: Checkpoint,
    task_vector: TaskVector,
    wanted: Wanted,
    out: Path,
    *,
    kind: OutputKind = "checkpoint",
    device: str = "auto",
    reporter: Reporter | None = None,
) -> tuple[Edit, Keeping]:
    """Filter a task vector, choose the strength by itself, write the edit, and measure it on documents of its own.

    The strongest filter is chosen that keeps ``share`` of the fine-tune's gain on held-back target documents; if none
    does, the one that gains most.

    Raises:
        StethoscopeError: everything that is wrong with what is wanted; or the edit cannot be written. ``out`` does not
            exist then.
    """
    reporter = reporter or Silent()
    _check(wanted)
    found = preview(base, task_vector, wanted.plan(), out, kind=kind)
    problems = [*found.problems]
    if kind == "adapter" and isinstance(task_vector, AdapterTaskVector):
        problems += [
            f"the filtered change of `{name}` has no low rank: write a checkpoint or a patch"
            for name in coefficients(task_vector, wanted.plan())
            if name == "embed_tokens.weight" or task_vector.changes[name].parts.keys() != {"A", "B"}
        ]
    if problems:
        raise CheckpointError("the edit cannot be written", problems=problems, hint="nothing has been written")
    with reporter.stage("Load the model"):
        model = load_model(base.path, device=find_device(device))
        texts = _Texts.of(wanted, load_tokenizer(base.path))
    provenance = Provenance(
        inputs={"base": fingerprint(base), "tuned": fingerprint(task_vector.store)}
        | {name: documents_hash(documents) for name, documents in wanted.texts.items()}
        | {"settings": sha256_bytes(canonical_json([wanted.tokens, wanted.max_tokens, wanted.layers]).encode())}
    )
    strengths = STRENGTHS if wanted.strength is None else (wanted.strength,)
    with scratch_folder(out) as folder:
        with reporter.stage("Collect moments and filter") as advance:
            write_filters(
                model,
                task_vector,
                texts.moments,
                filters := folder / "filters",
                provenance=provenance,
                strengths=strengths,
                weights=wanted.weights,
                layers=wanted.layers,
                progress=advance,
            )
        transforms = {strength: FilteredChange(filters, strength, task_vector) for strength in strengths}
        judge = _Judge(model, task_vector, wanted, texts)
        with reporter.stage("Choose the strength") as advance:
            whole, gains = judge.gain(wanted.plan()), {}
            for place, chosen in enumerate(sorted(strengths, reverse=True), 1):
                gains[chosen] = judge.gain(wanted.plan(transforms[chosen]))
                advance(place, len(strengths) + 1)
                if gains[chosen] >= wanted.share * whole:
                    break
            else:
                chosen = max(gains, key=lambda strength: gains[strength])
            coefficient = judge.coefficient(gains[chosen], whole)
        with reporter.stage("Measure on other documents"):
            plans = {
                BASE: None,
                TUNED: wanted.plan(),
                SCALED: wanted.plan(coefficient=coefficient),
                EDIT: wanted.plan(transforms[chosen]),
            }
            variants = judge.variants(plans)
        with reporter.stage("Edit") as advance:
            edit = write_edit(base, task_vector, wanted.plan(transforms[chosen]), out, kind=kind, progress=advance)
    return edit, Keeping(
        provenance=provenance,
        strength=chosen,
        chosen=wanted.strength is None,
        share=wanted.share,
        coefficient=coefficient,
        gains=gains,
        documents=texts.documents,
        variants=variants,
    )


def _check(wanted: Wanted) -> None:
    hashes = {name: {documents_hash([one]) for one in documents} for name, documents in wanted.texts.items()}
    problems = [
        f"`{name}` has {len(found)} different documents, fewer than {FEWEST}"
        for name, found in hashes.items()
        if len(found) < FEWEST
    ]
    problems += [] if wanted.protect else ["no text is to be protected"]
    problems += ["a protected text is called `target`"] if TARGET in wanted.protect else []
    if not 0 < wanted.share <= 1:
        problems.append(f"the share of the gain to keep is {wanted.share:g}, not one from 0 to 1")
    problems += [
        f"`{name}` has a weight, but is not protected" for name in wanted.weights if name not in wanted.protect
    ]
    begun = [(str(one), prompt) for one, prompt in zip(wanted.keep, wanted.prompts, strict=False)]
    if wanted.prompts and not len(wanted.prompts) == len(wanted.keep) == sum(one.startswith(p) for one, p in begun):
        problems.append("the documents to keep do not begin with their prompts, one each")
    hashes[TARGET] |= {documents_hash([one.removeprefix(prompt)]) for one, prompt in begun}
    for name, found in hashes.items():
        if name != TARGET and (shared := len(found & hashes[TARGET])):
            problems.append(f"{shared} documents are both to be kept and in `{name}`, which is protected")
    if problems:
        raise StethoscopeError("cannot filter this edit", problems=problems, hint="see `stethoscope edit --help`")


@dataclass(frozen=True, kw_only=True)
class _Texts:
    """Every text, tokenised and divided: batches for the moments, and documents to choose by and to measure."""

    moments: dict[str, list[TokenBatch]]
    chosen_by: dict[str, Tokens]
    measured: dict[str, Tokens]
    documents: dict[str, tuple[int, int, int]]

    @classmethod
    def of(cls, wanted: Wanted, tokenizer: "PreTrainedTokenizerBase") -> "_Texts":
        moments, chosen_by, measured, numbers = {}, {}, {}, {}
        for name, given in wanted.texts.items():
            # one that repeats another would both make the filter and measure it
            places = sorted({documents_hash([given[n]]): n for n in reversed(range(len(given)))}.values())
            if len(places) < len(given):
                log.warning("`%s`: %d documents repeat others and are skipped", name, len(given) - len(places))
            documents = [given[n] for n in places]
            rows = tokenize(documents, tokenizer, max_tokens=wanted.max_tokens)
            rows = rows[: max(len(within(wanted.tokens, rows)), FEWEST)]
            counted = counted_tokens(documents[: len(rows)], tokenizer, max_tokens=wanted.max_tokens)
            starts = None
            if name == TARGET and wanted.prompts:
                prompts = [wanted.prompts[n] for n in places[: len(rows)]]
                starts = prompt_lengths(rows, tokenize(prompts, tokenizer, max_tokens=wanted.max_tokens))
            made = [i for i in range(len(rows)) if i % 5 < 3]
            moments[name] = list(
                batches(
                    [rows[i] for i in made], tokenizer, batch_tokens=BATCH_TOKENS, counted=[counted[i] for i in made]
                )
            )
            chosen_by[name], measured[name] = ((rows[n::5], starts and starts[n::5]) for n in (3, 4))
            numbers[name] = (len(made), len(rows[3::5]), len(rows[4::5]))
        return cls(moments=moments, chosen_by=chosen_by, measured=measured, documents=numbers)


class _Judge:
    """Measures variants of a model by their losses, against the base's."""

    def __init__(self, model: "PreTrainedModel", task_vector: TaskVector, wanted: Wanted, texts: _Texts) -> None:
        self.wanted, self.texts, self._losses = wanted, texts, partial(losses_under, model, task_vector)
        self._base = self._losses(None, {TARGET: texts.chosen_by[TARGET]})[TARGET]

    def gain(self, plan: EditPlan) -> float:
        """Nats per token by which the target loss falls on the documents to choose by."""
        found = self._losses(plan, {TARGET: self.texts.chosen_by[TARGET]})[TARGET]
        return float((self._base.sums - found.sums).sum() / found.tokens.sum())

    def coefficient(self, gain: float, whole: float) -> float:
        """The coefficient at which the plain task vector gains as much, by bisection; 1 if none below is found."""
        ends = {0.0: 0.0, 1.0: whole}

        @cache
        def measured(c: float) -> float:
            return ends[c] if c in ends else self.gain(self.wanted.plan(coefficient=c))

        place = min(max(bisect_left(COEFFICIENTS, gain, key=measured), 1), len(COEFFICIENTS) - 1)
        around = COEFFICIENTS[place - 1 : place + 1]
        return float(np.interp(gain, [measured(c) for c in around], around))

    def variants(self, plans: Mapping[str, EditPlan | None]) -> dict[str, Variant]:
        """Gain and damage of every plan on the documents to measure, with intervals from a bootstrap over documents."""
        losses = {name: self._losses(plan, self.texts.measured) for name, plan in plans.items()}
        drawn = falls(losses, losses[BASE])
        return {
            name: Variant(
                gain=interval(found[TARGET]),
                kept=interval(share_kept(found[TARGET], drawn[TUNED][TARGET])),
                damage={text: interval(-found[text]) for text in self.wanted.protect},
            )
            for name, found in drawn.items()
        }
