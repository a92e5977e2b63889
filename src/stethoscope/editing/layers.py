"""Edited weights of single layers, for edits that are entered many times: read once and kept while they fit."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import nn

from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.apply import Swap, prepare
from stethoscope.editing.plan import EditPlan, Modules


class LayerEdits:
    """The task vector's layers at any coefficient, ready to be put into a live model.

    edits = LayerEdits(model, task_vector)
    with edits.entered({3: 1.0, 4: 0.5}):
        ...
    """

    def __init__(
        self, model: nn.Module, task_vector: TaskVector, *, modules: Modules = "all", memory: int = 8 << 30
    ) -> None:
        """Nothing is read yet.

        Args:
            modules: what of a layer is edited; see `EditPlan.for_layers`.
            memory: bytes of edited weights to keep; those used longest ago are read again.
        """
        self.model, self.task_vector, self.modules, self.memory = model, task_vector, modules, memory
        self._kept: OrderedDict[tuple[int, float], Swap] = OrderedDict()
        self._bytes = 0

    @contextmanager
    def entered(self, change: Mapping[int, float]) -> Iterator[nn.Module]:
        """The model with layers edited, layer -> coefficient, for the length of a block.

        Raises:
            CheckpointError: the task vector does not fit the model.
        """
        with ExitStack() as stack:
            for layer, coefficient in change.items():
                stack.enter_context(self._swap(layer, coefficient).entered())
            yield self.model

    def _swap(self, layer: int, coefficient: float) -> Swap:
        key = (layer, float(coefficient))
        if key not in self._kept:
            plan = EditPlan.for_layers({layer: coefficient}, modules=self.modules)
            self._kept[key] = prepare(self.model, self.task_vector, plan)
            self._bytes += _size(self._kept[key])
        self._kept.move_to_end(key)
        swap = self._kept[key]
        while self._bytes > self.memory and len(self._kept) > 1:
            self._bytes -= _size(self._kept.popitem(last=False)[1])
        return swap


def _size(swap: Swap) -> int:
    return sum(tensor.nbytes for tensor in swap.tensors.values())
