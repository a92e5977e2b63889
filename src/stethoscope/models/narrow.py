"""A large model on a CPU without native bfloat16: 16-bit matrices stay so in memory and are multiplied as float32.

Values and results are those of the model in float32, at half its memory.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

LARGE = 0.25  # of main memory: what weighs less in float32 is left so, for each use of a narrow matrix costs a cast
NARROW = {"BF16": torch.bfloat16, "F16": torch.float16}


def main_memory() -> int:
    """Bytes of this machine's main memory; 16 GiB where the system does not say."""
    known = hasattr(os, "sysconf") and {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys()
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 16 << 30


def narrow_dtype(path: str | Path) -> torch.dtype | None:
    """The 16-bit type that all of a local checkpoint is stored in, if it is large; else None."""
    files = [*Path(path).glob("*.safetensors")]
    if 2 * sum(file.stat().st_size for file in files) < LARGE * main_memory():
        return None
    found = set()
    for file in files:
        with safe_open(file, "pt") as opened:
            found |= {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    return NARROW.get(found.pop()) if len(found) == 1 else None


class NarrowLinear(nn.Linear):
    """A linear module whose weight is cast to its input's type at each use."""

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _Product.apply(x, self.weight, self.bias)
        return product


class _Product(torch.autograd.Function):
    """x W^T + b; the cast weight is not kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, x if ctx.needs_input_grad[1] else None)
        return nn.functional.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        weight, x = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        own = None if x is None else (rows.T @ x.flatten(0, -2)).to(weight.dtype)
        return gradient @ weight.to(gradient.dtype), own, rows.sum(0) if ctx.needs_input_grad[2] else None


def keep_narrow(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Turn a model of 16-bit weights into one that computes in float32, with its linear modules' matrices as they are.

    Embeddings and what is tied to them, norms and biases become float32.
    """
    head = model.get_output_embeddings()
    for module in model.modules():
        narrow = type(module) is nn.Linear and module is not head
        for name, parameter in module.named_parameters(recurse=False):
            if not (narrow and name == "weight"):
                parameter.data = parameter.data.float()
        if narrow:
            module.__class__ = NarrowLinear
    # a scale is rounded where it is made in 16 bits
    with _without_weights():
        full = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    stored = model.state_dict().keys()
    for name, buffer in full.named_buffers():
        own = model.get_buffer(name)
        own.data = own.to(buffer.dtype) if name in stored else buffer


@contextmanager
def _without_weights() -> Iterator[None]:
    """Inside, modules are made with parameters that take no memory, but with their buffers."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter if parameter is None else nn.Parameter(parameter.to("meta")))

    nn.Module.register_parameter = on_meta  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
