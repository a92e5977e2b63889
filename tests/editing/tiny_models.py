"""A tiny real Transformers model of every layout, its fine-tune, and both on disk."""

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 48, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip


def _small(model: str, **more: object) -> Callable[[], PreTrainedModel]:
    config = getattr(transformers, f"{model}Config", None) or getattr(transformers, f"{model}TextConfig")
    return lambda: getattr(transformers, f"{model}ForCausalLM")(config(**SMALL | more))


def _gpt2() -> PreTrainedModel:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=48, n_positions=64, **ids)
    return transformers.GPT2LMHeadModel(config)


def gemma3_text() -> PreTrainedModel:
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SMALL, head_dim=8))


def gemma3_multimodal() -> PreTrainedModel:
    text = transformers.Gemma3TextConfig(**SMALL, head_dim=8)
    vision = transformers.SiglipVisionConfig(**VISION)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


LAYOUTS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama tied": _small("Llama", tie_word_embeddings=True),
    "llama untied": _small("Llama", tie_word_embeddings=False),
    "qwen2": _small("Qwen2", tie_word_embeddings=True),
    "qwen3": _small("Qwen3", head_dim=8),
    "mistral": _small("Mistral"),
    "gemma2": _small("Gemma2", head_dim=8),
    "gemma3 text": gemma3_text,
    "gemma3 multimodal": gemma3_multimodal,
    "gpt2": _gpt2,
    "phi": _small("Phi"),
    "phi3": _small("Phi3"),
    "gpt-neox": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"})
    ),
    "mixtral": _small("Mixtral", num_local_experts=2),
    "qwen2 moe": _small(
        "Qwen2Moe", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8
    ),
    "qwen3 moe": _small("Qwen3Moe", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8),
}


def make(
    build: Callable[[], PreTrainedModel], *, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    """A model with random weights; norms and biases are random too, or an edit of them could not be seen."""
    torch.manual_seed(seed)
    model = build().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype)


def tune(model: PreTrainedModel, *, seed: int = 1) -> PreTrainedModel:
    """The same model after a fine-tune that changed every parameter. Changes the model itself."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_((0.05 * torch.randn(parameter.shape)).to(parameter.dtype))
    return model


def save_pair(
    build: Callable[[], PreTrainedModel], folder: Path, *, dtype: torch.dtype = torch.bfloat16, shard: str = "5GB"
) -> tuple[Path, Path]:
    """Base and tuned as `save_pretrained` writes them."""
    model = make(build, dtype=dtype)
    model.save_pretrained(folder / "base", max_shard_size=shard)
    tune(model).save_pretrained(folder / "tuned", max_shard_size=shard)
    return folder / "base", folder / "tuned"


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor on disk by stored name."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def rename(source: Path, target: Path, renamed: Callable[[str], str | None]) -> Path:
    """A copy of a one-file checkpoint with other tensor names; None drops a tensor."""
    target.mkdir()
    tensors = {new: tensor for name, tensor in stored(source).items() if (new := renamed(name)) is not None}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target
