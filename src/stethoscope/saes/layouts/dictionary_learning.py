"""dictionary_learning by Marks and others; its configuration is its trainer's."""

import re
from typing import Any

from stethoscope.saes.layouts.base import Converted, SAEFolder, State, Stored, renamed, sae_lens_config, unit_decoder

_ARCHITECTURES = {
    "AutoEncoder": "standard", "AutoEncoderNew": "standard", "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu", "AutoEncoderTopK": "topk", "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "matryoshka_batchtopk",
}  # fmt: skip
# SAELens' names of its tensors, whose own differ by class; weights of linear layers lie the other way.
_NAMES = {
    "encoder.weight": "W_enc", "decoder.weight": "W_dec", "b_dec": "b_dec", "bias": "b_dec", "decoder_bias": "b_dec",
    "decoder.bias": "b_dec", "b_enc": "b_enc", "encoder.bias": "b_enc", "gate_bias": "b_gate", "mag_bias": "b_mag",
    "r_mag": "r_mag", "threshold": "threshold", "W_enc": "W_enc", "W_dec": "W_dec",
}  # fmt: skip
_LINEAR = {"W_enc": "encoder.weight.T", "W_dec": "decoder.weight.T"}


def read(stored: Stored) -> SAEFolder:
    trainer, buffer = stored.table("trainer"), stored.table("buffer")
    kind = str(trainer.get("dict_class"))
    if kind not in _ARCHITECTURES:
        stored.problems.append(f"the class `{kind}` is not supported; these are: {', '.join(_ARCHITECTURES)}")
    if (io := buffer.get("io", "out")) != "out":
        stored.problems.append(f"it was made from its module's `{io}`; only `out` is supported")
    site = re.sub(r"_layer_\d+$", "", str(trainer.get("submodule_name") or "resid_post"))
    hook_name = f"blocks.{trainer['layer']}.hook_{site}" if "layer" in trainer else ""
    sizes = trainer.get("activation_dim"), trainer.get("dict_size")
    tensors = {name: name for name in _LINEAR} if "W_enc" in stored.shapes else _LINEAR
    architecture = _ARCHITECTURES.get(kind, "standard")
    return stored.folder(hook_name, architecture, sizes, tensors, model_name=trainer.get("lm_name"))


def convert(folder: SAEFolder, config: dict[str, Any], tensors: State) -> Converted:
    """By class: two multiply features by decoder norms, two never subtract a bias, two have one threshold for all."""
    trainer = config["trainer"]
    kind = trainer["dict_class"]
    state = renamed(tensors, {_NAMES[name]: name for name in tensors if name in _NAMES})
    for name in _LINEAR if "encoder.weight" in tensors else ():
        state[name] = state[name].T.contiguous()
    if kind in ("GatedAutoEncoder", "JumpReluAutoEncoder"):
        state = unit_decoder(state)
    architecture = "jumprelu" if folder.architecture.endswith("batchtopk") else folder.architecture
    if architecture == "jumprelu":
        state["threshold"] = state["threshold"].expand(folder.width).clone()
    else:
        state.pop("threshold", None)  # TopK keeps one that its encoder does not use
    extra = {"k": int(tensors["k"]) if "k" in tensors else trainer["k"]} if architecture == "topk" else {}
    subtract = kind not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    return sae_lens_config(folder, architecture, b_dec_to_input=subtract, **extra), state
