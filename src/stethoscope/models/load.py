"""Loads Transformers models, completely or not at all, and finds their decoder blocks by structure."""

import ctypes
import logging
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from stethoscope.errors import CheckpointError, StethoscopeError, refused_by_system
from stethoscope.models.device import preferred_dtype
from stethoscope.models.narrow import keep_narrow, main_memory, narrow_dtype

log = logging.getLogger(__name__)


def room_beside(model: PreTrainedModel) -> int:
    """Bytes that edited weights may take beside a model: half of what its GPU has free.

    Of main memory it is a quarter, 8 GiB at most.
    """
    if model.device.type != "cuda":
        return min(8 << 30, main_memory() // 4)
    free, _ = torch.cuda.mem_get_info(model.device)
    return int(free // 2)  # the activations need some, too


def _keep_freed_memory() -> None:
    """Let glibc keep large freed blocks: a forward on a CPU takes and frees the same ones again and again.

    By default each goes back to the kernel, and the page faults on getting it again cost a fifth of the time.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        mmap_threshold, trim_threshold = -3, -1  # from malloc.h
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Say what cannot be loaded: on a file that makes no sense Transformers raises whatever comes of it."""
    try:
        yield
    except Exception as error:
        if refused := refused_by_system(error):
            raise refused from error
        why = str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"the {what} cannot be loaded: {why}", hint="is one of its files damaged?") from error


def load_config(path: str | Path) -> PreTrainedConfig:
    """A checkpoint's config, complete, without the code and the attention from a hub that it may name.

    Raises:
        CheckpointError: it cannot be loaded, or the model is of a class that Transformers does not have.
    """
    with loading(f"model `{path}`"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    config._attn_implementation = config._experts_implementation = None  # PyTorch's own are taken
    return config


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    config: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    """Load a causal language model for inference; no code from the checkpoint is run.

    Args:
        path: a local checkpoint or a hub id.
        dtype: of the weights; the device's preferred one if None. On a CPU a large model's 16-bit matrices stay so in
            memory under float32, see `narrow`.
        device: the device to load it on.
        config: run the weights under this one instead of their own.

    Raises:
        CheckpointError: it cannot be loaded, or any weight is missing from the files. Transformers fills such
            weights with random numbers and only warns.
    """
    _keep_freed_memory()
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        # a thread of Transformers' that runs out of memory is waited for without end
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    config, dtype = config or load_config(path), dtype or preferred_dtype(device)
    with loading(f"model `{path}`"):
        narrow = narrow_dtype(path) if dtype == torch.float32 and torch.device(device).type == "cpu" else None
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(path),
            config=config,
            dtype=narrow or dtype,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    model: PreTrainedModel
    model, info = loaded
    if info["missing_keys"]:
        raise CheckpointError(
            f"the checkpoint `{path}` lacks weights of {type(model).__name__}",
            problems=sorted(info["missing_keys"]),
            hint="a multimodal checkpoint loaded into a text-only class does this",
        )
    model.requires_grad_(False)
    if narrow:
        keep_narrow(model, config)
    moved: Any = model  # its `to` is decorated, which hides its arguments from mypy
    moved.to(device)
    return model.eval()


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer; it pads on the right, with the end token if it has no padding token.

    Its ``model_max_length`` is the model's window, to which `text.tokens.tokenize` cuts documents.
    """
    with loading(f"tokenizer of `{path}`"):
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = _window(path) or tokenizer.model_max_length  # which is often another model's
    # what is longer is cut and said, so Transformers need not warn of it
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def _window(path: str | Path) -> int | None:
    """How many tokens a checkpoint's model has positions for, or was trained to read, if it says so."""
    try:
        return getattr(load_config(path).get_text_config(decoder=True), "max_position_embeddings", None)
    except CheckpointError:  # a tokenizer without a model
        return None


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of any Transformers causal language model, in order.

    Raises:
        StethoscopeError: the model has no single list of blocks.
    """
    inner = decoder(model)
    found = getattr(inner, "layers", None) or getattr(inner, "h", None)
    if not isinstance(found, nn.ModuleList):
        raise StethoscopeError(
            f"cannot find the decoder layers of {type(model).__name__}",
            hint="models with one list of decoder blocks, as Transformers builds them, are supported",
        )
    return found


def decoder(model: nn.Module) -> nn.Module:
    """A causal language model without its head, so that no logits are computed."""
    inner: nn.Module = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model  # type: ignore[operator,assignment]
    return inner
