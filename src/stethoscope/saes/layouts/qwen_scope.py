"""Qwen-Scope: a file per layer, without configuration; the repository's name says the rest."""

import re
from typing import Any

from stethoscope.saes.layouts.base import Claim, Converted, Layout, SAEFolder, Stored, sae_lens_config
from stethoscope.saes.layouts.files import State, renamed


def read(stored: Stored) -> Claim:
    release = re.search(r"SAE-Res-([^/]+)-W\d+K-L0_\d+", stored.path.as_posix())
    layer = re.fullmatch(r"layer(\d+)\.sae\.pt", stored.path.name)
    if release is None or layer is None:
        stored.problems.append(
            "its path does not say what it reads, as `SAE-Res-Qwen3-1.7B-Base-W32K-L0_50/layer12.sae.pt` would"
        )
    hook_name = f"model.layers.{layer[1]}" if release and layer else ""
    width, d_in = stored.matrix("W_enc")
    wanted = {"W_dec": (d_in, width), "b_enc": (width,), "b_dec": (d_in,)}
    return Claim(hook_name, "topk", d_in, width, release and f"Qwen/{release[1]}", wanted)


def convert(folder: SAEFolder, _config: dict[str, Any], tensors: State) -> Converted:
    """The k largest of relu(z), k by the repository's name; b_dec is not subtracted, and matrices lie the other way."""
    k = re.findall(r"SAE-Res-[^/]+-L0_(\d+)", folder.path.absolute().as_posix())[-1]
    names = {"b_enc": "b_enc", "b_dec": "b_dec"}
    state = renamed(tensors, names, turned={"W_enc": "W_enc", "W_dec": "W_dec"})
    return sae_lens_config(folder, "topk", b_dec_to_input=False, k=int(k)), state


LAYOUT = Layout(marker=".sae.pt", weights="", read=read, convert=convert)  # the path itself is the file
