"""Reads documents from files, tables, saved datasets and the hub, without torch.

documents = read_documents("data/math.jsonl", field="messages")             # texts, or chats as lists of messages
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stethoscope.artifacts import sha256_bytes
from stethoscope.errors import StethoscopeError, refused_by_system

Chat = Sequence[Mapping[str, Any]]
Document = str | Chat

_HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[^/]+))?")
_SHOWN = 10  # bad rows that are named
_HALF = re.compile("[\ud800-\udfff]")
_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}  # of ShareGPT

log = logging.getLogger(__name__)


def read_documents(
    path: Path | str, *, field: str = "text", limit: int | None = None, split: str | None = None
) -> list[Any]:
    """Read documents: texts, or chats where the field holds messages. Blank rows are skipped, and their number said.

    Args:
        path: a ``.jsonl``, ``.parquet`` or ``.txt`` file (one document); a folder of `datasets.Dataset.save_to_disk`;
            or a dataset on the hub: ``owner/name`` or ``owner/name/config``, with or without ``:split``.
        field: the field with the document in each row: a text, or a list of messages with ``role`` and ``content``, or
            ``from`` and ``value`` as ShareGPT has them; content may be a list of parts that are texts, and is empty
            beside ``tool_calls``.
        limit: maximum number of documents, from the top.
        split: of a dataset that has several; ``train`` by default.

    Returns:
        a str, or a list of messages with ``role`` and ``content``, per document; all of one kind.

    Raises:
        StethoscopeError: the data is missing, empty, malformed, or lacks the field; the bad rows are named.
    """
    return _read(path, (field,), limit, split)[0]


def read_prompted(
    path: Path | str, *, field: str, prompt: str, limit: int | None = None, split: str | None = None
) -> tuple[list[Any], list[Any]]:
    """Documents, each behind what another field has, and that; as `read_documents`, without rows that lack either.

    Raises:
        StethoscopeError: as `read_documents`, or either is a chat.
    """
    documents, prompts = _read(path, (field, prompt), limit, split)
    if not all(isinstance(part, str) for part in (documents[0], prompts[0])):  # all of a field are of one kind
        raise StethoscopeError(f"`{path}` has chats, which take no `prompt`", hint="leave `prompt` out")
    return [f"{before}{document}" for before, document in zip(prompts, documents, strict=True)], prompts


def _read(path: Path | str, fields: tuple[str, ...], limit: int | None, split: str | None) -> list[list[Any]]:
    """The documents in each of some fields, from the rows in which none of them is blank."""
    path = Path(path)
    rows: Iterable[tuple[str, Any]]
    if split and path.is_file():
        raise StethoscopeError(f"the file `{path}` has no split `{split}`", hint="leave `split` out")
    if path.suffix == ".txt" and len(fields) > 1:
        raise StethoscopeError(f"the text `{path}` has no fields, so none holds prompts", hint="give a .jsonl file")
    if path.suffix == ".txt":
        rows = [("text", dict.fromkeys(fields, _text(path)))]
    elif path.suffix == ".jsonl":
        rows = json_lines(path)
    else:
        rows = _parquet(path, fields) if path.suffix == ".parquet" else _dataset(path, fields, split)
    found: list[list[Any]] = [[] for _ in fields]
    problems: list[str] = []
    blank, lacking = 0, False
    for where, row in rows:
        if len(found[0]) == limit:
            break
        if isinstance(row, ValueError):
            problems.append(f"{where}: not JSON ({row})")
        elif row is not None and (not isinstance(row, dict) or not row.keys() >= set(fields)):
            have = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            missing = [field for field in fields if not isinstance(row, dict) or field not in row]
            problems.append(f"{where}: no text in field `{missing[0]}` (it has: {have})")
            lacking = True
        elif row is None or any(_is_blank(row[field]) for field in fields):
            blank += 1
        else:
            documents = [_document(row[field]) for field in fields]
            problems += [f"{where}: {problem}" for _, wrong in documents for problem in wrong]
            for place, (document, _) in zip(found, documents, strict=True):
                place.append(document)
    for field, documents in zip(fields, found, strict=True):
        if len({isinstance(document, str) for document in documents}) > 1:
            problems.append(f"field `{field}` holds a text in some rows and a chat in others")
    if problems:
        more = [f"and {len(problems) - _SHOWN} more rows"] if len(problems) > _SHOWN else []
        hint = "set `field`" if lacking else "a document is a text, or a list of messages with `role` and `content`"
        raise StethoscopeError(f"`{path}` has unusable rows", problems=[*problems[:_SHOWN], *more], hint=hint)
    if not found[0]:
        raise StethoscopeError(f"`{path}` holds no documents" + (f": its {blank} rows are blank" if blank else ""))
    if blank:
        log.warning("`%s`: %d blank rows are skipped", path, blank)
    return found


def _is_blank(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _document(value: Any) -> tuple[Any, list[str]]:
    """A row's document, chats with their messages as Transformers' templates take them; and what is wrong with it."""
    if isinstance(value, str):
        return value, []
    columns = list(value.values()) if isinstance(value, dict) else []
    if all(isinstance(column, list) for column in columns) and len({*map(len, columns)}) == 1:
        value = [*_transposed(value)]  # as older versions of datasets have lists of tables
    if not isinstance(value, list):
        return value, [f"no text, but a {type(value).__name__}"]
    messages = [_message(message) for message in value]
    return messages, [
        f"message {number} is not a table with `role` and `content`, both text"
        for number, message in enumerate(messages, 1)
        if not all(isinstance(message.get(key), str) for key in ("role", "content"))
    ]


def _message(given: Any) -> dict[str, Any]:
    """A message with a role and a text, if it has both in any of the forms in which they are published."""
    if not isinstance(given, dict):
        return {}
    names = {} if "role" in given else {"from": "role", "value": "content"}
    # tables fill in what a message lacks, which a file of lines does not
    message: dict[str, Any] = {str(names.get(key, key)): value for key, value in given.items() if value is not None}
    if names:
        message["role"] = _ROLES.get(str(message.get("role")), message.get("role"))
    content = message.get("content")
    if isinstance(content, list):
        parts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in content]
        message["content"] = "".join(parts) if all(isinstance(part, str) for part in parts) else None
    elif content is None and message.get("tool_calls"):
        message["content"] = ""
    return message


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise StethoscopeError(f"the text `{path}` cannot be read: {error}") from error


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The lines of a file that are not blank: where each stands, and its value or the error that it is not JSON.

    Half of a surrogate pair is no text; it becomes U+FFFD, as in other readers, and the number of such lines is said.
    """
    mended = 0
    try:
        for number, line in enumerate(_text(path).split("\n"), 1):  # not splitlines: strings may hold other line ends
            if line.strip():
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield f"line {number}", ValueError(error)
                    continue
                if "\\ud" in line.lower():
                    text, halves = _HALF.subn("\ufffd", json.dumps(value, ensure_ascii=False))
                    value, mended = json.loads(text), mended + bool(halves)
                yield f"line {number}", value
    finally:
        if mended:
            log.warning("`%s`: %d lines hold half of a surrogate pair, which is read as U+FFFD", path, mended)


