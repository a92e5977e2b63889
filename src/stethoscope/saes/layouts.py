"""How published SAEs are stored: a function per layout that says what an SAE is and reads, and how its weights differ.

With s for the input, features are relu(z) where z = s W_enc + b_enc passes a threshold, is among the k largest, or
opens a gate. SAELens' own loaders ask the network for shapes (Gemma Scope 2), transpose the decoder and take every
module for the residual stream (sparsify), or leave out norms and biases (dictionary_learning).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stethoscope.checkpoints.files import read_json_object
from stethoscope.saes.folder import Claim, SAEFolder, Stored

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, "Tensor"]
Converted = tuple[dict[str, Any], State]  # SAELens' configuration and state dict
SCALED = (True, "expected_average_only_in")  # SAELens' `normalize_activations` where the input has a factor
OUTPUT = "the module's output"  # every transcoder's metadata has a `hook_name_out`, by which it is known


def sae_lens_config(folder: SAEFolder) -> dict[str, Any]:
    """SAELens' configuration of an SAE that does not subtract b_dec, unless its options say so."""
    import sae_lens

    about = {"sae_lens_version": sae_lens.__version__, "hook_name": folder.hook_name, "model_name": folder.model_name}
    if folder.transcoder:
        about["hook_name_out"] = OUTPUT
    loaded_as = {"batchtopk": "jumprelu", "matryoshka_batchtopk": "jumprelu", "topk_transcoder": "topk"}
    return {
        "architecture": loaded_as.get(folder.architecture, folder.architecture),
        "d_in": folder.d_in,
        "d_sae": folder.width,
        "apply_b_dec_to_input": False,
        "metadata": about,
        **folder.options,
    }


def renamed(tensors: State, names: Mapping[str, str]) -> State:
    """Tensors by SAELens' names."""
    return {
        ours: tensors[theirs.removesuffix(".T")].T.contiguous() if theirs.endswith(".T") else tensors[theirs]
        for ours, theirs in names.items()
    }


def unit_decoder(state: State) -> State:
    """The same SAE with decoder rows of norm 1 and features as much larger."""
    norms = state["W_dec"].norm(dim=1).clamp(min=1e-8)
    larger = ("W_enc", "b_enc", "b_gate", "b_mag", "threshold")
    scaled = {name: value * norms if name in larger else value for name, value in state.items()}
    return {**scaled, "W_dec": state["W_dec"] / norms[:, None]}


def scaled_input(state: State, factor: float) -> State:
    """The same SAE with a factor on its input, and its inverse on the output, folded into the weights."""
    return {**state, "W_enc": state["W_enc"] * factor, **{n: state[n] / factor for n in ("W_dec", "b_dec")}}


def read_sae_lens(stored: Stored) -> Claim:
    """SAELens 6, with metadata in a table of its own, and the flat configurations of 3 to 5."""
    config = stored.config
    about = {**config, **stored.table("metadata")}
    activation = str(config.get("activation_fn_str") or config.get("activation_fn") or "relu")
    if activation not in ("relu", "topk"):
        stored.problems.append(f"the activation function `{activation}` is not supported; these are: relu, topk")
    architecture = str(config.get("architecture", "standard"))
    if architecture == "standard" and activation == "topk":
        architecture = "topk"
    normalized = config.get("normalize_activations")
    factor = config.get("norm_scaling_factor")
    if normalized == "covariance_whitening" or (normalized in SCALED and factor is None):
        stored.problems.append(
            f"it reads scaled activations but does not say the scale (normalize_activations: {normalized})"
        )
    if factor is not None:
        stored.number("norm_scaling_factor", factor, above=0.0)
    if about.get("hook_head_index", about.get("hook_point_head_index")) is not None:
        stored.problems.append("it reads one attention head, which is not supported")
    loading = about.get("model_from_pretrained_kwargs")
    if isinstance(loading, dict) and loading.get("center_writing_weights"):
        stored.problems.append(
            "it reads TransformerLens' centred residual stream (center_writing_weights), not the model's"
        )
    hook_name = str(about.get("hf_hook_name") or about.get("hook_name") or about.get("hook_point") or "")
    layer = about.get("hook_layer", about.get("hook_point_layer"))
    hook_name = hook_name.replace("{layer}", str(layer))
    if layer is not None and f".{layer}." not in f"{hook_name}.":
        stored.problems.append(f"`hook_layer` is `{layer}`, but it reads `{hook_name}`")
    own = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}  # a value per feature
    names = ("W_enc", "W_dec", "b_dec", *own.get(architecture.split("_", 1)[0], ("b_enc",)))
    sizes = [config.get(name) for name in ("d_in", "d_sae", "d_out" if architecture.endswith("transcoder") else "d_in")]
    older = config.get("activation_fn_kwargs")
    k = config.get("k", older.get("k") if isinstance(older, dict) else None)
    options = {"normalize_activations": normalized} | ({"k": k} if architecture.startswith("topk") else {})
    return Claim(hook_name, architecture, sizes, {name: name for name in names}, options, about.get("model_name"))


