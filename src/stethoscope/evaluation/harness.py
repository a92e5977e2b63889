"""lm-evaluation-harness' Hugging Face backend with shared-prefix decoding, and a record of every generation."""

import functools
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stethoscope.artifacts import canonical_json, sha256_bytes, write_text
from stethoscope.errors import EvaluationError
from stethoscope.evaluation.decoding import Prefix, agrees, can_share, decode_greedily, encode_prefix

logger = logging.getLogger(__name__)

# Generation settings that plain greedy decoding does not read; with any other one the harness' own path is taken.
HARMLESS = {
    "bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p", "max_length",
    "max_new_tokens", "use_cache", "cache_implementation", "transformers_version", "_from_model_config",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What the model wrote for one prompt; ``truncated``: the token limit ended it."""

    response: str
    tokens: int
    truncated: bool


class SharedPrefixLM(HFLM):  # type: ignore[misc]
    """HFLM whose greedy generation encodes what a task's prompts share once, and resumes batch by batch.

    Attributes:
        journal: finished batches are appended to this file and taken from it; ``None`` keeps none.
        on_items: called with the number of prompts of each finished batch.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> None:
        self._can_begin = (tokenizer.bos_token_id, tokenizer.eos_token_id) != (None, None)
        super().__init__(pretrained=model, tokenizer=_complete(tokenizer), batch_size=batch_size, backend="causal")
        self.journal: Path | None = None
        self.on_items: Callable[[int], None] = lambda _: None
        self._generations: dict[str, Generation] = {}
        self._raw: dict[tuple[int, ...], list[int]] = {}
        self._agreed: bool | None = None  # asked once: it is a matter of the architecture, not of the weights

    def generation(self, context: str, settings: dict[str, Any]) -> Generation | None:
        """What was generated for a prompt under an item's generation settings, if it was."""
        return self._generations.get(_key(context, settings))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Responses of the requests, in their order; equal prompts are generated once unless sampled."""
        if any(is_sampled(request.args[1]) for request in requests):
            return super().generate_until(requests, disable_tqdm=True)
        self._generations = read_journal(self.journal) if self.journal else {}
        groups: dict[str, list[Instance]] = {}
        for request in requests:
            groups.setdefault(canonical_json(request.args[1]), []).append(request)
        for group in groups.values():
            self._generate_group(group)
        return [self._generations[_key(*request.args)].response for request in requests]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihoods as the harness has them, without its bars."""
        self._check_begin(all(request.args[0] for request in requests))
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Those of whole texts, likewise."""
        self._check_begin(False)
        return list(super().loglikelihood_rolling(requests, disable_tqdm=True))

    def _check_begin(self, follows: bool) -> None:
        if not (follows or self._can_begin):
            raise EvaluationError(
                "the tokenizer has no begin and no end token, so nothing stands before a text's first token",
                hint="leave out tasks that score whole texts, or answers to an empty prompt",
            )

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        long = [len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests]
        self._say_cut(long, f"model's {self.max_length} tokens")
        if any(len(answer) > self.max_length for _, _, answer in requests):
            raise EvaluationError(f"an answer is longer than the model's window of {self.max_length} tokens")
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def _say_cut(self, long: list[bool], most: str) -> None:
        """Few-shot examples come first, and what is too long loses its beginning, as by the harness."""
        if any(long):
            said = "%d of %d prompts are longer than the %s: their beginning is cut off"
            logger.warning(said, sum(long), len(long), most)

    def _generate_group(self, requests: list[Instance]) -> None:
        """Greedy responses to prompts of equal settings, task by task, the longest of each first."""
        asked, settings = {_key(*request.args): request for request in requests}, requests[0].args[1]
        contexts = {key: request.args[0] for key, request in asked.items()}
        tasks = {key: request.task_name for key, request in asked.items()}
        kwargs = normalize_gen_kwargs(dict(settings), self.max_gen_toks)
        limit = kwargs.pop("max_gen_toks")
        stops = handle_stop_sequences(kwargs.pop("until", None), eos=self.tok_decode(self.eot_token_id, False))
        if (room := self.max_length - limit) < 1:
            raise EvaluationError(
                f"the model's window of {self.max_length} tokens has no room for {limit} new ones",
                hint="give the task's `generation_kwargs` a smaller `max_gen_toks`",
            )
        ids, mask = self.tok_batch_encode(list(contexts.values()), truncation=self.truncation)
        whole = {k: row[keep.bool()].tolist() for k, row, keep in zip(contexts, ids, mask, strict=True)}
        self._say_cut(
            [len(row) > room for row in whole.values()], f"{room} tokens that leave room for {limit} new ones"
        )
        prompts = {key: row[-room:] for key, row in whole.items()}
        places = {task: i for i, task in enumerate(dict.fromkeys(tasks.values()))}
        order = sorted(prompts, key=lambda k: (places[tasks[k]], -len(prompts[k]), contexts[k]))
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        todo = [batch for batch in batches if not self._generations.keys() >= set(batch)]
        if known := sum(map(len, batches)) - sum(map(len, todo)):
            self.on_items(known)
        plain = not set(kwargs) - {"do_sample", "temperature"} and not kwargs.get("temperature")
        shares = bool(todo) and plain and self._shares(max(prompts.values(), key=len), limit)
        shared = {task: _shared([prompts[key] for key in order if tasks[key] == task]) for task in places}
        prefixes: dict[str | None, Prefix] = {}  # of the tasks of one batch, as each may take much memory
        for batch in todo:
            tokens = [prompts[key] for key in batch]
            if shares:
                some = dict.fromkeys(tasks[key] for key in batch)
                prefixes = {task: prefixes.get(task) or encode_prefix(self.model, shared[task]) for task in some}
                groups = [(prefixes[task], [prompts[key] for key in batch if tasks[key] == task]) for task in some]
                found = self._decode(groups, stops, limit)
            else:
                found = self._generate_plainly([contexts[key] for key in batch], tokens, settings, stops, limit)
            made = dict(zip(batch, found, strict=True))
            self._generations.update(made)
            if self.journal:
                self.journal.parent.mkdir(parents=True, exist_ok=True)
                with self.journal.open("a", encoding="utf-8") as file:
                    file.writelines(journal_line({"key": key, **asdict(one)}) for key, one in made.items())
            self.on_items(len(batch))

    def _decode(self, groups: list[tuple[Prefix, list[list[int]]]], stops: list[str], limit: int) -> list[Generation]:
        end = _Stop(self, stops)
        tokens = decode_greedily(self.model, groups, max_new_tokens=limit, stop=end)
        texts = [postprocess_generated_text(self.tok_decode(new), stops, None) for new in tokens]
        return [
            Generation(response=text, tokens=len(new), truncated=i not in end.ended)
            for i, (text, new) in enumerate(zip(texts, tokens, strict=True))
        ]

    def _generate_plainly(
        self, contexts: list[str], prompts: list[list[int]], settings: dict[str, Any], stops: list[str], limit: int
    ) -> list[Generation]:
        requests = [
            Instance(request_type="generate_until", doc={}, arguments=(context, dict(settings)), idx=i)
            for i, context in enumerate(contexts)
        ]
        self._raw, made = {}, []
        for prompt, text in zip(prompts, super().generate_until(requests, disable_tqdm=True), strict=True):
            end, new = _Stop(self, stops), self._raw[tuple(prompt)]
            count = next((i for i in range(1, len(new) + 1) if end(0, new[:i])), len(new))
            made.append(Generation(response=text, tokens=count, truncated=not end.ended and count == limit))
        return made

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        out: Tensor = super()._model_generate(context, max_length, stop, **kwargs)
        for row, mask, new in zip(context, kwargs["attention_mask"], out[:, context.shape[1] :].tolist(), strict=True):
            self._raw[tuple(row[mask.bool()].tolist())] = new
        return out

    def _shares(self, longest: list[int], limit: int) -> bool:
        """Whether shared-prefix decoding does for these prompts what the model itself would."""
        changed = {name for name, value in self.model.generation_config.to_diff_dict().items() if value} - HARMLESS
        if changed or not can_share(self.model, len(longest) + limit):
            return False
        if self._agreed is None and len(longest) > 3:
            self._agreed = agrees(self.model, longest[-64:])
            if not self._agreed:
                logger.warning("%s is decoded by the harness itself, more slowly", type(self.model).__name__)
        return bool(self._agreed)


def is_sampled(settings: Mapping[str, Any]) -> bool:
    """Whether an item's generation settings draw tokens at random."""
    return bool(normalize_gen_kwargs(dict(settings))["do_sample"])


def read_journal(path: Path) -> dict[str, Generation]:
    """What was generated so far, by key; lines that are cut short or damaged are dropped from the file."""
    found, lines = {}, path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for line in lines:
        with suppress(ValueError, TypeError, AttributeError, RecursionError):
            entry = json.loads(line)
            if line == journal_line({name: value for name, value in entry.items() if name != "check"}).encode():
                found[line] = entry
    if damaged := len(set(lines)) - len(found):
        logger.warning("%d lines of `%s` are damaged: these answers are made again", damaged, path)
        write_text(path, b"".join(found).decode())
    return {e["key"]: Generation(**{n: v for n, v in e.items() if n not in ("key", "check")}) for e in found.values()}


def journal_line(entry: dict[str, Any]) -> str:
    """A line of the journal, with a hash by which it is known to be as it was written."""
    return json.dumps({**entry, "check": sha256_bytes(canonical_json(entry).encode())[:16]}) + "\n"


def _complete(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer with an end and a padding token, as the harness needs them.

    Those that it would add have no row in the model's embedding: here the end is a text that the model never writes,
    and padding, which is masked, is any token.
    """
    if tokenizer.pad_token_id is not None and tokenizer.eos_token_id is not None:
        return tokenizer
    tokenizer = deepcopy(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if tokenizer.eos_token_id is None:
        tokenizer.add_special_tokens({"eos_token": "<|no end token|>"})
    return tokenizer


class _Stop:
    """Ends a prompt at an end token or once its new text holds a stop string; ``ended`` has the prompts it ended."""

    def __init__(self, lm: SharedPrefixLM, stops: list[str]) -> None:
        end = lm.model.generation_config.eos_token_id
        self.ends = {end} if isinstance(end, int) else set(end or ())
        self.stops = [text for text in stops if text]
        # A token is at least one byte, so a stop string spans at most as many tokens as it has bytes.
        self.reach = max((len(text.encode()) for text in self.stops), default=0) + 2
        self.decode = functools.partial(lm.tokenizer.decode, skip_special_tokens=False)
        self.may_close = functools.cache(self._may_close)
        self.ended: set[int] = set()

    def __call__(self, prompt: int, tokens: list[int]) -> bool:
        text = self.decode(tokens[-self.reach :]) if self.may_close(tokens[-1]) else ""
        if tokens[-1] in self.ends or any(stop in text for stop in self.stops):
            self.ended.add(prompt)
        return prompt in self.ended

    def _may_close(self, token: int) -> bool:
        # The token that completes a stop string holds its last character, or a part of it.
        piece = self.decode([token])  # decoders may drop a leading space
        return any(stop[-1] in piece or stop[-1] == " " for stop in self.stops) or "\ufffd" in piece


def _shared(prompts: list[list[int]]) -> list[int]:
    """What all prompts begin with; each goes on."""
    return list(commonprefix(prompts))[: min(map(len, prompts)) - 1]  # noqa: RUF071 - of lists


def _key(context: str, settings: dict[str, Any]) -> str:
    return sha256_bytes(canonical_json([context, settings]).encode())
