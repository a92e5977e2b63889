"""Attention over what a batch of prompts shares, once for all, and over what each has of its own.

The shared part is one product for the whole batch instead of one per item, as in Hydragen (arXiv 2402.05099). Each item
keeps only its own keys and values, in buffers that are dense, since products of strided slices are many times slower.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

_NAME = "stethoscope_shared_prefix"
_STEP = 32  # columns by which buffers grow

States = tuple[Float[Tensor, "kv _ head"], Float[Tensor, "kv _ head_v"]]  # as long as the prefix


class OwnLayer(DynamicLayer):
    """One layer's keys and values of what items do not share, [kv, rows, capacity, head]."""

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, kv, new, _ = key_states.shape
        # Zeros, not rubbish: unused columns have no weight, and 0 times NaN is NaN.
        self.keys = key_states.new_zeros(kv, rows, new + _STEP, key_states.shape[-1])
        self.values = value_states.new_zeros(kv, rows, new + _STEP, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        if end > self.keys.shape[2]:
            self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, _STEP))
            self.values = torch.nn.functional.pad(self.values, (0, 0, 0, _STEP))
        self.keys[:, :, self.length : end] = key_states.transpose(0, 1)
        self.values[:, :, self.length : end] = value_states.transpose(0, 1)
        self.length = end
        return self.keys.transpose(0, 1), self.values.transpose(0, 1)

    def get_seq_length(self) -> int:
        return self.length


