"""SAELens 6, with metadata in a table of its own, and the flat configurations of 3 to 5."""

from typing import Any

from stethoscope.saes.layouts.base import OUTPUT, Claim, Converted, Layout, SAEFolder, Stored, unit_decoder
from stethoscope.saes.layouts.files import State, table

# Tensors that hold a value per feature, by architecture.
PER_FEATURE = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}


def read(stored: Stored) -> Claim:
    config = {**stored.config, **stored.overrides}
    about = {**config, **table(config.get("metadata"))}
    activation = str(config.get("activation_fn_str") or config.get("activation_fn") or "relu")
    if activation not in ("relu", "topk"):
        stored.problems.append(f"the activation function `{activation}` is not supported; these are: relu, topk")
    architecture = str(config.get("architecture", "standard"))
    if architecture == "standard" and activation == "topk":
        architecture = "topk"
    normalized = config.get("normalize_activations")
    scaled = normalized is True or normalized in ("expected_average_only_in", "covariance_whitening")
    if scaled and "norm_scaling_factor" not in stored.overrides:
        stored.problems.append(
            f"it reads scaled activations but does not say the scale (normalize_activations: {normalized})"
        )
    if about.get("hook_head_index", about.get("hook_point_head_index")) is not None:
        stored.problems.append("it reads one attention head, which is not supported")
    if table(about.get("model_from_pretrained_kwargs")).get("center_writing_weights"):
        stored.problems.append(
            "it reads TransformerLens' centred residual stream (center_writing_weights), not the model's"
        )
    hook_name = str(about.get("hf_hook_name") or about.get("hook_name") or about.get("hook_point") or "")
    hook_name = hook_name.replace("{layer}", str(about.get("hook_point_layer")))
    d_in, width = config.get("d_in"), config.get("d_sae")
    d_out = config.get("d_out") if architecture.endswith("transcoder") else d_in
    per_feature = PER_FEATURE.get(architecture.split("_", 1)[0], ("b_enc",))
    wanted = {"W_enc": (d_in, width), "W_dec": (width, d_out), "b_dec": (d_out,)}
    wanted |= dict.fromkeys(per_feature, (width,))
    return Claim(hook_name, architecture, d_in, width, about.get("model_name"), wanted)


def convert(folder: SAEFolder, config: dict[str, Any], state: State) -> Converted:
    """As SAELens reads it, but for four things that it leaves to its user or has forgotten."""
    config = {**config, **folder.overrides}
    about = config["metadata"] if isinstance(config.get("metadata"), dict) else config
    about.pop("model_from_pretrained_kwargs", None)  # only makes SAELens warn
    if folder.transcoder:
        about.setdefault("hook_name_out", OUTPUT)
    config["reshape_activations"] = "none"  # heads are side by side in a Transformers model already
    if (scale := state.pop("scaling_factor", None)) is not None and not bool((scale == 1).all()):
        if not config.get("finetuning_scaling_factor"):
            raise ValueError("it has a `scaling_factor`, but its configuration does not use one")
        state["W_dec"] = scale[:, None] * state["W_dec"]  # versions 3 to 5 scaled features before decoding
    if (factor := config.pop("norm_scaling_factor", None)) is not None:
        config["normalize_activations"] = "none"
        state |= {"W_enc": state["W_enc"] * factor}
        state |= {name: state[name] / factor for name in ("W_dec", "b_dec")}
    if folder.architecture in ("batchtopk", "matryoshka_batchtopk"):  # saved while it trained
        state = unit_decoder(state) if config.get("rescale_acts_by_decoder_norm") else state
        state["threshold"] = state.pop("topk_threshold").float().expand(folder.width).clone()
        config["architecture"] = "jumprelu"
    return config, state


LAYOUT = Layout(marker="cfg.json", config="cfg.json", weights="sae_weights.safetensors", read=read, convert=convert)
