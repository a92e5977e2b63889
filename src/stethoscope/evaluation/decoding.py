"""Greedy decoding of prompts in groups that begin alike: what a group shares is encoded once; finished rows leave."""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from stethoscope.evaluation.attention import OwnCache, States, attending, shared_attention

logger = logging.getLogger(__name__)

_PACK = 0.875  # share of live rows below which the finished ones are dropped


class Prefix(NamedTuple):
    """Tokens that every prompt begins with, and each layer's keys and values for them; None where none are shared."""

    tokens: list[int]
    states: list[States | None]


def can_share(model: PreTrainedModel, longest: int) -> bool:
    """Whether sequences of up to ``longest`` tokens see plain full attention in every layer of this model."""
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    slides = window is not None if kinds is None else "sliding_attention" in kinds
    return (
        not model.config.is_encoder_decoder
        and model._can_set_attn_implementation()
        and set(kinds or ()) <= {"full_attention", "sliding_attention"}
        and not (slides and (window is None or longest > window))
        and not getattr(config, "num_kv_shared_layers", None)
        and not getattr(config, "attn_logit_softcapping", None)
    )


@torch.no_grad()
def encode_prefix(model: PreTrainedModel, tokens: list[int]) -> Prefix:
    """Run the model over the shared tokens once and keep its keys and values."""
    if not tokens:
        return Prefix(tokens, [None] * _layers(model))
    cache = DynamicCache()
    model.base_model(input_ids=torch.tensor([tokens], device=model.device), past_key_values=cache, use_cache=True)
    layers = cast(list[DynamicLayer], cache.layers)
    return Prefix(tokens, [(cast(Tensor, x.keys)[0], cast(Tensor, x.values)[0]) for x in layers])


@torch.no_grad()
def decode_greedily(
    model: PreTrainedModel,
    groups: Sequence[tuple[Prefix, Sequence[Sequence[int]]]],
    *,
    max_new_tokens: int,
    stop: Callable[[int, list[int]], bool],
) -> list[list[int]]:
    """Continue every prompt with the likeliest token until it stops; the prompts of all groups are one batch.

    Args:
        groups: a prefix, from `encode_prefix` with the model's present weights, and token ids of prompts, which all
            begin with the prefix's tokens and go on for at least one more.
        max_new_tokens: at most so many tokens for each prompt.
        stop: called with a prompt's number, counted through the groups, and its new tokens after each; true ends that
            prompt.

    Returns:
        the new tokens of each prompt, the one that stopped it included.
    """
    written: list[list[int]] = [[] for _, prompts in groups for _ in prompts]
    live = list(range(len(written)))  # the prompt that each row of the batch belongs to
    done: set[int] = set()
    with shared_attention(model):
        logits, batch = _begin(model, groups)
        for left in reversed(range(max_new_tokens)):
            chosen = logits.max(-1).indices  # the first among equals, as argmax, which is slow on bfloat16
            for prompt, new in zip(live, chosen.tolist(), strict=True):
                if prompt not in done:
                    written[prompt].append(new)
                    if stop(prompt, written[prompt]):
                        done.add(prompt)
            going = [row for row, prompt in enumerate(live) if prompt not in done]
            if not going or not left:
                break
            if len(going) < _PACK * len(live):
                chosen, live = chosen[going], [live[row] for row in going]
                batch = batch.keep(going)
            logits = _last_logits(model, chosen[:, None], batch)
    return written


@torch.no_grad()
def agrees(model: PreTrainedModel, tokens: Sequence[int]) -> bool:
    """Whether the shared-prefix path gives this model's own logits, up to rounding, at the last two of some tokens.

    Catches what a configuration does not tell: position biases inside the attention, states other than keys and values.

    Args:
        tokens: at least four token ids.
    """
    shared = len(tokens) // 2
    ids = torch.tensor([list(tokens)], device=model.device)
    plain = model(input_ids=ids, logits_to_keep=2).logits[0].float()
    try:
        prefix = encode_prefix(model, list(tokens[:shared]))
        if len(prefix.states) != _layers(model):
            return False
        with shared_attention(model):
            first, batch = _begin(model, [(prefix, [tokens[:-1]])])
            parts = [first, _last_logits(model, ids[:, -1:], batch)]
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        logger.info("shared-prefix decoding does not run on this model: %s", error)
        return False
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    spread = plain - plain.mean(-1, keepdim=True)
    return bool((torch.cat(parts).float() - plain).norm() <= tolerance * spread.norm())


def _layers(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)


class _Batch(NamedTuple):
    """Rows that are being decoded: the columns of the cache in which each has padding, and the tokens of its prefix."""

    cache: OwnCache
    padding: Int[Tensor, " rows"]
    shared: Int[Tensor, " rows"]

    def keep(self, rows: list[int]) -> "_Batch":
        self.cache.keep(rows)
        return _Batch(self.cache, self.padding[rows], self.shared[rows])


def _begin(
    model: PreTrainedModel, groups: Sequence[tuple[Prefix, Sequence[Sequence[int]]]]
) -> tuple[Float[Tensor, "rows vocabulary"], _Batch]:
    """Logits after each prompt, and the batch that they begin."""
    logits, batches = [], []
    for prefix, prompts in groups:
        own = [list(prompt[len(prefix.tokens) :]) for prompt in prompts]
        longest = max(map(len, own))
        tokens = torch.tensor([[0] * (longest - len(row)) + row for row in own], device=model.device)
        padding = torch.tensor([longest - len(row) for row in own], device=model.device)
        shared = torch.full_like(padding, len(prefix.tokens))
        batches.append(_Batch(OwnCache(prefix.states, len(own)), padding, shared))
        logits.append(_last_logits(model, tokens, batches[-1]))
    cache = OwnCache.join([batch.cache for batch in batches])
    length = cache.get_seq_length()
    padding = torch.cat([batch.padding + length - batch.cache.get_seq_length() for batch in batches])
    return torch.cat(logits), _Batch(cache, padding, torch.cat([batch.shared for batch in batches]))


def _last_logits(
    model: PreTrainedModel, tokens: Int[Tensor, "rows new"], batch: _Batch
) -> Float[Tensor, "rows vocabulary"]:
    """Logits after the last of some new tokens, of which, and of those in the cache, the first ones may be padding."""
    first, padding = batch.cache.get_seq_length(), batch.padding[:, None]
    keys = torch.arange(first + tokens.shape[1], device=model.device)
    queries = keys[first:, None]
    # Causal, without padding; a padding token sees itself only, so that no row of scores is empty.
    hidden = ((keys < padding[:, None]) | (keys > queries)) & (keys != queries)  # [rows, queries, keys]
    mask = torch.zeros(hidden.shape, dtype=model.dtype, device=model.device).masked_fill_(hidden, float("-inf"))
    with attending(batch.cache):
        logits: Tensor = model(
            input_ids=tokens,
            attention_mask=mask[:, None],
            position_ids=batch.shared[:, None] + (keys[first:] - padding).clamp(min=0),
            past_key_values=batch.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
    return logits[:, -1]
