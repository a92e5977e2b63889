"""lm-evaluation-harness' Hugging Face backend with shared-prefix decoding, and a record of every generation."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stethoscope.artifacts import canonical_json, sha256_bytes, write_text
from stethoscope.evaluation.decoding import Prefix, agrees, can_share, common_prefix, decode_greedily, encode_prefix

logger = logging.getLogger(__name__)

# Generation settings that plain greedy decoding does not read; with any other one the harness' own path is taken.
HARMLESS = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p"),
    *(
        "max_length",
        "max_new_tokens",
        "use_cache",
        "cache_implementation",
        "transformers_version",
        "_from_model_config",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What the model wrote for one prompt; ``truncated``: the token limit ended it."""

    response: str
    tokens: int
    truncated: bool


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Prompts that are decoded together; any worker with the same model gives them the same responses.

    Attributes:
        prompts: token ids by key; see `SharedPrefixLM.generation`.
        contexts: the prompts' texts by key.
        settings: the items' generation settings.
        prefix: the tokens that all prompts of the task begin with, those of other batches too.
        probe: the last tokens of the longest of them, on which shared-prefix decoding is tried.
        longest: the most tokens that a sequence may come to.
    """

    prompts: Mapping[str, list[int]]
    contexts: Mapping[str, str]
    settings: Mapping[str, Any]
    prefix: list[int]
    probe: list[int]
    longest: int


class SharedPrefixLM(HFLM):  # type: ignore[misc]
    """HFLM whose greedy generation encodes what a task's prompts share once, and resumes batch by batch.

    Attributes:
        journal: finished batches are appended to this file and taken from it; ``None`` keeps none.
        on_items: called with the number of prompts of each finished batch.
        shares: set to false for the harness' own decoding throughout.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, shares: bool = True
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
        self.journal: Path | None = None
        self.on_items: Callable[[int], None] = lambda _: None
        self.shares = shares
        self._generations: dict[str, Generation] = {}
        self._raw: dict[tuple[int, ...], list[int]] = {}
        self._prefix: Prefix | None = None
        self._warned = False
        self.weights_changed()

    def generation(self, context: str, settings: dict[str, Any]) -> Generation | None:
        """What was generated for a prompt under an item's generation settings, if it was."""
        return self._generations.get(_key(context, settings))

    def weights_changed(self) -> None:
        """Forget what was computed with the model's weights as they were."""
        self._prefix, self._checked = None, dict[tuple[int, ...], bool]()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Responses of the requests, in their order; equal prompts are generated once unless sampled."""
        if any(request.args[1].get("do_sample") for request in requests):
            return super().generate_until(requests, disable_tqdm=True)
        self.weights_changed()
        self._generations = read_journal(self.journal) if self.journal else {}
        batches = self.batches(requests)
        todo = [batch for batch in batches if any(k not in self._generations for k in batch.prompts)]
        for batch in batches:
            if batch not in todo:
                self.on_items(len(batch.prompts))
        for batch in todo:
            made = self.generate(batch)
            self._generations.update(made)
            if self.journal:
                write_journal(self.journal, made)
            self.on_items(len(batch.prompts))
        return [self._generations[_key(*request.args)].response for request in requests]

    def batches(self, requests: list[Instance]) -> list[Batch]:
        """How the requests are decoded: by generation settings, longest first, as the harness does."""
        groups: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {}
        for request in requests:
            context, settings = request.args
            groups.setdefault(canonical_json(settings), {})[_key(context, settings)] = (context, settings)
        found = []
        for group in groups.values():
            settings = next(iter(group.values()))[1]
            limit, _ = self._decoding(settings)
            ids, mask = self.tok_batch_encode(
                [context for context, _ in group.values()],
                left_truncate_len=self.max_length - limit,
                truncation=self.truncation,
            )
            prompts = {k: row[keep.bool()].tolist() for k, row, keep in zip(group, ids, mask, strict=True)}
            order = sorted(group, key=lambda k: (-len(prompts[k]), group[k][0]))
            longest, prefix = prompts[order[0]], common_prefix(list(prompts.values()))
            found += [
                Batch(
                    prompts={k: prompts[k] for k in order[i : i + self.batch_size]},
                    contexts={k: group[k][0] for k in order[i : i + self.batch_size]},
                    settings=settings,
                    prefix=prefix,
                    probe=longest[-64:],
                    longest=len(longest) + limit,
                )
                for i in range(0, len(order), self.batch_size)
            ]
        return found

    def generate(self, batch: Batch) -> dict[str, Generation]:
        """What the model writes for a batch, by key."""
        limit, kwargs = self._decoding(batch.settings)
        stops = handle_stop_sequences(kwargs.pop("until", None), eos=self.tok_decode(self.eot_token_id, False))
        plain = not set(kwargs) - {"do_sample", "temperature"} and not kwargs.get("temperature")
        if not plain or not self._shares(batch):
            return self._generate_plainly(batch, stops, limit)
        if self._prefix is None or self._prefix.tokens != batch.prefix:
            self._prefix = encode_prefix(self.model, batch.prefix)
        end = _Stop(self, stops)
        prompts = list(batch.prompts.values())
        tokens = decode_greedily(self.model, prompts, self._prefix, max_new_tokens=limit, stop=end)
        return {
            k: Generation(
                response=postprocess_generated_text(self.tok_decode(new), stops, None),
                tokens=len(new),
                truncated=i not in end.ended,
            )
            for i, (k, new) in enumerate(zip(batch.prompts, tokens, strict=True))
        }

    def _decoding(self, settings: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """The most tokens to generate, and the other settings as the harness reads them."""
        kwargs = normalize_gen_kwargs(dict(settings), self.max_gen_toks)
        return kwargs.pop("max_gen_toks"), kwargs

    def _generate_plainly(self, batch: Batch, stops: list[str], limit: int) -> dict[str, Generation]:
        requests = [
            Instance(request_type="generate_until", doc={}, arguments=(context, dict(batch.settings)), idx=i)
            for i, context in enumerate(batch.contexts.values())
        ]
        self._raw = {}
        texts = super().generate_until(requests, disable_tqdm=True)
        made = {}
        for (key, prompt), text in zip(batch.prompts.items(), texts, strict=True):
            end = _Stop(self, stops)
            new = self._raw[tuple(prompt)]
            count = next((i + 1 for i in range(len(new)) if end(0, new[: i + 1])), len(new))
            made[key] = Generation(response=text, tokens=count, truncated=not end.ended and count == limit)
        return made

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        out: Tensor = super()._model_generate(context, max_length, stop, **kwargs)
        for row, mask, new in zip(context, kwargs["attention_mask"], out[:, context.shape[1] :].tolist(), strict=True):
            self._raw[tuple(row[mask.bool()].tolist())] = new
        return out

    def _shares(self, batch: Batch) -> bool:
        changed = {name for name, value in self.model.generation_config.to_diff_dict().items() if value} - HARMLESS
        if not self.shares or changed or not can_share(self.model, batch.longest):
            return False
        probe = tuple(batch.probe)
        if probe not in self._checked:
            self._checked[probe] = len(probe) > 3 and agrees(self.model, batch.probe)
            if not self._checked[probe] and not self._warned:
                logger.warning("%s is decoded by the harness itself, more slowly", type(self.model).__name__)
                self._warned = True
        return self._checked[probe]


def read_journal(path: Path) -> dict[str, Generation]:
    """What was generated so far, by key; a line cut short by an interruption is dropped from the file."""
    if not path.exists():
        return {}
    found = {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for line in lines:
        if not line.endswith("\n"):  # the interruption came while this line was written
            write_text(path, "".join(lines[:-1]))
            break
        entry = json.loads(line)
        key = entry.pop("key")
        found[key] = Generation(**entry)
    return found


def write_journal(path: Path, made: Mapping[str, Generation]) -> None:
    """Append what was generated."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"key": key, **asdict(generation)}) + "\n" for key, generation in made.items()]
    with path.open("a", encoding="utf-8") as file:
        file.writelines(lines)


