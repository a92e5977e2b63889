"""Gemma Scope 2. Features are relu(z) where z > threshold; b_dec is not subtracted."""

import re
from typing import Any

from stethoscope.saes.layouts.base import Converted, SAEFolder, State, Stored, sae_lens_config

TAPS = {
    "resid_post": "output",
    "attn_out": "self_attn.o_proj.input",
    "mlp_out": "post_feedforward_layernorm.output",
    "transcoder": "pre_feedforward_layernorm.output",
}
TENSORS = {"W_dec": "w_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}


def read(stored: Stored) -> SAEFolder:
    """Without its configuration, the folder above says where it reads."""
    config, name, above = stored.config, stored.path.name, stored.path.parent.name
    tap, layer = TAPS.get(above.removesuffix("_all")), re.match(r"layer_(\d+)", name)
    hook_name = str(config.get("hf_hook_point_in") or (f"layers.{layer[1]}.{tap}" if tap and layer else ""))
    if not hook_name:
        stored.problems.append(
            f"it has no `config.json`, and `{above}/{name}` does not say what it reads, as"
            " `resid_post_all/layer_12_width_16k_l0_small` would"
        )
    if (architecture := config.get("architecture", "jump_relu")) != "jump_relu":
        stored.problems.append(f"the architecture `{architecture}` is not supported in Gemma Scope 2's layout")
    architecture = "jumprelu"
    if above.startswith("transcoder") or config.get("hf_hook_point_out"):
        skip = "affine_skip_connection" in stored.shapes
        architecture = "jumprelu_skip_transcoder" if skip else "jumprelu_transcoder"
    release = re.search(r"gemma-scope-2-(\w+-(?:it|pt))", stored.path.as_posix())
    model_name = config.get("model_name") or (release and f"google/gemma-3-{release[1]}")
    # a transcoder's output is as wide as its input in every Gemma
    return stored.folder(hook_name, architecture, stored.matrix("w_enc"), TENSORS, model_name=model_name)


def convert(folder: SAEFolder, _config: dict[str, Any], tensors: State) -> Converted:
    state = {name.replace("w_", "W_"): value for name, value in tensors.items()}
    if folder.architecture == "jumprelu_skip_transcoder":
        state["W_skip"] = state.pop("affine_skip_connection").T.contiguous()
    extra = {"d_out": folder.d_in} if folder.transcoder else {}
    return sae_lens_config(folder, folder.architecture, b_dec_to_input=False, **extra), state
