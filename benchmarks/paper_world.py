"""A world of Gemma-3-4B-IT's shape with random weights, for `paper_size.py`; about 25 GB with 34 layers.

The base in bf16 in two shards under the published names, with its head tied to the embedding and a SigLIP tower of the
real width but fewer layers; a LoRA adapter of rank 16 as PEFT writes it; Gemma Scope 2's folders of 16,384 features;
chats of 90 to 140 tokens; a task of six items of four tokens. Gemma's tokenizer is gated: this one splits at white
space, and has Gemma's size, its special tokens and a chat template that begins with a BOS, as Gemma's does, beside the
BOS that the tokenizer adds. Four early layers of the adapter write sixteen "mathematical" tokens wherever one of them
is read, so that target text gains; all else of it is small noise.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from edit import GEMMA
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedTokenizerFast

from stethoscope.artifacts import new_folder, write_json
from stethoscope.checkpoints.header import build_header
from stethoscope.checkpoints.open import open_checkpoint

RECIPE = Path(__file__).parents[1] / "recipes" / "gemma-3-4b-it.yaml"
WIDTH, FEATURES, RANK, PLANTED = GEMMA["hidden_size"], 16384, 16, 4
VISION = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "image_size": 896,
          "patch_size": 14, "vision_use_head": False}  # fmt: skip
SPECIAL = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<start_of_turn>": 105, "<end_of_turn>": 106}
WORDS = {"\n": 107, "user": 108, "model": 109, **{word: 110 + i for i, word in enumerate("0123456789+-*/=;")}}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SAES = "gemma-scope-2-4b-it/resid_post_all"
TEXTS = {"target": 200, "control": 200, "held_out": 4, "general": 4}  # documents
ARMS = ["base", "tuned", "selected", "filtered", "scaled", "recommended"]


def make_base(folder: Path, layers: int, vision_layers: int, vocabulary: int) -> None:
    """The checkpoint, every weight random in ±[1/128, 1/32): norms add 1, so activations stay of order 1."""
    text = GEMMA | {"num_hidden_layers": layers, "vocab_size": vocabulary, "sliding_window": 1024}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "architectures": None}
    config = Gemma3Config(
        text_config=text, vision_config=VISION | {"num_hidden_layers": vision_layers}, eos_token_id=[1, 106],
        dtype="bfloat16", architectures=["Gemma3ForConditionalGeneration"],
    )  # fmt: skip
    with torch.device("meta"):
        state = Gemma3ForConditionalGeneration(config).state_dict()
    tensors = {published(name): tuple(tensor.shape) for name, tensor in state.items() if name != "lm_head.weight"}
    config.save_pretrained(folder)
    names, generator = list(tensors), np.random.default_rng(0)
    middle = names.index(f"language_model.model.layers.{layers // 2}.self_attn.q_proj.weight")
    weight_map = {}
    for number, part in enumerate((names[:middle], names[middle:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        with (folder / file).open("wb") as out:
            out.write(build_header({name: ("BF16", tensors[name]) for name in part}))
            for name in part:
                for piece in random_bits(generator, int(np.prod(tensors[name]))):
                    out.write(piece)
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    make_tokenizer(vocabulary).save_pretrained(folder)


def published(name: str) -> str:
    """A tensor's name in Google's files, for Transformers' of today."""
    name = name.removeprefix("model.").replace("language_model.", "language_model.model.", 1)
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1)


def random_bits(generator: np.random.Generator, left: int) -> Iterator[bytes]:
    while left:
        bits = np.frombuffer(generator.bytes(2 * min(left, 1 << 24)), dtype=np.uint16)
        yield ((bits & 0x80FF) | 0x3C00).tobytes()  # sign and mantissa as drawn, exponent one of two
        left -= len(bits)


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    known = SPECIAL | WORDS
    rest = {f"w{n}": n for n in range(vocabulary) if n not in set(known.values())}
    built = Tokenizer(models.WordLevel({**known, **rest}, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|[^\s]+"), "removed", invert=True)
    built.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    built.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=built, chat_template=TEMPLATE, **names)


def make_adapter(folder: Path, base: Path) -> None:
    checkpoint, generator = open_checkpoint(base), torch.Generator().manual_seed(1)
    tokens = [n for word, n in WORDS.items() if n >= 110]
    directions = torch.cat([checkpoint.read_rows("embed_tokens.weight", n, n + 1) for n in tokens]).float()
    directions /= directions.norm(dim=1, keepdim=True)
    pick = torch.eye(RANK, GEMMA["intermediate_size"])
    tensors = {}
    for entry in checkpoint.entries.values():
        if entry.layer is None or len(entry.shape) != 2:
            continue
        A = torch.randn(RANK, entry.shape[1], generator=generator) / entry.shape[1] ** 0.5
        B = 0.01 * torch.randn(entry.shape[0], RANK, generator=generator)
        if entry.layer < PLANTED and ".mlp." in entry.name:
            reads = "down_proj" not in entry.name
            A, B = (directions, B + 0.3 * pick.T) if reads else (pick, B + directions.sum(0)[:, None])
        key = f"base_model.model.model.language_model.{entry.name.removesuffix('.weight')}"
        tensors |= {f"{key}.lora_A.weight": A.clone(), f"{key}.lora_B.weight": B}
    save_file(tensors, folder / "adapter_model.safetensors")
    modules = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "bias": "none"}
    settings |= {"base_model_name_or_path": str(base), "target_modules": modules}
    write_json(folder / "adapter_config.json", settings)


