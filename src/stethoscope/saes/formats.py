"""Weights of published SAEs as SAELens' own: a converter per layout, for `SAE.load_from_disk(converter=...)`.

config, state = CONVERTERS[folder.layout](folder)      # SAELens' configuration and state dict, in float32

With s for the input, features are relu(z) where z = s W_enc + b_enc passes a threshold, is among the k largest, or
opens a gate. SAELens' own loaders ask the network for shapes (Gemma Scope 2), transpose the decoder and take every
module for the residual stream (sparsify), or leave out norms and biases (dictionary_learning).
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sae_lens
import torch
from safetensors.torch import load_file
from torch import Tensor

from stethoscope.saes.folder import SAEFolder, read_json

State = dict[str, Tensor]
Converted = tuple[dict[str, Any], State]

OUTPUT = "the module's output"  # every transcoder's metadata has a `hook_name_out`, by which it is known


def _tensors(path: Path) -> State:
    """The tensors of a file, in float32 where they are floats."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays}
    elif path.suffix == ".pt":
        tensors = dict(torch.load(path, map_location="cpu", weights_only=True))
    else:
        tensors = load_file(path)
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def _config(folder: SAEFolder, architecture: str, *, b_dec_to_input: bool, **extra: Any) -> dict[str, Any]:
    about = {"sae_lens_version": sae_lens.__version__, "hook_name": folder.hook_name, "model_name": folder.model_name}
    if folder.transcoder:
        about["hook_name_out"] = OUTPUT
    return {
        "architecture": architecture,
        "d_in": folder.d_in,
        "d_sae": folder.width,
        "apply_b_dec_to_input": b_dec_to_input,
        "metadata": about,
        **extra,
    }


def _unit_decoder(state: State) -> State:
    """The same SAE with decoder rows of norm 1 and features as much larger."""
    norms = state["W_dec"].norm(dim=1).clamp(min=1e-8)
    larger = ("W_enc", "b_enc", "b_gate", "b_mag", "threshold")
    scaled = {name: value * norms if name in larger else value for name, value in state.items()}
    return {**scaled, "W_dec": state["W_dec"] / norms[:, None]}


def _sae_lens(folder: SAEFolder) -> Converted:
    """As SAELens reads it, but for four things that it leaves to its user or has forgotten."""
    config = {**read_json(folder.path / "cfg.json"), **folder.overrides}
    about = config["metadata"] if isinstance(config.get("metadata"), dict) else config
    about.pop("model_from_pretrained_kwargs", None)  # only makes SAELens warn
    if folder.transcoder:
        about.setdefault("hook_name_out", OUTPUT)
    state = _tensors(folder.path / "sae_weights.safetensors")
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
        state = _unit_decoder(state) if config.get("rescale_acts_by_decoder_norm") else state
        state["threshold"] = state.pop("topk_threshold").float().expand(folder.width).clone()
        config["architecture"] = "jumprelu"
    return config, state


def _sparsify(folder: SAEFolder) -> Converted:
    """The k largest of relu((x - b_dec) W_enc + b_enc); a transcoder subtracts no bias."""
    stored = _tensors(folder.path / "sae.safetensors")
    k = read_json(folder.path / "cfg.json")["k"]
    state = {
        "W_enc": stored["encoder.weight"].T.contiguous(), "b_enc": stored["encoder.bias"],
        "W_dec": stored["W_dec"], "b_dec": stored["b_dec"],
    }  # fmt: skip
    return _config(folder, "topk", b_dec_to_input=not folder.transcoder, k=k), state


def _gemma_scope_2(folder: SAEFolder) -> Converted:
    """relu(z) where z > threshold; b_dec is not subtracted."""
    stored = _tensors(folder.path / "params.safetensors")
    state = {name.replace("w_", "W_"): value for name, value in stored.items()}
    if folder.architecture == "jumprelu_skip_transcoder":
        state["W_skip"] = state.pop("affine_skip_connection").T.contiguous()
    extra = {"d_out": folder.d_in} if folder.transcoder else {}
    return _config(folder, folder.architecture, b_dec_to_input=False, **extra), state