class _Stop:
    """Ends a prompt at an end token or once its new text holds a stop string; ``ended`` has the prompts it ended."""

    def __init__(self, lm: SharedPrefixLM, stops: list[str]) -> None:
        end = lm.model.generation_config.eos_token_id
        self.ends = {end} if isinstance(end, int) else set(end or ())
        self.stops = [text for text in stops if text]
        # A token is at least one byte, so a stop string spans at most as many tokens as it has bytes.
        self.reach = max((len(text.encode()) for text in self.stops), default=0) + 2
        self.decode = lm.tokenizer.decode
        self.pieces: dict[int, bool] = {}
        self.ended: set[int] = set()

    def __call__(self, prompt: int, tokens: list[int]) -> bool:
        last = tokens[-1]
        if last in self.ends or (
            self._may_close(last)
            and any(text in self.decode(tokens[-self.reach :], skip_special_tokens=False) for text in self.stops)
        ):
            self.ended.add(prompt)
            return True
        return False

    def _may_close(self, token: int) -> bool:
        # The token that completes a stop string holds its last character, or a part of it.
        if token not in self.pieces:
            piece = self.decode([token], skip_special_tokens=False)
            # (decoders may drop a leading space)
            self.pieces[token] = any(s[-1] in piece or s[-1] == " " for s in self.stops) or "\ufffd" in piece
        return self.pieces[token]


def _key(context: str, settings: dict[str, Any]) -> str:
    return sha256_bytes(canonical_json([context, settings]).encode())
