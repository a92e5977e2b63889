"""Greedy decoding of many prompts that begin alike: what they share is encoded once and attended to by all at once.

Attention over the shared prefix is one product for the whole batch instead of one per item; each item keeps only its own
keys and values, in a buffer made once. The two parts are merged exactly by their log-sum-exp, as in Hydragen
(arXiv 2402.05099). Finished items leave the batch.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

logger = logging.getLogger(__name__)

_NAME = "stethoscope_shared_prefix"
_LEAVE = 0.875  # share of live rows below which the buffers are packed anew


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """Tokens that every prompt begins with, and each layer's keys and values for them, [1, kv_heads, prefix, head]."""

    tokens: list[int]
    states: list[tuple[Tensor, Tensor]]


class _OwnLayer(CacheLayerMixin):
    """One layer's keys and values of the tokens that items do not share, and a view of the prefix."""

    is_sliding = False

    def __init__(self, prefix: tuple[Tensor, Tensor] | None, width: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.width = width
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads, _, size = key_states.shape
        self.keys = key_states.new_empty(rows, heads, self.width, size)
        self.values = value_states.new_empty(rows, heads, self.width, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        end = self.length + key_states.shape[-2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        assert self.keys is not None and self.values is not None
        kept = len(rows)
        self.keys[:kept, :, : self.length] = self.keys[rows, :, : self.length]
        self.values[:kept, :, : self.length] = self.values[rows, :, : self.length]
        self.keys, self.values = self.keys[:kept], self.values[:kept]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.width


_CACHE: ContextVar[Cache] = ContextVar("cache of the batch being decoded")


def _attend(
    query: Float[Tensor, "rows kv queries head"],
    key: Float[Tensor, "rows kv keys head"],
    value: Float[Tensor, "rows kv keys head_v"],
    mask: Float[Tensor, "rows 1 queries keys"] | None,
    scale: float,
) -> tuple[Float[Tensor, "rows kv queries head_v"], Float[Tensor, "rows kv queries"]]:
    """Attention and the log-sum-exp of its scores."""
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # type: ignore[no-any-return]
            query, key, value, attn_mask=mask, scale=scale
        )
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if mask is not None:
        scores = scores + mask.float()
    total = scores.logsumexp(-1)
    return (scores - total[..., None]).exp().to(value.dtype) @ value, total


def _shared_prefix_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "rows heads queries head"],
    key: Float[Tensor, "rows kv keys head"],
    value: Float[Tensor, "rows kv keys head_v"],
    attention_mask: Float[Tensor, "rows 1 queries keys"] | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "rows queries heads head_v"], None]:
    """Attention over an item's own keys merged with attention over the shared prefix's."""
    rows, heads, queries, size = query.shape
    kv = key.shape[1]
    group = heads // kv
    scale = size**-0.5 if scaling is None else scaling
    # Heads that read the same keys become further queries of one head.
    packed = query.reshape(rows, kv, group * queries, size)
    if attention_mask is not None and group > 1:
        attention_mask = attention_mask.repeat(1, 1, group, 1)
    out, own = _attend(packed, key, value, attention_mask, scale)
    prefix = _CACHE.get().layers[module.layer_idx].prefix
    if prefix is not None:
        # rows x queries against one set of keys: rows become queries too
        flat = packed.transpose(0, 1).reshape(1, kv, rows * group * queries, size)
        shared_out, shared = _attend(flat, *prefix, None, scale)
        shared_out = shared_out.reshape(kv, rows, group * queries, -1).transpose(0, 1)
        weight = (own - shared.reshape(kv, rows, group * queries).transpose(0, 1)).sigmoid()
        out = torch.lerp(shared_out.float(), out.float(), weight[..., None]).to(query.dtype)
    out = out.reshape(rows, heads, queries, -1).transpose(1, 2).contiguous()
    return out, None


AttentionInterface.register(_NAME, _shared_prefix_attention)


@contextmanager
def _shared_attention(model: PreTrainedModel) -> Iterator[None]:
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        model.set_attn_implementation(_NAME)
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


def can_share(model: PreTrainedModel, longest: int) -> bool:
    """Whether sequences of up to ``longest`` tokens see plain full attention in every layer of this model."""
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in kinds or (window and getattr(config, "layer_types", None) is None)
    return (
        not model.config.is_encoder_decoder
        and model._can_set_attn_implementation()
        and kinds <= {"full_attention", "sliding_attention"}
        and not (slides and (not window or longest > window))
        and not getattr(config, "num_kv_shared_layers", None)
        and not getattr(config, "attn_logit_softcapping", None)
    )


