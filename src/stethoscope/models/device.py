"""The device that a name means and the type that it computes in best; imports PyTorch alone."""

import re

import torch

from stethoscope.errors import StethoscopeError


def preferred_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, else float32."""
    if torch.device(device).type == "cuda":
        # without a GPU here, the question is about a worker that has one
        known = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if known else torch.float32
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return torch.bfloat16 if native else torch.float32


def find_device(name: str) -> torch.device:
    """The device of a name: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``, which is a GPU if there is one.

    Raises:
        StethoscopeError: this machine has no such device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise StethoscopeError(f"`{name}` is not a device", hint="give cpu, cuda, cuda:1 or auto")
    if name != "cpu" and int(match[1] or 0) >= count:
        seen = f"{count} GPU{'' if count == 1 else 's'}" if count else "no GPU"
        raise StethoscopeError(
            f"there is no device `{name}` here: PyTorch sees {seen}",
            hint="`auto` takes a GPU where there is one; a PyTorch that was built for CPUs sees none",
        )
    return torch.device(name)
