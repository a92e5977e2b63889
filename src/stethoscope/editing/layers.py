"""Edited weights of single layers, for edits that are entered many times: read once and kept while they fit."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import nn

from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.apply import Swap, prepare
from stethoscope.editing.plan import EditPlan


class LayerEdits:
    """The task vector's layers at any coefficient, ready to be put into a live model.

    edits = LayerEdits(model, task_vector)
    with edits.entered({3: 1.0, 4: 0.5}):
        ...
    """

    def __init__(self, model: nn.Module, task_vector: TaskVector, *, memory: int = 8 << 30) -> None:
        """Nothing is read yet. Of edited weights ``memory`` bytes are kept; those used longest ago are read again."""
        self.model, self.task_vector, self.memory = model, task_vector, memory
        self._kept: OrderedDict[tuple[int, float], Swap] = OrderedDict()

    @contextmanager
    def entered(self, change: Mapping[int, float]) -> Iterator[nn.Module]:
        """The model with layers edited, layer -> coefficient, for the length of a block.

        Raises:
            CheckpointError: the task vector does not fit the model.
        """
        with ExitStack() as stack:
            for layer, coefficient in change.items():
                stack.enter_context(self._swap(layer, float(coefficient)).entered())
            yield self.model

    def _swap(self, layer: int, coefficient: float) -> Swap:
        key = (layer, coefficient)
        if key not in self._kept:
            self._kept[key] = prepare(self.model, self.task_vector, EditPlan.for_layers({layer: coefficient}))
        self._kept.move_to_end(key)
        swap = self._kept[key]
        while len(self._kept) > 1 and sum(one.nbytes for one in self._kept.values()) > self.memory:
            self._kept.popitem(last=False)
        return swap
