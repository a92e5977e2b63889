"""What tests work on: tiny real models of every layout, SAEs, texts, tasks, planted task vectors, a whole folder."""

import json
import os
import random
import signal
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from stethoscope.checkpoints.names import parse_name
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.models.load import load_model
from stethoscope.text.tokens import TokenBatch, batches, tokenize

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BYTES = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, **TOKENS,
}  # fmt: skip
SMALL = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "num_hidden_layers": 3, **TOKENS,
}  # fmt: skip
# As Gemma's: BOS, contents stripped, no role for the system, whose prompt opens the first user's turn.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set loop_messages = messages[1:] %}{% else %}{% set first = '' %}{% set loop_messages = messages %}{% endif %}"
    "{% for m in loop_messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' + (first if loop.first else '')"
    " + (m['content'] | trim) + '<end>\n' }}{% endfor %}"
)
MATH = Path(__file__).parent / "evaluation" / "data" / "math"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, after `<pad>`, `<s>` and `</s>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=built, padding_side="right", **names)


def build(model: str, **config: Any) -> PreTrainedModel:
    """A causal model of a class of Transformers' with random weights."""
    kind = getattr(transformers, f"{model}Config", None)
    if kind is None or model == "Gemma3":
        kind = getattr(transformers, f"{model}TextConfig")
    return getattr(transformers, f"{model}ForCausalLM")(kind(**config)).eval().requires_grad_(False)


def make_llama(*, layers: int = 4, hidden: int = 32, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 2 * hidden}
    return build("Llama", **BYTES | sizes, tie_word_embeddings=True)


def small(model: str, **more: Any) -> Callable[[], PreTrainedModel]:
    return lambda: build(model, **SMALL | more)


def gpt2(**sizes: Any) -> PreTrainedModel:
    given = {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 48, "n_positions": 64, **TOKENS, **sizes}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**given)).eval()


def gemma3_multimodal() -> PreTrainedModel:
    sizes = {name: SMALL[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    vision = transformers.SiglipVisionConfig(**sizes, num_hidden_layers=1, image_size=28, patch_size=14)
    text = transformers.Gemma3TextConfig(**SMALL, head_dim=8)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
LAYOUTS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama tied": small("Llama", tie_word_embeddings=True),
    "llama untied": small("Llama", tie_word_embeddings=False),
    "qwen2": small("Qwen2", tie_word_embeddings=True),
    "qwen3": small("Qwen3", head_dim=8),
    "mistral": small("Mistral"),
    "gemma2": small("Gemma2", head_dim=8),
    "gemma3 text": small("Gemma3", head_dim=8),
    "gemma3 multimodal": gemma3_multimodal,
    "gpt2": gpt2,
    "phi": small("Phi"),
    "phi3": small("Phi3"),
    "gpt-neox": lambda: build("GPTNeoX", **{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
    "mixtral": small("Mixtral", num_local_experts=2),
    "qwen2 moe": small("Qwen2Moe", **EXPERTS, shared_expert_intermediate_size=8),
    "qwen3 moe": small("Qwen3Moe", **EXPERTS, head_dim=8),
}


def make(layout: str, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A model with random weights; norms and biases are random too, or an edit of them could not be seen."""
    torch.manual_seed(seed)
    return stir(LAYOUTS[layout]().eval().requires_grad_(False)).to(dtype)


def stir(model: PreTrainedModel) -> PreTrainedModel:
    """The model with every parameter changed a little."""
    for parameter in model.parameters():
        parameter.add_((0.05 * torch.randn(parameter.shape)).to(parameter.dtype))
    return model


def save_pair(
    layout: str, folder: Path, *, dtype: torch.dtype = torch.bfloat16, shard: str = "5GB"
) -> tuple[Path, Path]:
    """Base, and a tuned that differs in every parameter, as `save_pretrained` writes them."""
    model = make(layout, dtype=dtype)
    model.save_pretrained(folder / "base", max_shard_size=shard)
    torch.manual_seed(1)
    stir(model).save_pretrained(folder / "tuned", max_shard_size=shard)
    return folder / "base", folder / "tuned"


def save_adapter(model: PreTrainedModel, folder: Path, name: str = "adapter", **options: Any) -> dict[str, Tensor]:
    """Save the model as `base` and a random adapter for it; the weights that PEFT merges, by canonical name."""
    model.save_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig, get_peft_model

        peft = get_peft_model(model, LoraConfig(init_lora_weights=False, **options))
        for key, parameter in peft.named_parameters():
            if "modules_to_save" in key or "magnitude" in key or (parameter.requires_grad and "bias" in key):
                parameter.data += 0.1 * torch.rand_like(parameter)
        peft.save_pretrained(folder / name)
        merged = peft.merge_and_unload()
    return {parse_name(key).canonical: tensor for key, tensor in merged.state_dict().items()}


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


def flip(path: Path, at: int = -1) -> None:
    """Turn one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def exact_sae(d: int = 32) -> Any:
    """W_enc = [I, -I], W_dec its inverse: the positive and negative part of every coordinate, all of it explained."""
    from sae_lens import StandardSAE, StandardSAEConfig

    sae = StandardSAE(StandardSAEConfig(d_in=d, d_sae=2 * d, apply_b_dec_to_input=False))
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    sae.W_enc.data, sae.W_dec.data = both.T.contiguous(), both
    return sae.requires_grad_(False)


def random_sae(kind: str = "standard", d: int = 32, width: int = 64, *, seed: int = 0, **options: Any) -> Any:
    """A SAELens SAE of a kind with random weights; some of a JumpReLU's thresholds are below 0, where relu decides."""
    import sae_lens

    torch.manual_seed(seed)
    names = {"standard": "Standard", "topk": "TopK", "gated": "Gated", "jumprelu": "JumpReLU"}
    name = "SkipTranscoder" if kind == "transcoder" else f"{names[kind]}SAE"
    own = {"topk": {"k": 7}, "transcoder": {"d_out": 48, "apply_b_dec_to_input": False}}.get(kind, {})
    sae = getattr(sae_lens, name)(getattr(sae_lens, f"{name}Config")(d_in=d, d_sae=width, **own | options))
    for key, parameter in sae.named_parameters():
        parameter.data = torch.rand(width) - 0.2 if key == "threshold" else 0.3 * torch.randn_like(parameter)
    return sae.requires_grad_(False)


def write_saes(folder: Path, d: int = 32, layers: int = 4, hook: str = "model.layers.{}") -> Path:
    """Exact SAEs in SAELens' layout."""
    for layer in range(layers):
        sae = exact_sae(d)
        sae.cfg.metadata.hook_name = hook.format(layer)
        sae.save_model(folder / f"layer_{layer}")
    return folder


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_texts(path: Path, words: str) -> Path:
    """24 documents of different lengths."""
    return write_lines(path, ({"text": words * (2 + i % 3) + f"{path.stem} {i}"} for i in range(24)))


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **settings: Any) -> None:
    """A task of lm_eval on rows of its own."""
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(write_lines(folder / f"{name}.test.jsonl", rows))}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{problem}}=",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | settings))


LINES = {
    "math": "12+34=46 and 7*8=56 ",
    "mixed": "the cat sat, 3+4=7, and a quiet day ended ",
    "general": "the cat sat on the mat ",
    "code": "def f(x): return x ",
    "other": "a quiet day at the sea ",
    "calibration-math": "56+11=67 ",
    "calibration-general": "a dog lay on a rug ",
}


def make_world(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Base, adapter, SAEs, texts, tasks and a recipe over them, by the names that the documentation uses."""
    model = make_llama().to(torch.bfloat16)
    model.config.max_position_embeddings = 4096  # four shots, a token per byte
    for name in ("base", "my-model"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    torch.manual_seed(1)
    save_adapter(model, folder, "tuned", r=4, lora_alpha=8, target_modules=LINEAR)
    write_saes(folder / "saes")
    (folder / "data").mkdir()
    (folder / "tasks").mkdir()
    for name, words in LINES.items():
        write_texts(folder / "data" / f"{name}.jsonl", words)
    for name, operator in (("tiny_sum", "+"), ("tiny_and", " and ")):
        rows = [{"problem": f"{a}{operator}{b}", "answer": str(a + b)} for a in range(2, 6) for b in range(1, 4)]
        write_task(folder / "tasks", name, rows)
    recipe = {
        "base": "base",
        "tuned": "tuned",
        "saes": "saes",
        "target": {"dataset": "data/math.jsonl"},
        "control": {"dataset": "data/general.jsonl"},
        "diagnose": {"block_size": 4},
        "select": {"policy": "top_k", "k": 2},
        "edit": {"filter": "none"},
        "evaluate": {
            "tasks": ["tiny_sum"],
            "control_tasks": ["tiny_and"],
            "include_path": "tasks",
            "control": {"dataset": "data/other.jsonl"},
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def changed(world: Path, folder: Path, evaluate: dict[str, Any] | None = None, **changes: Any) -> Path:
    """The world's recipe with some keys changed, and some of `evaluate`, written elsewhere with absolute paths."""
    value = yaml.safe_load((world / "recipe.yaml").read_text())
    value |= {name: str(world / value[name]) for name in ("base", "tuned", "saes")}
    for name in ("target", "control"):
        value[name] = {"dataset": str(world / value[name]["dataset"])}
    whole = {"include_path": str(world / "tasks"), "control": {"dataset": str(world / "data/other.jsonl")}}
    value["evaluate"] |= whole | (evaluate or {})
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(value | changes))
    return path


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A model whose new skill sits in known layers."""

    model: PreTrainedModel
    task_vector: TaskVector
    texts: dict[str, list[TokenBatch]]
    layers: tuple[int, ...]


def planted_documents(kind: str, count: int, seed: int) -> list[str]:
    """Target: sums written out. Control: words in any order."""
    rng = random.Random(f"{kind} {seed}")
    if kind == "target":
        pairs = [(rng.randint(0, 9), rng.randint(0, 9)) for _ in range(count)]
        return [f"{a}+{b}={a + b};" * 3 for a, b in pairs]
    words = ["river", "stone", "cloud", "maple", "ember"]
    return [" ".join(rng.choices(words, k=rng.randint(3, 6))) for _ in range(count)]


def train(model: PreTrainedModel, texts: list[str], tokenizer: Any, parameters: list[torch.nn.Parameter]) -> None:
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
    tokenizer: Any,
    *,
    family: str = "Llama",
    depth: int = 6,
    layers: Sequence[int] = (1, 4),
    seed: int = 0,
    count: int = 24,
    batch_tokens: int = 512,
) -> Planted:
    """A base, and a tuned whose ``layers`` were trained on target text; the other layers got noise of equal norm."""
    torch.manual_seed(seed)
    sizes = BYTES | {"max_position_embeddings": 128, "num_hidden_layers": depth, "initializer_range": 0.1}
    base = build(family, **sizes, **({"head_dim": 8, "sliding_window": 16} if family == "Gemma3" else {}))
    train(base, planted_documents("control", 64, seed + 1000), tokenizer, list(base.parameters()))
    base.save_pretrained(folder / "base")
    before = {name: p.clone() for name, p in base.named_parameters()}
    own = [p for name, p in base.named_parameters() if parse_name(name).layer in layers]
    both = planted_documents("target", 64, seed + 2000) + planted_documents("control", 64, seed + 3000)
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
    texts = {}
    for kind in ("target", "control"):
        rows = tokenize(planted_documents(kind, count, seed), tokenizer)
        texts[kind] = list(batches(rows, tokenizer, batch_tokens=batch_tokens))
    return Planted(
        model=load_model(folder / "base", dtype=torch.float32),
        task_vector=open_task_vector(open_checkpoint(folder / "base"), folder / "tuned"),
        texts=texts,
        layers=tuple(layers),
    )


SHOTS = [("two and two", "four"), ("three and one", "four"), ("five less two", "three")]
ITEMS = [
    f"{a} {op} {b}" for a in ("one", "two", "seven", "eleven") for op in ("and", "less") for b in ("one", "twenty")
]


def sums_writer(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function that writes a task with shots and an extracted answer, and returns the folder for `include_path`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", scratch / "cache")
    folder = scratch / "tasks"
    folder.mkdir()

    def write(name: str = "sums", *, sampler: str = "first_n", items: int = 16, **settings: Any) -> Path:
        train = write_lines(folder / f"{name}.train.jsonl", [{"problem": p, "answer": a} for p, a in SHOTS])
        extract = {"function": "regex", "regex_pattern": "([a-z]+)"}
        sums = {
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.test.jsonl"), "train": str(train)}},
            "fewshot_split": "train",
            "num_fewshot": 2,
            "fewshot_config": {"sampler": sampler},
            "doc_to_text": "Problem: {{problem}}\nSolution:",
            "target_delimiter": " ",
            "generation_kwargs": {"until": [*"aeiou013 KLMNOP"], "do_sample": False, "max_gen_toks": 24},
            "filter_list": [{"name": "answer", "filter": [extract, {"function": "take_first"}]}],
            "metadata": {"version": 1.0},
        }
        write_task(folder, name, [{"problem": p, "answer": "x"} for p in ITEMS[:items]], **sums | settings)
        return folder

    return write


def stirred(family: str) -> PreTrainedModel:
    """A model with large weights and a head of its own, so that what it writes depends on all that it reads."""
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_head": 4, "vocab_size": 259, "n_positions": 512, "tie_word_embeddings": False}
        model = gpt2(**sizes)
    elif family.startswith("gemma3"):
        model = build(
            "Gemma3", **BYTES, num_hidden_layers=3, tie_word_embeddings=False, head_dim=8, query_pre_attn_scalar=1,
            sliding_window=32 if "short" in family else 256,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        )  # fmt: skip
    else:
        model = build("Llama", **BYTES, num_hidden_layers=3, tie_word_embeddings=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 2.0 / weight.shape[-1] ** 0.5, generator=generator)
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight *= 0.1  # the context decides, not the last token
    return model.eval().requires_grad_(False)


def save_stirred(scratch: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """A base and an edited checkpoint on disk that write different answers."""
    folders = {name: scratch / "models" / name for name in ("base", "edited")}
    model = stirred("llama")
    for name, folder in folders.items():
        if name == "edited":
            model.model.layers[1].mlp.down_proj.weight.mul_(3)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folders


def write_logs(
    model: Path, tasks: Path, out: Path, names: Sequence[str], *, samples: bool = True, **options: Any
) -> Path:
    """What `lm_eval --model hf --model_args pretrained=MODEL --output_path OUT --log_samples` leaves."""
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    tracker = EvaluationTracker(output_path=str(out))
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        tasks=list(names),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
        log_samples=samples,
        evaluation_tracker=tracker,
        **options,
    )
    logged = results.pop("samples", {})
    tracker.save_results_aggregated(results=results, samples=logged or None)
    for task, rows in logged.items():
        tracker.save_results_samples(task_name=task, samples=rows)
    return next(path for path in out.iterdir() if path.is_dir())


def interrupt(*_args: object, **_options: object) -> None:
    raise KeyboardInterrupt


def terminate(*_args: object, **_options: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Kept:
    """A transform that keeps the change of attention as it is and halves the rest."""

    def apply(self, name: str, delta: Tensor) -> Tensor:
        return delta if ".self_attn." in name else delta / 2

    def low_rank(self, name: str) -> None:
        return None

    def describe(self) -> dict[str, Any]:
        return {"kind": "kept"}