def make_saes(folder: Path, layers: int) -> None:
    """Random directions, a decoder short enough to explain a little; the threshold lets about 60 features fire."""
    generator = np.random.default_rng(2)
    for layer in range(layers):
        place = folder / f"layer_{layer}_width_16k_l0_small"
        place.mkdir(parents=True)
        w = torch.from_numpy(generator.standard_normal((FEATURES, WIDTH), dtype=np.float32)) / WIDTH**0.5
        threshold = torch.full((FEATURES,), 2.7 * (2 * layer + 3) ** 0.5)
        biases = {"b_enc": torch.zeros(FEATURES), "b_dec": torch.zeros(WIDTH), "threshold": threshold}
        save_file({"w_enc": w.T.contiguous(), "w_dec": 0.3 * w, **biases}, place / "params.safetensors")
        about = {"architecture": "jump_relu", "model_name": "gemma-v3-4b-it", "width": FEATURES, "l0": 60}
        write_json(place / "config.json", about | {"hf_hook_point_in": f"model.layers.{layer}.output"})


def make_texts(folder: Path) -> None:
    generator = np.random.default_rng(3)
    common = [f"w{n}" for n in range(1000, 1400)]
    marks = list("0123456789+-*/=;")
    for number, (name, documents) in enumerate(TEXTS.items()):
        rows = []
        for length in generator.integers(84, 130, size=documents):
            words = generator.choice(marks if number % 2 == 0 else common, size=length)
            words[::3] = generator.choice(common, size=len(words[::3]))
            chat = ({"role": "user", "content": " ".join(words[:20])},)
            rows.append(json.dumps({"messages": [*chat, {"role": "assistant", "content": " ".join(words[20:])}]}))
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    items = [{"problem": f"{a} + {b}", "answer": str(a + b)} for a, b in zip(range(1, 7), range(2, 8), strict=True)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    task = {
        "task": "sums", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "sums.jsonl")}},
        "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{problem}} =",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (folder / "sums.yaml").write_text(yaml.safe_dump(task))


def make_recipe(world: Path, layers: int, documents: int, forwards: int) -> None:
    """The published recipe with what is local here, one control text, and a search of few forwards."""
    recipe, texts = yaml.safe_load(RECIPE.read_text()), world / "texts"

    def text(name: str, **options: Any) -> dict[str, Any]:
        return {"dataset": str(texts / f"{name}.jsonl"), "field": "messages", **options}

    del recipe["controls"]
    recipe |= {name: str(world / name) for name in ("base", "tuned")} | {"saes": str(world / SAES)}
    recipe |= {name: text(name, documents=documents) for name in ("target", "control")}
    recipe["diagnose"]["block_size"] = max(1, documents // 16)
    recipe["edit"]["forwards"] = forwards
    recipe["select"] |= {"k": min(5, (layers + 1) // 2), "include_flagged": True}  # random SAEs explain nothing
    recipe["arms"] = ARMS
    recipe["evaluate"] = {"tasks": ["sums"], "include_path": str(texts), "batch_size": 6,
                          "target": text("held_out"), "control": text("general")}  # fmt: skip
    (world / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


def build(world: Path, layers: int, vision_layers: int, vocabulary: int, documents: int, forwards: int) -> None:
    """Make whatever of a world is not there yet.

    Args:
        documents: of target and control text each.
        forwards: of the search for the recommended edit.
    """
    parts: dict[str, Callable[[Path], None]] = {
        "base": lambda f: make_base(f, layers, vision_layers, vocabulary),
        "tuned": lambda f: make_adapter(f, world / "base"),
        SAES: lambda f: make_saes(f, layers),
    }
    for name, make in parts.items():
        if not (world / name).exists():
            (world / name).parent.mkdir(parents=True, exist_ok=True)
            with new_folder(world / name) as folder:
                make(folder)
            print("made", world / name, flush=True)
    (world / "texts").mkdir(exist_ok=True)
    make_texts(world / "texts")
    make_recipe(world, layers, documents, forwards)
