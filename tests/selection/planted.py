"""Small real models whose new skill sits in known layers: trained there on the target, equal noise elsewhere."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from stethoscope.checkpoints.names import parse_name
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.models.load import load_model
from stethoscope.text.tokens import TokenBatch, batches, tokenize

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 259, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Planted:
    model: PreTrainedModel
    task_vector: TaskVector
    texts: dict[str, list[TokenBatch]]
    layers: tuple[int, ...]


def documents(kind: str, count: int, seed: int) -> list[str]:
    """Target: sums written out. Control: words in any order."""
    rng = random.Random(f"{kind} {seed}")
    if kind == "target":
        pairs = [(rng.randint(0, 9), rng.randint(0, 9)) for _ in range(count)]
        return [f"{a}+{b}={a + b};" * 3 for a, b in pairs]
    words = ["river", "stone", "cloud", "maple", "ember"]
    return [" ".join(rng.choices(words, k=rng.randint(3, 6))) for _ in range(count)]


def train(model: PreTrainedModel, texts: list[str], tokenizer, parameters: list[torch.nn.Parameter]) -> None:
    model.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    found = list(batches(tokenize(texts, tokenizer), tokenizer, batch_tokens=512))
    for step in range(24):
        batch = found[step % len(found)]
        labels = batch.input_ids.masked_fill(~batch.attention_mask, -100)
        model(input_ids=batch.input_ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False)


def plant(
    folder: Path,
    tokenizer,
    *,
    family: str = "llama",
    depth: int = 6,
    layers: Sequence[int] = (1, 4),
    seed: int = 0,
    count: int = 24,
    batch_tokens: int = 512,
) -> Planted:
    """A base, and a tuned whose ``layers`` were trained on target text; the other layers got noise of equal norm."""
    torch.manual_seed(seed)
    sizes = SIZES | {"num_hidden_layers": depth}
    base = (
        LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.1))
        if family == "llama"
        else Gemma3ForCausalLM(Gemma3TextConfig(**sizes, head_dim=8, initializer_range=0.1, sliding_window=16))
    ).eval()
    train(base, documents("control", 64, seed + 1000), tokenizer, list(base.parameters()))
    base.save_pretrained(folder / "base")
    before = {name: p.clone() for name, p in base.named_parameters()}
    own = [p for name, p in base.named_parameters() if parse_name(name).layer in layers]
    both = documents("target", 64, seed + 2000) + documents("control", 64, seed + 3000)
    train(base, both, tokenizer, own)
    with torch.no_grad():
        norms: dict[str, list[float]] = {}
        for name, p in base.named_parameters():
            if parse_name(name).layer in layers:
                norms.setdefault(name.split(".", 3)[3], []).append(float((p - before[name]).norm()))
        for name, p in base.named_parameters():
            if parse_name(name).layer not in (None, *layers):
                found = norms[name.split(".", 3)[3]]
                noise = torch.randn_like(p)
                p.add_(noise * (sum(found) / len(found) / float(noise.norm())))
    base.save_pretrained(folder / "tuned")
    texts = {
        kind: list(batches(tokenize(documents(kind, count, seed), tokenizer), tokenizer, batch_tokens=batch_tokens))
        for kind in ("target", "control")
    }
    return Planted(
        model=load_model(folder / "base", dtype=torch.float32),
        task_vector=open_task_vector(open_checkpoint(folder / "base"), folder / "tuned"),
        texts=texts,
        layers=tuple(layers),
    )
