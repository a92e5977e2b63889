"""One canonical name for every tensor, whichever class saved it: `layers.12.self_attn.q_proj.weight`.

A stored name is split at its dots and looked up component by component in the tables below: what stands in front
of the decoder, what holds its blocks, what a block is made of. Nothing is matched by substring or pattern, so a
name the tables do not know keeps its own spelling and is of kind "other". Pure functions; imports no tensor library.
"""

from functools import lru_cache
from typing import Literal, NamedTuple, get_args

Kind = Literal["attention", "mlp", "norm", "embedding", "head", "vision", "buffer", "other"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# PEFT puts this in front of whatever the model itself calls a tensor.
ADAPTER_PREFIX = "base_model.model."

# What stands in front of the decoder, the longer before the shorter: `model.language_model` is not `model`.
DECODERS: tuple[tuple[str, ...], ...] = (
    ("model", "language_model", "model"),
    ("language_model", "model"),  # Gemma 3 as published
    ("model", "language_model"),  # Gemma 3 at run time since Transformers 4.52
    ("model", "text_model"),
    ("model", "decoder"),
    ("language_model",),
    ("gpt_neox",),
    ("transformer",),
    ("model",),
    (),
)
BLOCKS = frozenset({"layers", "h", "blocks"})

# Tensors of the decoder outside its blocks: stored module -> canonical module and kind.
OUTSIDE_BLOCKS: dict[str, tuple[str, Kind]] = {
    **dict.fromkeys(("embed_tokens", "wte", "embed_in", "word_embeddings"), ("embed_tokens", "embedding")),
    **dict.fromkeys(("embed_positions", "wpe"), ("embed_positions", "embedding")),
    "word_embeddings_layernorm": ("embed_norm", "embedding"),
    **dict.fromkeys(("norm", "ln_f", "norm_f", "final_layernorm", "final_layer_norm"), ("norm", "norm")),
    **dict.fromkeys(("lm_head", "embed_out"), ("lm_head", "head")),
}

# A row for each token: a fine-tune with added tokens has more.
VOCABULARY = frozenset({"embed_tokens.weight", "lm_head.weight", "lm_head.bias"})

# What a block is made of, by the first component behind its number.
BLOCK_MODULES: dict[str, Kind] = {
    **dict.fromkeys(("self_attn", "attn", "attention", "self_attention", "linear_attn"), "attention"),
    **dict.fromkeys(("mlp", "feed_forward", "ffn", "fc1", "fc2"), "mlp"),
    **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), "norm"),
    **dict.fromkeys(("pre_feedforward_layernorm", "post_feedforward_layernorm"), "norm"),
    **dict.fromkeys(("post_self_attn_layernorm", "post_mlp_layernorm"), "norm"),
    **dict.fromkeys(("attention_norm", "ffn_norm", "self_attn_layer_norm", "final_layer_norm"), "norm"),
    **dict.fromkeys(("ln_1", "ln_2", "ln_attn", "ln_mlp", "norm_1", "norm_2"), "norm"),
}  # fmt: skip

# Mixtral's files and its run-time class call the same things differently.
RENAMED_MODULES = {"block_sparse_moe": "mlp"}
RENAMED_EXPERTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

# Not text: left alone by every plan that names layers. A leading `model` is dropped.
VISION = frozenset(
    {"vision_tower", "vision_model", "visual", "multi_modal_projector", "mm_projector", "connector"}
    | {"embed_vision", "audio_tower", "embed_audio"}
)

# Constants that some classes save and others recompute: copied with the base, never compared.
BUFFERS: frozenset[tuple[str, ...]] = frozenset(
    {("attn", "bias"), ("attn", "masked_bias"), ("attention", "bias"), ("attention", "masked_bias")}
    | {("self_attn", "rotary_emb", "inv_freq"), ("attention", "rotary_emb", "inv_freq")}
)


class TensorName(NamedTuple):
    """What a stored name means: its canonical spelling, its decoder layer (None outside the blocks), its kind."""

    canonical: str
    layer: int | None
    kind: Kind


@lru_cache(maxsize=65536)
def parse_name(stored: str) -> TensorName:
    """The meaning of a tensor's stored or run-time name; never fails, an unknown name is of kind "other".

    >>> parse_name("language_model.model.layers.3.self_attn.q_proj.weight")
    TensorName(canonical='layers.3.self_attn.q_proj.weight', layer=3, kind='attention')
    >>> parse_name("h.3.attn.c_attn.weight") == parse_name("transformer.h.3.attn.c_attn.weight")
    True
    """
    parts = tuple(stored.removeprefix(ADAPTER_PREFIX).split("."))
    outer = parts[1:] if parts[0] == "model" else parts
    if outer and outer[0] in VISION:
        # SigLIP's inner `vision_model` comes and goes with the version of Transformers that saved it.
        inner = outer[2:] if outer[:2] == ("vision_tower", "vision_model") else outer[1:]
        return TensorName(".".join((outer[0], *inner)), None, "vision")
    for prefix in DECODERS:
        if parts[: len(prefix)] == prefix and (found := _in_decoder(parts[len(prefix) :])):
            return found
    return TensorName(".".join(parts), None, "other")


def _in_decoder(parts: tuple[str, ...]) -> TensorName | None:
    if len(parts) >= 3 and parts[0] in BLOCKS and _is_number(parts[1]):
        module = RENAMED_MODULES.get(parts[2], parts[2])
        rest = parts[3:]
        if module == "mlp" and len(rest) >= 3 and rest[0] == "experts":
            rest = (*rest[:2], RENAMED_EXPERTS.get(rest[2], rest[2]), *rest[3:])
        kind: Kind = "buffer" if (module, *rest) in BUFFERS else BLOCK_MODULES.get(module, "other")
        return TensorName(".".join(("layers", parts[1], module, *rest)), int(parts[1]), kind)
    if len(parts) >= 2 and parts[0] in OUTSIDE_BLOCKS:
        module, kind = OUTSIDE_BLOCKS[parts[0]]
        return TensorName(".".join((module, *parts[1:])), None, kind)
    return None


def _is_number(text: str) -> bool:
    # "03" and "٣" also satisfy int(); accepting them would give one layer two names
    return text.isascii() and text.isdigit() and len(text) <= 6 and (text == "0" or text[0] != "0")
