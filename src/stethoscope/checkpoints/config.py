"""In what two config.json differ, of what changes outputs: compared as they are written, without Transformers.

Whatever is not known to be without effect counts. Old and new spellings of the rotary embedding are the same.
"""

from collections.abc import Iterator, Mapping
from typing import Any

# Names, types, training and generation; shapes, which the tensors show themselves.
COSMETIC = frozenset(
    {"architectures", "auto_map", "cache_implementation", "dtype", "gradient_checkpointing", "head_dim", "id2label",
     "initializer_range", "label2id", "max_window_layers", "name_or_path", "num_attention_heads", "num_hidden_layers",
     "num_key_value_heads", "num_labels", "original_vocab_size", "output_attentions", "output_hidden_states",
     "output_router_logits", "pretraining_tp", "problem_type", "quantization_config", "return_dict",
     "task_specific_params", "tokenizer_class", "torch_dtype", "use_bfloat16", "use_cache", "vocab_size"}
)  # fmt: skip
COSMETIC_ENDS = ("dropout", "_pdrop", "_token_id", "_token_ids", "_token_index", "_version", "aux_loss_coef")
DEFAULTS = {"rope_theta": 10000, "rope_type": "default"}
TIED = "tie_word_embeddings"  # the tensors show it, too, where one config does not say


def differences(one: Mapping[str, Any], two: Mapping[str, Any]) -> tuple[dict[str, tuple[Any, Any]], tuple[str, ...]]:
    """Compare two configs, of a multimodal model what is its text part's.

    Returns:
        key -> both values; and keys that only one config has, of which Transformers' default may be the same.
    """
    left, right = (dict(_flat(_text(config))) for config in (one, two))
    values: dict[str, tuple[Any, Any]] = {}
    unknown = []
    for key in sorted(left.keys() | right.keys()):
        a, b = (side.get(key, DEFAULTS.get(key)) for side in (left, right))
        if a == b or (_is_nothing(a) and _is_nothing(b)):
            continue
        if key == "rope_type" or (key in left and key in right):
            values[key] = (a, b)
        elif key != TIED:
            unknown.append(key)
    if "rope_type" not in values and left.get("rope_type", "default") == "default":
        values.pop("max_position_embeddings", None)  # how far it was trained, then, and no more
    return values, tuple(unknown)


def config_notes(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> tuple[str, ...]:
    """What is said of configs that differ."""
    values, unknown = differences(base, tuned)
    notes = []
    if values:
        named = ", ".join(f"`{key}` ({a} in base, {b} in tuned)" for key, (a, b) in values.items())
        notes.append(
            f"the configs of base and tuned differ in what changes outputs: {named}; an edit has the base's config, the"
            " arm `tuned` has tuned's"
        )
    if unknown:
        keys = ", ".join(f"`{key}`" for key in unknown)
        notes.append(f"only one of the configs says {keys}; Transformers' default may be the same")
    return tuple(notes)


def _text(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's config, with the rotary embedding's values beside the others."""
    part = config.get("text_config")
    text = {TIED: config.get(TIED), **part} if isinstance(part, Mapping) else dict(config)
    for name in ("rope_scaling", "rope_parameters"):
        rope = text.pop(name, None)
        if isinstance(rope, Mapping):
            # Gemma 3: values of their own for layers with a window
            whole, local = (rope.get(f"{kind}_attention") for kind in ("full", "sliding"))
            if isinstance(whole, Mapping) and isinstance(local, Mapping):
                rope = {**whole, "rope_local_base_freq": local.get("rope_theta")}
            text |= rope
    if "type" in text:
        text["rope_type"] = text.pop("type")
    if text.get("use_sliding_window") is False:
        text["sliding_window"] = None
    return text


def _flat(value: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if key in COSMETIC or key.startswith("_") or key.endswith(COSMETIC_ENDS):
            continue
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{before}{key}.")
        else:
            yield before + key, inner


def _is_nothing(value: Any) -> bool:
    """Whether a value is what a missing one means: off, none, or attention that is full in every layer."""
    return not value or (isinstance(value, list) and set(map(str, value)) == {"full_attention"})
