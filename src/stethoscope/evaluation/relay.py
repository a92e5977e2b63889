"""What the harness asks of a model, cut into batches that any worker answers alike, and the answers given back to it.

The harness runs where the tasks are, and twice at that: first to learn what it asks, then, when workers have answered,
to be told. A batch is what a single process decodes together, so the answers are the same.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stethoscope.errors import EvaluationError
from stethoscope.evaluation.harness import Batch, Generation, SharedPrefixLM, read_journal, write_journal
from stethoscope.work import Lost, Piece, Run

Cell = tuple[str, str]  # arm and task
Continuation = tuple[tuple[str, str] | None, list[int], list[int]]  # text, and tokens of context and continuation
Score = tuple[float, bool]  # log-likelihood, and whether greedy decoding would have written it
Models = Mapping[str, Callable[[], AbstractContextManager[tuple[PreTrainedModel, PreTrainedTokenizerBase]]]]


@dataclass(frozen=True, kw_only=True)
class Question:
    """Prompts to be continued, or continuations to be scored, together and by one arm."""

    arm: str
    asked: Batch | list[Continuation]


class Answerer:
    """What a worker answers with: the arms' models, one of them at a time in memory."""

    def __init__(self, arms: Models, *, batch_size: int) -> None:
        self.arms, self.batch_size = arms, batch_size
        self._arm: str | None = None
        self._state = ExitStack()

    def answer(self, question: Question) -> dict[str, Generation] | list[Score]:
        """Generations by key, or a score for each continuation."""
        if question.arm != self._arm:
            self._arm = None
            self._state.close()
            model, tokenizer = self._state.enter_context(self.arms[question.arm]())
            self._lm = SharedPrefixLM(model, tokenizer, batch_size=self.batch_size)
            self._arm = question.arm
        if isinstance(question.asked, Batch):
            return self._lm.generate(question.asked)
        scores: list[Score] = self._lm._loglikelihood_tokens(question.asked, disable_tqdm=True)
        return scores


class RelayLM(SharedPrefixLM):
    """Stands where the model would: notes what is asked, or says what was answered.

    Attributes:
        scores: of continuations, by their tokens; None to note what is asked.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> None:
        """
        Args:
            model: for its configuration; it may be without memory, on the device ``meta``.
        """
        super().__init__(model, tokenizer, batch_size=batch_size)
        self.scores: Mapping[Any, Score] | None = {}
        self._asked: list[Batch | list[Continuation]] = []

    def rehearse(self, task: Task, limit: int | None, seed: int) -> list[Batch | list[Continuation]]:
        """What a task asks, whoever answers.

        Raises:
            EvaluationError: it samples its responses.
        """
        task.set_fewshot_seed(seed=seed)
        task.build_all_requests(limit=limit)
        self.scores, self._asked = None, []
        by_kind: dict[str, list[Instance]] = {}
        for request in task.instances:
            by_kind.setdefault(request.request_type, []).extend([request] * request.repeats)
        for kind, requests in by_kind.items():
            getattr(self, kind)(requests, disable_tqdm=True)
        self.scores = {}
        return self._asked

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As noted or answered; see `SharedPrefixLM`."""
        if any(request.args[1].get("do_sample") for request in requests):
            raise EvaluationError(
                f"`{requests[0].task_name}` samples its responses, which no two runs do alike",
                hint="evaluate it without workers",
            )
        if self.scores is None:
            self._asked += self.batches(requests)
            return [""] * len(requests)
        return super().generate_until(requests, disable_tqdm)

    def generate(self, batch: Batch) -> dict[str, Generation]:
        """Never: all was answered before."""
        raise EvaluationError(f"{len(batch.prompts)} prompts were not answered")

    def _loglikelihood_tokens(
        self, requests: list[Continuation], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Score]:
        if self.scores is not None:
            return [self.scores[_tokens(request)] for request in requests]
        # As the harness does: those that differ in the last token only share a row, and the longest rows come first.
        rows: dict[tuple[int, ...], list[Continuation]] = {}
        for request in requests:
            rows.setdefault((*request[1], *request[2][:-1]), []).append(request)
        order = sorted(rows.values(), key=_row)
        for i in range(0, len(order), self.batch_size):
            self._asked.append([request for row in order[i : i + self.batch_size] for request in row])
        return [(0.0, False)] * len(requests)


def ask_workers(
    run: Run,
    lm: RelayLM,
    cells: Mapping[Cell, Path],
    tasks: Mapping[str, Task],
    *,
    limit: int | None,
    seed: int,
    on_items: Callable[[int, Cell], None],
) -> dict[Cell, dict[Any, Score]]:
    """Have workers answer all that is still open; what they generate goes to the cells' journals.

    Args:
        cells: arm and task -> journal.
        on_items: called with the number of prompts answered, and whose.

    Returns:
        scores of continuations by their tokens, per cell.

    Raises:
        EvaluationError: a task samples its responses, or a batch ends whoever works on it.
    """
    asked = {name: lm.rehearse(tasks[name], limit, seed) for name in dict.fromkeys(name for _, name in cells)}
    scores: dict[Cell, dict[Any, Score]] = {cell: {} for cell in cells}
    open_: list[tuple[Cell, Question]] = []
    for cell, journal in cells.items():
        known = read_journal(journal)
        for batch in asked[cell[1]]:
            if isinstance(batch, Batch) and all(key in known for key in batch.prompts):
                on_items(len(batch.prompts), cell)
            else:
                open_.append((cell, Question(arm=cell[0], asked=batch)))
    pieces = [_piece(cell, question) for cell, question in open_]
    for number, found in run(Answerer.answer, pieces):
        cell, question = open_[number]
        if isinstance(found, Lost):
            raise EvaluationError(f"{pieces[number].name} ends every worker: {found.why}", hint="a smaller batch size")
        if isinstance(question.asked, Batch):
            write_journal(cells[cell], found)
        else:
            scores[cell] |= zip(map(_tokens, question.asked), found, strict=True)
        on_items(len(found), cell)
    return scores


def _piece(cell: Cell, question: Question) -> Piece:
    first = next(iter(question.asked.contexts.values())) if isinstance(question.asked, Batch) else question.asked[0][0]
    return Piece(name=f"the batch of {cell} that ends {str(first)[-40:]!r}", key=cell[0], load=lambda: question)


def _tokens(request: Continuation) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(request[1]), tuple(request[2])


def _row(row: Sequence[Continuation]) -> tuple[int, list[int]]:
    longest = max(row, key=lambda request: len(request[2]))
    return -len(longest[1] + longest[2]), longest[1] + longest[2]
