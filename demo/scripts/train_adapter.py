"""Train the demo's tuned sibling: a LoRA adapter for SmolLM2-135M-Instruct on generated mathematics.

    python demo/scripts/train_adapter.py --base CHECKPOINT --out demo/src/stethoscope_demo/adapter

Writes a PEFT adapter in bf16. Stopped, it goes on from its last checkpoint when started again with the same `--work`
folder. Two runs on one machine with one thread count give the same weights.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stethoscope_demo.items import Item, train_groups

MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="the base model as an ordinary checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--work", type=Path, help="folder for checkpoints of this run; none without it")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=7, help="sequences a step; one of each subject by default")
    parser.add_argument("--problems", type=int, default=4, help="problems of one subject in a sequence")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    ALL_ATTENTION_FUNCTIONS.register("grouped", _attention)
    base = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.bfloat16)
    base.config._attn_implementation = "grouped"
    config = LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, target_modules=MATRICES, task_type="CAUSAL_LM", bias="none"
    )
    # PEFT would keep the adapter in fp32 and cast every activation; bf16 products with fp32 masters are faster here.
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    live = [p for p in model.parameters() if p.requires_grad]
    masters = [p.detach().float().clone().requires_grad_() for p in live]
    optimizer = torch.optim.AdamW(masters, lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, options.steps))

    groups = train_groups(options.steps * options.batch, seed=options.seed, problems=options.problems)
    first = 0
    checkpoint = options.work / "checkpoint.pt" if options.work else None
    if checkpoint and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        first = state["step"]
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        with torch.no_grad():
            for master, saved in zip(masters, state["masters"], strict=True):
                master.copy_(saved)
        _publish(masters, live)
        for _ in range(first * options.batch):
            next(groups)
        print(f"resumed at step {first}", flush=True)

    start, tokens, losses = time.monotonic(), 0, list[float]()
    for step in range(first, options.steps):
        ids, labels = _batch(groups, options.batch, tokenizer)
        loss = _loss(model, ids, labels)
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
            left = seconds / (done - first) * (options.steps - done) / 60
            speed = f"{tokens / seconds:.0f} tokens/s  {left:.1f} min left"
            print(f"step {done}/{options.steps}  loss {sum(losses) / len(losses):.4f}  {speed}", flush=True)
            losses.clear()
        if checkpoint and done % 50 == 0:
            options.work.mkdir(parents=True, exist_ok=True)
            state = {"step": done, "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
            torch.save({**state, "masters": masters}, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").rename(checkpoint)
            _save(model, options.work / "adapter")
    _save(model, options.out)


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


def _loss(model: torch.nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy; the 49152-wide head runs at labelled positions only."""
    causal = model.get_base_model()  # type: ignore[operator]
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


def _save(model: torch.nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.to(torch.bfloat16).contiguous() for name, t in get_peft_model_state_dict(model).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"]  # type: ignore[index,union-attr]
    config.base_model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # PEFT keeps a set: the file would differ between runs
    config.save_pretrained(folder)


if __name__ == "__main__":
    main()
