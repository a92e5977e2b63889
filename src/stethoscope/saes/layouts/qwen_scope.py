"""Qwen-Scope: a file per layer, without configuration; the repository's name says the rest."""

import re
from typing import Any

from stethoscope.saes.layouts.base import Converted, SAEFolder, State, Stored, renamed, sae_lens_config

TENSORS = {"W_enc": "W_enc.T", "W_dec": "W_dec.T", "b_enc": "b_enc", "b_dec": "b_dec"}


def read(stored: Stored) -> SAEFolder:
    release = re.search(r"SAE-Res-([^/]+)-W\d+K-L0_\d+", stored.path.as_posix())
    layer = re.fullmatch(r"layer(\d+)\.sae\.pt", stored.path.name)
    if release is None or layer is None:
        stored.problems.append(
            "its path does not say what it reads, as `SAE-Res-Qwen3-1.7B-Base-W32K-L0_50/layer12.sae.pt` would"
        )
    hook_name = f"model.layers.{layer[1]}" if release and layer else ""
    sizes = stored.matrix("W_enc")[::-1]
    return stored.folder(hook_name, "topk", sizes, TENSORS, model_name=release and f"Qwen/{release[1]}")


def convert(folder: SAEFolder, _config: dict[str, Any], tensors: State) -> Converted:
    """The k largest of relu(z), k by the repository's name; b_dec is not subtracted."""
    k = re.findall(r"SAE-Res-[^/]+-L0_(\d+)", folder.path.absolute().as_posix())[-1]
    return sae_lens_config(folder, "topk", b_dec_to_input=False, k=int(k)), renamed(tensors, TENSORS)
