"""What a worker is: an actor with a bench, on which lie the model and what else a stage asks for.

PyTorch is imported by what first needs it, so that a worker that takes another's place starts in a second.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stethoscope.lazy import torch


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What a worker works with; each part is loaded when it is first asked for, and kept.

    Attributes:
        base: the model's folder, as every node sees it.
        tuned: its fine-tune's, an adapter's, or a hub id.
        dtype: of the model; the device's preferred one if None.
        device: ``cpu`` or ``cuda``.
        threads: that PyTorch computes with on a CPU; sums depend on it.
        share: of a GPU's memory, which others may use as well.
    """

    base: Path | None = None
    tuned: Path | str | None = None
    dtype: torch.dtype | None = None
    device: str = "cpu"
    threads: int = 1
    share: float = 1.0

    @cached_property
    def model(self) -> Any:
        """The base."""
        return self.load(self.base)

    @cached_property
    def tokenizer(self) -> Any:
        """The base's."""
        from stethoscope.models.load import load_tokenizer

        assert self.base is not None
        return load_tokenizer(self.base)

    @cached_property
    def task_vector(self) -> Any:
        """Tuned less base."""
        from stethoscope.checkpoints.open import open_checkpoint, open_task_vector

        assert self.base is not None
        assert self.tuned is not None
        return open_task_vector(open_checkpoint(self.base), self.tuned)

    @cached_property
    def edits(self) -> Any:
        """The task vector's layers, to be put into the model."""
        from stethoscope.editing.layers import LayerEdits

        if self.device != "cuda":
            return LayerEdits(self.model, self.task_vector)
        total = torch.cuda.get_device_properties(0).total_memory
        left = self.share * total - sum(weight.nbytes for weight in self.model.parameters())
        # half of it, for the activations need some too
        return LayerEdits(self.model, self.task_vector, memory=max(1, int(left / 2)))

    def load(self, folder: Path | None) -> Any:
        """A model of the bench's type, on its device."""
        from stethoscope.models.load import load_model

        assert folder is not None
        torch.set_num_threads(self.threads)
        if self.device == "cuda" and self.share < 1:
            torch.cuda.set_per_process_memory_fraction(self.share)  # Ray does not see to it
        return load_model(folder, dtype=self.dtype, device=self.device)

    @contextmanager
    def entered(self, plan: Any) -> Iterator[tuple[Any, Any]]:
        """The base under a plan, or as it is, and its tokenizer."""
        from stethoscope.editing.apply import applied

        if plan is None:
            yield self.model, self.tokenizer
            return
        with applied(self.model, self.task_vector, plan):
            yield self.model, self.tokenizer

    @contextmanager
    def opened(self, folder: Path) -> Iterator[tuple[Any, Any]]:
        """Another checkpoint's model and tokenizer, for as long as the block lasts."""
        from stethoscope.models.load import load_tokenizer

        yield self.load(folder), load_tokenizer(folder)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What the pieces of one call have in common; it travels to each node once."""

    number: int
    make: Callable[[Bench], Any]
    task: Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Introduction:
    """What a worker says of itself.

    Attributes:
        versions: of the packages that compute; others compute other results.
        device: the processor or GPU.
        memory: bytes of its GPU, if it has one.
    """

    where: str
    pid: int
    versions: dict[str, str]
    device: str
    memory: int | None


class Worker:
    """The actor: one process somewhere in the cluster."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._stage, self._tool = -1, None

    def introduce(self) -> Introduction:
        """Who this is."""
        cuda = self.bench.device == "cuda"
        return Introduction(
            where=f"process {os.getpid()} on {platform.node()}",
            pid=os.getpid(),
            versions=versions(),
            device=torch.cuda.get_device_name() if cuda else _processor(),
            memory=torch.cuda.get_device_properties(0).total_memory if cuda else None,
        )

    def do(self, stage: Stage, loaded: Any, *given: Any) -> Any:
        """One piece of work; Ray fetches what it is given."""
        if stage.number != self._stage:
            self._tool = None  # before the next is made
            self._tool = stage.make(self.bench)
            self._stage = stage.number
        return stage.task(self._tool, loaded, *given)


def versions() -> dict[str, str]:
    """Of the packages that compute, in this process."""
    return {name: version(name) for name in ("sae-stethoscope", "torch", "transformers")}


def _processor() -> str:
    found = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.*)", found.read_text()) if found.exists() else None
    return match[1] if match else platform.machine()
