"""Layer and site of an SAE from its hook name, in TransformerLens' style or as a module of a Transformers model."""

import re

from stethoscope.errors import SAEError

SITES = ("resid_pre", "resid_post", "mlp_in", "mlp_out", "attn_z", "attn_out")

_TRANSFORMER_LENS = re.compile(r"blocks\.(\d+)\.(\w+(?:\.\w+)?)")
_SITE_OF_HOOK = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_post": "resid_post",
    "mlp.hook_in": "mlp_in",
    "hook_mlp_out": "mlp_out",
    "attn.hook_z": "attn_z",
    "hook_attn_out": "attn_out",
}
_TRANSFORMERS = re.compile(r"(?:[\w.]+\.)?(?:layers|h)\.(\d+)(?:\.([\w.]+))?")
# `post_attention_layernorm` is missing on purpose: it ends attention in Gemma and begins the MLP everywhere else.
_TAPS = {
    "resid_pre": "input",
    "resid_post": "output",
    "mlp_in": "mlp.input feed_forward.input pre_feedforward_layernorm.output",
    "mlp_out": "mlp.output feed_forward.output block_sparse_moe.output post_feedforward_layernorm.output",
    "attn_z": "self_attn.o_proj.input self_attn.dense.input attn.c_proj.input attention.dense.input",
    "attn_out": "self_attn.output attn.output attention.output",
}
_SITE_OF_TAP = {tap: site for site, taps in _TAPS.items() for tap in taps.split()}


def site_of(hook_name: str) -> tuple[int, str, str | None]:
    """Layer, site and tap of a hook name; a module named without an end is read at its output.

    >>> site_of("blocks.12.hook_resid_post"), site_of("model.layers.3.mlp")
    ((12, 'resid_post', None), (3, 'mlp_out', 'mlp.output'))

    Raises:
        SAEError: it names no site that is known.
    """
    if match := _TRANSFORMER_LENS.fullmatch(hook_name):
        if site := _SITE_OF_HOOK.get(match[2]):
            return int(match[1]), site, None
    elif match := _TRANSFORMERS.fullmatch(hook_name):
        tap = match[2] or "output"
        tap = tap if tap.endswith(("input", "output")) else f"{tap}.output"
        if site := _SITE_OF_TAP.get(tap):
            return int(match[1]), site, tap
    raise SAEError(
        "unknown site", problems=[f"the hook `{hook_name}` is none of {', '.join(SITES)} as far as is known"]
    )
