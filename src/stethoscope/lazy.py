"""PyTorch on first use: importing it takes over a second, more than copying five layers of a 4B model does.

A module that says `from stethoscope.lazy import torch`, with annotations postponed, starts without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _OnFirstUse:
        def __getattr__(self, name: str) -> Any:
            return getattr(import_module("torch"), name)

    torch = _OnFirstUse()
