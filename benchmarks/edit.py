"""Writing an edit, against mergekit and `cp -r`, on a pair of checkpoints with Gemma 3 4B's shapes.

    python benchmarks/edit.py --mergekit PATH/TO/mergekit-yaml [--scratch FOLDER] [--rounds 2]

Makes the pair once (2 x 7.8 GB of random bf16, kept in the scratch folder), then times every contender in turn,
A B C A B C, each in a process of its own. Results: benchmarks/results/edit.json.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from stethoscope.checkpoints.header import build_header

LAYERS, HIDDEN, MLP, VOCABULARY = 34, 2560, 10240, 262208
CONFIG = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "dtype": "bfloat16",
    "torch_dtype": "bfloat16", "hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": LAYERS,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": VOCABULARY,
    "tie_word_embeddings": True, "max_position_embeddings": 131072,
}  # fmt: skip


def shapes() -> dict[str, tuple[int, ...]]:
    """Gemma 3 4B's text tensors by stored name."""
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        block = {
            "input_layernorm": (HIDDEN,), "mlp.down_proj": (HIDDEN, MLP), "mlp.gate_proj": (MLP, HIDDEN),
            "mlp.up_proj": (MLP, HIDDEN), "post_attention_layernorm": (HIDDEN,),
            "post_feedforward_layernorm": (HIDDEN,), "pre_feedforward_layernorm": (HIDDEN,),
            "self_attn.k_norm": (256,), "self_attn.k_proj": (1024, HIDDEN), "self_attn.o_proj": (HIDDEN, 2048),
            "self_attn.q_norm": (256,), "self_attn.q_proj": (2048, HIDDEN), "self_attn.v_proj": (1024, HIDDEN),
        }  # fmt: skip
        tensors |= {f"model.layers.{layer}.{module}.weight": shape for module, shape in block.items()}
    return tensors | {"model.norm.weight": (HIDDEN,)}


def make_pair(scratch: Path) -> tuple[Path, Path]:
    """Base and tuned in two shards each; tuned differs from base in the last bits of every weight."""
    base, tuned = scratch / "base", scratch / "tuned"
    if (base / "config.json").exists() and (tuned / "config.json").exists():
        return base, tuned
    tensors = list(shapes().items())
    middle = next(i for i, (name, _) in enumerate(tensors) if name.startswith("model.layers.14."))
    shards = [dict(tensors[:middle]), dict(tensors[middle:])]
    names = [f"model-{i + 1:05d}-of-00002.safetensors" for i in range(2)]
    generator = np.random.default_rng(0)
    for folder in (base, tuned):
        folder.mkdir(parents=True, exist_ok=True)
    for name, shard in zip(names, shards, strict=True):
        with (base / name).open("wb") as one, (tuned / name).open("wb") as two:
            header = build_header({tensor: ("BF16", shape) for tensor, shape in shard.items()})
            one.write(header)
            two.write(header)
            for shape in shard.values():
                left = int(np.prod(shape))
                while left:
                    count = min(left, 1 << 24)
                    bits = np.frombuffer(generator.bytes(2 * count), dtype=np.uint16)
                    # sign and mantissa as drawn, exponent one of two: |w| in [1/128, 1/32)
                    weights = (bits & 0x80FF) | 0x3C00
                    one.write(weights.tobytes())
                    two.write((weights ^ ((bits >> 8) & 0x3)).tobytes())
                    left -= count
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = 2 * sum(int(np.prod(shape)) for _, shape in tensors)
    for folder in (base, tuned):
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    return base, tuned


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    make_pair(parser.parse_args().scratch)
