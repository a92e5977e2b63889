"""dictionary_learning by Marks and others; its configuration is its trainer's."""

import re
from typing import Any

from stethoscope.saes.layouts.base import Claim, Converted, Layout, SAEFolder, Stored, sae_lens_config, unit_decoder
from stethoscope.saes.layouts.files import State, renamed, table

_ARCHITECTURE_OF_CLASS = {
    "AutoEncoder": "standard", "AutoEncoderNew": "standard", "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu", "AutoEncoderTopK": "topk", "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "matryoshka_batchtopk",
}  # fmt: skip
# Its names of tensors, which differ by class, and SAELens'; weights of linear layers lie the other way.
_NAMES = {
    "b_dec": "b_dec", "bias": "b_dec", "decoder_bias": "b_dec", "decoder.bias": "b_dec", "b_enc": "b_enc",
    "encoder.bias": "b_enc", "gate_bias": "b_gate", "mag_bias": "b_mag", "r_mag": "r_mag", "threshold": "threshold",
    "W_enc": "W_enc", "W_dec": "W_dec",
}  # fmt: skip
_TURNED = {"encoder.weight": "W_enc", "decoder.weight": "W_dec"}


def read(stored: Stored) -> Claim:
    trainer, buffer = table(stored.config.get("trainer")), table(stored.config.get("buffer"))
    kind = str(trainer.get("dict_class"))
    if kind not in _ARCHITECTURE_OF_CLASS:
        stored.problems.append(f"the class `{kind}` is not supported; these are: {', '.join(_ARCHITECTURE_OF_CLASS)}")
    if (io := buffer.get("io", "out")) != "out":
        stored.problems.append(f"it was made from its module's `{io}`; only `out` is supported")
    site = re.sub(r"_layer_\d+$", "", str(trainer.get("submodule_name") or "resid_post"))
    hook_name = f"blocks.{trainer['layer']}.hook_{site}" if "layer" in trainer else ""
    d_in, width = trainer.get("activation_dim"), trainer.get("dict_size")
    wanted = {"encoder.weight": (width, d_in), "decoder.weight": (d_in, width)}
    if "W_enc" in stored.shapes:
        wanted = {"W_enc": (d_in, width), "W_dec": (width, d_in)}
    architecture = _ARCHITECTURE_OF_CLASS.get(kind, "standard")
    return Claim(hook_name, architecture, d_in, width, trainer.get("lm_name"), wanted)


def convert(folder: SAEFolder, config: dict[str, Any], tensors: State) -> Converted:
    """By class: two multiply features by decoder norms, two never subtract a bias, two have one threshold for all."""
    trainer = config["trainer"]
    kind = trainer["dict_class"]
    names, turned = ({ours[name]: name for name in tensors if name in ours} for ours in (_NAMES, _TURNED))
    state = renamed(tensors, names, turned)
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


LAYOUT = Layout(marker="ae.pt", config="config.json", weights="ae.pt", read=read, convert=convert)
