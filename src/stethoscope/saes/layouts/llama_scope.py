"""Llama Scope by fnlp."""

from typing import Any

from stethoscope.saes.layouts.base import Claim, Converted, Layout, SAEFolder, Stored, sae_lens_config
from stethoscope.saes.layouts.files import State, table


def read(stored: Stored) -> Claim:
    config = stored.config
    if (activation := config.get("act_fn", "jumprelu")) != "jumprelu":
        stored.problems.append(f"the activation function `{activation}` is not supported; this is: jumprelu")
    hook = config.get("hook_point_in")
    if config.get("hook_point_out", hook) != hook:
        stored.problems.append("it is a transcoder, which is not supported in Llama Scope's layout")
    norm = table(config.get("dataset_average_activation_norm")).get("in")
    for name, value in (("jump_relu_threshold", config.get("jump_relu_threshold")), ("average norm", norm)):
        if not isinstance(value, int | float) or isinstance(value, bool):
            stored.problems.append(f"`{name}` is `{value}`, not a number")
    d_in, width = config.get("d_model"), config.get("d_sae")
    wanted = {
        "encoder.weight": (width, d_in), "encoder.bias": (width,),
        "decoder.weight": (d_in, width), "decoder.bias": (d_in,),
    }  # fmt: skip
    return Claim(str(hook or ""), "jumprelu", d_in, width, "meta-llama/Llama-3.1-8B", wanted)


def convert(folder: SAEFolder, config: dict[str, Any], tensors: State) -> Converted:
    """Inputs are scaled by sqrt(d) over their average norm; the one threshold is given for unscaled ones."""
    scale = folder.d_in**0.5 / config["dataset_average_activation_norm"]["in"]
    bias = tensors["encoder.bias"]
    state = {
        "W_enc": (tensors["encoder.weight"].T * scale).contiguous(),
        "W_dec": (tensors["decoder.weight"].T / scale).contiguous(),
        "b_enc": bias,
        "b_dec": tensors["decoder.bias"] / scale,
        "threshold": bias.new_full(bias.shape, config["jump_relu_threshold"] * scale),
    }
    return sae_lens_config(folder, "jumprelu", b_dec_to_input=False), state


LAYOUT = Layout(
    marker="hyperparams.json", config="hyperparams.json", weights="checkpoints/final.safetensors",
    read=read, convert=convert,
)  # fmt: skip
