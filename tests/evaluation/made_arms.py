"""Tiny real models of three families, checkpoints of them, and tasks for them on disk."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SHOTS = [("two and two", "four"), ("three and one", "four"), ("five less two", "three")]
ITEMS = [
    f"{a} {op} {b}" for a in ("one", "two", "seven", "eleven") for op in ("and", "less") for b in ("one", "twenty")
]

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/{name}.test.jsonl
    train: {folder}/{name}.train.jsonl
output_type: generate_until
test_split: test
fewshot_split: train
num_fewshot: 2
fewshot_config:
  sampler: {sampler}
doc_to_text: "Problem: {{{{problem}}}}\\nSolution:"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
generation_kwargs:
  until: {until}
  do_sample: false
  max_gen_toks: 24
filter_list:
  - name: answer
    filter:
      - function: regex
        regex_pattern: "([a-z]+)"
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def task_writer(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function that writes a task and returns the folder for `include_path`."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", scratch / "cache")
    folder = scratch / "tasks"
    folder.mkdir()

    def write(
        name: str = "sums",
        *,
        until: tuple[str, ...] = tuple("aeiou013 KLMNOP"),
        sampler: str = "first_n",
        items: int = 16,
    ) -> Path:
        rows = {"test": [(p, "x") for p in ITEMS[:items]], "train": SHOTS}
        for split, pairs in rows.items():
            lines = [json.dumps({"problem": p, "answer": a}) + "\n" for p, a in pairs]
            (folder / f"{name}.{split}.jsonl").write_text("".join(lines))
        text = TASK.format(name=name, folder=folder, until=json.dumps(until), sampler=sampler)
        (folder / f"{name}.yaml").write_text(text)
        return folder

    return write


def _stir(model: PreTrainedModel) -> PreTrainedModel:
    """Larger weights, so that what a random model writes depends on what it reads."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 2.0 / weight.shape[-1] ** 0.5, generator=generator)
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight *= 0.1  # the context decides, not the last token
    return model.eval().requires_grad_(False)


def save_pair(scratch: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """A base and an edited checkpoint on disk that write different answers."""
    folders = {name: scratch / "models" / name for name in ("base", "edited")}
    model = build("llama")
    for name, folder in folders.items():
        if name == "edited":
            model.model.layers[1].mlp.down_proj.weight.mul_(3)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folders


def build(family: str) -> PreTrainedModel:
    # heads of their own: a tied one makes a random model repeat what it just read
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
    if family == "gpt2":
        config = GPT2Config(vocab_size=259, n_embd=32, n_layer=3, n_head=4, n_positions=512, **tokens)
        return _stir(GPT2LMHeadModel(config))
    if family.startswith("gemma3"):
        gemma = Gemma3TextConfig(
            vocab_size=259,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            query_pre_attn_scalar=1,
            max_position_embeddings=512,
            sliding_window=32 if "short" in family else 256,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            **tokens,
        )
        return _stir(Gemma3ForCausalLM(gemma))
    llama = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        **tokens,
    )
    return _stir(LlamaForCausalLM(llama))
