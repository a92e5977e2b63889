"""Fine-tuning a small model on generated problems, on a CPU: a LoRA adapter, or every weight of the layers.

    train(base, train_groups(2100), out, settings=TrainingSettings(), work=Path("checkpoints"))

Two runs on one machine with one thread count give the same weights.
"""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stethoscope_demo.items import Item

log = logging.getLogger(__name__)

MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How to train.

    Attributes:
        batch: sequences to a step.
        learning_rate: AdamW's peak, after a warm-up of 20 steps and before a cosine to zero.
        rank: of the LoRA adapter; 0 trains the layers' own matrices instead, and the result is a checkpoint.
    """

    steps: int = 300
    batch: int = 7
    learning_rate: float = 1e-3
    rank: int = 16
    seed: int = 0


def train(
    base: Path, groups: Iterator[list[Item]], out: Path, *, settings: TrainingSettings, work: Path | None = None
) -> None:
    """Train on groups of problems, a sequence each, and write an adapter or a checkpoint in bf16.

    Args:
        groups: at least ``steps * batch``.
        work: a folder for checkpoints, from which a run that was stopped goes on.
    """
    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ALL_ATTENTION_FUNCTIONS.register("grouped", _attention)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    attention, model.config._attn_implementation = model.config._attn_implementation, "grouped"
    if settings.rank:
        config = LoraConfig(
            r=settings.rank, lora_alpha=2 * settings.rank, target_modules=MATRICES, task_type="CAUSAL_LM", bias="none"
        )
        # PEFT would keep the adapter in fp32 and cast every activation; bf16 products with fp32 masters are faster.
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.split(".")[-2] in MATRICES)
    live = [p for p in model.parameters() if p.requires_grad]
    masters = [p.detach().float().clone().requires_grad_() for p in live]
    optimizer = torch.optim.AdamW(masters, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings.steps))
    first = 0
    checkpoint = work / "checkpoint.pt" if work else None
    if checkpoint and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        first = state["step"]
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        with torch.no_grad():
            for master, saved in zip(masters, state["masters"], strict=True):
                master.copy_(saved)
        _publish(masters, live)
        for _ in range(first * settings.batch):
            next(groups)
        log.info("resumed at step %d", first)

    start, tokens, losses = time.monotonic(), 0, list[float]()
    for step in range(first, settings.steps):
        ids, labels = _batch(groups, settings.batch, tokenizer)
        loss = _loss(model.get_base_model() if settings.rank else model, ids, labels)
        loss.backward()
        for master, parameter in zip(masters, live, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        scheduler.step()
        _publish(masters, live)
        tokens += ids.numel()
        losses.append(loss.item())
        done = step + 1
        if done % 20 == 0 or done == first + 5:
            seconds = time.monotonic() - start
            left = seconds / (done - first) * (settings.steps - done) / 60
            mean, speed = sum(losses) / len(losses), tokens / seconds
            log.info("step %d/%d  loss %.4f  %.0f tokens/s  %.1f min left", done, settings.steps, mean, speed, left)
            losses.clear()
        if checkpoint and done % 50 == 0:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            state = {"step": done, "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
            torch.save({**state, "masters": masters}, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").rename(checkpoint)
    if settings.rank:
        _save_adapter(model, out)
    else:
        model.config._attn_implementation = attention
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)


def _rate(step: int, steps: int) -> float:
    """Warm-up over 20 steps, then a cosine to zero."""
    return min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _batch(groups: Iterator[list[Item]], size: int, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Token ids [size, length], and labels of equal shape with -100 where nothing is learned."""
    rows = [_tokens(next(groups), tokenizer) for _ in range(size)]
    length = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(size, length, dtype=torch.long)
    labels = torch.full((size, length), -100)
    for row, (row_ids, row_labels) in enumerate(rows):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        labels[row, : len(row_ids)] = torch.tensor(row_labels)
    return ids, labels


def _tokens(group: list[Item], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """One sequence in the tested form, with a loss on every solution and on the `Problem:` that ends it."""
    text, spans = "", []
    for item in group:
        text += item.prompt
        start = len(text)
        text += f" {item.solution}"
        spans.append((start, len(text)))
        spans.append((len(text), len(text) + len("\n\nProblem")))
        text += "\n\n"
    text += "Problem:"
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    ids = encoded["input_ids"]
    labels = [
        token if any(low < end and begin < high for low, high in spans) else -100
        for token, (begin, end) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    return ids, labels


def _loss(causal: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy; the 49152-wide head runs at labelled positions only."""
    # Rows are padded on the right and attention is causal, so no mask is needed: padding is never looked at.
    hidden = causal.model(input_ids=ids, use_cache=False).last_hidden_state  # [size, length, width]
    wanted = labels[:, 1:] != -100
    logits = causal.lm_head(hidden[:, :-1][wanted]).float()  # [labelled, vocabulary]
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:][wanted])


def _attention(
    module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Causal attention as two batched products: the fused kernel is slow in bf16 on a CPU, above all backward."""
    n, heads, length, d = q.shape
    groups = k.shape[1]
    rows = (q * scaling).reshape(n * groups, -1, d)  # the heads that share a key head stand below each other
    scores = torch.bmm(rows, k.reshape(n * groups, length, d).transpose(1, 2)).view(-1, length, length)
    ahead = torch.full((length, length), -torch.inf, dtype=scores.dtype).triu(1)
    weights = (scores + ahead).softmax(-1).view(n * groups, -1, length)
    read = torch.bmm(weights, v.reshape(n * groups, length, d)).view(n, heads, length, d)
    return read.transpose(1, 2).contiguous(), None


@torch.no_grad()
def _publish(masters: list[Tensor], live: list[torch.nn.Parameter]) -> None:
    for master, parameter in zip(masters, live, strict=True):
        parameter.copy_(master)


def _save_adapter(model: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.to(torch.bfloat16).contiguous() for name, t in get_peft_model_state_dict(model).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE_NAME
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # PEFT keeps a set: the file would differ between runs
    config.save_pretrained(folder)
