"""lm-evaluation-harness' Hugging Face backend with shared-prefix decoding, and a record of every generation."""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stethoscope.artifacts import canonical_json, sha256_bytes, write_text
from stethoscope.evaluation.decoding import agrees, can_share, common_prefix, decode_greedily, encode_prefix

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
        self._checked: bool | None = None
        self._generations: dict[str, Generation] = {}
        self._raw: dict[tuple[int, ...], list[int]] = {}

    def generation(self, context: str, settings: dict[str, Any]) -> Generation | None:
        """What was generated for a prompt under an item's generation settings, if it was."""
        return self._generations.get(_key(context, settings))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Responses of the requests, in their order; equal prompts are generated once unless sampled."""
        groups: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {}
        for request in requests:
            context, settings = request.args
            groups.setdefault(canonical_json(settings), {})[_key(context, settings)] = (context, settings)
        if any(settings.get("do_sample") for group in groups.values() for _, settings in group.values()):
            return super().generate_until(requests, disable_tqdm=True)
        self._generations = self._read_journal()
        for group in groups.values():
            self._generate_group(group)
        return [self._generations[_key(*request.args)].response for request in requests]

    def _generate_group(self, group: dict[str, tuple[str, dict[str, Any]]]) -> None:
        settings = next(iter(group.values()))[1]
        kwargs = normalize_gen_kwargs(settings, self.max_gen_toks)
        limit = kwargs.pop("max_gen_toks")
        stops = handle_stop_sequences(kwargs.pop("until", None), eos=self.tok_decode(self.eot_token_id, False))
        ids, mask = self.tok_batch_encode(
            [context for context, _ in group.values()],
            left_truncate_len=self.max_length - limit,
            truncation=self.truncation,
        )
        prompts = {k: row[keep.bool()].tolist() for k, row, keep in zip(group, ids, mask, strict=True)}
        # Longest first, as the harness does: the first batch is the largest.
        order = sorted(group, key=lambda k: (-len(prompts[k]), group[k][0]))
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        todo = [batch for batch in batches if any(k not in self._generations for k in batch)]
        for batch in batches:
            if batch not in todo:
                self.on_items(len(batch))
        plain = not set(kwargs) - {"do_sample", "temperature"} and not kwargs.get("temperature")
        shares = plain and todo and self._shares(list(prompts.values()), limit)
        prefix = encode_prefix(self.model, common_prefix(list(prompts.values()))) if shares else None
        for batch in todo:
            if prefix is not None:
                end = _Stop(self, stops)
                tokens = decode_greedily(
                    self.model, [prompts[k] for k in batch], prefix, max_new_tokens=limit, stop=end
                )
                made = {
                    k: Generation(
                        response=postprocess_generated_text(self.tok_decode(new), stops, None),
                        tokens=len(new),
                        truncated=i not in end.ended,
                    )
                    for i, (k, new) in enumerate(zip(batch, tokens, strict=True))
                }
            else:
                made = self._generate_plainly(batch, group, prompts, stops, limit)
            self._generations.update(made)
            self._write_journal(made)
            self.on_items(len(batch))

    def _generate_plainly(
        self,
        batch: list[str],
        group: dict[str, tuple[str, dict[str, Any]]],
        prompts: dict[str, list[int]],
        stops: list[str],
        limit: int,
    ) -> dict[str, Generation]:
        requests = [
            Instance(request_type="generate_until", doc={}, arguments=group[k], idx=i) for i, k in enumerate(batch)
        ]
        self._raw = {}
        texts = super().generate_until(requests, disable_tqdm=True)
        made = {}
        for key, text in zip(batch, texts, strict=True):
            end = _Stop(self, stops)
            new = self._raw[tuple(prompts[key])]
            count = next((i + 1 for i in range(len(new)) if end(0, new[: i + 1])), len(new))
            made[key] = Generation(response=text, tokens=count, truncated=not end.ended and count == limit)
        return made

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        out: Tensor = super()._model_generate(context, max_length, stop, **kwargs)
        for row, mask, new in zip(context, kwargs["attention_mask"], out[:, context.shape[1] :].tolist(), strict=True):
            self._raw[tuple(row[mask.bool()].tolist())] = new
        return out

    def _shares(self, prompts: list[list[int]], limit: int) -> bool:
        config = self.model.generation_config
        changed = {name for name, value in config.to_diff_dict().items() if value} - HARMLESS
        longest = max(map(len, prompts)) + limit
        if not self.shares or changed or not can_share(self.model, longest):
            return False
        if self._checked is None:
            longest_prompt = max(prompts, key=len)
            self._checked = len(longest_prompt) > 3 and agrees(self.model, longest_prompt[-64:])
            if not self._checked:
                logger.warning("%s is decoded by the harness itself, more slowly", type(self.model).__name__)
        return self._checked

    def _read_journal(self) -> dict[str, Generation]:
        if self.journal is None or not self.journal.exists():
            return {}
        found = {}
        lines = self.journal.read_text(encoding="utf-8").splitlines(keepends=True)
        for line in lines:
            if not line.endswith("\n"):  # the interruption came while this line was written
                write_text(self.journal, "".join(lines[:-1]))
                break
            entry = json.loads(line)
            key = entry.pop("key")
            found[key] = Generation(**entry)
        return found

    def _write_journal(self, made: dict[str, Generation]) -> None:
        if self.journal is not None:
            self.journal.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps({"key": key, **asdict(generation)}) + "\n" for key, generation in made.items()]
            with self.journal.open("a", encoding="utf-8") as file:
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
