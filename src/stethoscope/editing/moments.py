"""Second moments of the inputs of a model's weights: E[x x^T] per text, one decoder block at a time.

for layer, inputs in collect_moments(model, {"target": [...batches], "protected": [...batches]}, names):
    inputs["layers.3.mlp.down_proj.weight"]["target"]      # of this layer's tensors only

Hidden states of all tokens are kept where a block begins and the block runs once, so memory is the model, the hidden
states and one layer's moments, whatever the depth.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stethoscope.checkpoints.names import parse_name
from stethoscope.editing.apply import STACKED, stacked_place
from stethoscope.editing.change import second_moment
from stethoscope.errors import CheckpointError, StethoscopeError
from stethoscope.models.forward import run, skipped
from stethoscope.models.load import decoder_layers
from stethoscope.saes.activations import attention_sinks
from stethoscope.text.tokens import TokenBatch

Texts = Mapping[str, Sequence[TokenBatch]]
Progress = Callable[[int, int], None]
# How a tensor's change meets its input x: by the columns or rows of a matrix that multiplies x; token by token of a
# vocabulary, or so and as the head, too; channel by channel of a normalised x; or added, with no input but 1.
Role = Literal["columns", "rows", "token", "tied", "channel", "added"]


@dataclass(frozen=True, kw_only=True)
class Moments:
    """The sum of x x^T over tokens; of its diagonal alone where the inputs of a tensor meet it one by one.

    Attributes:
        sums: float32, on the model's device.
        tokens: how many of the text count.
        seen: how many of these are in the sums: an expert sees only some.
    """

    sums: Float[Tensor, "d d"] | Float[Tensor, " d"]
    tokens: int
    seen: int

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of both texts together."""
        tokens, seen = self.tokens + other.tokens, self.seen + other.seen
        return Moments(sums=self.sums + other.sums, tokens=tokens, seen=seen)

    def mean(self) -> Float64[Tensor, "d d"] | Float64[Tensor, " d"]:
        """Per token; zero where there is no token."""
        return self.sums.to(torch.float64, copy=True).div_(max(self.tokens, 1))


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The input itself, token by token: what takes less memory and time than moments where tokens are few.

    Attributes:
        rows: float32, on the model's device.
    """

    rows: Float[Tensor, "tokens d"]

    @property
    def seen(self) -> int:
        """How many tokens count."""
        return len(self.rows)

    def mean(self) -> Float64[Tensor, "d d"]:
        """Moments per token."""
        return second_moment(self.rows.double()) / max(self.seen, 1)


# tensor -> text -> moments of its input, or the input itself; tensors that share one share these
Inputs = dict[str, dict[str, Moments | Samples]]


def shrinkage(scale: float, squares: float, d: int, tokens: int) -> float:
    """How far moments per token should be drawn toward scale I: oracle approximating shrinkage.

    Chen, Wiesel, Eldar and Hero 2010, eq. 23, as in scikit-learn's `oas`, for samples about 0.

    Args:
        scale: the mean of their diagonal.
        squares: the mean of their squared elements.
    """
    spread = (tokens + 1) * (squares - scale**2 / d)
    return min(1.0, (squares + scale**2) / spread) if spread > 0 else 1.0


def not_definite() -> CheckpointError:
    """The error of moments that cannot be inverted."""
    return CheckpointError(
        "the second moments of an input are not positive definite",
        hint="the model's activations hold NaN or infinity, or a text is a few tokens repeated",
    )


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a tensor is in the live model: its module, its parameter's name there and how it meets its input."""

    module: nn.Module
    role: Role
    expert: tuple[int, str] | None = None  # its number and module, where all experts are one tensor


def roles(model: PreTrainedModel, names: Collection[str]) -> dict[str, Role]:
    """How the change of each tensor meets its input.

    Args:
        names: canonical names.

    Raises:
        CheckpointError: with every tensor whose input is not known.
    """
    return {name: place.role for name, place in _places(model, names).items()}


