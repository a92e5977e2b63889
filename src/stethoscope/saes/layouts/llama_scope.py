"""Llama Scope by fnlp."""

from typing import Any

from stethoscope.saes.layouts.base import Converted, SAEFolder, State, Stored, renamed, sae_lens_config

TENSORS = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T", "b_dec": "decoder.bias"}


def read(stored: Stored) -> SAEFolder:
    config = stored.config
    if (activation := config.get("act_fn", "jumprelu")) != "jumprelu":
        stored.problems.append(f"the activation function `{activation}` is not supported; this is: jumprelu")
    hook = config.get("hook_point_in")
    if config.get("hook_point_out", hook) != hook:
        stored.problems.append("it is a transcoder, which is not supported in Llama Scope's layout")
    norm = stored.table("dataset_average_activation_norm").get("in")
    for name, value in (("jump_relu_threshold", config.get("jump_relu_threshold")), ("average norm", norm)):
        if not isinstance(value, int | float) or isinstance(value, bool):
            stored.problems.append(f"`{name}` is `{value}`, not a number")
    sizes = config.get("d_model"), config.get("d_sae")
    return stored.folder(str(hook or ""), "jumprelu", sizes, TENSORS, model_name="meta-llama/Llama-3.1-8B")


def convert(folder: SAEFolder, config: dict[str, Any], tensors: State) -> Converted:
    """Inputs are scaled by sqrt(d) over their average norm; the one threshold is given for unscaled ones."""
    scale = folder.d_in**0.5 / config["dataset_average_activation_norm"]["in"]
    state = renamed(tensors, TENSORS)
    threshold = state["b_enc"].new_full((folder.width,), config["jump_relu_threshold"] * scale)
    state |= {"W_enc": state["W_enc"] * scale, "threshold": threshold}
    state |= {name: state[name] / scale for name in ("W_dec", "b_dec")}
    return sae_lens_config(folder, "jumprelu", b_dec_to_input=False), state