def common_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Longest run of tokens that all prompts begin with, short of the last token of the shortest."""
    low, high = min(prompts), max(prompts)
    size = min(len(prompt) for prompt in prompts) - 1
    shared = next((i for i in range(size) if low[i] != high[i]), size)
    return list(low[:shared])


@torch.no_grad()
def encode_prefix(model: PreTrainedModel, tokens: list[int]) -> Prefix:
    """Run the model over the shared tokens once and keep its keys and values."""
    if not tokens:
        return Prefix(tokens=[], states=[])
    cache = DynamicCache()
    model(input_ids=torch.tensor([tokens], device=model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return Prefix(tokens=tokens, states=[(layer.keys, layer.values) for layer in cache.layers])


@torch.no_grad()
def decode_greedily(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    prefix: Prefix,
    *,
    max_new_tokens: int,
    stop: Callable[[int, list[int]], bool],
) -> list[list[int]]:
    """Continue every prompt with the likeliest token until it stops.

    Args:
        prompts: token ids; all begin with the prefix's tokens and go on for at least one more.
        prefix: from `encode_prefix` with the model's present weights.
        max_new_tokens: at most so many tokens for each prompt.
        stop: called with a prompt's number and its new tokens after each; true ends that prompt.

    Returns:
        the new tokens of each prompt, the one that stopped it included.
    """
    shared = len(prefix.tokens)
    own = [list(prompt[shared:]) for prompt in prompts]
    longest = max(map(len, own))
    device = model.device
    tokens = torch.tensor([[0] * (longest - len(t)) + t for t in own], device=device)  # [rows, longest]
    padding = torch.tensor([longest - len(t) for t in own], device=device)  # [rows]
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    width = longest + max_new_tokens
    states: Sequence[tuple[Tensor, Tensor] | None] = prefix.states or [None] * layers
    cache = Cache(layers=[_OwnLayer(state, width) for state in states])
    columns = torch.arange(width, device=device)
    # A padding token sees itself only, so that no row of scores is empty.
    seen = columns[None, :longest] >= padding[:, None]  # [rows, longest]
    seen = (seen[:, None, :] & (columns[:longest, None] >= columns[:longest])) | torch.eye(
        longest, dtype=torch.bool, device=device
    )  # [rows, longest, longest]
    mask = _additive(seen[:, None], model.dtype)
    positions = (shared + columns[:longest] - padding[:, None]).clamp(min=0)
    written: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))  # the prompt that each row of the batch belongs to
    done: set[int] = set()
    token = _CACHE.set(cache)
    try:
        with _shared_attention(model):
            for step in range(max_new_tokens):
                logits = model(
                    input_ids=tokens,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits[:, -1]  # [rows, vocabulary]
                chosen = logits.argmax(-1)
                for row, new in enumerate(chosen.tolist()):
                    prompt = live[row]
                    if prompt not in done:
                        written[prompt].append(new)
                        if stop(prompt, written[prompt]):
                            done.add(prompt)
                rows = [row for row, prompt in enumerate(live) if prompt not in done]
                if not rows or step + 1 == max_new_tokens:
                    break
                if len(rows) < _LEAVE * len(live):
                    kept = torch.tensor(rows, device=device)
                    for layer in cache.layers:
                        layer.keep(kept)
                    chosen, padding, live = chosen[kept], padding[kept], [live[row] for row in rows]
                tokens = chosen[:, None]
                length = longest + step + 1
                mask = _additive((columns[None, :length] >= padding[:, None])[:, None, None], model.dtype)
                positions = (shared + length - 1 - padding)[:, None]
    finally:
        _CACHE.reset(token)
    return written


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


@torch.no_grad()
def agrees(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> bool:
    """Whether this model's shared-prefix logits are its plain forward's, up to rounding, on one of these prompts.

    Catches what a configuration does not tell: position biases inside the attention, states other than keys and values.
    """
    prompt = list(max(prompts, key=len))
    plain = model(input_ids=torch.tensor([prompt], device=model.device), logits_to_keep=1).logits[0, -1].float()
    prefix = encode_prefix(model, common_prefix(prompts))
    shared = len(prefix.tokens)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    states: Sequence[tuple[Tensor, Tensor] | None] = prefix.states or [None] * layers
    if len(states) != layers:
        return False
    own = len(prompt) - shared
    cache = Cache(layers=[_OwnLayer(state, own) for state in states])
    triangle = torch.ones(own, own, dtype=torch.bool, device=model.device).tril()
    token = _CACHE.set(cache)
    try:
        with _shared_attention(model):
            ours = model(
                input_ids=torch.tensor([prompt[shared:]], device=model.device),
                attention_mask=_additive(triangle[None, None], model.dtype),
                position_ids=torch.arange(shared, len(prompt), device=model.device)[None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[0, -1]
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        logger.info("shared-prefix decoding does not run on this model: %s", error)
        return False
    finally:
        _CACHE.reset(token)
    tolerance = 1e-3 if plain.dtype == model.dtype else 0.1
    return bool((ours.float() - plain).norm() <= tolerance * (plain - plain.mean()).norm())
