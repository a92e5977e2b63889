"""Runs independent pieces of work: in a loop here, or on the workers of a Ray cluster.

    with RayExecutor(Ray(workers=4), WorkerContext(base=base, tuned=tuned)) as executor:
        collect_activations(model, tokenizer, saes, texts, executor=executor)
        calibrate(model, edits, texts, z, executor=executor, ...)

    for index, result in executor.map_pieces(task, pieces, setup=setup):
        ...

Pieces never depend on the number of workers, and the caller merges their results in order: so results are equal to the
bit. A worker is a Ray actor that loads the model once. Ray restarts a worker that died; its piece is run again.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from stethoscope.errors import StethoscopeError, require
from stethoscope.lazy import torch
from stethoscope.recipe import Ray

log = logging.getLogger(__name__)

ATTEMPTS = 4  # a piece is given up when so many workers died with it
PATIENCE = 300.0  # seconds to wait for the first worker

Setup = Callable[[Any], Any]  # a worker's context -> its tool
Task = Callable[[Any, Any], Any]  # tool and piece -> result
Results = Iterator[tuple[int, Any]]  # index of a piece, and its result or `Failed`


@dataclass(frozen=True, kw_only=True)
class Failed:
    """In place of the result of a piece that killed every worker it was given to."""

    why: str


@runtime_checkable
class Executor(Protocol):
    """Runs pieces of work."""

    @property
    def workers(self) -> int:
        """How many pieces run at once."""

    def map_pieces(self, task: Task, pieces: Iterable[Any], *, setup: Setup) -> Results:
        """Call a task on each piece; yields index and result as they are done, in any order.

        Args:
            task: called with a worker's tool and a piece; what it raises is raised here.
            pieces: taken from the iterator when a worker is free, so that few are in memory.
            setup: makes a worker's tool from its `WorkerContext`, once for this call.
        """


@dataclass(kw_only=True)
class LocalExecutor:
    """Runs pieces in this process, one after another, with what is loaded here in place of a `WorkerContext`."""

    model: Any = None
    tokenizer: Any = None
    edits: Any = None
    workers: int = 1

    def map_pieces(self, task: Task, pieces: Iterable[Any], *, setup: Setup) -> Results:
        """See `Executor`; the order is that of the pieces."""
        tool = setup(self)
        for index, piece in enumerate(pieces):
            yield index, task(tool, piece)


@dataclass(frozen=True, kw_only=True)
class WorkerContext:
    """What a worker works with; models and edits are loaded on first use, and kept.

    Attributes:
        base: folder of the base model, as every node sees it.
        tuned: the fine-tune's or an adapter's folder, or a hub id.
        dtype: of the model; the device's preferred one if None.
        device: ``cpu`` or ``cuda``.
        threads: that PyTorch computes with on a CPU; float sums depend on it.
        share: of a GPU's memory, which other workers may use as well.
    """

    base: Path | None = None
    tuned: Path | str | None = None
    dtype: torch.dtype | None = None
    device: str = "cpu"
    threads: int = 1
    share: float = 1.0

    @cached_property
    def model(self) -> Any:
        """The base model."""
        assert self.base is not None
        return self.load(self.base)

    @cached_property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
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
        from stethoscope.models.load import room_beside

        return LayerEdits(self.model, self.task_vector, memory=int(self.share * room_beside(self.model)))

    def load(self, folder: Path) -> Any:
        """A model on this worker's device."""
        from stethoscope.models.load import load_model

        torch.set_num_threads(self.threads)
        if self.device == "cuda" and self.share < 1:
            torch.cuda.set_per_process_memory_fraction(self.share)  # Ray does not limit it
        return load_model(folder, dtype=self.dtype, device=self.device)

    @contextmanager
    def state(self, arm: Any) -> Iterator[tuple[Any, Any]]:
        """An arm's model and tokenizer: a checkpoint's by its folder, or the base under a plan, or as it is (None)."""
        from stethoscope.editing.apply import applied
        from stethoscope.models.load import load_tokenizer

        if isinstance(arm, Path):
            yield self.load(arm), load_tokenizer(arm)
        elif arm is None:
            yield self.model, self.tokenizer
        else:
            with applied(self.model, self.task_vector, arm):
                yield self.model, self.tokenizer


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the pieces of one call have in common, with the caller's versions of packages and working folder."""

    number: int
    setup: Setup
    task: Task
    versions: dict[str, str]
    folder: Path