def _gemma_scope(folder: SAEFolder) -> Converted:
    return _config(folder, "jumprelu", b_dec_to_input=False), _tensors(folder.path / "params.npz")


# What dictionary_learning calls SAELens' tensors, by class in several ways; weights of linear layers lie the other way.
_DICTIONARY_NAMES = {
    "b_dec": ("b_dec", "bias", "decoder_bias", "decoder.bias"), "b_enc": ("b_enc", "encoder.bias"),
    "b_gate": ("gate_bias",), "b_mag": ("mag_bias",), "r_mag": ("r_mag",), "threshold": ("threshold",),
    "W_enc": ("W_enc",), "W_dec": ("W_dec",),
}  # fmt: skip


def _dictionary_learning(folder: SAEFolder) -> Converted:
    """By class: two multiply features by decoder norms, two never subtract a bias, two have one threshold for all."""
    trainer = read_json(folder.path / "config.json")["trainer"]
    kind, stored = trainer["dict_class"], _tensors(folder.path / "ae.pt")
    state = {
        name: next(stored[theirs] for theirs in names if theirs in stored)
        for name, names in _DICTIONARY_NAMES.items()
        if any(theirs in stored for theirs in names)
    }
    state |= {
        name: stored[theirs].T.contiguous()
        for name, theirs in (("W_enc", "encoder.weight"), ("W_dec", "decoder.weight"))
        if theirs in stored
    }
    if kind in ("GatedAutoEncoder", "JumpReluAutoEncoder"):
        state = _unit_decoder(state)
    architecture = "jumprelu" if folder.architecture.endswith("batchtopk") else folder.architecture
    if architecture == "jumprelu":
        state["threshold"] = state["threshold"].expand(folder.width).clone()
    else:
        state.pop("threshold", None)  # TopK keeps one that its encoder does not use
    extra = {"k": int(stored["k"]) if "k" in stored else trainer["k"]} if architecture == "topk" else {}
    subtract = kind not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    return _config(folder, architecture, b_dec_to_input=subtract, **extra), state


def _llama_scope(folder: SAEFolder) -> Converted:
    """Inputs are scaled by sqrt(d) over their average norm; the one threshold is given for unscaled ones."""
    config = read_json(folder.path / "hyperparams.json")
    stored = _tensors(folder.path / "checkpoints" / "final.safetensors")
    scale = folder.d_in**0.5 / config["dataset_average_activation_norm"]["in"]
    bias = stored["encoder.bias"]
    state = {
        "W_enc": (stored["encoder.weight"].T * scale).contiguous(),
        "W_dec": (stored["decoder.weight"].T / scale).contiguous(),
        "b_enc": bias,
        "b_dec": stored["decoder.bias"] / scale,
        "threshold": bias.new_full(bias.shape, config["jump_relu_threshold"] * scale),
    }
    return _config(folder, "jumprelu", b_dec_to_input=False), state


def _qwen_scope(folder: SAEFolder) -> Converted:
    """The k largest of relu(z), k by the repository's name; b_dec is not subtracted, and matrices lie the other way."""
    stored = _tensors(folder.path)
    k = re.findall(r"SAE-Res-[^/]+-L0_(\d+)", folder.path.absolute().as_posix())[-1]
    state = {name: value.T.contiguous() if name in ("W_enc", "W_dec") else value for name, value in stored.items()}
    state = {name: state[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    return _config(folder, "topk", b_dec_to_input=False, k=int(k)), state


CONVERTERS: dict[str, Callable[[SAEFolder], Converted]] = {
    "sae_lens": _sae_lens,
    "sparsify": _sparsify,
    "gemma_scope_2": _gemma_scope_2,
    "gemma_scope": _gemma_scope,
    "dictionary_learning": _dictionary_learning,
    "llama_scope": _llama_scope,
    "qwen_scope": _qwen_scope,
}
