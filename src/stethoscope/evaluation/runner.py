"""Arms on tasks, piece by piece, by lm-evaluation-harness: in this process, or in a worker."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from lm_eval import evaluator
from lm_eval.api.model import LM
from lm_eval.api.task import Task

from stethoscope.evaluation.harness import SharedPrefixLM, is_sampled
from stethoscope.evaluation.harness_logs import to_rows
from stethoscope.evaluation.tasks import quiet_harness
from stethoscope.executor import WorkerContext

Opened = Callable[[Any], AbstractContextManager[LM]]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One arm on tasks that are run together.

    Attributes:
        stored: task -> where its outcomes are stored.
        key: identifies all that decides them.
    """

    arm: str
    key: str
    stored: Mapping[str, Path]

    @property
    def journal(self) -> Path:
        """Where finished batches are kept until the outcomes are stored."""
        return next(iter(self.stored.values())).with_suffix(".jsonl")


@dataclass(frozen=True, kw_only=True)
class Questions:
    """The tasks and how they are asked.

    Attributes:
        limit: so many items of each task; all if None.
        seed: of few-shot sampling.
        batch_size: prompts decoded together.
    """

    tasks: Mapping[str, Task]
    limit: int | None
    seed: int
    batch_size: int

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Items of each task; the harness makes a task's items anew whenever it is asked for them."""
        found = {name: len(task.eval_docs) for name, task in self.tasks.items()}
        return {name: size if self.limit is None else min(self.limit, size) for name, size in found.items()}

    def pieces(self) -> Iterator[list[str]]:
        """The tasks as they are run: those that fit into one batch are decoded together, others alone."""
        piece, size = list[str](), 0
        for name, task in self.tasks.items():
            joins = task.OUTPUT_TYPE == "generate_until" and not is_sampled(task.config.generation_kwargs or {})
            size += self.sizes[name]
            if piece and not (joins and size <= self.batch_size):
                yield piece
                piece, size = [], self.sizes[name]
            piece.append(name)
            if not joins:
                yield piece
                piece, size = [], 0
        if piece:
            yield piece


class TaskRunner:
    """Runs arms on tasks, with one arm's model in memory at a time.

    Attributes:
        answers: arm -> the arm whose answers it has.
        on_items: called with the number of prompts of each finished batch.
    """

    def __init__(self, arms: Mapping[str, Any], opened: Opened, questions: Questions) -> None:
        self.arms, self.opened, self.questions = arms, opened, questions
        self.answers = {arm: arm for arm in arms}
        self.on_items: Callable[[int], None] = lambda _: None
        self._arm: str | None = None
        self._lm: LM | None = None
        self._state = ExitStack()

    def close(self) -> None:
        """Leave the arm that is open."""
        loaded = isinstance(self.arms.get(self._arm or ""), Path)
        self._arm = self._lm = None
        self._state.close()
        if loaded:
            gc.collect()  # a model holds cycles, and the next one needs its memory

    def open(self, arm: str) -> LM:
        """The model that answers for an arm; the arm before is left."""
        if self._arm != arm:
            self.close()
            self._lm = self._state.enter_context(self.opened(self.arms[arm]))
            self._arm = arm
        return self._lm

    def run(self, piece: Piece) -> list[pd.DataFrame]:
        """One arm on some tasks, each as rows of outcomes."""
        arm, asked = piece.arm, self.questions
        lm, tasks = self.open(arm), {name: asked.tasks[name] for name in piece.stored}
        if isinstance(lm, SharedPrefixLM):
            lm.on_items = self.on_items
            lm.journal = piece.journal if piece.journal.parent.is_dir() else None
        for task in tasks.values():
            task.set_fewshot_seed(seed=asked.seed)  # or the second arm would draw other shots than the first
        with quiet_harness():
            result = evaluator.evaluate(lm, {"tasks": tasks}, limit=asked.limit, bootstrap_iters=0, log_samples=True)
        known = lm.generation if isinstance(lm, SharedPrefixLM) else None
        frames = []
        for name, task in tasks.items():
            # Minerva's and its kin's tasks extract inside their scoring function, out of the filters' sight.
            extract = getattr(task.config.process_results, "__globals__", {}).get("get_unnormalized_answer")
            frames.append(to_rows(arm, name, result["samples"][name], extract=extract, generation=known))
        return frames


def set_up_worker(context: WorkerContext, *, arms: Mapping[str, Any], questions: Callable[[], Questions]) -> TaskRunner:
    """A worker's runner; ``arms`` are plans for its base, None for the base itself, or folders of checkpoints."""

    @contextmanager
    def opened(arm: Any) -> Iterator[LM]:
        with context.state(arm) as (model, tokenizer):
            yield SharedPrefixLM(model, tokenizer, batch_size=asked.batch_size)

    with quiet_harness():
        asked = questions()
        return TaskRunner(arms, opened, asked)