def _places(model: PreTrainedModel, names: Collection[str]) -> dict[str, _Place]:
    owners = {
        parse_name(f"{path}.{parameter}" if path else parameter).canonical: (module, parameter, tensor)
        for path, module in model.named_modules()
        for parameter, tensor in module.named_parameters(recurse=False, remove_duplicate=False)
    }
    found, problems = {}, []
    for name in names:
        stacked = stacked_place(name)
        if name not in owners and stacked in owners:
            *_, number, part, _ = name.split(".")
            found[name] = _Place(module=owners[stacked][0], role="columns", expert=(int(number), part))
        elif name in owners and (role := _role(model, *owners[name])):
            found[name] = _Place(module=owners[name][0], role=role)
        else:
            problems.append(f"`{name}` of {type(owners[name][0] if name in owners else model).__name__}")
    if problems:
        raise CheckpointError(
            "the inputs of some changed tensors are not known, so their change cannot be filtered",
            problems=problems,
            hint="`--layers` leaves some out; a recipe with `edit: {filter: none}` filters nothing",
        )
    return found


def _role(model: PreTrainedModel, module: nn.Module, parameter: str, tensor: Tensor) -> Role | None:
    if parameter == "bias" and tensor.ndim == 1:
        return "added"
    if parameter != "weight":
        return None
    if isinstance(module, nn.Embedding):
        if hasattr(module, "offset"):  # OPT's positions: its input is a mask
            return None
        head = model.get_output_embeddings()
        return "tied" if head is not None and head.weight is tensor else "token"
    if "norm" in type(module).__name__.lower():
        return "channel" if tensor.ndim == 1 else None  # Cohere's may have a row for each head
    matrix: Role = "rows" if isinstance(module, Conv1D) else "columns"
    return matrix if tensor.ndim == 2 else None


@torch.no_grad()
def collect_moments(
    model: PreTrainedModel,
    texts: Texts,
    names: Collection[str],
    *,
    samples: bool = False,
    progress: Progress | None = None,
) -> Iterator[tuple[int | None, Inputs]]:
    """The moments of the inputs of tensors in the model as it is, layer by layer.

    Tokens that count are those of `TokenBatch.countable` that are no attention sink at this layer or one before it.
    Sums are taken in float32 in the batches' order: the same on every run.

    Args:
        texts: name -> batches; see `stethoscope.text.tokens.batches`.
        names: canonical names of tensors; biases have no input and are skipped.
        samples: give a layer's input itself where all texts together have fewer tokens than it has values.
        progress: called with forwards of blocks, done and in all.

    Yields:
        layer, and for each of its tensors its input, which tensors may share; last None and the tensors outside the
        layers, with ``lm_head.weight`` also where it is the embedding. Use them before asking for the next.

    Raises:
        CheckpointError: with every tensor whose input is not known.
        StethoscopeError: a text has no token that counts.
    """
    places = {name: place for name, place in _places(model, names).items() if place.role != "added"}
    if empty := [f"`{name}`" for name, text in texts.items() if not any(batch.countable.any() for batch in text)]:
        raise StethoscopeError("no token of a text counts", problems=empty, hint="give longer documents")
    blocks, todo = decoder_layers(model), [(name, batch) for name, text in texts.items() for batch in text]
    hidden: list[Any] = [None] * len(todo)
    few = sum(int(batch.countable.sum()) for _, batch in todo) if samples else None
    sinks = [torch.zeros_like(batch.countable) for _, batch in todo]
    by_layer: dict[int | None, dict[str, _Place]] = {}
    for name, place in places.items():
        by_layer.setdefault(parse_name(name).layer, {})[name] = place
    for layer in [*range(len(blocks)), None]:
        collector = _Collector(by_layer.get(layer, {}), few)
        if layer is None and not collector.places:
            return
        for i, (text, batch) in enumerate(todo):
            with ExitStack() as stack:
                stop = len(blocks) if layer is None else layer
                stack.enter_context(skipped(blocks[:stop], hidden[i]))
                if stop and layer is not None:
                    stream = hidden[i][0] if isinstance(hidden[i], tuple) else hidden[i]
                    sinks[i] |= attention_sinks([stream], batch.attention_mask)
                collector.attach(stack, text, batch.countable & ~sinks[i])
                if layer is None:
                    collector.finish(model, run(model, batch.input_ids))
                else:
                    hidden[i] = _through(model, blocks[layer], batch)
            if progress:
                progress(stop * len(todo) + i + 1, (len(blocks) + 1) * len(todo))
        yield layer, collector.inputs


def _through(model: PreTrainedModel, block: nn.Module, batch: TokenBatch) -> Any:
    """What a block returns for a batch; the forward ends there."""
    returned: list[Any] = []

    def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
        returned.append(output)
        raise _Stopped

    with ExitStack() as stack, suppress(_Stopped):
        stack.callback(block.register_forward_hook(stop).remove)
        run(model, batch.input_ids)
    return returned[0]


