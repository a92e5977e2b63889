"""Token ids of documents, masks of the tokens that count, and batches; each document keeps its identity.

documents = read_documents("data/math.jsonl", field="messages")             # texts, or chats as lists of messages
rows = tokenize(documents, tokenizer)
counted = counted_tokens(documents, tokenizer, tokens="assistant")
for batch in batches(rows, tokenizer, counted=counted): ...
"""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from stethoscope.errors import StethoscopeError
from stethoscope.text.documents import Chat, Document

log = logging.getLogger(__name__)

Tokens = Literal["all", "assistant", "last"]
SIMILAR = 0.8

# These enclose a message's number, which replaces its content in a template; neither occurs there by itself.
_OPEN, _CLOSE = "\ue000", "\ue001"
_TAG = re.compile(r"(</?\w+>)")


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Documents of similar length, padded on the right.

    Attributes:
        documents: position of each row's document in the corpus.
        input_ids: token ids, padded with the tokenizer's padding token.
        attention_mask: True on the document's tokens.
        countable: True on tokens that statistics count: no padding, no special tokens, and only the kind asked for.
        predicted: True on tokens whose loss counts: the document's but the first, without its prompt's.
    """

    documents: tuple[int, ...]
    input_ids: Int[Tensor, "rows tokens"]
    attention_mask: Bool[Tensor, "rows tokens"]
    countable: Bool[Tensor, "rows tokens"]
    predicted: Bool[Tensor, "rows tokens"]


def tokenize(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int = 1024
) -> list[list[int]]:
    """Token ids per document, cut at ``max_tokens``, and at what the tokenizer says that the model can read.

    A text gets the special tokens that the tokenizer adds itself, none of them twice; a chat is rendered with the
    model's template, which brings its own.

    Raises:
        StethoscopeError: a document has no tokens, or a chat cannot be rendered.
    """
    texts = [text if isinstance(text, str) else _render(text, tokenizer, i) for i, text in enumerate(documents)]
    chats = bool(documents) and not isinstance(documents[0], str)
    if not chats and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        # a chat that its owner rendered brings the begin token with it, too
        texts = [text.removeprefix(tokenizer.bos_token) for text in texts]
    most = min(max_tokens, tokenizer.model_max_length)
    rows: list[list[int]] = tokenizer(texts, truncation=True, max_length=most, add_special_tokens=not chats)[
        "input_ids"
    ]
    if most < max_tokens and max(map(len, rows), default=0) == most:
        _say_cut(most, max_tokens)
    empty = [f"document {i}" for i, row in enumerate(rows) if not row]
    if empty:
        raise StethoscopeError("some documents have no tokens", problems=empty)
    return rows


@cache  # once, not for every block of documents
def _say_cut(most: int, asked: int) -> None:
    log.warning("the model reads %d tokens at most: documents are cut there, not at %d", most, asked)


def within(most: int, rows: list[list[int]]) -> list[list[int]]:
    """The first rows that together have about so many tokens, and two at least."""
    total = list(accumulate(map(len, rows)))
    return rows[: max(2, sum(tokens < most for tokens in total) + 1)]


def counted_tokens(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int = 1024,
    tokens: Tokens = "all",
) -> list[list[bool]]:
    """Mark the tokens of each row of `tokenize` that statistics count; never special tokens or a chat template's.

    Args:
        tokens: ``all``; those of the ``assistant``'s messages; or the ``last`` one of each document.

    Returns:
        per document a list as long as its row of token ids.

    Raises:
        StethoscopeError: a chat's content cannot be told from its template, or a text has no assistant.
    """
    special = set(tokenizer.all_special_ids)
    counted = []
    rows = tokenize(documents, tokenizer, max_tokens=max_tokens)
    for i, (document, row) in enumerate(zip(documents, rows, strict=True)):
        if isinstance(document, str):
            if tokens == "assistant":
                raise StethoscopeError("a text has no assistant's tokens", hint="give chats, or count `all` tokens")
            mask = [True] * len(row)
        else:
            mask = _content(document, tokenizer, i, max_tokens, assistant=tokens == "assistant")
        mask = [wanted and token not in special for wanted, token in zip(mask, row, strict=True)]
        if tokens == "last" and True in mask:
            last = len(mask) - 1 - mask[::-1].index(True)
            mask = [place == last for place in range(len(mask))]
        counted.append(mask)
    return counted


def prompt_lengths(rows: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]]) -> list[int]:
    """Number of tokens at the start of each row that are its prompt's, without one that crosses the prompt's end."""
    return [agreement(row, prompt) for row, prompt in zip(rows, prompts, strict=True)]


def agreement(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Number of items at the start of two sequences that are equal."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _render(chat: Chat, tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    if tokenizer.chat_template is None:
        raise StethoscopeError(
            "the model's tokenizer has no chat template, so chats cannot be rendered",
            hint="give texts, or an instruction-tuned model",
        )
    try:
        return str(tokenizer.apply_chat_template([dict(message) for message in chat], tokenize=False))
    except Exception as error:  # jinja's, or what an operation on a value of another type raises
        raise StethoscopeError(f"the chat template refuses document {number}: {error}") from error


def _content(
    chat: Chat, tokenizer: PreTrainedTokenizerBase, number: int, max_tokens: int, *, assistant: bool
) -> list[bool]:
    """Mark the tokens of a rendered chat that overlap the content of its messages, or of the assistant's."""
    if not tokenizer.is_fast:
        raise StethoscopeError(
            f"a {type(tokenizer).__name__} does not say where in a chat its tokens stand",
            hint="render the chats yourself and give texts",
        )
    text = _render(chat, tokenizer, number)
    max_tokens = min(max_tokens, tokenizer.model_max_length)
    found = _content_spans(chat, tokenizer, number, text, tags=False) or _content_spans(
        chat, tokenizer, number, text, tags=True
    )
    if found is None:
        raise StethoscopeError(
            f"in document {number}, what the messages say cannot be told from what the chat template adds",
            hint="render the chats yourself and give texts",
        )
    spans = [span for role, span in found if not assistant or role in ("assistant", "model")]
    encoded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, truncation=True, max_length=max_tokens
    )
    return [any(start < b and end > a for a, b in spans) for start, end in encoded["offset_mapping"]]


