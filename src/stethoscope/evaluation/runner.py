"""Runs arms on tasks by lm-evaluation-harness, one model at a time: in this process, or as a worker's tool."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from lm_eval import evaluator
from lm_eval.api.model import LM
from lm_eval.api.task import Task

from stethoscope.evaluation.harness import SharedPrefixLM
from stethoscope.evaluation.harness_logs import to_rows
from stethoscope.evaluation.tasks import quiet_harness
from stethoscope.executor import WorkerContext


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One arm on one task, a piece of the work; ``key`` identifies all that decides its outcomes."""

    arm: str
    task: str
    key: str
    stored: Path

    @property
    def journal(self) -> Path:
        """Where finished batches are kept until the outcomes are stored."""
        return self.stored.with_suffix(".jsonl")


class TaskRunner:
    """Runs arms on tasks by the harness, with one arm's model in memory at a time.

    Attributes:
        on_items: called with the number of prompts of each finished batch.
    """

    def __init__(
        self,
        arms: Mapping[str, Callable[[], AbstractContextManager[LM]]],
        tasks: Mapping[str, Task],
        limit: int | None,
        seed: int,
    ) -> None:
        self.arms, self.tasks, self.limit, self.seed = arms, tasks, limit, seed
        self.on_items: Callable[[int], None] = lambda _: None
        self._arm: str | None = None
        self._lm: LM | None = None
        self._state = ExitStack()

    def __enter__(self) -> "TaskRunner":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the arm that is open."""
        self._arm = self._lm = None
        self._state.close()
        gc.collect()  # a model holds cycles, and the next one needs its memory

    def open(self, arm: str) -> LM:
        """The model that answers for an arm; the arm before is left."""
        if self._arm != arm:
            self.close()
            self._lm = self._state.enter_context(self.arms[arm]())
            self._arm = arm
        return self._lm

    def run(self, cell: Cell) -> pd.DataFrame:
        """One arm on one task, as rows of outcomes."""
        lm, task = self.open(cell.arm), self.tasks[cell.task]
        if isinstance(lm, SharedPrefixLM):
            lm.on_items = self.on_items
            lm.journal = cell.journal if cell.journal.parent.is_dir() else None
        task.set_fewshot_seed(seed=self.seed)  # or the second arm would draw other shots than the first
        with quiet_harness():
            result = evaluator.evaluate(
                lm, {"tasks": {cell.task: task}}, limit=self.limit, bootstrap_iters=0, log_samples=True
            )
        # Minerva's and its kin's tasks extract inside their scoring function, out of the filters' sight.
        extract = getattr(task.config.process_results, "__globals__", {}).get("get_unnormalized_answer")
        known = lm.generation if isinstance(lm, SharedPrefixLM) else None
        return to_rows(cell.arm, cell.task, result["samples"][cell.task], extract=extract, generation=known)


def set_up_worker(
    context: WorkerContext,
    *,
    arms: Mapping[str, Any],
    load_tasks: Callable[[], Mapping[str, Task]],
    batch_size: int,
    limit: int | None,
    seed: int,
) -> TaskRunner:
    """A worker's runner.

    Args:
        arms: plans for the worker's base, None for the base itself, or folders of checkpoints.
        load_tasks: called once.
    """

    @contextmanager
    def opened(arm: Any) -> Iterator[LM]:
        with context.state(arm) as (model, tokenizer):
            yield SharedPrefixLM(model, tokenizer, batch_size=batch_size)

    with quiet_harness():
        return TaskRunner({name: partial(opened, arm) for name, arm in arms.items()}, load_tasks(), limit, seed)
