"""The exploratory parts of the study of edits: which edits `methods.py` measures beside the methods themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import vectors
from common import TEXTS
from edits import rounded
from torch import Tensor, nn

from stethoscope.artifacts import Provenance
from stethoscope.checkpoints.names import parse_name
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.apply import applied
from stethoscope.editing.filter import FilteredChange, write_filters
from stethoscope.editing.plan import EditPlan, Transform
from stethoscope.editing.rivals import WHOLE, Changed, scaled
from stethoscope.editing.writer import write_edit
from stethoscope.models.load import decoder_layers
from stethoscope.saes.open import load_sae

if TYPE_CHECKING:
    from methods import Methods

SIZES = (5, 15)  # of sets of layers
INPUTS = {"q, k, v": ("q_proj", "k_proj", "v_proj"), "o": ("o_proj",), "gate, up": ("gate_proj", "up_proj"),
          "down": ("down_proj",)}  # fmt: skip
STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
Within = Callable[[nn.Module], AbstractContextManager[None]]
Edit = tuple[str, float, EditPlan | None]  # method, value of its parameter, plan


@dataclass(frozen=True)
class Only:
    """The transform that keeps the change of some modules alone, transformed further or as it is."""

    modules: tuple[str, ...]
    then: Transform | None = None

    def apply(self, name: str, delta: Tensor) -> Tensor:
        """The new change."""
        if name.split(".")[-2] not in self.modules:
            return torch.zeros_like(delta)
        return self.then.apply(name, delta) if self.then else delta

    def low_rank(self, _: str) -> None:
        """Nothing is written."""

    def describe(self) -> dict[str, Any]:
        """What it keeps."""
        return {"kind": "only", "modules": self.modules, "then": self.then.describe() if self.then else None}


def layers(bench: Methods) -> Iterator[Edit]:
    """Chosen layers, raw (0) and filtered at two strengths; every layer alone is among `inputs`."""
    for k in SIZES:
        for name, chosen in bench.sets(k).items():
            yield f"{name}, {k}", 0.0, EditPlan.for_layers(chosen)
            for strength in (0.3, 3.0):
                transform = FilteredChange(bench.filters(), strength, bench.task_vector)
                yield f"{name}, {k}", strength, EditPlan.for_layers(chosen, transform=transform)


def inputs(bench: Methods) -> Iterator[Edit]:
    """Tensors of one kind of input alone, raw (0) and filtered at strength 1; then each layer's raw change alone."""
    for name, modules in INPUTS.items():
        yield name, 0.0, replace(WHOLE, transform=Only(modules))
        yield name, 1.0, replace(WHOLE, transform=Only(modules, bench.filtered(1.0).transform))
    for layer in range(bench.base.layers):
        yield "layer alone", float(layer), EditPlan.for_layers([layer])


