"""What the documentation's commands work on: a base, a fine-tune, SAEs, texts, tasks and logs, all tiny."""

import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from sae_lens import StandardSAE, StandardSAEConfig
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

MATH = Path(__file__).parents[1] / "evaluation" / "data" / "math"
LINES = {
    "math": "12+34=46 and 7*8=56 ",
    "mixed": "the cat sat, 3+4=7, and a quiet day ended ",
    "general": "the cat sat on the mat ",
    "code": "def f(x): return x ",
    "other": "a quiet day at the sea ",
    "calibration-math": "56+11=67 ",
    "calibration-general": "a dog lay on a rug ",
}


def make_world(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Fill a folder; everything has the names that the documentation uses."""
    model.config.max_position_embeddings = 4096  # four shots, a token per byte
    for name in ("base", "my-model"):
        model.to(torch.bfloat16).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "base"),
        LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False),
    )
    adapted.save_pretrained(folder / "tuned")
    write_saes(folder / "saes", model.config.num_hidden_layers, model.config.hidden_size)
    (folder / "data").mkdir()
    for name, words in LINES.items():
        rows = [{"text": words * (2 + i % 3) + f"{name} {i}"} for i in range(24)]
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(MATH, folder / "math")
    (folder / "tasks").mkdir()
    items = [{"problem": f"{a}+{b}", "answer": str(a + b)} for a in range(2, 6) for b in range(1, 4)]
    (folder / "tasks" / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
    return folder


def write_saes(folder: Path, layers: int, d: int) -> None:
    """SAEs that hold every direction and its opposite: their variance explained is 1."""
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    for layer in range(layers):
        sae = StandardSAE(StandardSAEConfig(d_in=d, d_sae=2 * d, apply_b_dec_to_input=False))
        sae.W_enc.data, sae.W_dec.data = both.T.contiguous(), both.clone()
        sae.cfg.metadata.hook_name = f"model.layers.{layer}"
        sae.save_model(folder / f"layer_{layer}")


def write_logs(folder: Path, model: Path, tasks: Path) -> None:
    """What `lm_eval --output_path FOLDER --log_samples` leaves of a model on the task of the quickstart."""
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    tracker = EvaluationTracker(output_path=str(folder))
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        tasks=["my_task"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=16,
        device="cpu",
        bootstrap_iters=0,
        log_samples=True,
        evaluation_tracker=tracker,
    )
    logged = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=logged)
    for task, rows in logged.items():
        tracker.save_results_samples(task_name=task, samples=rows)
