"""Edited weights of single layers, for edits that are entered many times: read once and kept while they fit."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from torch import nn

from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.apply import Swap, prepare
from stethoscope.editing.filter import FilteredChange
from stethoscope.editing.plan import EditPlan


class Filtered(NamedTuple):
    """How much of a layer's change, behind the filter of a strength."""

    coefficient: float
    strength: float


Amount = float | Filtered  # a number alone is a coefficient of the raw change


class LayerEdits:
    """The task vector's layers at any coefficient, ready to be put into a live model.

    edits = LayerEdits(model, task_vector)
    with edits.entered({3: 1.0, 4: Filtered(0.5, strength=3.0)}):
        ...
    """

    def __init__(
        self, model: nn.Module, task_vector: TaskVector, *, memory: int = 8 << 30, filters: Path | None = None
    ) -> None:
        """Nothing is read yet. Of edited weights ``memory`` bytes are kept; those used longest ago are read again.

        Filtered amounts need ``filters``, what `write_filters` wrote."""
        self.model, self.task_vector, self.memory, self.filters = model, task_vector, memory, filters
        self._kept: OrderedDict[tuple[int, Amount, Path | None], Swap] = OrderedDict()

    @contextmanager
    def entered(self, change: Mapping[int, Amount]) -> Iterator[nn.Module]:
        """The model with layers edited, layer -> amount, for the length of a block.

        Raises:
            CheckpointError: the task vector does not fit the model.
        """
        with ExitStack() as stack:
            for layer, amount in change.items():
                stack.enter_context(self._swap(layer, amount).entered())
            yield self.model

    def _swap(self, layer: int, amount: Amount) -> Swap:
        key = (layer, amount, self.filters)
        if key not in self._kept:
            if isinstance(amount, Filtered):
                assert self.filters is not None
                transform = FilteredChange(self.filters, amount.strength, self.task_vector)
                plan = EditPlan.for_layers({layer: amount.coefficient}, transform=transform)
            else:
                plan = EditPlan.for_layers({layer: float(amount)})
            self._kept[key] = prepare(self.model, self.task_vector, plan)
        self._kept.move_to_end(key)
        swap = self._kept[key]
        while len(self._kept) > 1 and sum(one.nbytes for one in self._kept.values()) > self.memory:
            self._kept.popitem(last=False)
        return swap