class Worker:
    """The Ray actor: one process somewhere in the cluster."""

    def __init__(self, context: WorkerContext) -> None:
        self.context = context
        self._job = -1
        self._tool: Any = None

    def greet(self) -> int:
        """Bytes of the GPU's memory; 0 without one."""
        return torch.cuda.get_device_properties(0).total_memory if self.context.device == "cuda" else 0

    def do(self, job: Job, piece: Any) -> Any:
        """Run one piece.

        Raises:
            StethoscopeError: other versions are installed here than where the job comes from.
        """
        if job.number != self._job:
            if job.versions != versions():
                raise StethoscopeError(
                    f"{platform.node()} has other versions than the driver, and would compute other results",
                    problems=[f"{name} {one}, not {job.versions[name]}" for name, one in versions().items()],
                    hint="install the same environment on every node",
                )
            if job.folder.is_dir():
                os.chdir(job.folder)  # tasks may name their data by relative paths
            if hasattr(self._tool, "close"):
                self._tool.close()
            self._tool = None  # freed before the next is made
            self._tool = job.setup(self.context)
            self._job = job.number
        return job.task(self._tool, piece)


class RayExecutor:
    """Workers of a Ray cluster, for the length of a ``with`` block; they start when first needed."""

    def __init__(self, options: Ray, context: WorkerContext) -> None:
        """
        Raises:
            StethoscopeError: Ray is not installed, or a worker is to have several GPUs.
        """
        if options.gpus > 1:
            raise StethoscopeError(
                f"`gpus: {options.gpus:g}`: a worker computes on one GPU", hint="`gpus: 1`, and more workers"
            )
        require("ray", extra="ray")
        import ray
        import ray.exceptions

        self._ray: Any = ray
        self.options = options
        # as many threads as here: float sums on CPUs depend on their number
        threads = options.threads or (1 if options.gpus else torch.get_num_threads())
        device = "cuda" if options.gpus else "cpu"
        self.context = replace(context, device=device, threads=threads, share=options.gpus or 1.0)
        self._demand = {"CPU": threads, "GPU": options.gpus}
        self._idle: list[Any] = []
        self._busy: dict[Any, Any] = {}  # reference to a greeting or result -> actor
        self._greetings: set[Any] = set()
        self._memory: list[int] = []  # bytes of the GPU of each worker that has started
        self._jobs = count()
        self._started_ray = False

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in vars(self).get("_actors", ()):
            self._ray.kill(actor)
        if self._started_ray:
            self._ray.shutdown()

    @property
    def workers(self) -> int:
        """How many there are, those that have yet to start included."""
        return len(self._actors)

    @cached_property
    def _actors(self) -> list[Any]:
        """The workers, started on first use.

        Raises:
            StethoscopeError: there is no cluster at the address.
        """
        self._connect()
        total = self._ray.cluster_resources()
        room = min(total.get(kind, 0) / number for kind, number in self._demand.items() if number)
        options = {"num_cpus": self._demand["CPU"], "num_gpus": self._demand["GPU"], "scheduling_strategy": "SPREAD"}
        actor = self._ray.remote(Worker).options(max_restarts=-1, **options)
        actors = [actor.remote(self.context) for _ in range(self.options.workers or max(1, int(room)))]
        for one in actors:
            self._greet(one)
        return actors

    @property
    def dtype(self) -> torch.dtype:
        """In which workers compute."""
        from stethoscope.models.device import preferred_dtype

        return self.context.dtype or preferred_dtype(self.context.device)

    def sae_memory(self, model_bytes: int) -> int | None:
        """Bytes for encoders beside the model on a worker's share of its GPU; None without GPUs.

        Raises:
            StethoscopeError: there is no room for a worker.
        """
        if not self.options.gpus:
            return None
        while self._actors and not self._memory:
            self._wait()
        return max(1, round(0.8 * min(self._memory) * self.context.share) - model_bytes)

    def map_pieces(self, task: Task, pieces: Iterable[Any], *, setup: Setup) -> Results:
        """See `Executor`; each worker has one piece at a time.

        Raises:
            StethoscopeError: no worker can start, or one has other versions than this process.
        """
        waiting = enumerate(pieces)
        queue = deque(islice(waiting, 1))
        if not queue or not self._actors:
            return
        job = Job(number=next(self._jobs), setup=setup, task=task, versions=versions(), folder=Path.cwd())
        reference_to_job = self._ray.put(job)  # so that it is sent to each node once
        sent: dict[Any, tuple[int, Any]] = {}
        deaths: Counter[int] = Counter()

        def send() -> None:
            while self._idle and queue:
                actor = self._idle.pop()
                index, piece = queue.popleft()
                # without Ray's own retries: they also count each look at a worker that is still starting again
                reference = actor.do.remote(reference_to_job, piece)
                self._busy[reference], sent[reference] = actor, (index, piece)
                if not queue:
                    queue.extend(islice(waiting, 1))

        send()
        while sent or queue:
            reference, found = self._wait()
            index, piece = sent.pop(reference, (None, None))  # or of a greeting, or of a call that was abandoned
            if index is not None and isinstance(found, Failed):
                deaths[index] += 1
                if deaths[index] < ATTEMPTS:
                    queue.append((index, piece))
                    index = None
                found = Failed(why=f"{ATTEMPTS} workers died with it: {found.why}")
            send()
            if index is not None:
                if isinstance(found, Exception):
                    raise found
                yield index, found

    def _greet(self, actor: Any) -> None:
        reference = actor.greet.options(max_task_retries=-1).remote()  # answered when Ray has started the worker
        self._busy[reference] = actor
        self._greetings.add(reference)

    def _wait(self) -> tuple[Any, Any]:
        """Wait until a worker is done; returns the reference, and its value, `Failed`, or what the task raised.

        Raises:
            StethoscopeError: no worker can start.
        """
        done: list[Any] = []
        while not done:
            done, _ = self._ray.wait(list(self._busy), num_returns=1, timeout=PATIENCE)
            if not done and not self._memory:
                left = self._ray.available_resources()
                raise StethoscopeError(
                    "the cluster has no room for a worker, or none starts",
                    problems=[f"a worker takes {self._demand}, the cluster has {left} to give"],
                    hint="`ray status` tells more; fewer `threads` or a smaller share of a GPU may do",
                )
        reference, errors = done[0], self._ray.exceptions
        actor = self._busy.pop(reference)
        try:
            found = self._ray.get(reference)
        except errors.RayTaskError as error:
            # an error of ours as it was raised; any other with the worker's traceback
            found = error.cause if isinstance(error.cause, StethoscopeError) else error
        except errors.RayError as error:
            why = str(error).strip().splitlines()
            if reference in self._greetings:
                raise StethoscopeError(
                    "a worker cannot start", problems=[why[-1]], hint="is stethoscope installed on every node?"
                ) from error
            self._greet(actor)
            return reference, Failed(why=why[0])
        if reference in self._greetings:
            self._memory.append(found)
        self._idle.append(actor)
        return reference, found

    def _connect(self) -> None:
        if self._ray.is_initialized():
            return
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        on_end = signal.getsignal(signal.SIGTERM)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            self._ray.init(address=self.options.address, **quiet)
        except ConnectionError as error:
            if self.options.address != "auto":
                hint = "`auto` starts one on this machine"
                raise StethoscopeError(f"there is no Ray cluster at `{self.options.address}`", hint=hint) from error
            cpus = max(os.cpu_count() or 1, (self.options.workers or 1) * self.context.threads)
            self._ray.init(num_cpus=cpus, include_dashboard=False, **quiet)
            log.info("started a Ray cluster on this machine with %d CPUs", cpus)
        self._started_ray = True
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, on_end)  # Ray's own would end the process with no word


def versions() -> dict[str, str]:
    """Of the packages that compute, in this process."""
    return {name: version(name) for name in ("sae-stethoscope", "torch", "transformers")}