def moments(bench: Methods) -> Iterator[Edit]:
    """The filter from the base's moments, from those of the model edited so far, and from SAE reconstructions."""
    texts = {
        name: bench.made_from(bench._texts[text], 5_000)
        for name, text in (("target", "target"), ("general", "control"))
    }
    blocks, strengths = decoder_layers(bench.model), (0.3, 1.0, 3.0)

    @contextmanager
    def reconstructed(layer: int) -> Iterator[None]:
        if not layer:
            yield
            return
        sae = load_sae(bench.saes[layer - 1])

        def replaced(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return sae.decode(sae.encode(args[0].float())).to(args[0].dtype), *args[1:]

        handle = blocks[layer].register_forward_pre_hook(replaced)
        try:
            yield
        finally:
            handle.remove()

    def by_layer(
        name: str, strengths: Sequence[float], around: Callable[[int], AbstractContextManager[Any]]
    ) -> dict[int, Path]:
        made = {}
        for layer in range(len(blocks)):
            made[layer] = bench.folder / name / str(layer)
            with around(layer):
                write_filters(
                    bench.model, bench.task_vector, texts, made[layer], provenance=Provenance(), strengths=strengths,
                    layers=[layer],
                )  # fmt: skip
        return made

    def together(folders: Mapping[int, Path], strength: float) -> EditPlan:
        parts = {n: FilteredChange(folder, strength, bench.task_vector) for n, folder in folders.items()}
        change = partial(_by_layer, parts=parts)
        return EditPlan.for_layers(list(parts), transform=Changed(change))

    whole = bench.folder / "few"
    write_filters(bench.model, bench.task_vector, texts, whole, provenance=Provenance(), strengths=strengths)
    for strength in strengths:
        yield "of the base", strength, together(dict.fromkeys(range(len(blocks)), whole), strength)
    made = by_layer("reconstructed", strengths, reconstructed)
    for strength in strengths:
        yield "of reconstructions", strength, together(made, strength)
    for strength in strengths:
        so_far: dict[int, Path] = {}

        def edited(
            layer: int, strength: float = strength, so_far: dict[int, Path] = so_far
        ) -> AbstractContextManager[Any]:
            plan = together(so_far, strength) if so_far else EditPlan()
            so_far[layer] = bench.folder / "sequence" / str(layer)
            return applied(bench.model, bench.task_vector, plan)

        yield "in sequence", strength, together(by_layer("sequence", [strength], edited), strength)


def _by_layer(name: str, delta: Tensor, *, parts: Mapping[int, FilteredChange]) -> Tensor:
    layer = parse_name(name).layer
    assert layer is not None
    return parts[layer].apply(name, delta)


def limits(bench: Methods) -> Iterator[tuple[str, float, EditPlan | None, Within]]:
    """Coefficients above 1, and matrices of few bits."""
    for strength in (1.0, 3.0):
        for c in (1.25, 1.5, 2.0):
            yield f"filter {strength:g} at", c, bench.filtered(strength, default=c), nullcontext
    plans = {"base": None, "tuned": WHOLE, "scaled 0.5": scaled(0.5), "filter 1": bench.filtered(1.0)}
    for bits, group in ((8, 0), (4, 64)):
        for name, plan in plans.items():
            yield f"{name}, bits", float(bits), plan, partial(rounded, bits=bits, group=group)


def merged(bench: Methods, other: Methods) -> Iterator[Edit]:
    """Both vectors of one base; the first is the bench's."""
    bench.measured[f"target of {other.vector}"] = other.measured[TEXTS[0]]
    yield "base", 0.0, None
    for name, one in ((bench.vector, bench), (other.vector, other)):
        yield name, 1.0, replace(WHOLE, transform=Changed(partial(_of, task_vector=one.task_vector)))
    both = {"first": bench.task_vector, "second": other.task_vector}
    for c in (1.0, 0.7, 0.5, 0.3):
        yield "sum", c, replace(WHOLE, default=c, transform=Changed(partial(_sum, **both)))
    for density in (0.5, 0.2, 0.1):
        yield "TIES", density, replace(WHOLE, transform=Changed(partial(_ties, density=density, **both)))
    folders = [
        one.filters(f"beside {two.vector}", more={two.vector: two._texts["target"]})
        for one, two in ((bench, other), (other, bench))
    ]
    for strength in STRENGTHS:
        parts = [FilteredChange(folder, strength, tv) for folder, tv in zip(folders, both.values(), strict=True)]
        yield "filters added", strength, replace(WHOLE, transform=Changed(partial(_added, parts=parts)))


def second(bench: Methods, other: Methods) -> Iterator[Edit]:
    """The other vector trained once more: on the fine-tune, and on its filtered edit, as it was on the base."""
    bench.measured[f"target of {other.vector}"] = other.measured[TEXTS[0]]
    yield "base", 0.0, None
    alone = Changed(partial(_of, task_vector=other.task_vector))
    yield f"nothing, then {other.vector}", 1.0, replace(WHOLE, transform=alone)
    for name, plan in (("tuned", WHOLE), ("filter", bench.filtered(1.0))):
        yield name, 1.0, plan
        change = _trained_on(bench, plan, other.vector, bench.folder.parent / "second" / name)
        both = Changed(partial(_after, first=plan.transform, second=change))
        yield f"{name}, then {other.vector}", 1.0, replace(WHOLE, transform=both)


def _trained_on(bench: Methods, plan: EditPlan, vector: str, folder: Path) -> TaskVector:
    """What a vector's training makes of an edited model."""
    how, edited = vectors.VECTORS[vector], folder / "edited"
    assert how.settings is not None
    if not any((folder / "tuned").glob("*.safetensors")):
        write_edit(bench.base, bench.task_vector, plan, edited, overwrite=True)
        vectors.train_on(edited, how, folder / "tuned", work=folder / "training")
    return open_task_vector(open_checkpoint(edited), folder / "tuned")


def _after(name: str, delta: Tensor, *, first: Transform | None, second: TaskVector) -> Tensor:
    return (first.apply(name, delta) if first else delta) + second.delta(name)


def _of(name: str, _: Tensor, *, task_vector: TaskVector) -> Tensor:
    return task_vector.delta(name)


def _sum(name: str, _: Tensor, *, first: TaskVector, second: TaskVector) -> Tensor:
    return first.delta(name) + second.delta(name)


def _ties(name: str, _: Tensor, *, first: TaskVector, second: TaskVector, density: float) -> Tensor:
    from peft.utils.merge_utils import ties

    return ties([first.delta(name), second.delta(name)], torch.ones(2), density)


def _added(name: str, delta: Tensor, *, parts: Sequence[FilteredChange]) -> Tensor:
    return torch.stack([part.apply(name, part.task_vector.delta(name)) for part in parts]).sum(0)
