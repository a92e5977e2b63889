"""A forward that starts in the middle: what blocks returned for some tokens is recorded, and given again.

recording = Recording(model, ids)                  # one forward
with edits.entered({12: 1.0}):
    output = recording.replay(12)                  # blocks 0 to 11 return what they returned
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from stethoscope.models.load import decoder_layers
from stethoscope.models.losses import replaced_forward, run


class Recording:
    """What a model, in the state it was in, returned for some tokens.

    Attributes:
        output: of the whole model before its head.
    """

    def __init__(
        self, model: PreTrainedModel, ids: Int[Tensor, "rows tokens"], *, starts: Collection[int] | None = None
    ) -> None:
        """Run the model once.

        Args:
            starts: the blocks that a replay may start at; any if None. Only the outputs they need are kept.
        """
        self.model, self.ids = model, ids
        self._blocks = decoder_layers(model)
        self.depth = len(self._blocks)
        self._outputs: dict[int, Any] = {}  # as the block returned them, a tensor or a tuple

        def keep(layer: int, _module: nn.Module, _inputs: Any, output: Any) -> None:
            self._outputs[layer] = output

        with ExitStack() as stack:
            for start in range(self.depth + 1) if starts is None else starts:
                if start > 0:
                    hook = partial(keep, start - 1)
                    stack.callback(self._blocks[start - 1].register_forward_hook(hook).remove)
            self.output = run(model, ids)

    def after(self, layer: int) -> Float[Tensor, "rows tokens hidden"]:
        """The residual stream as a block left it."""
        output = self._outputs[layer]
        return output[0] if isinstance(output, tuple) else output

    def replay(self, start: int) -> Any:
        """The output before the head, with blocks from ``start`` on run as they are now."""
        with self.below(start):
            return run(self.model, self.ids)

    @contextmanager
    def below(self, start: int) -> Iterator[None]:
        """Blocks below ``start`` do nothing for the length of a block of code, but the last returns what it did.

        The model's own forward still makes masks and positions, and still has all its layers: Gemma 3 counts them.
        """
        if start == 0:
            yield
            return
        with ExitStack() as stack:
            for layer in range(start):
                stack.enter_context(replaced_forward(self._blocks[layer], _returning(self._outputs[start - 1])))
            yield


def _returning(value: Any) -> Callable[..., Any]:
    return lambda *_args, **_options: value
