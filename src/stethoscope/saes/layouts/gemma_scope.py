"""Gemma Scope 1, without configuration: the repository's name and the folders say it all."""

import re
from typing import Any

from stethoscope.saes.layouts.base import Claim, Converted, Layout, SAEFolder, Stored, sae_lens_config
from stethoscope.saes.layouts.files import State
from stethoscope.saes.layouts.gemma_scope_2 import TAPS

_TAPS = {"res": TAPS["resid_post"], "att": TAPS["attn_out"], "mlp": TAPS["mlp_out"]}


def read(stored: Stored) -> Claim:
    where = f"{stored.path.as_posix()}/"
    release, layer = re.search(r"gemma-scope-(\d+b)-(pt|it)-([a-z]+)", where), re.search(r"/layer_(\d+)/", where)
    if release is None or layer is None:
        stored.problems.append(
            "its path does not say what it reads, as `gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82` would"
        )
    elif release[3] not in _TAPS:
        kinds = ", ".join(_TAPS)
        stored.problems.append(f"`{release[0]}` is not supported; these kinds of Gemma Scope 1 are: {kinds}")
    hook_name = f"layers.{layer[1]}.{_TAPS.get(release[3], 'output')}" if release and layer else ""
    model_name = release and f"google/gemma-2-{release[1]}{'-it' if release[2] == 'it' else ''}"
    d_in, width = stored.matrix("W_enc")
    wanted = {"W_dec": (width, d_in), "b_enc": (width,), "b_dec": (d_in,), "threshold": (width,)}
    return Claim(hook_name, "jumprelu", d_in, width, model_name, wanted)


def convert(folder: SAEFolder, _config: dict[str, Any], tensors: State) -> Converted:
    return sae_lens_config(folder, "jumprelu", b_dec_to_input=False), tensors


LAYOUT = Layout(marker="params.npz", weights="params.npz", read=read, convert=convert)
