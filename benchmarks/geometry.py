"""What the geometry of one layer costs, on the Gemma-3-4B shape, for a LoRA of rank 16 and for a full fine-tune.

python benchmarks/geometry.py [--scratch FOLDER] [--features 16384] [--tokens 512]

The layer has random weights, and features are random directions; 512 tokens a corpus are read and taken. Times are
processor seconds of `measure_geometry`, with what reading the tokens costs (`texts`) apart.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import torch
from edit import GEMMA, make_pair, shapes
from safetensors.torch import save_file

from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.editing.geometry import measure_geometry
from stethoscope.editing.subspace import LayerFeatures
from stethoscope.models.load import load_model
from stethoscope.text.tokens import TokenBatch

RESULTS = Path(__file__).parent / "results" / "geometry.json"
LAYER = GEMMA | {"num_hidden_layers": 1, "vocab_size": 512}
RANK = 16


def make_adapter(folder: Path) -> Path:
    """A LoRA of every linear matrix of the layer."""
    folder.mkdir(exist_ok=True)
    tensors = {}
    for name, shape in shapes(LAYER).items():
        if "_proj" in name:
            key = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, shape[1]) / shape[1] ** 0.5
            tensors[f"{key}.lora_B.weight"] = torch.randn(shape[0], RANK) * 1e-3
    save_file(tensors, folder / "adapter_model.safetensors")
    modules = sorted({key.split(".")[-3] for key in tensors})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def measure(scratch: Path, features: int, tokens: int) -> dict[str, object]:
    torch.manual_seed(0)
    width = GEMMA["hidden_size"]
    base_path, full = make_pair(scratch, LAYER)
    base, model = open_checkpoint(base_path), load_model(base_path)
    decoder, encoder = torch.randn(2, features, width)
    found = LayerFeatures(decoder=decoder, encoder=encoder, order=range(features), chosen=round(0.03 * width))
    mask = torch.ones(1, tokens, dtype=torch.bool)
    ids = torch.randint(3, LAYER["vocab_size"], (1, tokens))
    batch = TokenBatch(documents=(0,), input_ids=ids, attention_mask=mask, countable=mask, predicted=mask)
    times = {}
    for kind, tuned in (("lora", make_adapter(scratch / "adapter")), ("full", full)):
        task_vector = open_task_vector(base, tuned)
        start = time.process_time()
        measure_geometry(
            task_vector, {0: lambda: found}, model=model, texts={"target": [batch], "control": [batch]}, tokens=tokens
        )
        times[kind] = round(time.process_time() - start, 2)
    start = time.process_time()
    with torch.no_grad():
        model.model(batch.input_ids)
    return {
        "geometry_s_per_layer": times,
        "texts": round(2 * (time.process_time() - start), 2),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "features": features,
        "tokens": tokens,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "stethoscope-gemma-layer")
    parser.add_argument("--features", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    load = os.getloadavg()
    found = measure(options.scratch.absolute(), options.features, options.tokens)
    found["machine"] = {"cores": os.cpu_count(), "load_before": load, "load_after": os.getloadavg()}
    print(json.dumps(found, indent=1))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
