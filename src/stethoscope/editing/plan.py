"""Which tensors to change and by how much: a plan is data, it reads no weights.

EditPlan.for_layers([3, 4])                            # the fine-tune's layers 3 and 4, whole
EditPlan.for_layers({3: 0.5, 4: -1.0}, modules="mlp")  # MLPs only, layer 4 reversed
EditPlan.everything()                                  # the tuned model itself
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Float

from stethoscope.checkpoints.names import KINDS, Kind, parse_name
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.errors import CheckpointError
from stethoscope.lazy import torch

Modules = Literal["all", "attention", "mlp"]
MODULE_KINDS: dict[str, tuple[Kind, ...]] = {
    "all": ("attention", "mlp", "norm", "other"),
    "attention": ("attention",),
    "mlp": ("mlp",),
}
SCHEMA = "stethoscope.plan/1"


@runtime_checkable
class Transform(Protocol):
    """What happens to a tensor's change before it is scaled and added, such as a projection."""

    def apply(self, name: str, delta: Float[torch.Tensor, "..."]) -> Float[torch.Tensor, "..."]:
        """The new change of a tensor, float32 and of the same shape; ``delta`` itself says "as it is"."""
        ...

    def low_rank(self, name: str) -> Float[torch.Tensor, "rank d"] | None:
        """The A that makes the new change with LoRA's own B; None where there is none."""
        ...

    def describe(self) -> dict[str, Any]:
        """The transform as JSON, complete enough that equal descriptions mean equal results."""
        ...


@dataclass(frozen=True, kw_only=True)
class EditPlan:
    """How much of the task vector each tensor gets; 0 leaves a tensor as the base has it.

    Attributes:
        layers: layer -> module kind ("attention", "mlp", "norm", "other") -> coefficient.
        outside: kind of a tensor outside the layers ("embedding", "head", "norm", "vision", "other") -> coefficient.
        default: the coefficient of every tensor that ``layers`` and ``outside`` do not speak of.
        transform: applied to each selected tensor's change; None adds the raw change.
    """

    layers: Mapping[int, Mapping[Kind, float]] = field(default_factory=dict)
    outside: Mapping[Kind, float] = field(default_factory=dict)
    default: float = 0.0
    transform: Transform | None = None

    def __post_init__(self) -> None:
        problems = [f"`{layer}` is not a layer number" for layer in self.layers if type(layer) is not int or layer < 0]
        tables = {f"layer {n}": table for n, table in self.layers.items()} | {"outside the layers": self.outside}
        for where, table in tables.items():
            problems += [f"{where}: there is no kind `{kind}`" for kind in table if kind not in KINDS]
            problems += [f"{where}: the coefficient of {k} is {c}" for k, c in table.items() if not _finite(c)]
        if not _finite(self.default):
            problems.append(f"the default coefficient is {self.default}")
        if problems:
            raise CheckpointError(
                "the edit plan makes no sense", problems=problems, hint="coefficients are finite numbers"
            )

    @classmethod
    def for_layers(
        cls,
        layers: Iterable[int] | Mapping[int, float],
        *,
        coefficient: float = 1.0,
        modules: Modules = "all",
        transform: Transform | None = None,
    ) -> EditPlan:
        """A plan for whole layers, or their attention or MLP only.

        Args:
            layers: layer numbers, or layer number -> coefficient. Layers that are not named stay the base's.
            coefficient: how much of the change the layers get; negative takes a skill away.
            modules: "all" takes norms with it, "attention" and "mlp" do not.
        """
        if modules not in MODULE_KINDS:
            raise CheckpointError(f"there are no modules `{modules}`", hint="choose all, attention or mlp")
        if isinstance(layers, Mapping) and coefficient != 1:
            raise CheckpointError(
                f"the layers have coefficients of their own, so {coefficient} would be ignored",
                hint="give layer numbers alone, or leave `coefficient` out",
            )
        per_layer = dict(layers) if isinstance(layers, Mapping) else dict.fromkeys(layers, coefficient)
        tables = {n: dict.fromkeys(MODULE_KINDS[modules], c) for n, c in sorted(per_layer.items())}
        return cls(layers=tables, transform=transform)

    @classmethod
    def everything(cls) -> EditPlan:
        """The tuned model itself: every tensor, embeddings, head and whatever else there is."""
        return cls(default=1.0)

    def coefficient(self, name: str) -> float:
        """How much of the change the tensor of this canonical (or stored) name gets."""
        parsed = parse_name(name)
        if parsed.kind == "buffer":
            return 0.0
        if parsed.layer is None:
            return float(self.outside.get(parsed.kind, self.default))
        table = self.layers.get(parsed.layer)
        return float(self.default if table is None else table.get(parsed.kind, 0.0))

    @property
    def is_tuned(self) -> bool:
        """Whether the text model becomes tuned itself."""
        outside = {c for kind, c in self.outside.items() if kind != "vision"}
        return self.transform is None and {self.default, *outside} == {1.0} and not self.layers

    @property
    def selected_layers(self) -> tuple[int, ...]:
        """The layers that the plan names with a coefficient other than 0."""
        return tuple(sorted(n for n, table in self.layers.items() if any(table.values())))

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "schema": SCHEMA,
            "layers": {str(n): dict(sorted(table.items())) for n, table in sorted(self.layers.items())},
            "outside": dict(sorted(self.outside.items())),
            "default": self.default,
            "transform": self.transform.describe() if self.transform else None,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, transform: Transform | None = None) -> EditPlan:
        """The plan that `to_json` described. A plan with a transform needs it given, and its description must match.

        Raises:
            CheckpointError: another schema, a transform missing or different.
        """
        if data.get("schema") != SCHEMA:
            raise CheckpointError(f"this is not a plan of schema `{SCHEMA}` but `{data.get('schema')}`")
        if (transform.describe() if transform else None) != data.get("transform"):
            raise CheckpointError("the plan was made with another transform", hint="pass the transform it describes")
        layers = {int(n): dict(table) for n, table in data["layers"].items()}
        return cls(layers=layers, outside=dict(data["outside"]), default=data["default"], transform=transform)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def followed(task_vector: TaskVector, name: str) -> str:
    """The embedding, for a tied head that has a copy of its own on disk; for any other tensor its own name."""
    embedding = "embed_tokens.weight"
    copy = name == "lm_head.weight" and task_vector.base.tied and embedding in task_vector.names
    return embedding if copy else name


def coefficients(task_vector: TaskVector, plan: EditPlan) -> dict[str, float]:
    """The canonical names of the tensors that a plan changes, with their coefficients, in the base's order.

    A tied head that has a copy of its own on disk follows the embedding.
    """
    found = {name: plan.coefficient(followed(task_vector, name)) for name in task_vector.names}
    return {name: coefficient for name, coefficient in found.items() if coefficient}
