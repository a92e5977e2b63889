"""A cluster's workers and the driver's loop: pieces out, results in, whoever dies in between.

A worker is a Ray actor that loads the model once and keeps what it needs for a stage. It gets one piece of the work
after the other, by preference of the key it had before; few are out at a time. Ray starts a worker that died anew, on
another node if it must. What it had in hand goes back to the queue; a piece's result is taken once.
"""

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from stethoscope.checkpoints.open import open_checkpoint
from stethoscope.editing.plan import EditPlan
from stethoscope.errors import StethoscopeError
from stethoscope.lazy import torch
from stethoscope.recipe import Ray
from stethoscope.scaling.bench import Bench, Introduction, Stage, Worker, versions
from stethoscope.work import Lost, Means, Piece, Spread

log = logging.getLogger(__name__)

AHEAD = 2  # pieces that a worker has at once: one in work, one waiting
DEATHS = 4  # a piece in whose work so many workers died is given up
PATIENCE = 300.0  # seconds without any worker
SLOW, SLOW_SECONDS = 4.0, 30.0  # a straggler takes so many times as long as the median piece, and at least this
REPORT_SECONDS = 30.0


@dataclass(kw_only=True)
class _Member:
    """A worker as the driver sees it.

    Attributes:
        greeting: reference to its introduction, while that is awaited.
        flying: references to what it works on, in the order of sending.
    """

    actor: Any
    greeting: Any
    introduction: Introduction | None = None
    key: Any = None
    flying: list[Any] = field(default_factory=list)

    @property
    def where(self) -> str:
        """Which it is, for a person."""
        return self.introduction.where if self.introduction else "a worker"


@dataclass(kw_only=True)
class _Flight:
    """A piece that is out; ``since`` it is its worker's turn to work on it.

    Attributes:
        kept: references to the values of its result that stay where they are.
    """

    member: _Member
    number: int
    since: float
    kept: list[Any]


