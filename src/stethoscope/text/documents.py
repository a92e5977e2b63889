"""Reads documents from files, tables, saved datasets and the hub, without torch.

documents = read_documents("data/math.jsonl", field="messages")             # texts, or chats as lists of messages
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stethoscope.artifacts import canonical_json, sha256_bytes
from stethoscope.errors import StethoscopeError

Chat = Sequence[Mapping[str, Any]]
Document = str | Chat

_HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[^/]+))?")
_SHOWN = 10  # bad rows that are named


def read_documents(
    path: Path | str, *, field: str = "text", limit: int | None = None, split: str | None = None
) -> list[Any]:
    """Read documents: texts, or chats where the field holds messages.

    Args:
        path: a ``.jsonl``, ``.parquet`` or ``.txt`` file (one document); a folder of `datasets.Dataset.save_to_disk`;
            or a dataset on the hub: ``owner/name`` or ``owner/name/config``, with or without ``:split``.
        field: the field with the document in each row: a text, or a list of messages with ``role`` and ``content``.
        limit: maximum number of documents, from the top.
        split: of a dataset that has several; ``train`` by default.

    Returns:
        a str, or a list of messages, per document; all of one kind.

    Raises:
        StethoscopeError: the data is missing, empty, malformed, or lacks the field; the bad rows are named.
    """
    path = Path(path)
    rows: Iterable[tuple[str, Any]]
    if path.suffix == ".txt":
        text = _text(path)
        rows = [("text", {field: text})] if text.strip() else []
    elif path.suffix == ".jsonl":
        rows = json_lines(path)
    else:
        rows = _parquet(path, field, limit) if path.suffix == ".parquet" else _dataset(path, field, limit, split)
    documents: list[Any] = []
    problems: list[str] = []
    for where, row in rows:
        value = row.get(field) if isinstance(row, dict) else None
        if isinstance(row, ValueError):
            problems.append(f"{where}: not JSON ({row})")
        elif isinstance(value, str) and value.strip():
            documents.append(value)
        elif isinstance(value, list) and value:
            problems += [
                f"{where}: message {number} is no table with `role` and `content`, both text"
                for number, message in enumerate(value, 1)
                if not isinstance(message, dict)
                or not all(isinstance(message.get(key), str) for key in ("role", "content"))
            ]
            documents.append(value)
        else:
            have = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            problems.append(f"{where}: no text in field `{field}` (it has: {have})")
    if len({type(document) for document in documents}) > 1:
        problems.append(f"field `{field}` holds a text in some rows and a chat in others")
    if problems:
        more = [f"and {len(problems) - _SHOWN} more rows"] if len(problems) > _SHOWN else []
        raise StethoscopeError(f"`{path}` has unusable rows", problems=[*problems[:_SHOWN], *more], hint="set `field`")
    if documents and not isinstance(documents[0], str):
        # tables fill in what a message lacks, which a file of lines does not
        documents = [[{k: v for k, v in m.items() if v is not None} for m in chat] for chat in documents]
    if not documents:
        raise StethoscopeError(f"`{path}` holds no documents")
    return documents[:limit]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StethoscopeError(f"the text `{path}` cannot be read: {error}") from error


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The lines of a file that are not blank: where each stands, and its value or the error that it is not JSON."""
    for number, line in enumerate(_text(path).split("\n"), 1):  # not splitlines: strings may hold other line ends
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                yield f"line {number}", error


def _parquet(path: Path, field: str, limit: int | None) -> list[tuple[str, Any]]:
    from pyarrow import ArrowException, parquet

    try:
        names = parquet.read_schema(path).names
        values = parquet.read_table(path, columns=[field])[field].slice(0, limit) if field in names else None
    except (OSError, ArrowException) as error:
        raise StethoscopeError(f"the table `{path}` cannot be read: {error}") from error
    return _column(path, field, names, values and values.to_pylist())


def _dataset(path: Path, field: str, limit: int | None, split: str | None) -> list[tuple[str, Any]]:
    """Rows of a dataset in a folder, or by its name from the hub library's cache or the network."""
    hub = _HUB.fullmatch(path.as_posix())
    if not path.is_dir() and (path.exists() or hub is None):
        raise StethoscopeError(
            f"there is no text `{path}` that can be read",
            hint="give a .jsonl, .parquet or .txt file, the folder of a saved dataset, or a dataset on the hub",
        )
    import datasets

    try:
        if path.is_dir():
            found = datasets.load_from_disk(str(path))
        else:
            assert hub is not None
            split = split or hub["split"]
            found = datasets.load_dataset(hub["name"], hub["config"])
    except (OSError, ValueError) as error:
        raise StethoscopeError(
            f"the dataset `{path}` cannot be read: {error}",
            hint="a dataset on the hub is `owner/name/config:split`; without a network it must be in the cache",
        ) from error
    if isinstance(found, datasets.DatasetDict):
        split = split or (next(iter(found)) if len(found) == 1 else "train")
        if split not in found:
            raise StethoscopeError(f"the dataset `{path}` has no split `{split}`", hint=f"it has: {', '.join(found)}")
        found = found[split]
    names = found.column_names
    return _column(path, field, names, found[field][:limit] if field in names else None)


def _column(path: Path, field: str, names: list[str], values: list[Any] | None) -> list[tuple[str, Any]]:
    if values is None:
        raise StethoscopeError(f"`{path}` has no field `{field}` (it has: {', '.join(names)})", hint="set `field`")
    return [(f"row {number}", {field: value}) for number, value in enumerate(values, 1)]


def documents_hash(documents: Iterable[Document]) -> str:
    """The SHA-256 of a list of documents, in their order."""
    return sha256_bytes(canonical_json(list(documents)).encode())