class _Stopped(Exception):  # noqa: N818 - control flow: ends a forward after a block
    pass


class _Collector:
    """Hooks that add up the inputs of some tensors, each input once whoever shares it."""

    def __init__(self, places: Mapping[str, _Place], few: int | None) -> None:
        self.places, self.few = places, few
        self.inputs: Inputs = {}
        self._seen: list[tuple[Tensor, str]] = []

    def attach(self, stack: ExitStack, text: str, counted: Bool[Tensor, "rows tokens"]) -> None:
        self._seen = []
        self.text, self.counted = text, counted
        for name, place in self.places.items():
            hook = partial(self._keep_expert if place.expert else self._keep, name, place)
            stack.callback(place.module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def finish(self, model: PreTrainedModel, output: Any) -> None:
        """The head is not run: its input is the last hidden state, also where it shares the embedding's weight."""
        head = "lm_head.weight"
        if head in self.places or any(place.role == "tied" for place in self.places.values()):
            self._add(head, second_moment(self._rows(output.last_hidden_state).float()))

    def _keep(
        self, name: str, place: _Place, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        x = args[0] if args else next(iter(options.values()))
        if place.role in ("columns", "rows"):
            for seen, owner in self._seen:
                if seen is x:
                    self.inputs[name] = self.inputs[owner]
                    return
            self._seen.append((x, name))
            x = self._rows(x).float()
            if self.few is None or self.few >= x.shape[1]:
                self._add(name, second_moment(x))
            else:
                found = self.inputs.setdefault(name, {})
                before = found.get(self.text)
                found[self.text] = Samples(rows=torch.cat([before.rows, x]) if isinstance(before, Samples) else x)
        elif place.role in ("token", "tied"):
            ids = x.expand(self.counted.shape)[self.counted.to(x.device)]
            scale = float(getattr(module, "embed_scale", 1.0))  # Gemma's one-hot inputs are so large
            self._add(name, scale**2 * torch.bincount(ids, minlength=len(module.weight)))  # type: ignore[arg-type]
        else:
            self._add(name, self._rows(_normalised(module, x)).square().sum(0))

    def _keep_expert(
        self, name: str, place: _Place, module: Any, args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        """An expert's input is what the router sends it, as large as the router weighs it."""
        x, chosen, weights = [*args, *options.values()][:3]
        number, part = place.expert or (0, "")
        token, slot = ((chosen == number) & self.counted.to(x.device).flatten()[:, None]).nonzero(as_tuple=True)
        inner = x[token]
        if part in STACKED["down_proj"]:
            gate, up = nn.functional.linear(inner, module.gate_up_proj[number]).chunk(2, dim=-1)
            inner = module.act_fn(gate) * up
        self._add(name, second_moment((inner * weights[token, slot, None]).float()), len(token))

    def _add(self, name: str, sums: Tensor, seen: int | None = None) -> None:
        found, tokens = self.inputs.setdefault(name, {}), int(self.counted.sum())
        before, seen = found.get(self.text), tokens if seen is None else seen
        if isinstance(before, Moments):
            sums, tokens, seen = before.sums.add_(sums), before.tokens + tokens, before.seen + seen
        found[self.text] = Moments(sums=sums.float(), tokens=tokens, seen=seen)

    def _rows(self, x: Float[Tensor, "..."]) -> Float[Tensor, "counted d"]:
        """The inputs of tokens that count; heads are inputs of their own."""
        counted = self.counted.to(x.device)
        if x.ndim == 2:  # a mixture of experts flattens rows and tokens
            return x[counted.flatten()]
        if x.ndim == 4 and x.shape[2] == counted.shape[1]:  # [rows, heads, tokens, d]: a view, if both sizes agree
            x = x.transpose(1, 2) if x.shape[1] != x.shape[2] or x.stride(1) < x.stride(2) else x
        return x[counted].flatten(0, -2)


def _normalised(module: nn.Module, x: Tensor) -> Float[Tensor, "*shape d"]:
    """What a norm's weight multiplies."""
    x, epsilon = x.float(), float(getattr(module, "variance_epsilon", getattr(module, "eps", 1e-6)))
    if "LayerNorm" in type(module).__name__:  # also Cohere's own
        return nn.functional.layer_norm(x, x.shape[-1:], eps=epsilon)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
