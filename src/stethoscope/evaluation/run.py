"""Run lm-evaluation-harness tasks on several arms: `evaluate(model, tokenizer, arms, tasks, ...)` on states of one live
model, `evaluate_checkpoints(checkpoints, tasks, ...)` on checkpoints.

Tasks are built once and every arm gets the same prompts. Each finished arm and task is stored at once; an interrupted
run goes on where it stopped, inside a task too.
"""

import functools
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from lm_eval import evaluator
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from stethoscope.artifacts import canonical_json, sha256_bytes, sha256_files
from stethoscope.checkpoints.open import open_checkpoint
from stethoscope.errors import EvaluationError
from stethoscope.evaluation.harness import HARMLESS, SharedPrefixLM
from stethoscope.evaluation.harness_logs import Sample, to_rows
from stethoscope.evaluation.outcomes import Outcomes
from stethoscope.evaluation.relay import Answerer, Cell, RelayLM, Score, ask_workers
from stethoscope.evaluation.tasks import load_tasks, prompts_hash, quiet_harness
from stethoscope.models import find_device, load_model, load_skeleton, load_tokenizer, preferred_dtype
from stethoscope.work import Run, Spread

__all__ = ["evaluate", "evaluate_checkpoints", "load_tasks", "weights_hash"]

Arms = Mapping[str, Callable[[], AbstractContextManager[Any]]]
Progress = Callable[[int, int, str], None]
# An arm, entered: what identifies its weights, and how to get the model that answers (loaded when first asked).
_Entered = tuple[str, Callable[[], LM]]


def evaluate(
    model: PreTrainedModel | Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    arms: Arms,
    tasks: Sequence[str],
    *,
    out: Path,
    include_path: Path | None = None,
    data: Path | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    keys: Mapping[str, str] | None = None,
    spread: Spread | None = None,
    progress: Progress | None = None,
) -> Outcomes:
    """Evaluate every state of a live model on every task, item by item; no model is loaded.

    Args:
        model: in the base state, on its device, in the type to evaluate in; or a function that loads it, called if any
            answer is missing. ``keys`` must then name every arm, and depend on base weights, device and type.
        arms: name to a callable whose context puts the model into that arm's state and takes it back.
        tasks: names of harness tasks or groups, or paths of YAML files.
        out: folder for ``outcomes.parquet`` and, under ``parts/``, what is finished so far.
        include_path: folder of further task YAMLs; if it holds all tasks, the harness' own are not read (10 s).
        data: local files of ``minerva_math``'s items (see `minerva.local_tasks`).
        limit: so many items of each task; all if not given.
        batch_size: prompts decoded together.
        seed: of few-shot sampling.
        keys: a hash for each arm's state; arms without one are identified by hashing the model's weights in that state.
        spread: where the work is done; here if None. Workers have arms of their own by the same names.
        progress: called with items done, items in all, and what is running.

    Returns:
        the outcomes, also saved as ``out/outcomes.parquet``.

    Raises:
        EvaluationError: no arm; tasks that are unknown, cannot be built, or have no items.
    """

    @contextmanager
    def entered(arm: str) -> Iterator[_Entered]:
        with ExitStack() as state:

            @functools.cache
            def load() -> LM:
                state.enter_context(arms[arm]())
                return local()

            if key := (keys or {}).get(arm):
                yield key, load  # an arm without work is not entered
            else:
                load()
                yield weights_hash(loaded()), load

    @functools.cache
    def loaded() -> PreTrainedModel:
        return model if isinstance(model, PreTrainedModel) else model()

    @functools.cache
    def local() -> SharedPrefixLM:
        return SharedPrefixLM(loaded(), tokenizer, batch_size=batch_size)

    def relay() -> tuple[Run, RelayLM]:
        assert spread
        run = spread(functools.partial(Answerer, batch_size=batch_size))
        return run, RelayLM(loaded(), tokenizer, batch_size=batch_size)

    _check(arms, limit)
    with quiet_harness():
        built = load_tasks(tasks, include_path, data=data, seed=seed)
        settings = {"batch_size": batch_size, "tokenizer": _tokenizer_hash(tokenizer, built)}
        if isinstance(model, PreTrainedModel):
            settings |= {"dtype": str(model.dtype), "model": weights_hash(model)}
        states = {arm: functools.partial(entered, arm) for arm in arms}
        work = relay if spread else None
        return _run(states, built, settings, out=out, limit=limit, seed=seed, relay=work, progress=progress)