def _content_spans(
    chat: Chat, tokenizer: PreTrainedTokenizerBase, number: int, text: str, *, tags: bool
) -> list[tuple[str, tuple[int, int]]] | None:
    """Role, start and end of each content in a rendered chat; None if they cannot be found.

    The chat is rendered again with marks in place of the contents. The text between the marks is the template's, and
    in the chat itself the contents must lie between exactly that text.

    Args:
        tags: leave tags like ``<think>`` out of the marks: templates drop or move the text in such tags.
    """
    pieces_by_mark: list[tuple[str, str]] = []
    marked = []
    for message in chat:
        pieces = _TAG.split(message["content"]) if tags else [message["content"]]
        for place, piece in enumerate(pieces):
            # an empty content stays empty: a template may ask whether there is one
            if piece.strip() and not (tags and _TAG.fullmatch(piece)):
                pieces[place] = f"{_OPEN}{len(pieces_by_mark)}{_CLOSE}"
                pieces_by_mark.append((message["role"], piece))
        marked.append({**message, "content": "".join(pieces)})
    first, *rest = re.split(f"{_OPEN}(\\d+){_CLOSE}", _render(marked, tokenizer, number))
    order = [pieces_by_mark[int(mark)] for mark in rest[::2]]
    pattern = re.escape(first) + "".join(
        # as it stands, or stripped, as many templates do
        f"({re.escape(piece)}|{re.escape(piece.strip())}){re.escape(after)}"
        for (_, piece), after in zip(order, rest[1::2], strict=True)
    )
    match = re.fullmatch(pattern, text)
    return match and [(role, match.span(group)) for group, (role, _) in enumerate(order, 1)]


def by_length(lengths: Sequence[int], batch_tokens: int, similar: float = SIMILAR) -> Iterator[list[int]]:
    """Places of documents of similar length, longest first, at most ``batch_tokens`` together, padding included.

    Args:
        similar: the least share of the longest's length that all others have, as padding costs as much as text does.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while order:
        longest = lengths[order[0]]
        most = max(1, batch_tokens // longest)
        size = next((n for n, i in enumerate(order[:most]) if lengths[i] < similar * longest), most)
        yield order[:size]
        order = order[size:]


def batches(
    rows: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_tokens: int = 4096,
    counted: Sequence[Sequence[bool]] | None = None,
    starts: Sequence[int] | None = None,
    similar: float = SIMILAR,
) -> Iterator[TokenBatch]:
    """Yield batches as `by_length` composes them.

    The composition depends on the documents alone, never on a worker or a run.

    Args:
        rows: from `tokenize`.
        counted: from `counted_tokens`, for the same documents; all but special tokens count if None.
        starts: the first token of each row whose loss counts, as from `prompt_lengths`; all count if None.
    """
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.int64)
    for chosen in by_length([len(row) for row in rows], batch_tokens, similar):
        width = len(rows[chosen[0]])
        ids = torch.full((len(chosen), width), tokenizer.pad_token_id or 0, dtype=torch.int64)
        attention, countable, predicted = torch.zeros((3, len(chosen), width), dtype=torch.bool)
        for place, i in enumerate(chosen):
            ids[place, : len(rows[i])] = torch.tensor(rows[i], dtype=torch.int64)
            attention[place, : len(rows[i])] = True
            countable[place, : len(rows[i])] = torch.tensor(counted[i]) if counted else True
            predicted[place, max(1, starts[i] if starts else 1) : len(rows[i])] = True
        yield TokenBatch(
            documents=tuple(chosen),
            input_ids=ids,
            attention_mask=attention,
            countable=countable & ~torch.isin(ids, special),
            predicted=predicted,
        )
