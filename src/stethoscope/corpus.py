"""Documents in, token batches out: each document keeps its identity, because tokens in it are not independent."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from stethoscope.artifacts import canonical_json, sha256_bytes
from stethoscope.errors import StethoscopeError


def read_documents(path: Path, *, field: str = "text", limit: int | None = None) -> list[str]:
    """Read the documents of a JSONL file (one field per line) or of a text file (one document).

    Args:
        path: ends in ``.jsonl`` or ``.txt``.
        field: the JSONL field that holds the text.
        limit: at most this many documents, from the top.

    Raises:
        StethoscopeError: the file is missing, empty, malformed, or lacks the field; every bad line is named.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StethoscopeError(f"the text `{path}` cannot be read: {error}") from error
    if path.suffix == ".txt":
        documents = [text] if text.strip() else []
    elif path.suffix == ".jsonl":
        documents = _jsonl_field(path, text, field)
    else:
        raise StethoscopeError(f"`{path}` is neither .jsonl nor .txt", hint="convert it to JSONL, one document a line")
    if not documents:
        raise StethoscopeError(f"`{path}` holds no documents")
    return documents[:limit]


def _jsonl_field(path: Path, text: str, field: str) -> list[str]:
    documents, problems = [], []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold other line ends
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            problems.append(f"line {number}: not JSON ({error})")
            continue
        value = row.get(field) if isinstance(row, dict) else None
        if isinstance(value, str) and value.strip():
            documents.append(value)
        else:
            have = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            problems.append(f"line {number}: no text in field `{field}` (it has: {have})")
    if problems:
        more = [f"and {len(problems) - 10} more lines"] if len(problems) > 10 else []
        raise StethoscopeError(f"`{path}` has unusable lines", problems=[*problems[:10], *more], hint="set `field`")
    return documents


def documents_hash(documents: Iterable[str]) -> str:
    """One content hash of a list of documents, order included."""
    return sha256_bytes(canonical_json(list(documents)).encode())


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Documents of similar length, padded on the right.

    Attributes:
        documents: each row's position in the corpus.
        input_ids: token ids; padding is the tokenizer's.
        attention_mask: True on the document's own tokens.
        countable: True on tokens that statistics count: no padding, no special tokens.
    """

    documents: tuple[int, ...]
    input_ids: Int[Tensor, "rows tokens"]
    attention_mask: Bool[Tensor, "rows tokens"]
    countable: Bool[Tensor, "rows tokens"]


def tokenize(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int = 1024
) -> list[list[int]]:
    """Token ids per document, cut at ``max_tokens``, with the special tokens that the tokenizer adds itself.

    Raises:
        StethoscopeError: a document has no tokens.
    """
    rows: list[list[int]] = tokenizer(list(documents), truncation=True, max_length=max_tokens)["input_ids"]
    empty = [f"document {i}" for i, row in enumerate(rows) if not row]
    if empty:
        raise StethoscopeError("some documents have no tokens", problems=empty)
    return rows


def batches(
    rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, *, batch_tokens: int = 4096
) -> Iterator[TokenBatch]:
    """Batches of at most ``batch_tokens`` tokens, padding included, documents sorted by length.

    The composition depends on the documents alone, never on a worker or a run.
    """
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.int64)
    while order:
        size = max(1, batch_tokens // len(rows[order[0]]))
        chosen, order = order[:size], order[size:]
        width = len(rows[chosen[0]])
        ids = torch.full((len(chosen), width), int(tokenizer.pad_token_id), dtype=torch.int64)
        attention = torch.zeros((len(chosen), width), dtype=torch.bool)
        for place, i in enumerate(chosen):
            ids[place, : len(rows[i])] = torch.tensor(rows[i], dtype=torch.int64)
            attention[place, : len(rows[i])] = True
        yield TokenBatch(
            documents=tuple(chosen),
            input_ids=ids,
            attention_mask=attention,
            countable=attention & ~torch.isin(ids, special),
        )
