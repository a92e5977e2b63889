"""The sites in a decoder block that SAEs read, and reading activations there: one forward feeds every layer.

    points = {12: hook_point(model, 12, "mlp_out")}
    read_activations(model, points, input_ids)[12]              # [rows, tokens, d_in]

A tap is a module of the block and one of its ends: `output`, `mlp.output`, `self_attn.o_proj.input`.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from jaxtyping import Float, Int

from stethoscope.errors import SAEError
from stethoscope.lazy import torch

Key = TypeVar("Key", bound=Hashable)

# The first tap that a block has is the site's. A block that normalises what attention and MLP return before adding it
# to the residual stream (Gemma 2 and 3, OLMo 2, GLM-4) is read after that norm, as TransformerLens does.
TAPS: dict[str, tuple[str, ...]] = {
    "resid_pre": ("input",),
    "resid_post": ("output",),
    "mlp_in": ("mlp.input", "feed_forward.input"),
    "mlp_out": (
        "post_feedforward_layernorm.output",
        "post_mlp_layernorm.output",
        "mlp.output",
        "block_sparse_moe.output",
        "feed_forward.output",
    ),
    "attn_z": ("self_attn.o_proj.input", "self_attn.dense.input", "attn.c_proj.input", "attention.dense.input"),
    "attn_out": ("post_self_attn_layernorm.output", "self_attn.output", "attn.output", "attention.output"),
}
SITES = tuple(TAPS)
# The site by the end of a hook name, in TransformerLens' style or as a tap. `post_attention_layernorm` is missing on
# purpose: it ends attention in Gemma and begins the MLP everywhere else.
_SITE_OF_HOOK = {
    "hook_resid_pre": "resid_pre", "hook_resid_post": "resid_post", "mlp.hook_in": "mlp_in", "hook_mlp_out": "mlp_out",
    "attn.hook_z": "attn_z", "hook_attn_out": "attn_out",
}  # fmt: skip
_SITE_OF_TAP = {tap: site for site, taps in TAPS.items() for tap in taps}
_SITE_OF_TAP["pre_feedforward_layernorm.output"] = "mlp_in"


def site_of(hook_name: str) -> tuple[int, str, str | None]:
    """Layer, site and tap of a hook name of TransformerLens, or of a module, which is read at its output.

    >>> site_of("blocks.12.hook_resid_post"), site_of("model.layers.3.mlp")
    ((12, 'resid_post', None), (3, 'mlp_out', 'mlp.output'))

    Raises:
        SAEError: it names no site that is known.
    """
    if match := re.fullmatch(r"blocks\.(\d+)\.(\w+(?:\.\w+)?)", hook_name):
        if site := _SITE_OF_HOOK.get(match[2]):
            return int(match[1]), site, None
    elif match := re.fullmatch(r"(?:[\w.]+\.)?(?:layers|h)\.(\d+)(?:\.([\w.]+))?", hook_name):
        tap = match[2] or "output"
        tap = tap if tap.endswith(("input", "output")) else f"{tap}.output"
        if site := _SITE_OF_TAP.get(tap):
            return int(match[1]), site, tap
    raise SAEError(
        "unknown site", problems=[f"the hook `{hook_name}` is none of {', '.join(SITES)} as far as is known"]
    )


@dataclass(frozen=True, kw_only=True)
class HookPoint:
    """One end of one module of a model."""

    module: torch.nn.Module
    reads_input: bool


def hook_point(model: torch.nn.Module, layer: int, site: str, tap: str | None = None) -> HookPoint:
    """The hook point of a site in a model's block.

    Args:
        site: a key of ``TAPS``.
        tap: the exact module and end, for SAEs that were trained elsewhere than at the site's usual one.

    Raises:
        SAEError: there is no such layer, or its block has no such module.
    """
    from stethoscope.models.load import decoder_layers

    blocks = decoder_layers(model)
    if not 0 <= layer < len(blocks):
        raise SAEError(f"{type(model).__name__} has no layer {layer}", hint=f"its layers are 0 to {len(blocks) - 1}")
    block = blocks[layer]
    modules = dict(block.named_modules())
    if tap is None and site == "attn_out" and "post_feedforward_layernorm" in modules:
        tap = "post_attention_layernorm.output"
    for candidate in (tap,) if tap else TAPS[site]:
        name, _, end = candidate.rpartition(".")
        if name in modules and end in ("input", "output"):
            return HookPoint(module=modules[name], reads_input=end == "input")
    raise SAEError(
        f"layer {layer} of {type(model).__name__} has no `{tap or site}`",
        hint=f"its block's parts are {', '.join(name for name, _ in block.named_children())}",
    )


def read_activations(
    model: torch.nn.Module, points: Mapping[Key, HookPoint], input_ids: Int[torch.Tensor, "rows tokens"]
) -> dict[Key, Float[torch.Tensor, "rows tokens d_in"]]:
    """Activations at every point; the forward ends at the last point, before the head.

    No attention mask is given: padding belongs on the right, where a causal model never looks.
    """
    from stethoscope.models.load import decoder

    device = next(model.parameters()).device
    with record_activations(points, stop=True) as found, suppress(_AllRecorded):
        decoder(model)(input_ids=input_ids.to(device), use_cache=False)
    return found


@contextmanager
def record_activations(points: Mapping[Key, HookPoint], *, stop: bool = False) -> Iterator[dict[Key, torch.Tensor]]:
    """Record activations at every point in a forward that the block runs; ``stop`` ends the forward after the last."""
    found: dict[Key, torch.Tensor] = {}

    def keep(key: Key, value: Any) -> None:
        found[key] = value[0] if isinstance(value, tuple) else value
        if stop and len(found) == len(points):
            raise _AllRecorded

    with ExitStack() as stack:
        for key, point in points.items():
            hook = (
                point.module.register_forward_pre_hook(
                    lambda _m, args, options, key=key: keep(key, args[0] if args else options["hidden_states"]),
                    with_kwargs=True,
                )
                if point.reads_input
                else point.module.register_forward_hook(lambda _m, _inputs, output, key=key: keep(key, output))
            )
            stack.callback(hook.remove)
        yield found


class _AllRecorded(Exception):  # noqa: N818 - control flow: ends a forward at the last point
    pass