def convert_sae_lens(folder: SAEFolder, config: dict[str, Any], state: State) -> Converted:
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
    rescaled, factor = (config.pop(name, None) for name in ("rescale_acts_by_decoder_norm", "norm_scaling_factor"))
    if config.get("normalize_activations") in SCALED:
        config["normalize_activations"] = "none"
        state = scaled_input(state, factor)
        if rescaled and "topk_threshold" in state:  # of features that are as much smaller as the decoder's rows
            state["topk_threshold"] = state["topk_threshold"] / factor
    if rescaled:
        state = unit_decoder(state)
    if folder.architecture in ("batchtopk", "matryoshka_batchtopk"):  # saved while it trained
        state["threshold"] = state.pop("topk_threshold").float().expand(folder.width).clone()
        config["architecture"] = "jumprelu"
    return config, state


def read_sparsify(stored: Stored) -> Claim:
    """EleutherAI's sparsify, the k largest of relu(z); the folder is called like the module that it reads."""
    config = stored.config
    if (activation := config.get("activation", "topk")) != "topk":
        stored.problems.append(f"the activation function `{activation}` is not supported; this is: topk")
    unsupported = [name for name in ("signed", "embed_skip", "gram_lookup") if config.get(name)]
    stored.problems.extend(f"`{name}` is not supported" for name in unsupported)
    module, transcode, run = stored.where.name, bool(config.get("transcode")), stored.where.parent / "config.json"
    hook_name, architecture = (f"{module}.input", "topk_transcoder") if transcode else (module, "topk")
    sizes = config.get("d_in"), stored.matrix("encoder.weight")[0]
    tensors = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
    model_name = read_json_object(run, hint="fetch it again").get("model") if run.is_file() else None
    options = {"apply_b_dec_to_input": not transcode, "k": config.get("k")}
    return Claim(hook_name, architecture, sizes, tensors, options, model_name)


GEMMA_TAPS = {
    "resid_post": "output",
    "attn_out": "self_attn.o_proj.input",
    "mlp_out": "post_feedforward_layernorm.output",
    "transcoder": "pre_feedforward_layernorm.output",
}