def evaluate_checkpoints(
    checkpoints: Mapping[str, str | Path],
    tasks: Sequence[str],
    *,
    out: Path,
    backend: Literal["hf", "vllm"] = "hf",
    include_path: Path | None = None,
    data: Path | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    dtype: torch.dtype | None = None,
    device: str = "auto",
    seed: int = 0,
    spread: Spread | None = None,
    progress: Progress | None = None,
) -> Outcomes:
    """Evaluate checkpoints on disk on every task, item by item; one is loaded at a time, and only if it has work left.

    Args:
        checkpoints: an arm's name to its folder or hub id.
        backend: ``hf`` decodes as `evaluate` does; ``vllm`` is the harness' own class, which does not tell how many
            tokens a response has or whether it was cut off.
        dtype: of the weights; the device's preferred one if not given.
        device: on which ``hf`` computes in this process, see `models.find_device`.
        spread: where the work is done, by ``hf``; here if None.

    Others and the return value: as for `evaluate`.

    Raises:
        StethoscopeError: there is no such device.
        EvaluationError: as `evaluate`; vLLM is not installed; tokenizers or decoding settings differ between arms.
        CheckpointError: a checkpoint cannot be opened.
    """
    _check(checkpoints, limit)
    if backend == "vllm" and spread:
        raise EvaluationError("workers decode by `hf`", hint="vLLM spreads over GPUs itself: leave out `--ray`")
    if backend == "vllm" and find_spec("vllm") is None:
        raise EvaluationError("vLLM is not installed", hint=f"pip install 'lm_eval[vllm]=={version('lm_eval')}'")
    folders = {arm: open_checkpoint(path).path for arm, path in checkpoints.items()}
    where = find_device(device)
    dtype = dtype or preferred_dtype(where)

    @contextmanager
    def entered(folder: Path) -> Iterator[_Entered]:
        @functools.cache
        def load() -> LM:
            if backend == "vllm":
                from lm_eval.models.vllm_causallms import VLLM

                return VLLM(pretrained=str(folder), dtype=str(dtype).removeprefix("torch."), seed=seed)
            model = load_model(folder, dtype=dtype, device=where)
            return SharedPrefixLM(model, load_tokenizer(folder), batch_size=batch_size)

        identity = [path for path in folder.iterdir() if path.suffix in {".json", ".safetensors", ".jinja", ".model"}]
        try:
            yield sha256_files(identity), load
        finally:
            load.cache_clear()
            gc.collect()  # a model holds cycles, and the next one needs its memory

    with quiet_harness():
        built = load_tasks(tasks, include_path, data=data, seed=seed)
        tokenizers = {arm: _tokenizer_hash(load_tokenizer(folder), built) for arm, folder in folders.items()}
        _check_alike("tokenizers", tokenizers, "the prompts would not be the same tokens: evaluate them apart")
        decoding = {arm: _decoding(folder) for arm, folder in folders.items()}
        _check_alike("decoding settings", decoding, "make `generation_config.json` the same in all of them")
        settings = {
            "batch_size": batch_size if backend == "hf" else "auto",
            "dtype": str(dtype),
            "backend": backend,
            "tokenizer": next(iter(tokenizers.values())),
        }
        states = {arm: functools.partial(entered, folder) for arm, folder in folders.items()}

        def relay() -> tuple[Run, RelayLM]:
            assert spread
            first = next(iter(folders.values()))
            lm = RelayLM(load_skeleton(first, dtype=dtype), load_tokenizer(first), batch_size=batch_size)
            return spread(functools.partial(Answerer, batch_size=batch_size)), lm

        work = relay if spread else None
        return _run(states, built, settings, out=out, limit=limit, seed=seed, relay=work, progress=progress)


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of a model's tensors as they are now."""
    digest = sha256()
    for name, tensor in sorted(model.state_dict(keep_vars=False).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _run(
    states: Mapping[str, Callable[[], AbstractContextManager[_Entered]]],
    tasks: Mapping[str, Task],
    settings: dict[str, Any],
    *,
    out: Path,
    limit: int | None,
    seed: int,
    relay: Callable[[], tuple[Run, RelayLM]] | None,
    progress: Progress | None,
) -> Outcomes:
    """Every arm on every task; what is stored already is read instead, the rest asked of workers if there are any."""
    versions = {name: version(name) for name in ("lm_eval", "transformers", "torch")}
    settings = {**settings, **versions, "limit": limit, "seed": seed}
    prompts = {name: prompts_hash(task, limit, seed) for name, task in tasks.items()}
    sizes = {name: min(limit or len(task.eval_docs), len(task.eval_docs)) for name, task in tasks.items()}
    done, total = 0, len(states) * sum(sizes.values())
    parts: list[pd.DataFrame] = []

    def place(arm: str, state: str, name: str) -> tuple[str, Path]:
        key = sha256_bytes(canonical_json([settings, prompts[name], arm, state]).encode())
        return key, out / "parts" / f"{_safe(arm)}.{_safe(name)}.{key[:16]}.parquet"

    scores: dict[Cell, dict[Any, Score]] = {}
    if relay:
        known = {arm: _state(entered) for arm, entered in states.items()}
        cells = {(arm, name): place(arm, known[arm], name)[1] for arm in states for name in tasks}
        answered = {(arm, name): sizes[name] if path.exists() else 0 for (arm, name), path in cells.items()}

        def tell(items: int, cell: Cell) -> None:
            answered[cell] = min(answered[cell] + items, sizes[cell[1]])
            if progress:
                progress(sum(answered.values()), total, f"{cell[0]}: {cell[1]}")

        journals = {cell: path.with_suffix(".jsonl") for cell, path in cells.items() if not path.exists()}
        run, answers = relay() if journals else (None, None)  # no worker is started if all is answered
        if run and answers:
            scores = ask_workers(run, answers, journals, tasks, limit=limit, seed=seed, on_items=tell)
        states = {arm: functools.partial(_relayed, known[arm], answers) for arm in states}
    show = None if relay else progress  # what is left then is to look at the answers
    for arm, entered in states.items():
        with entered() as (state, load):
            for name, task in tasks.items():
                key, stored = place(arm, state, name)
                if stored.exists():
                    parts.append(Outcomes.load(stored).frame)
                else:
                    lm, start, said = load(), done, f"{arm}: {name}"

                    def advance(items: int, start: int = start, name: str = name, said: str = said) -> None:
                        nonlocal done
                        done = min(done + items, start + sizes[name])
                        if show:
                            show(done, total, said)

                    if isinstance(lm, SharedPrefixLM):
                        lm.on_items = advance
                        lm.journal = stored.with_suffix(".jsonl")
                    if isinstance(lm, RelayLM):
                        lm.scores = scores[arm, name]
                    part = _run_cell(lm, arm, name, task, limit, seed)
                    Outcomes(frame=part, provenance={"key": key}).save(stored)
                    stored.with_suffix(".jsonl").unlink(missing_ok=True)
                    parts.append(part)
                    done = start
                    del lm
                done += sizes[name]
                if show:
                    show(done, total, f"{arm}: {name}")
    provenance = {**settings, "prompts": prompts, "stethoscope": version("sae-stethoscope")}
    outcomes = Outcomes(frame=pd.concat(parts, ignore_index=True), provenance=provenance)
    outcomes.check_comparable()
    outcomes.save(out / "outcomes.parquet")
    return outcomes


def _state(entered: Callable[[], AbstractContextManager[_Entered]]) -> str:
    with entered() as (state, _):
        return state


@contextmanager
def _relayed(state: str, lm: RelayLM | None) -> Iterator[_Entered]:
    """An arm whose answers workers gave; without ``lm``, all of them are stored."""

    def load() -> LM:
        assert lm is not None
        return lm

    yield state, load


def _run_cell(lm: LM, arm: str, name: str, task: Task, limit: int | None, seed: int) -> pd.DataFrame:
    """One arm on one task, run by the harness, as rows of outcomes."""
    task.set_fewshot_seed(seed=seed)  # or the second arm would draw other shots than the first
    result = evaluator.evaluate(lm, {"tasks": {name: task}}, limit=limit, bootstrap_iters=0, log_samples=True)
    settings = {i.doc_id: i.args[1] for i in task.instances if i.request_type == "generate_until"}

    def details(sample: Sample) -> dict[str, Any]:
        asked = settings.get(sample["doc_id"])
        if asked is None or not isinstance(lm, SharedPrefixLM):
            return {"generated": asked is not None}
        found = lm.generation(sample["arguments"][0][0], asked)
        return {
            "generated": True,
            "truncated": found.truncated if found else None,
            "generated_tokens": found.tokens if found else None,
        }

    # Minerva's and its kin's tasks extract inside their scoring function, out of the filters' sight.
    scorer = getattr(task.config.process_results, "__globals__", {})
    return to_rows(arm, name, result["samples"][name], details, extract=scorer.get("get_unnormalized_answer"))


def _check(arms: Mapping[str, Any], limit: int | None) -> None:
    if not arms:
        raise EvaluationError("there is no arm to evaluate", hint="`{'base': contextlib.nullcontext}` is the least")
    if limit is not None and limit < 1:
        raise EvaluationError(f"the limit of `{limit}` items leaves nothing to evaluate")


def _check_alike(what: str, found: Mapping[str, str], hint: str) -> None:
    first, *others = found.items()
    if different := [f"`{arm}`" for arm, value in others if value != first[1]]:
        raise EvaluationError(
            f"these arms have other {what} than `{first[0]}`, so they cannot be compared", problems=different, hint=hint
        )


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase, tasks: Mapping[str, Task]) -> str:
    """Identifies a tokenizer by its vocabulary and by what it makes of each task's first item."""
    first = [str(task.doc_to_text(task.eval_docs[0])) for task in tasks.values()]
    return sha256_bytes(canonical_json([tokenizer.get_vocab(), tokenizer(first)["input_ids"]]).encode())


def _decoding(folder: Path) -> str:
    """The generation settings of a checkpoint that change what greedy decoding writes, end tokens aside."""
    if not (folder / "generation_config.json").exists():
        return "{}"
    changed = GenerationConfig.from_pretrained(folder).to_diff_dict()
    return canonical_json({name: value for name, value in changed.items() if value and name not in HARMLESS})


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name)