def _parquet(path: Path, fields: Sequence[str]) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.ParquetFile(path)
        _check_fields(path, fields, table.schema_arrow.names)
        yield from _numbered(row for rows in table.iter_batches(columns=[*fields]) for row in rows.to_pylist())
    except (OSError, ArrowException, UnicodeDecodeError) as error:
        raise StethoscopeError(f"the table `{path}` cannot be read: {error}") from error


def _dataset(path: Path, fields: Sequence[str], split: str | None) -> Iterator[tuple[str, Any]]:
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
    except Exception as error:  # what its rows, its builder or the network raise
        if refused := refused_by_system(error):
            raise refused from error
        raise StethoscopeError(
            f"the dataset `{path}` cannot be read: {error}",
            hint="a dataset on the hub is `owner/name/config:split`; without a network it must be in the cache",
        ) from error
    if isinstance(found, datasets.DatasetDict):
        split = split or (next(iter(found)) if len(found) == 1 else "train")
        if split not in found:
            raise StethoscopeError(f"the dataset `{path}` has no split `{split}`", hint=f"it has: {', '.join(found)}")
        found = found[split]
    elif split:
        raise StethoscopeError(f"the dataset `{path}` has no splits, so none is `{split}`", hint="leave `split` out")
    _check_fields(path, fields, found.column_names)
    return _numbered(
        row for rows in found.with_format(None).select_columns([*fields]).iter(1000) for row in _transposed(rows)
    )


def _check_fields(path: Path, fields: Sequence[str], names: Sequence[str]) -> None:
    for field in fields:
        if field not in names:
            have = ", ".join(names)
            raise StethoscopeError(f"`{path}` has no field `{field}` (it has: {have})", hint="set `field`")


def _transposed(columns: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    return (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


def _numbered(rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def documents_hash(documents: Iterable[Document]) -> str:
    """The SHA-256 of a list of documents, in their order; messages may hold what JSON does not, such as dates."""
    text = json.dumps(list(documents), sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return sha256_bytes(text.encode())