class OwnCache(Cache):
    """Own keys and values of a batch whose rows begin with one of several prefixes; rows of a prefix stand together.

    Attributes:
        groups: every prefix, as what each layer has of it, None where nothing is shared, and its number of rows.
    """

    layers: list[OwnLayer]  # type: ignore[assignment]

    def __init__(self, prefix: Sequence[States | None], rows: int) -> None:
        super().__init__(layers=[OwnLayer() for _ in prefix])
        self.groups = [(prefix, rows)]

    @classmethod
    def join(cls, parts: Sequence["OwnCache"]) -> "OwnCache":
        """One batch of several; the columns that a shorter one lacks are on its left."""
        if len(parts) == 1:
            return parts[0]
        length = max(part.get_seq_length() for part in parts)
        joined = cls(parts[0].groups[0][0], 0)
        joined.groups = [group for part in parts for group in part.groups]
        for layer, *found in zip(joined.layers, *(part.layers for part in parts), strict=True):
            layer.keys = torch.cat([_widened(part.keys, part.length, length) for part in found], 1)
            layer.values = torch.cat([_widened(part.values, part.length, length) for part in found], 1)
            layer.length, layer.is_initialized = length, True
        return joined

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows of the batch.

        Args:
            rows: in order.
        """
        start, groups = 0, []
        for prefix, count in self.groups:
            groups.append((prefix, sum(start <= row < start + count for row in rows)))
            start += count
        self.groups = [group for group in groups if group[1]]
        kept = torch.tensor(rows, device=self.layers[0].keys.device)
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[:, kept], layer.values[:, kept]


def _widened(
    states: Float[Tensor, "kv rows capacity size"], length: int, new: int
) -> Float[Tensor, "kv rows wider size"]:
    """The used columns, with unused ones before them and room after them."""
    return torch.nn.functional.pad(states[:, :, :length], (0, 0, new - length, _STEP))


_CACHE: ContextVar[OwnCache] = ContextVar("cache of the batch being decoded")


@contextmanager
def shared_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model attend to prefixes and to each item's own tokens, where it is called as `attending` says."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    # PyTorch multiplies a strided slice of hidden states row by row, and copies the head's weights for each
    dense = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    try:
        model.set_attn_implementation(_NAME)
        yield
    finally:
        dense.remove()
        for config, name in before:
            config._attn_implementation_internal = name


@contextmanager
def attending(cache: OwnCache) -> Iterator[None]:
    """Within, the model is called with this cache and with an additive mask [rows, 1, queries, own keys]."""
    token = _CACHE.set(cache)
    try:
        yield
    finally:
        _CACHE.reset(token)


def _attention(
    module: torch.nn.Module,
    query: Float[Tensor, "rows heads queries head"],
    key: Float[Tensor, "rows kv capacity head"],
    value: Float[Tensor, "rows kv capacity head_v"],
    attention_mask: Float[Tensor, "rows 1 queries keys"],
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "rows queries heads head_v"], None]:
    rows, heads, queries, size = query.shape
    kv = key.shape[1]
    scale = size**-0.5 if scaling is None else scaling
    cache, index = _CACHE.get(), cast(int, module.layer_idx)
    layer, groups = cache.layers[index], [(prefix[index], count) for prefix, count in cache.groups]
    # Heads that read the same keys become further queries of one head.
    packed = query.reshape(rows, kv, heads // kv * queries, size).transpose(0, 1).contiguous()
    mask = attention_mask[:, 0]
    if queries == 1:
        out = _decode(packed * scale, layer, groups, mask)
    else:
        out = _prefill(packed, layer, groups, mask.repeat(1, heads // kv, 1), scale)
    # [kv, rows, queries of all, head_v] -> [rows, queries, heads, head_v]
    out = out.transpose(0, 1).reshape(rows, heads, queries, -1).transpose(1, 2).contiguous()
    return out, None


def _decode(
    query: Float[Tensor, "kv rows queries head"],
    layer: OwnLayer,
    groups: Sequence[tuple[States | None, int]],
    mask: Float[Tensor, "rows 1 keys"],
) -> Float[Tensor, "kv rows queries head_v"]:
    """One softmax over the scores of the prefix's keys and of the item's own."""
    kv, rows, queries, _ = query.shape
    keys, values = layer.keys.flatten(0, 1), layer.values.flatten(0, 1)  # [kv x rows, capacity, head]
    unused = keys.shape[1] - mask.shape[-1]
    mask = torch.nn.functional.pad(mask, (0, unused), value=float("-inf"))
    own = torch.bmm(query.flatten(0, 1), keys.transpose(1, 2)).view(kv, rows, queries, -1) + mask
    weights, outs = [], []
    counts = [count for _, count in groups]
    for (prefix, count), scores, asked in zip(groups, own.split(counts, 1), query.split(counts, 1), strict=True):
        if prefix is None:
            weights.append(scores.softmax(-1))
            outs.append(query.new_zeros(kv, count, queries, values.shape[-1]))
            continue
        prefix_keys, prefix_values = prefix
        size = prefix_keys.shape[1]
        shared = torch.bmm(asked.flatten(1, 2), prefix_keys.transpose(1, 2))  # [kv, rows x queries, prefix]
        weight = torch.cat([shared.view(kv, count, queries, size), scores], -1).softmax(-1)
        outs.append(torch.bmm(weight.flatten(1, 2)[..., :size], prefix_values).view(kv, count, queries, -1))
        weights.append(weight[..., size:])
    weight = torch.cat(weights, 1).flatten(0, 1)
    return torch.cat(outs, 1) + torch.bmm(weight, values).view(kv, rows, queries, -1)


def _prefill(
    query: Float[Tensor, "kv rows queries head"],
    layer: OwnLayer,
    groups: Sequence[tuple[States | None, int]],
    mask: Float[Tensor, "rows queries keys"],
    scale: float,
) -> Float[Tensor, "kv rows queries head_v"]:
    """Both parts on their own, merged by the log-sum-exp of their scores; of one prefix."""
    ((prefix, _),) = groups
    kv, rows, queries, _ = query.shape
    keys, values = (t[:, :, : layer.length].transpose(0, 1) for t in (layer.keys, layer.values))
    by_row = query.transpose(0, 1)  # [rows, kv, queries, head]
    if prefix is None:
        out = torch.nn.functional.scaled_dot_product_attention(by_row, keys, values, mask[:, None], scale=scale)
        return out.transpose(0, 1)
    out, own = _with_total(by_row, keys, values, mask[:, None], scale)
    # the prefix sees all rows' queries as queries of one row
    prefix_keys, prefix_values = (t[None] for t in prefix)
    shared_out, shared = _with_total(query.flatten(1, 2)[None], prefix_keys, prefix_values, None, scale)
    weight = (own.transpose(0, 1) - shared.view(kv, rows, queries)).sigmoid()[..., None]
    merged = torch.lerp(shared_out.view(kv, rows, queries, -1).float(), out.transpose(0, 1).float(), weight)
    return merged.to(query.dtype)


def _with_total(
    query: Float[Tensor, "rows kv queries head"],
    key: Float[Tensor, "rows kv keys head"],
    value: Float[Tensor, "rows kv keys head_v"],
    mask: Float[Tensor, "rows 1 queries keys"] | None,
    scale: float,
) -> tuple[Float[Tensor, "rows kv queries head_v"], Float[Tensor, "rows kv queries"]]:
    """Attention and the log-sum-exp of its scores in float32."""
    if query.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, total = flash(query, key, value, attn_mask=mask, scale=scale)
        return out, total
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if mask is not None:
        scores = scores + mask.float()
    total = scores.logsumexp(-1)
    return (scores - total[..., None]).exp().to(value.dtype) @ value, total


AttentionInterface.register(_NAME, _attention)
