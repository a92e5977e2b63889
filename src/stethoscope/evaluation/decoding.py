"""Greedy decoding of many prompts that begin alike: what they share is encoded once; finished items leave the batch."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from stethoscope.evaluation.attention import OwnLayer, States, shared_attention

logger = logging.getLogger(__name__)

_PACK = 0.875  # share of live rows below which the finished ones are dropped


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """Tokens that every prompt begins with, and each layer's keys and values for them; empty where none are shared."""

    tokens: list[int]
    states: list[States]


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


def common_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Longest run of tokens that all prompts begin with, short of the last token of the shortest."""
    low, high = min(map(list, prompts)), max(map(list, prompts))
    size = min(len(prompt) for prompt in prompts) - 1
    shared = next((i for i in range(size) if low[i] != high[i]), size)
    return list(low[:shared])


@torch.no_grad()
def encode_prefix(model: PreTrainedModel, tokens: list[int]) -> Prefix:
    """Run the model over the shared tokens once and keep its keys and values."""
    if not tokens:
        return Prefix(tokens=[], states=[])
    cache = DynamicCache()
    model(
        input_ids=torch.tensor([tokens], device=model.device), past_key_values=cache, use_cache=True, logits_to_keep=1
    )
    layers = cast(list[DynamicLayer], cache.layers)
    return Prefix(tokens=tokens, states=[(cast(Tensor, x.keys)[0], cast(Tensor, x.values)[0]) for x in layers])


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
    written: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))  # the prompt that each row of the batch belongs to
    done: set[int] = set()
    tokens, padding = _pad_left([prompt[len(prefix.tokens) :] for prompt in prompts], model.device)
    longest = tokens.shape[1]
    columns = torch.arange(longest + max_new_tokens, device=model.device)
    mask, positions = _first_mask(padding, longest, model.dtype), columns[:longest] - padding[:, None]
    with shared_attention(model, prefix.states, _layers(model)) as cache:
        for step in range(max_new_tokens):
            logits: Float[Tensor, "rows vocabulary"] = model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=len(prefix.tokens) + positions.clamp(min=0),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            chosen = logits.max(-1).indices  # the first among equals, as argmax, which is slow on bfloat16
            for row, new in enumerate(chosen.tolist()):
                prompt = live[row]
                if prompt not in done:
                    written[prompt].append(new)
                    if stop(prompt, written[prompt]):
                        done.add(prompt)
            rows = [row for row, prompt in enumerate(live) if prompt not in done]
            if not rows:
                break
            if len(rows) < _PACK * len(live):
                kept = torch.tensor(rows, device=model.device)
                for layer in cache.layers:
                    assert isinstance(layer, OwnLayer)
                    layer.keep(kept)
                chosen, padding, live = chosen[kept], padding[kept], [live[row] for row in rows]
            tokens = chosen[:, None]
            length = longest + step + 1
            mask = _additive((columns[:length] >= padding[:, None])[:, None, None], model.dtype)
            positions = (length - 1 - padding)[:, None]
    return written


@torch.no_grad()
def agrees(model: PreTrainedModel, tokens: Sequence[int]) -> bool:
    """Whether the shared-prefix path gives this model's own logits, up to rounding, at the last two of some tokens.

    Catches what a configuration does not tell: position biases inside the attention, states other than keys and values.

    Args:
        tokens: at least four token ids.
    """
    end, shared = len(tokens), len(tokens) // 2
    ids = torch.tensor([list(tokens)], device=model.device)
    plain = model(input_ids=ids, logits_to_keep=2).logits[0].float()
    ours = []
    try:
        prefix = encode_prefix(model, list(tokens[:shared]))
        if len(prefix.states) != _layers(model):
            return False
        with shared_attention(model, prefix.states, _layers(model)) as cache:
            for first, last in ((shared, end - 1), (end - 1, end)):
                positions = torch.arange(first, last, device=model.device)
                seen = positions[:, None] >= torch.arange(shared, last, device=model.device)
                output = model(
                    input_ids=ids[:, first:last],
                    attention_mask=_additive(seen[None, None], model.dtype),
                    position_ids=positions[None],
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                ours.append(output.logits[0, -1].float())
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        logger.info("shared-prefix decoding does not run on this model: %s", error)
        return False
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    spread = plain - plain.mean(-1, keepdim=True)
    return bool((torch.stack(ours) - plain).norm() <= tolerance * spread.norm())


def _layers(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)


def _pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens [rows, longest] and how many of each row's first ones are padding [rows]."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    tokens = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
    return torch.tensor(tokens, device=device), torch.tensor(padding, device=device)


def _first_mask(padding: Tensor, longest: int, dtype: torch.dtype) -> Tensor:
    """Causal, without padding; a padding token sees itself only, so that no row of scores is empty."""
    columns = torch.arange(longest, device=padding.device)
    seen = (columns >= padding[:, None])[:, None] & (columns[:, None] >= columns)  # [rows, longest, longest]
    return _additive((seen | (columns[:, None] == columns))[:, None], dtype)


def _additive(seen: Bool[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