def read_gemma_scope_2(stored: Stored) -> Claim:
    """Gemma Scope 2; without its configuration, the folder above says where it reads."""
    config, name, above = stored.config, stored.where.name, stored.where.parent.name
    tap, layer = GEMMA_TAPS.get(above.removesuffix("_all")), re.match(r"layer_(\d+)", name)
    hook_name = str(config.get("hf_hook_point_in") or (f"layers.{layer[1]}.{tap}" if tap and layer else ""))
    if not hook_name:
        stored.problems.append(
            f"it has no `config.json`, and `{above}/{name}` does not say what it reads, as"
            " `resid_post_all/layer_12_width_16k_l0_small` would"
        )
    if (architecture := config.get("architecture", "jump_relu")) != "jump_relu":
        stored.problems.append(f"the architecture `{architecture}` is not supported in Gemma Scope 2's layout")
    d_in, width = stored.matrix("w_enc")
    tensors = {"W_enc": "w_enc", "W_dec": "w_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
    architecture, options = "jumprelu", {}
    if above.startswith("transcoder") or config.get("hf_hook_point_out"):
        # its output is as wide as its input in every Gemma
        architecture, options = "jumprelu_transcoder", {"d_out": d_in}
        if "affine_skip_connection" in stored.shapes:
            architecture, tensors["W_skip"] = "jumprelu_skip_transcoder", "affine_skip_connection.T"
    release = re.search(r"gemma-scope-2-(\w+-(?:it|pt))", stored.where.as_posix())
    # the configuration calls it by another name than the hub
    model_name = f"google/gemma-3-{release[1]}" if release else config.get("model_name")
    return Claim(hook_name, architecture, (d_in, width), tensors, options, model_name)


def read_gemma_scope(stored: Stored) -> Claim:
    """Gemma Scope 1, without configuration: the repository's name and the folders say it all."""
    taps = {"res": GEMMA_TAPS["resid_post"], "att": GEMMA_TAPS["attn_out"], "mlp": GEMMA_TAPS["mlp_out"]}
    found = re.search(r"(gemma-scope-(\d+b)-(pt|it)-([a-z]+)).*/layer_(\d+)/", f"{stored.where.as_posix()}/")
    release, size, tuned, kind, layer = found.groups() if found else ("", "", "", "", "")
    if not found:
        stored.problems.append(
            "its path does not say what it reads, as `gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82` would"
        )
    elif kind not in taps:
        kinds = ", ".join(taps)
        stored.problems.append(f"`{release}` is not supported; these kinds of Gemma Scope 1 are: {kinds}")
    hook_name = f"layers.{layer}.{taps.get(kind, 'output')}" if found else ""
    tensors = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    model_name = f"google/gemma-2-{size}{'-it' if tuned == 'it' else ''}"
    return Claim(hook_name, "jumprelu", stored.matrix("W_enc"), tensors, model_name=model_name)


def read_llama_scope(stored: Stored) -> Claim:
    """Llama Scope by fnlp."""
    config = stored.config
    if (activation := config.get("act_fn", "jumprelu")) != "jumprelu":
        stored.problems.append(f"the activation function `{activation}` is not supported; this is: jumprelu")
    hook = config.get("hook_point_in")
    if config.get("hook_point_out", hook) != hook:
        stored.problems.append("it is a transcoder, which is not supported in Llama Scope's layout")
    norm = stored.table("dataset_average_activation_norm").get("in")
    stored.number("jump_relu_threshold", config.get("jump_relu_threshold"))
    stored.number("average norm", norm, above=0.0)
    sizes = config.get("d_model"), config.get("d_sae")
    tensors = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias"}
    tensors |= {"W_dec": "decoder.weight.T", "b_dec": "decoder.bias"}
    return Claim(str(hook or ""), "jumprelu", sizes, tensors, model_name="meta-llama/Llama-3.1-8B")


def convert_llama_scope(folder: SAEFolder, config: dict[str, Any], tensors: State) -> Converted:
    """Inputs are scaled by sqrt(d) over their average norm; the one threshold is given for unscaled ones."""
    scale = folder.d_in**0.5 / config["dataset_average_activation_norm"]["in"]
    state = scaled_input(renamed(tensors, folder.tensors), scale)
    threshold = state["b_enc"].new_full((folder.width,), config["jump_relu_threshold"] * scale)
    return sae_lens_config(folder), {**state, "threshold": threshold}


def read_qwen_scope(stored: Stored) -> Claim:
    """Qwen-Scope, the k largest of relu(z): a file per layer, without configuration; its path says the rest."""
    found = re.search(r"SAE-Res-([^/]+)-W\d+K-L0_(\d+)(?:/.*)?/layer(\d+)\.sae\.pt$", stored.where.as_posix())
    model, k, layer = found.groups() if found else ("", 1, "")
    if not found:
        stored.problems.append(
            "its path does not say what it reads, as `SAE-Res-Qwen3-1.7B-Base-W32K-L0_50/layer12.sae.pt` would"
        )
    hook_name, sizes = f"model.layers.{layer}" if found else "", stored.matrix("W_enc")[::-1]
    tensors = {"W_enc": "W_enc.T", "W_dec": "W_dec.T", "b_enc": "b_enc", "b_dec": "b_dec"}
    return Claim(hook_name, "topk", sizes, tensors, {"k": int(k)}, f"Qwen/{model}")


_DICTIONARIES = {
    "AutoEncoder": "standard", "AutoEncoderNew": "standard", "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu", "AutoEncoderTopK": "topk", "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "matryoshka_batchtopk",
}  # fmt: skip
# SAELens' names of its tensors other than the matrices, whose own differ by class.
_DICTIONARY = {
    "b_dec": "b_dec", "bias": "b_dec", "decoder_bias": "b_dec", "decoder.bias": "b_dec", "b_enc": "b_enc",
    "encoder.bias": "b_enc", "gate_bias": "b_gate", "mag_bias": "b_mag", "r_mag": "r_mag", "threshold": "threshold",
}  # fmt: skip


def read_dictionary(stored: Stored) -> Claim:
    """dictionary_learning by Marks and others; its configuration is its trainer's."""
    trainer = stored.table("trainer")
    kind = str(trainer.get("dict_class"))
    if kind not in _DICTIONARIES:
        stored.problems.append(f"the class `{kind}` is not supported; these are: {', '.join(_DICTIONARIES)}")
    if (io := stored.table("buffer").get("io", "out")) != "out":
        stored.problems.append(f"it was made from its module's `{io}`; only `out` is supported")
    site = re.sub(r"_layer_\d+$", "", str(trainer.get("submodule_name") or "resid_post"))
    linear = {"W_enc": "encoder.weight.T", "W_dec": "decoder.weight.T"}
    hook_name = f"blocks.{trainer['layer']}.hook_{site}" if "layer" in trainer else ""
    sizes = trainer.get("activation_dim"), trainer.get("dict_size")
    tensors = {name: name for name in linear} if "W_enc" in stored.shapes else linear
    options: dict[str, Any] = {"apply_b_dec_to_input": kind not in ("AutoEncoderNew", "JumpReluAutoEncoder")}
    if kind == "AutoEncoderTopK" and "k" not in stored.shapes:
        options["k"] = trainer.get("k")
    return Claim(hook_name, _DICTIONARIES.get(kind, "standard"), sizes, tensors, options, trainer.get("lm_name"))


def convert_dictionary(folder: SAEFolder, config: dict[str, Any], tensors: State) -> Converted:
    """By class: two multiply features by decoder norms, two have one threshold for all."""
    others = {_DICTIONARY[name]: name for name in tensors if name in _DICTIONARY}
    state, options = renamed(tensors, {**others, **folder.tensors}), sae_lens_config(folder)
    if config["trainer"]["dict_class"] in ("GatedAutoEncoder", "JumpReluAutoEncoder"):
        state = unit_decoder(state)
    if "k" in tensors and folder.architecture == "topk":
        options["k"] = int(tensors["k"])
    if options["architecture"] == "jumprelu":
        state["threshold"] = state["threshold"].expand(folder.width).clone()
    else:
        state.pop("threshold", None)  # TopK keeps one that its encoder does not use
    return options, state


@dataclass(frozen=True)
class Layout:
    """One way of storing SAEs.

    Attributes:
        read: what the files of an SAE claim that it is.
        marker: the file that tells it from others; where one file is a whole SAE, how its name ends.
        files: the configuration, if it has one, and last the weights; an empty name is the SAE's own path.
        convert: SAE, configuration, tensors in float32 -> configuration and state dict for SAELens; where it is None,
            to rename the tensors is enough.
        config_optional: whether an SAE may lack the configuration.
    """

    read: Callable[[Stored], Claim]
    marker: str
    files: tuple[str, ...]
    convert: Callable[[SAEFolder, dict[str, Any], State], Converted] | None = None
    config_optional: bool = False


ONE_FILE = ".sae.pt"  # what the name of an SAE in a single file ends with
# In the order of looking: sparsify's folders hold a `cfg.json` too.
LAYOUTS = {
    "sparsify": Layout(read_sparsify, "sae.safetensors", ("cfg.json", "sae.safetensors")),
    "gemma_scope_2": Layout(
        read_gemma_scope_2, "params.safetensors", ("config.json", "params.safetensors"), config_optional=True
    ),
    "gemma_scope": Layout(read_gemma_scope, "params.npz", ("params.npz",)),
    "dictionary_learning": Layout(read_dictionary, "ae.pt", ("config.json", "ae.pt"), convert_dictionary),
    "llama_scope": Layout(
        read_llama_scope, "hyperparams.json", ("hyperparams.json", "checkpoints/final.safetensors"), convert_llama_scope
    ),
    "qwen_scope": Layout(read_qwen_scope, ONE_FILE, ("",)),
    "sae_lens": Layout(read_sae_lens, "cfg.json", ("cfg.json", "sae_weights.safetensors"), convert_sae_lens),
}
