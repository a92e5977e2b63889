"""A plan applied to a live model in place, and taken back bit for bit.

    with applied(model, task_vector, plan):
        ...                                     # the model is the edited one
                                                # and here it is itself again, whatever happened inside

A tensor is exchanged by pointing its parameter at another tensor: the original is neither copied nor written.
`prepare` makes the new tensors once, on several threads, for plans that are entered many times.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count, takewhile
from typing import Any

from jaxtyping import Shaped

from stethoscope.checkpoints.config import differences
from stethoscope.checkpoints.names import parse_name
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.plan import EditPlan, coefficients, followed
from stethoscope.editing.transfer import in_parallel
from stethoscope.errors import CheckpointError
from stethoscope.lazy import torch

# Transformers 5 runs a block's experts as one tensor, and still saves one per expert.
STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@contextmanager
def applied(model: torch.nn.Module, task_vector: TaskVector, plan: EditPlan) -> Iterator[torch.nn.Module]:
    """The model edited for the length of a block.

    Inside, the weights are those that `write_edit` would write, cast to the model's own dtype. Under the plan that is
    tuned itself the model has tuned's config, too, where that gives other outputs.

    Raises:
        CheckpointError: a selected tensor has no parameter in the model, or another shape there.
    """
    with prepare(model, task_vector, plan).entered() as edited:
        yield edited


@dataclass(frozen=True)
class Swap:
    """New tensors for some of a model's parameters, by canonical name; see `prepare`."""

    model: torch.nn.Module
    tensors: dict[str, torch.Tensor]
    targets: dict[str, torch.Tensor]
    stand_in: torch.nn.Module | None = None  # what the model becomes, with parameters ``targets``

    @property
    def nbytes(self) -> int:
        """Bytes of the new tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @contextmanager
    def entered(self) -> Iterator[torch.nn.Module]:
        """The model with the new tensors in place, for the length of a block."""
        originals: list[tuple[torch.Tensor, torch.Tensor]] = []
        kind, state = type(self.model), vars(self.model)
        try:
            if self.stand_in is not None:
                self.model.__class__, self.model.__dict__ = type(self.stand_in), vars(self.stand_in)
            for name, target in self.targets.items():
                originals.append((target, target.data))
                target.data = self.tensors[name]
            yield self.model
        finally:
            self.model.__class__, self.model.__dict__ = kind, state
            for target, original in reversed(originals):
                target.data = original


def prepare(model: torch.nn.Module, task_vector: TaskVector, plan: EditPlan) -> Swap:
    """Read and compute the edited tensors of a plan, on the model's devices and in its dtypes."""
    stand_in = _under_own_config(model, task_vector) if plan.is_tuned else None
    live, entries = live_tensors(stand_in or model), task_vector.base.entries
    targets: dict[str, torch.Tensor] = {}
    problems = []
    for name in coefficients(task_vector, plan):
        shape = entries[name].shape
        place = name if name in live else stacked_place(name)
        target = live.get(place)
        if target is None:
            problems.append(f"`{name}` is in the plan but not in the model")
        elif target.device.type == "meta":
            problems.append(f"`{name}` is offloaded: it has no memory of its own")
        elif place == name and tuple(target.shape) != shape:
            problems.append(f"`{name}` is {list(target.shape)} in the model and {list(shape)} on disk")
        elif place not in targets and not any(target is other for other in targets.values()):
            targets[place] = target
    if problems:
        raise CheckpointError(
            "the plan does not fit the live model", problems=problems, hint="load the model from the base checkpoint"
        )

    def made(place: str, target: torch.Tensor) -> torch.Tensor:
        make = edited_tensor if place in entries else _stack_experts
        new = make(task_vector, plan, place)
        if new.shape != target.shape:
            raise CheckpointError(
                f"`{place}` is {list(target.shape)} in the model, its experts on disk make {list(new.shape)}",
                hint="this version of Transformers stacks the experts in another way: edit on disk and load that",
            )
        return new.to(device=target.device, dtype=target.dtype)

    jobs = [(target.nbytes, partial(made, place, target)) for place, target in targets.items()]
    tensors = dict(zip(targets, in_parallel(jobs, arithmetic=True), strict=True))
    return Swap(model, tensors, targets, stand_in)


def _under_own_config(model: torch.nn.Module, task_vector: TaskVector) -> torch.nn.Module | None:
    """The base's model under tuned's config, sharing the live one's weights; None if that gives the same outputs."""
    base, store = task_vector.base, task_vector.store
    if not store.config or not any(differences(base.config, store.config)):  # an adapter has none
        return None
    from stethoscope.models.load import load_config, load_model

    live: Any = model
    config = load_config(store.path)
    if not differences(live.config.to_dict(), config.to_dict())[0]:
        return None
    config.get_text_config().vocab_size = live.config.get_text_config().vocab_size
    other = load_model(base.path, dtype=live.dtype, device=live.device, config=config)
    mine = live_tensors(model)
    for name, parameter in live_tensors(other).items():
        if isinstance(parameter, torch.nn.Parameter) and name in mine:
            parameter.data = mine[name].data
    return other


def live_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A model's parameters and buffers by canonical name; tied ones appear under each of their names."""
    named = [*model.named_buffers(remove_duplicate=False), *model.named_parameters(remove_duplicate=False)]
    return {parse_name(name).canonical: tensor for name, tensor in named}


def stacked_place(name: str) -> str:
    """The name of the tensor that holds all experts' of a kind, for one expert's; any other name as it is."""
    match name.split("."):
        case ["layers", layer, "mlp", "experts", _, module, "weight"]:
            for stacked, modules in STACKED.items():
                if module in modules:
                    return f"layers.{layer}.mlp.experts.{stacked}"
    return name


def _stack_experts(task_vector: TaskVector, plan: EditPlan, place: str) -> torch.Tensor:
    prefix, _, stacked = place.rpartition(".")
    changed, base = frozenset(task_vector.names), task_vector.base
    parts = ([f"{prefix}.{n}.{module}.weight" for module in STACKED[stacked]] for n in count())
    experts = takewhile(lambda names: names[0] in base.entries, parts)

    def one(name: str) -> torch.Tensor:
        return edited_tensor(task_vector, plan, name) if name in changed else base.read(name)

    return torch.stack([torch.cat([one(name) for name in names]) for names in experts])


def edited_tensor(task_vector: TaskVector, plan: EditPlan, name: str) -> Shaped[torch.Tensor, "..."]:
    """What a tensor is under a plan, in the base's dtype: what the writer writes.

    At coefficient 1 without a transform it is tuned's tensor; else base + coefficient * change in float32, cast once.
    """
    name = followed(task_vector, name)
    coefficient = plan.coefficient(name)
    if not coefficient:
        return task_vector.base.read(name)
    A = plan.transform.low_rank(name) if plan.transform else None
    if plan.transform is None or A is not None:
        return task_vector.edited(name, coefficient, A=A)
    delta = task_vector.delta(name)
    changed = plan.transform.apply(name, delta)
    if changed is delta:
        return task_vector.edited(name, coefficient)
    if changed.shape != delta.shape:
        raise CheckpointError(f"the transform made `{name}` {list(changed.shape)} of {list(delta.shape)}")
    del delta
    return task_vector.add(name, task_vector.base.read(name), changed, coefficient)
