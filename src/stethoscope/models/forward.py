"""Forwards without the head: restarted in the middle, and token losses whose logits never exist all at once.

recording = Recording(model, ids)                  # one forward
with edits.entered({12: 1.0}):
    output = recording.replay(12)                  # blocks 0 to 11 return what they returned
token_losses(model, output, ids, counted)          # [rows, predicted], nats
"""

import copy
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from stethoscope.models.load import decoder_layers

CHUNK = 2**25  # logits held at once: 128 MiB in float32


def run(model: PreTrainedModel, ids: Int[Tensor, "rows tokens"]) -> Any:
    """The model's output before its head, with ``last_hidden_state``; padding belongs on the right."""
    # Under a causal mask no real token sees padding on its right, so no mask is needed.
    return model.base_model(input_ids=ids.to(model.device), use_cache=False)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward inside the block."""
    own = vars(module)
    before = {"forward": own["forward"]} if "forward" in own else {}  # offloading puts one there
    own["forward"] = forward
    try:
        yield
    finally:
        del own["forward"]
        own |= before


@contextmanager
def skipped(blocks: Iterable[nn.Module], output: Any) -> Iterator[None]:
    """Inside the block of code these decoder blocks do nothing and return ``output``.

    The model's own forward still makes masks and positions, and still has all its layers: Gemma 3 counts them.
    """
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(replaced_forward(block, lambda *_args, **_options: output))
        yield


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
        self._outputs: dict[int, Any] = {}  # as the block returned them, a tensor or a tuple

        def keep(layer: int, _module: nn.Module, _inputs: Any, output: Any) -> None:
            self._outputs[layer] = output

        with ExitStack() as stack:
            for start in range(len(self._blocks) + 1) if starts is None else starts:
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

    def below(self, start: int) -> AbstractContextManager[None]:
        """Inside the block of code, blocks below ``start`` do nothing, and the last of them returns what it did."""
        return skipped(self._blocks[:start], self._outputs[start - 1] if start else None)


def token_losses(
    model: PreTrainedModel, output: Any, ids: Int[Tensor, "rows tokens"], counted: Bool[Tensor, "rows predicted"]
) -> Float[Tensor, "rows predicted"]:
    """Next-token loss in nats of every token but the first of each row, from what `run` returned.

    Args:
        counted: the tokens that the head is run for; the loss of the others is given as 0.
    """
    places = counted.flatten().nonzero()[:, 0].to(model.device)
    hidden, targets = output.last_hidden_state[:, :-1].flatten(0, 1), ids[:, 1:].to(model.device).flatten()
    losses = torch.zeros(len(targets), device=model.device)
    for some in places.split(chunk_size(model)):
        losses[some] = _losses(model, output, hidden[some], targets[some])
    return losses.view(len(ids), -1)


def loss_gradient(
    model: PreTrainedModel, output: Any, ids: Int[Tensor, "rows tokens"], counted: Bool[Tensor, "rows predicted"]
) -> tuple[Float[Tensor, "rows predicted"], Float[Tensor, "rows tokens hidden"]]:
    """Losses as `token_losses` has them, and the gradient of the sum of those counted at ``last_hidden_state``.

    The head is differentiated chunk by chunk, so its logits are never kept either.
    """
    hidden = output.last_hidden_state.detach()
    flat, targets = hidden[:, :-1].flatten(0, 1), ids[:, 1:].to(model.device).flatten()
    weights = counted.to(model.device).flatten()
    losses, slopes = [], []
    step = chunk_size(model)
    for h, t, w in zip(flat.split(step), targets.split(step), weights.split(step), strict=True):
        with torch.enable_grad():
            h.requires_grad_(True)
            loss = _losses(model, output, h, t)
            (slope,) = torch.autograd.grad(loss.where(w, 0.0).sum(), h)
        losses.append(loss.detach())
        slopes.append(slope)
    gradient = torch.zeros_like(hidden)
    gradient[:, :-1] = torch.cat(slopes).view(len(ids), -1, hidden.shape[-1])
    return torch.cat(losses).view(len(ids), -1), gradient


def head_logits(
    model: PreTrainedModel, output: Any, hidden: Float[Tensor, "some hidden"]
) -> Float[Tensor, "some vocabulary"]:
    """Logits of some of the last hidden states of what `run` returned, in the model's present state and dtype."""
    # The model's own forward makes logits of a hidden state: a head may come with a soft cap or a scale.
    chunk = copy.copy(output)
    chunk.last_hidden_state = hidden[None]
    ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
    with replaced_forward(model.base_model, lambda *_args, **_options: chunk):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits


def _losses(
    model: PreTrainedModel, output: Any, hidden: Float[Tensor, "some hidden"], targets: Int[Tensor, " some"]
) -> Float[Tensor, " some"]:
    return nn.functional.cross_entropy(head_logits(model, output, hidden).float(), targets, reduction="none")


def chunk_size(model: PreTrainedModel) -> int:
    """How many tokens' logits are held at once."""
    return max(1, CHUNK // int(model.config.get_text_config().vocab_size))
