"""Run lm-evaluation-harness tasks on several arms: `evaluate(model, tokenizer, arms, tasks, ...)` on states of one live
model, `evaluate_checkpoints(checkpoints, tasks, ...)` on checkpoints.

Tasks are built once and every arm gets the same prompts. Each finished arm and task is stored at once; an interrupted
run goes on where it stopped, inside a task too.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from functools import cache, partial
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from stethoscope.artifacts import canonical_json, file_name, kept_for_one, sha256_bytes, sha256_files
from stethoscope.checkpoints.files import identity_files
from stethoscope.checkpoints.open import open_checkpoint
from stethoscope.editing.plan import EditPlan
from stethoscope.errors import EvaluationError
from stethoscope.evaluation.harness import HARMLESS, SharedPrefixLM
from stethoscope.evaluation.outcomes import DIRECTIONS, Outcomes
from stethoscope.evaluation.runner import Piece, Questions, TaskRunner, set_up_worker
from stethoscope.evaluation.tasks import load_tasks, prompts_hash, quiet_harness
from stethoscope.executor import Executor, Failed, LocalExecutor, RayExecutor, WorkerContext
from stethoscope.models.device import find_device, preferred_dtype
from stethoscope.models.load import load_model, load_tokenizer, loading

log = logging.getLogger(__name__)

__all__ = ["evaluate", "evaluate_checkpoints", "load_tasks", "weights_hash"]

Arms = Mapping[str, Callable[[], AbstractContextManager[Any]] | EditPlan | None]
Progress = Callable[[int, int, str], None]
Opened = Callable[[Any], AbstractContextManager[LM]]


def evaluate(
    model: PreTrainedModel | Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    arms: Arms,
    tasks: Sequence[str],
    *,
    out: Path,
    include_path: Path | None = None,
    task_code: bool = False,
    data: Path | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    keys: Mapping[str, str] | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Outcomes:
    """Evaluate every state of a live model on every task, item by item; no model is loaded.

    Args:
        model: in the base state, on its device, in the type to evaluate in; or a function that loads it, called if any
            answer is missing. ``keys`` must then name every arm, and depend on base weights, device and type.
        arms: name to a callable whose context puts the model into that arm's state and takes it back; with an
            ``executor``, to the plan that its workers apply to their base, which None leaves as it is.
        tasks: names of harness tasks or groups, or paths of YAML files.
        out: folder for ``outcomes.parquet`` and, under ``parts/``, what is finished so far.
        include_path: folder of further task YAMLs; if it holds all tasks, the harness' own are not read (10 s).
        task_code: run Python functions that task files of one's own name.
        data: local files of ``minerva_math``'s items (see `tasks.load_tasks`).
        limit: so many items of each task; all if not given.
        batch_size: prompts decoded together.
        seed: of few-shot sampling.
        keys: a hash for each arm's state, needed with an ``executor``; others are told by the model's weights. Of arms
            with equal keys the first is run for all.
        executor: its workers run whole tasks, with equal results; this process does if None.
        progress: called with items done, items in all, and what is running.

    Returns:
        the outcomes, also saved as ``out/outcomes.parquet``.

    Raises:
        EvaluationError: no arm; tasks that are unknown, cannot be built, or have no items.
    """

    @cache
    def loaded() -> PreTrainedModel:
        return model if isinstance(model, PreTrainedModel) else model()

    @cache
    def local() -> SharedPrefixLM:
        return SharedPrefixLM(loaded(), tokenizer, batch_size=batch_size)

    @contextmanager
    def opened(arm: Any) -> Iterator[LM]:
        with arm():
            yield local()

    def identify(arm: str) -> str:
        if key := (keys or {}).get(arm):
            return key  # an arm without work is not entered
        runner.open(arm)
        return weights_hash(loaded())

    _check(arms, limit, batch_size)
    build = partial(load_tasks, tasks, include_path, data=data, seed=seed, task_code=task_code)
    ask = partial(_ask, build, limit=limit, seed=seed, batch_size=batch_size)
    setup = partial(set_up_worker, arms=arms, questions=ask)
    firsts: dict[str, str] = {}
    with quiet_harness(), closing(TaskRunner(arms, opened, ask())) as runner:
        settings = {"batch_size": batch_size, "tokenizer": _tokenizer_hash(tokenizer, runner.questions.tasks)}
        if isinstance(model, PreTrainedModel):
            settings |= {"dtype": str(model.dtype), "model": weights_hash(model)}
        runner.answers = {arm: firsts.setdefault((keys or {}).get(arm, arm), arm) for arm in arms}
        return _complete(runner, identify, settings, out, executor, setup, progress)


def evaluate_checkpoints(
    checkpoints: Mapping[str, str | Path],
    tasks: Sequence[str],
    *,
    out: Path,
    backend: Literal["hf", "vllm"] = "hf",
    include_path: Path | None = None,
    task_code: bool = False,
    data: Path | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    dtype: torch.dtype | None = None,
    device: str = "auto",
    seed: int = 0,
    executor: RayExecutor | None = None,
    progress: Progress | None = None,
) -> Outcomes:
    """Evaluate checkpoints on disk on every task, item by item; one is loaded at a time, and only if it has work left.

    Args:
        checkpoints: an arm's name to its folder or hub id.
        backend: ``hf`` decodes as `evaluate` does; ``vllm`` is the harness' own class, which does not tell how many
            tokens a response has or whether it was cut off.
        dtype: of the weights; the device's preferred one if not given.
        device: on which ``hf`` computes in this process, see `models.find_device`.

    Others and the return value: as for `evaluate`.

    Raises:
        StethoscopeError: there is no such device.
        EvaluationError: as `evaluate`; vLLM is not installed; tokenizers or decoding settings differ between arms.
        CheckpointError: a checkpoint cannot be opened.
        StethoscopeError: another process works in ``out``.
    """
    _check(checkpoints, limit, batch_size)
    if backend == "vllm" and executor:
        raise EvaluationError("workers decode by `hf`", hint="vLLM spreads over GPUs itself: leave out `--ray`")
    if backend == "vllm" and find_spec("vllm") is None:
        raise EvaluationError("vLLM is not installed", hint=f"pip install 'lm_eval[vllm]=={version('lm_eval')}'")
    folders = {arm: open_checkpoint(path).path for arm, path in checkpoints.items()}
    where = find_device(device)
    dtype = dtype or (executor.dtype if executor else preferred_dtype(where))

    @contextmanager
    def opened(folder: Path) -> Iterator[LM]:
        if backend == "vllm":
            from lm_eval.models.vllm_causallms import VLLM

            yield VLLM(pretrained=str(folder), dtype=str(dtype).removeprefix("torch."), seed=seed)
        else:
            model = load_model(folder, dtype=dtype, device=where)
            yield SharedPrefixLM(model, load_tokenizer(folder), batch_size=batch_size)

    def identify(arm: str) -> str:
        return sha256_files(identity_files(folders[arm]))

    build = partial(load_tasks, tasks, include_path, data=data, seed=seed, task_code=task_code)
    ask = partial(_ask, build, limit=limit, seed=seed, batch_size=batch_size)
    setup = partial(set_up_worker, arms=folders, questions=ask)
    with kept_for_one(out), quiet_harness(), closing(TaskRunner(folders, opened, ask())) as runner:
        tokenizers = {
            arm: _tokenizer_hash(load_tokenizer(folder), runner.questions.tasks) for arm, folder in folders.items()
        }
        _check_alike("tokenizers", tokenizers, "the prompts would not be the same tokens: evaluate them apart")
        decoding = {arm: _decoding(folder) for arm, folder in folders.items()}
        _check_alike("decoding settings", decoding, "make `generation_config.json` the same in all of them")
        settings = {
            "batch_size": batch_size if backend == "hf" else "auto",
            "dtype": str(dtype),
            "backend": backend,
            "tokenizer": next(iter(tokenizers.values())),
        }
        return _complete(runner, identify, settings, out, executor, setup, progress)


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of a model's tensors as they are now."""
    digest = sha256()
    for name, tensor in sorted(model.state_dict(keep_vars=False).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _complete(
    runner: TaskRunner,
    identify: Callable[[str], str],
    settings: dict[str, Any],
    out: Path,
    executor: Executor | None,
    setup: Callable[[WorkerContext], TaskRunner],
    progress: Progress | None,
) -> Outcomes:
    """Every arm on every task; what is stored already is read, the rest is run here or on workers by ``setup``.

    Args:
        identify: a hash of an arm's weights, called when its turn comes.
    """
    asked = runner.questions
    tasks, limit, seed, sizes = asked.tasks, asked.limit, asked.seed, asked.sizes
    settings |= {name: version(name) for name in ("lm_eval", "transformers", "torch")} | {"limit": limit, "seed": seed}
    prompts = {name: prompts_hash(task, limit, seed) for name, task in tasks.items()}
    total, items = len(set(runner.answers.values())) * sum(sizes.values()), 0
    frames: dict[tuple[str, str], pd.DataFrame] = {}
    together, missing = list(asked.pieces()), list[Piece]()
    (out / "parts").mkdir(parents=True, exist_ok=True)  # workers keep their journals there if they see it

    def tell(arm: str, task: str) -> None:
        if progress:
            progress(sum(sizes[name] for _, name in frames) + items, total, f"{arm}: {task}")

    def pieces() -> Iterator[Piece]:
        for arm in dict.fromkeys(runner.answers.values()):
            state = identify(arm)
            for names in together:
                # what else is in a batch decides how its sums are rounded
                key = sha256_bytes(canonical_json([settings, [prompts[name] for name in names], arm, state]).encode())
                stored = {n: out / "parts" / f"{file_name(arm)}.{file_name(n)}.{key[:16]}.parquet" for n in names}
                found = {n: frame for n, path in stored.items() if (frame := _stored(path, key)) is not None}
                if len(found) < len(stored):
                    missing.append(Piece(arm=arm, key=key, stored=stored))
                    yield missing[-1]
                    continue
                for name, frame in found.items():
                    frames[arm, name] = frame
                    tell(arm, name)

    def advance(answered: int) -> None:
        nonlocal items
        items = min(items + answered, sum(sizes[name] for name in missing[-1].stored))
        tell(missing[-1].arm, next(iter(missing[-1].stored)))

    runner.on_items = advance
    mapped = executor or LocalExecutor()
    for index, found in mapped.map_pieces(TaskRunner.run, pieces(), setup=setup if executor else lambda _: runner):
        piece = missing[index]
        if isinstance(found, Failed):
            names = ", ".join(f"`{name}`" for name in piece.stored)
            raise EvaluationError(
                f"`{piece.arm}` on {names} ends every worker: {found.why}", hint="a smaller batch size"
            )
        for (name, path), frame in zip(piece.stored.items(), found, strict=True):
            Outcomes(frame=frame, provenance={"key": piece.key}).save(path)
            frames[piece.arm, name], items = frame, max(0, items - sizes[name])
            tell(piece.arm, name)
        piece.journal.unlink(missing_ok=True)
        items = 0
    rows = [frames[first, task].assign(arm=arm) for arm, first in runner.answers.items() for task in tasks]
    outcomes = Outcomes(
        frame=pd.concat(rows, ignore_index=True),
        provenance={**settings, "prompts": prompts, "stethoscope": version("sae-stethoscope")}
        | {DIRECTIONS: {name: dict(task.higher_is_better()) for name, task in tasks.items()}},
    )
    outcomes.check_comparable()
    outcomes.save(out / "outcomes.parquet")
    return outcomes


def _ask(build: Callable[[], Mapping[str, Task]], *, limit: int | None, seed: int, batch_size: int) -> Questions:
    return Questions(tasks=build(), limit=limit, seed=seed, batch_size=batch_size)


def _stored(path: Path, key: str) -> pd.DataFrame | None:
    """The outcomes of one arm on one task as they were stored; None if they were not, or are damaged."""
    if not path.exists():
        return None
    try:
        found = Outcomes.load(path)
        if found.provenance.get("key") == key:
            return found.frame
    except EvaluationError as error:
        log.debug("%s", error)
    log.warning("`%s` is damaged: its arm is run again on its task", path)
    return None


def _check(arms: Mapping[str, Any], limit: int | None, batch_size: int) -> None:
    if not arms:
        raise EvaluationError("there is no arm to evaluate", hint="`{'base': contextlib.nullcontext}` is the least")
    if limit is not None and limit < 1:
        raise EvaluationError(f"the limit of `{limit}` items leaves nothing to evaluate")
    if batch_size < 1:
        raise EvaluationError(f"a batch of `{batch_size}` prompts cannot be decoded", hint="the least is 1")


def _check_alike(what: str, found: Mapping[str, str], hint: str) -> None:
    first, *others = found.items()
    if different := [f"`{arm}`" for arm, value in others if value != first[1]]:
        raise EvaluationError(
            f"these arms have other {what} than `{first[0]}`, so they cannot be compared", problems=different, hint=hint
        )


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase, tasks: Mapping[str, Task]) -> str:
    """Identifies a tokenizer by its vocabulary and by how it splits each task's first item."""
    first = [str(task.doc_to_text(task.eval_docs[0])) for task in tasks.values()]
    return sha256_bytes(canonical_json([tokenizer.get_vocab(), tokenizer(first)["input_ids"]]).encode())


def _decoding(folder: Path) -> str:
    """The generation settings of a checkpoint that change what greedy decoding writes, end tokens aside."""
    if not (folder / "generation_config.json").exists():
        return "{}"
    with loading(f"generation settings of `{folder}`"):
        changed = GenerationConfig.from_pretrained(folder).to_diff_dict()
    return canonical_json({name: value for name, value in changed.items() if value and name not in HARMLESS})
