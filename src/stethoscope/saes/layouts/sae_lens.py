"""SAELens 6, with metadata in a table of its own, and the flat configurations of 3 to 5."""

from typing import Any

from stethoscope.saes.layouts.base import OUTPUT, Converted, SAEFolder, State, Stored, unit_decoder

# Tensors that hold a value per feature, by architecture.
PER_FEATURE = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}


def read(stored: Stored) -> SAEFolder:
    config = stored.config
    about = {**config, **stored.table("metadata")}
    activation = str(config.get("activation_fn_str") or config.get("activation_fn") or "relu")
    if activation not in ("relu", "topk"):
        stored.problems.append(f"the activation function `{activation}` is not supported; these are: relu, topk")
    architecture = str(config.get("architecture", "standard"))
    if architecture == "standard" and activation == "topk":
        architecture = "topk"
    normalized = config.get("normalize_activations")
    scaled = normalized is True or normalized in ("expected_average_only_in", "covariance_whitening")
    if scaled and "norm_scaling_factor" not in config:
        stored.problems.append(
            f"it reads scaled activations but does not say the scale (normalize_activations: {normalized})"
        )
    if about.get("hook_head_index", about.get("hook_point_head_index")) is not None:
        stored.problems.append("it reads one attention head, which is not supported")
    loading = about.get("model_from_pretrained_kwargs")
    if isinstance(loading, dict) and loading.get("center_writing_weights"):
        stored.problems.append(
            "it reads TransformerLens' centred residual stream (center_writing_weights), not the model's"
        )
    hook_name = str(about.get("hf_hook_name") or about.get("hook_name") or about.get("hook_point") or "")
    per_feature = PER_FEATURE.get(architecture.split("_", 1)[0], ("b_enc",))
    sizes = [config.get(name) for name in ("d_in", "d_sae", "d_out" if architecture.endswith("transcoder") else "d_in")]
    return stored.folder(
        hook_name.replace("{layer}", str(about.get("hook_point_layer"))),
        architecture,
        sizes,
        {name: name for name in ("W_enc", "W_dec", "b_dec", *per_feature)},
        model_name=about.get("model_name"),
    )


def convert(folder: SAEFolder, config: dict[str, Any], state: State) -> Converted:
    """As SAELens reads it, but for four things that it leaves to its user or has forgotten."""
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
