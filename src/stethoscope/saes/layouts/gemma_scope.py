"""Gemma Scope 1, without configuration: the repository's name and the folders say it all."""

import re
from typing import Any

from stethoscope.saes.layouts.base import Converted, SAEFolder, State, Stored, sae_lens_config
from stethoscope.saes.layouts.gemma_scope_2 import TAPS

_TAPS = {"res": TAPS["resid_post"], "att": TAPS["attn_out"], "mlp": TAPS["mlp_out"]}
TENSORS = {name: name for name in ("W_dec", "b_enc", "b_dec", "threshold")}


def read(stored: Stored) -> SAEFolder:
    where = f"{stored.path.as_posix()}/"
    release, layer = re.search(r"gemma-scope-(\d+b)-(pt|it)-([a-z]+)", where), re.search(r"/layer_(\d+)/", where)
    hook_name = model_name = ""
    if release is None or layer is None:
        stored.problems.append(
            "its path does not say what it reads, as `gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82` would"
        )
    else:
        size, tuned, kind = release.groups()
        if kind not in _TAPS:
            kinds = ", ".join(_TAPS)
            stored.problems.append(f"`{release[0]}` is not supported; these kinds of Gemma Scope 1 are: {kinds}")
        hook_name = f"layers.{layer[1]}.{_TAPS.get(kind, 'output')}"
        model_name = f"google/gemma-2-{size}{'-it' if tuned == 'it' else ''}"
    return stored.folder(hook_name, "jumprelu", stored.matrix("W_enc"), TENSORS, model_name=model_name)


def convert(folder: SAEFolder, _config: dict[str, Any], tensors: State) -> Converted:
    return sae_lens_config(folder, "jumprelu", b_dec_to_input=False), tensors
