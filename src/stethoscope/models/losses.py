"""What text costs a model, document by document; the logits of a whole batch never exist.

output = run(model, batch.input_ids)                       # everything but the head
token_losses(model, output, batch.input_ids, batch.predicted[:, 1:])     # [rows, predicted], nats
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

CHUNK = 2**25  # logits held at once: 128 MiB in float32


def run(model: PreTrainedModel, ids: Int[Tensor, "rows tokens"]) -> Any:
    """The model's output before its head, with ``last_hidden_state``; padding belongs on the right."""
    # Under a causal mask no real token sees padding on its right, so no mask is needed.
    return model.base_model(input_ids=ids.to(model.device), use_cache=False)


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


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """One module's forward replaced by another for the length of a block."""
    own = vars(module)
    before = own.get("forward")  # an instance may have one of its own: offloading puts it there
    own["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before


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