class Crew:
    """Workers of a cluster, for the length of a block; stages take `listening`, `injecting` and `answering`."""

    def __init__(self, options: Ray, bench: Bench) -> None:
        """
        Raises:
            StethoscopeError: Ray is not installed, or a worker is to have several GPUs.
        """
        if options.gpus > 1:
            raise StethoscopeError(
                f"`gpus: {options.gpus:g}`: a worker computes on one GPU", hint="`gpus: 1`, and more workers"
            )
        self._ray = import_ray()
        self.options = options
        # as many threads as here, or sums on CPUs would be made in another order
        self._threads = options.threads or (1 if options.gpus else torch.get_num_threads())
        device = "cuda" if options.gpus else "cpu"
        self._bench = replace(bench, device=device, threads=self._threads, share=options.gpus or 1.0)
        self._members: list[_Member] = []
        self._stages = count()
        self._started = False

    def __enter__(self) -> "Crew":
        """
        Raises:
            StethoscopeError: there is no cluster at the address.
        """
        self._connect()
        options = {"num_cpus": self._threads, "num_gpus": self.options.gpus, "scheduling_strategy": "SPREAD"}
        actor = self._ray.remote(Worker).options(max_restarts=-1, **options)
        for _ in range(self.options.workers or self._room()):
            worker = actor.remote(self._bench)
            self._members.append(_Member(actor=worker, greeting=_greet(worker)))
        return self

    def __exit__(self, *_: object) -> None:
        for member in self._members:
            self._ray.kill(member.actor)
        self._members = []
        if self._started:
            self._ray.shutdown()

    @property
    def workers(self) -> int:
        """How many there are, those that have yet to start included."""
        return len(self._members)

    @property
    def means(self) -> Means:
        """What they have, as far as work is shared by it."""
        stores = [node["Resources"].get("object_store_memory", 0) for node in self._ray.nodes() if node["Alive"]]
        return Means(
            workers=self.workers,
            device=self._bench.device,
            share=self._bench.share if self.options.gpus else float(self._threads),
            store=int(min(stores)),
        )

    @property
    def pids(self) -> list[int]:
        """The workers' processes, as far as they are known."""
        return [member.introduction.pid for member in self._members if member.introduction]

    def sae_memory(self, model_bytes: int) -> int | None:
        """Bytes for encoders beside the model on a worker's share of its GPU; None without GPUs.

        Raises:
            StethoscopeError: there is no room for a worker.
        """
        if not self.options.gpus:
            return None
        while not any(member.introduction for member in self._members):
            self._wait({})
        sizes = [m.introduction.memory for m in self._members if m.introduction and m.introduction.memory]
        return max(1, round(0.8 * min(sizes) * self._bench.share) - model_bytes)

    def listening(self, make: Callable[..., Any]) -> "CrewRun":
        """For `stethoscope.diagnosis.listen.listen`."""
        return CrewRun(self, lambda bench: make(bench.model, bench.tokenizer))

    def injecting(self, make: Callable[..., Any]) -> "CrewRun":
        """For `calibrate`, `judge_hearing` and `measure`."""
        return CrewRun(self, lambda bench: make(bench.model, bench.edits))

    def answering(self, plans: Mapping[str, EditPlan | None]) -> Spread:
        """For `evaluate`; the arms are the base under these plans."""
        return lambda make: CrewRun(
            self, lambda bench: make({arm: partial(bench.entered, plan) for arm, plan in plans.items()})
        )

    @property
    def dtype(self) -> torch.dtype:
        """In which the workers compute."""
        from stethoscope.models.load import preferred_dtype

        return self._bench.dtype or preferred_dtype(self._bench.device)

    def answering_from(self, checkpoints: Mapping[str, str | Path]) -> Spread:
        """For `evaluate_checkpoints`."""
        folders = {arm: open_checkpoint(path).path for arm, path in checkpoints.items()}
        return lambda make: CrewRun(
            self, lambda bench: make({arm: partial(bench.opened, folder) for arm, folder in folders.items()})
        )

    def work(
        self, make: Callable[[Bench], Any], task: Callable[..., Any], pieces: Sequence[Piece]
    ) -> Iterator[tuple[int, Any]]:
        """See `stethoscope.work.Run`.

        Raises:
            StethoscopeError: no worker is left, or none is to be had.
            Exception: whatever a worker's task raised.
        """
        ray, errors = self._ray, self._ray.exceptions
        stage = ray.put(Stage(number=next(self._stages), make=make, task=task))
        queue, watch = _Queue(pieces), _Watch(pieces)
        flying: dict[Any, _Flight] = {}
        deaths: Counter[int] = Counter()
        try:
            while queue.look() or queue.suspects or flying:
                if not flying:  # all that waits is new: nobody need keep what the last had at hand
                    for member in self._members:
                        member.key = None
                self._send(queue, flying, stage, pieces)
                watch.look(flying)
                for reference in self._wait(flying):
                    flight = flying.pop(reference)
                    flight.member.flying.remove(reference)
                    try:
                        result = ray.get(reference)
                    except errors.RayTaskError as error:
                        if not isinstance(error.cause, errors.ObjectLostError):
                            # an error of ours as it was raised; any other with the worker's traceback
                            raise (error.cause if isinstance(error.cause, StethoscopeError) else error) from None
                        result = Lost(why=f"what it was given is gone: {str(error.cause).splitlines()[0]}")
                    except errors.RayError as error:
                        why = str(error).strip().splitlines()[0]
                        log.warning("%s died with %s: %s", flight.member.where, pieces[flight.number].name, why)
                        deaths[flight.number] += not flight.member.flying  # else another may be to blame
                        if deaths[flight.number] < DEATHS:
                            queue.suspect(flight.number)
                        self._bury(flight.member, queue, flying)
                        if deaths[flight.number] < DEATHS:
                            continue
                        result = Lost(why=f"{DEATHS} workers died with it, the last: {why}")
                    watch.note(flight, flying)
                    if flight.kept and not isinstance(result, Lost):
                        result = (result, *flight.kept)
                    number = flight.number
                    del flight
                    yield number, result
                    del result  # it may hold shared memory, which others wait for
        finally:
            for reference, flight in flying.items():
                ray.cancel(reference)
                flight.member.flying.remove(reference)
            watch.report()

    def _send(self, queue: "_Queue", flying: dict[Any, _Flight], stage: Any, pieces: Sequence[Piece]) -> None:
        """Give out pieces, so few that they can be held, towards the end one to a worker; suspects one by one."""

        def send(member: _Member, number: int) -> None:
            piece = pieces[number]
            do = member.actor.do.options(num_returns=1 + piece.keep)
            found = do.remote(stage, piece.load(), *piece.given)
            reference, *kept = found if piece.keep else [found]
            member.flying.append(reference)
            flying[reference] = _Flight(member=member, number=number, since=time.monotonic(), kept=kept)

        free = [member for member in self._members if member.introduction]
        for member in free:
            if not member.flying and queue.suspects:
                send(member, queue.take_suspect(member))
        for depth in range(AHEAD if len(queue) > len(self._members) else 1):
            for member in free:
                busy = any(flying[one].number in queue.suspected for one in member.flying if one in flying)
                if len(member.flying) == depth and len(queue) and not busy:
                    number = queue.take(member, self._members)
                    if number is not None:
                        send(member, number)

    def _wait(self, flying: Mapping[Any, _Flight]) -> list[Any]:
        """What is done, if anything is within a second; workers that are ready to begin are taken in.

        Raises:
            StethoscopeError: nobody has been ready for long, or a worker has other versions than the driver.
        """
        greetings = {member.greeting: member for member in self._members if member.greeting is not None}
        done, _ = self._ray.wait([*flying, *greetings], num_returns=1, timeout=1.0)
        for reference in done:
            if member := greetings.get(reference):
                self._welcome(member)
        if any(member.introduction for member in self._members):
            self._since = time.monotonic()
        elif time.monotonic() - self._since > PATIENCE:
            wanted = {"CPU": self._threads, "GPU": self.options.gpus}
            raise StethoscopeError(
                "the cluster has no room for a worker, or none starts",
                problems=[f"a worker takes {wanted}", f"the cluster has {self._ray.available_resources()} to give"],
                hint="`ray status` tells more; fewer `threads` or a smaller share of a GPU may do",
            )
        return [reference for reference in done if reference in flying]

    def _welcome(self, member: _Member) -> None:
        try:
            found: Introduction = self._ray.get(member.greeting)
        except self._ray.exceptions.RayError as error:  # for good: while it may start again, it is asked again
            log.warning("a worker cannot start: %s", error)
            self._members.remove(member)
            if not self._members:
                raise StethoscopeError(
                    "no worker can start",
                    problems=[str(error).strip().splitlines()[-1]],
                    hint="is stethoscope installed on every node?",
                ) from error
            return
        if found.versions != versions():
            raise StethoscopeError(
                f"{found.where} has other versions than this one, and would compute other results",
                problems=[f"{name} {one}, here {versions()[name]}" for name, one in found.versions.items()],
                hint="install the same environment on every node",
            )
        others = {m.introduction.device for m in self._members if m.introduction} - {found.device}
        if others:
            log.warning("%s computes on %s, others on %s", found.where, found.device, ", ".join(others))
        member.introduction, member.greeting = found, None
        log.info("%s is ready", found.where)

    def _bury(self, member: _Member, queue: "_Queue", flying: dict[Any, _Flight]) -> None:
        """Take back what else a worker that died had, and wait for it to begin anew."""
        for reference in member.flying:
            queue.suspect(flying.pop(reference).number)
        member.flying, member.key, member.introduction = [], None, None
        member.greeting = _greet(member.actor)

    def _connect(self) -> None:
        self._since = time.monotonic()
        if self._ray.is_initialized():
            return
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # what a piece that failed should have kept is never asked for: its first value has told already
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
        try:
            self._ray.init(address=self.options.address, **quiet)
        except ConnectionError as error:
            if self.options.address != "auto":
                raise StethoscopeError(
                    f"there is no Ray cluster at `{self.options.address}`", hint="`auto` starts one on this machine"
                ) from error
            cpus = max(os.cpu_count() or 1, (self.options.workers or 1) * self._threads)
            self._ray.init(num_cpus=cpus, include_dashboard=False, **quiet)
            log.info("started a Ray cluster on this machine with %d CPUs", cpus)
        self._started = True

    def _room(self) -> int:
        """How many workers the cluster as it is has room for."""
        total = self._ray.cluster_resources()
        if self.options.gpus:
            return max(1, int(total.get("GPU", 0) / self.options.gpus))
        return max(1, int(total.get("CPU", 1) / self._threads))


class CrewRun:
    """A crew and what makes its tools; a `stethoscope.work.Run`."""

    def __init__(self, crew: Crew, make: Callable[[Bench], Any]) -> None:
        self._crew, self._make = crew, make

    @property
    def means(self) -> Means:
        """The crew's."""
        return self._crew.means

    def __call__(self, task: Callable[..., Any], pieces: Sequence[Piece]) -> Iterator[tuple[int, Any]]:
        """See `stethoscope.work.Run`."""
        return self._crew.work(self._make, task, pieces)


class _Queue:
    """Pieces that wait, by key: a worker keeps to a key while there are pieces of it.

    Attributes:
        suspects: those that a worker had when it died; each is done by itself, so that who kills is known for certain.
        suspected: all that ever were.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        self._waiting: dict[Any, deque[int]] = {}
        self._seen = self._left = 0
        self.suspects: deque[int] = deque()
        self.suspected: set[int] = set()
        self.look()

    def __len__(self) -> int:
        return self._left

    def look(self) -> int:
        """How many pieces wait, those that have come since included."""
        for number in range(self._seen, len(self._pieces)):
            self._waiting.setdefault(self._pieces[number].key, deque()).append(number)
            self._left += 1
        self._seen = len(self._pieces)
        return self._left

    def take(self, member: _Member, members: Sequence[_Member]) -> int | None:
        """The next piece for a worker, if there is any: of its key, or of none; else of that which fewest others have.

        What continues with values of other pieces is left to those who have its key, or it would go to and fro.
        """
        key = next((key for key in (member.key, None) if self._waiting.get(key)), None)
        if key is None and not self._waiting.get(None):
            holders = Counter(other.key for other in members if other is not member)
            taken = Counter(other.key for other in members if other.flying)
            free = [
                key
                for key, waiting in self._waiting.items()
                if waiting and not (self._pieces[waiting[0]].given and holders[key] and member.key is not None)
            ]
            if not free:
                return None
            key = member.key = min(free, key=lambda key: taken[key])
        self._left -= 1
        return self._waiting[key].popleft()

    def suspect(self, number: int) -> None:
        """A piece that was out when its worker died."""
        self.suspects.append(number)
        self.suspected.add(number)

    def take_suspect(self, member: _Member) -> int:
        """The next suspect for a worker that has nothing else."""
        number = self.suspects.popleft()
        if self._pieces[number].key is not None:
            member.key = self._pieces[number].key
        return number


class _Watch:
    """Throughput and stragglers, for the log."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces, self._start = pieces, time.monotonic()
        self._seconds: deque[float] = deque(maxlen=1000)
        self._done: Counter[str] = Counter()
        self._told: set[int] = set()
        self._reported = self._start

    def note(self, flight: _Flight, flying: Mapping[Any, _Flight]) -> None:
        """A piece is done."""
        now = time.monotonic()
        self._seconds.append(now - flight.since)
        self._done[flight.member.where] += 1
        for reference in flight.member.flying[:1]:
            flying[reference].since = now

    def look(self, flying: Mapping[Any, _Flight]) -> None:
        """Say which pieces take unusually long, and now and then how far things are."""
        now = time.monotonic()
        if now - self._reported > REPORT_SECONDS:
            self.report()
        usual = median(self._seconds) if self._seconds else None
        for flight in flying.values():
            late = now - flight.since
            if usual and late > max(SLOW * usual, SLOW_SECONDS) and flight.number not in self._told:
                self._told.add(flight.number)
                name = self._pieces[flight.number].name
                log.warning("%s has %s for %.0f s, %.1f s are usual", flight.member.where, name, late, usual)

    def report(self) -> None:
        """How many pieces are done, how fast, and by whom."""
        self._reported = time.monotonic()
        done = sum(self._done.values())
        rate = done / max(self._reported - self._start, 1e-9)
        shares = ", ".join(f"{who}: {number}" for who, number in self._done.most_common())
        log.info("%d of %d pieces done, %.2f a second (%s)", done, len(self._pieces), rate, shares)


def import_ray() -> Any:
    """Ray itself.

    Raises:
        StethoscopeError: it is not installed.
    """
    try:
        import ray
        import ray.exceptions
    except ModuleNotFoundError as error:
        raise StethoscopeError('workers need Ray: `pip install "sae-stethoscope[ray]"`') from error
    return ray


def _greet(actor: Any) -> Any:
    return actor.introduce.options(max_task_retries=-1).remote()
