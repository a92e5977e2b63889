"""Results on disk: JSON with schema, versions, seed and input hashes; folders written whole or not at all.

An output that exists is complete: it is written beside its place and renamed into it.
"""

import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stethoscope.errors import StethoscopeError
from stethoscope.parsing import parse_json

log = logging.getLogger(__name__)

PARTIAL = ".stethoscope-partial"  # the end of the name of what is not finished, locked while its process lives
ALONE = fcntl.LOCK_EX | fcntl.LOCK_NB
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2  # linux/fs.h
NOT_SUPPORTED = (errno.ENOSYS, errno.EINVAL)

Built = TypeVar("Built")
# typing.Self would say this better, but beartype cannot check it in a class that is not decorated as a whole.
Saved = TypeVar("Saved", bound="Artifact")


def sha256_bytes(data: bytes) -> str:
    """The SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(paths: Iterable[Path], hash_file: Callable[[Path], str] = sha256_file) -> str:
    """One hash of several files' names and contents; the order given does not matter."""
    listed = sorted((path.name, hash_file(path)) for path in paths)
    return sha256_bytes(canonical_json(listed).encode())


@contextmanager
def remembered_hashes(path: Path) -> Iterator[Callable[[Path], str]]:
    """Yield a `sha256_file` that keeps hashes in the JSON file ``path`` and reads no unchanged file again.

    A file is unchanged if its path, size, inode and times of change are.
    """
    try:
        known = read_json(path)
    except StethoscopeError:
        known = {}
    known = {name: one for name, one in known.items() if isinstance(one, dict)} if isinstance(known, dict) else {}
    used = {}

    def hash_file(file: Path) -> str:
        stat, name = file.stat(), str(file.resolve())
        state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        if known.get(name, {}).get("state") != state:
            known[name] = {"state": state, "sha256": sha256_file(file)}
        used[name] = known[name]
        return str(used[name].get("sha256"))

    yield hash_file
    write_json(path, used)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, so that equal values have equal hashes; NaN is refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def file_name(name: str) -> str:
    """What a file or folder is called that stands for a name: the name itself, or like it and with its hash.

    >>> file_name("general-2"), file_name("../../esc")
    ('general-2', 'esc-9fddcecd')
    """
    kept = re.sub(r"[^\w.-]+", "-", name).strip("-.")[:64]
    return name if name and kept == name else f"{kept or 'x'}-{sha256_bytes(name.encode('utf-8', 'replace'))[:8]}"


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield an empty file beside ``path`` that becomes ``path`` if the block succeeds, else vanishes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
    temporary = Path(name)
    try:
        with suppress(OSError):
            fcntl.flock(handle, ALONE)
        yield temporary
        with temporary.open("rb") as file:  # a library may have put another in its place
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        os.close(handle)
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, whole or not at all; NaN and infinity are refused (undefined is ``null``)."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


@contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` that becomes ``path`` if the block succeeds, else vanishes.

    Raises:
        StethoscopeError: ``path`` exists, or does by the time the block ends, and ``overwrite`` is false.
    """
    check_new(path, overwrite=overwrite)
    with scratch_folder(path) as made:
        yield made
        made.chmod(0o755)
        _publish(made, path, overwrite=overwrite)


@contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """Yield an empty hidden folder beside a path that vanishes in the end.

    What a process that was killed leaves behind is removed by the next that writes to, or beside, the same place.
    """
    beside.parent.mkdir(parents=True, exist_ok=True)
    remove_partial(beside.parent)
    made = Path(tempfile.mkdtemp(dir=beside.parent, prefix=f".{beside.name}."))
    temporary = made.with_name(made.name + PARTIAL)
    handle = os.open(made, os.O_RDONLY)
    try:
        with suppress(OSError):  # under its first name, so that nobody sees an unlocked partial folder that is alive
            fcntl.flock(handle, ALONE)
        made.rename(temporary)
        yield temporary
    finally:
        _remove(temporary)
        _remove(made)
        os.close(handle)


def _publish(made: Path, path: Path, *, overwrite: bool) -> None:
    """Give a folder its name. What has it already is left alone or, to be overwritten, changes places in one step."""
    try:
        _renameat2(made, path, RENAME_NOREPLACE)
        return
    except OSError as error:
        if error.errno not in (errno.EEXIST, *NOT_SUPPORTED):
            raise
    if not path.exists():
        made.rename(path)  # the system would put it in place of an empty folder, but of no file and no other folder
    elif not overwrite:
        raise _exists(path)
    else:
        try:
            _renameat2(made, path, RENAME_EXCHANGE)
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise
            old = made.with_name(f".old{made.name}")
            path.rename(old)  # not removed in place: half of it would look like all of it
            made.rename(path)
            old.rename(made)


def _renameat2(source: Path, target: Path, flags: int) -> None:
    """Linux' rename with flags; an OSError of `NOT_SUPPORTED` where the C library or the file system has none."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here = -100  # AT_FDCWD: relative paths are relative to the working folder
    if function is None or function(here, os.fsencode(source), here, os.fsencode(target), flags):
        code = ctypes.get_errno() if function else errno.ENOSYS
        raise OSError(code, os.strerror(code), str(target))


def check_new(path: Path, *, overwrite: bool) -> None:
    """Check that an output can be written, before long work.

    Raises:
        StethoscopeError: ``path`` exists, if only as a link that leads nowhere, and ``overwrite`` is false.
    """
    if (path.exists() or path.is_symlink()) and not overwrite:
        raise _exists(path)


def _exists(path: Path) -> StethoscopeError:
    return StethoscopeError(f"the output `{path}` exists", hint="choose another folder or remove it first")


@contextmanager
def kept_for_one(folder: Path) -> Iterator[Path]:
    """Keep other processes out of a folder, made if need be, and yield it; the lock dies with its process.

    Raises:
        StethoscopeError: another process works in it, or there can be no such folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise StethoscopeError(f"`{folder}` is, or lies below, a file", hint="choose another folder") from error
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, ALONE)
        except BlockingIOError as error:
            hint = "wait for it to end, or choose another folder"
            raise StethoscopeError(f"another process works in `{folder}`", hint=hint) from error
        except OSError:
            log.debug("the file system of `%s` has no locks", folder)
        remove_partial(folder)
        remove_partial(folder.parent)
        yield folder
    finally:
        os.close(handle)


def remove_partial(folder: Path) -> None:
    """Remove what processes that have ended left unfinished in a folder."""
    for stale in folder.glob(f".*{PARTIAL}"):
        with suppress(OSError):
            handle = os.open(stale, os.O_RDONLY)
            try:
                fcntl.flock(handle, ALONE)
                _remove(stale)
            finally:
                os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class Frozen(BaseModel):
    """A part of a result: frozen, without unknown fields or NaN (undefined is None)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Provenance(Frozen):
    """The origin of a result: package version, seed, and the SHA-256 of each input by name."""

    stethoscope: str = Field(default_factory=lambda: version("sae-stethoscope"))
    seed: int = 0
    inputs: dict[str, str] = {}

    @property
    def key(self) -> str:
        """The hash of all fields; a stage with an equal key need not run again."""
        return sha256_bytes(canonical_json(self.model_dump()).encode())


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        StethoscopeError: the file is missing or is not JSON.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StethoscopeError(f"`{path}` is missing", hint="run the stage that writes it first") from error
    except OSError as error:
        raise StethoscopeError(f"cannot read `{path}`: {error.strerror}") from error
    except ValueError as error:
        raise StethoscopeError(f"`{path}` is not JSON: {error}") from error


def read_versioned(path: Path, schema: int, build: Callable[[Any], Built], *, field: str = "schema_version") -> Built:
    """Build an object from the value in a JSON file whose ``field`` is the schema version.

    Raises:
        StethoscopeError: the file is missing, damaged, or of another schema version.
    """
    value = read_json(path)
    found = value.get(field) if isinstance(value, dict) else None
    if found != schema:
        raise StethoscopeError(
            f"`{path}` has schema version `{found}`, this version reads `{schema}`",
            hint="run its stage again with this version of stethoscope",
        )
    try:
        return build(value)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise StethoscopeError(f"`{path}` does not have the expected form", problems=problems) from error


class Artifact(Frozen):
    """A stage's result: frozen, versioned, and saved as one JSON file.

    Subclasses name their file, and give ``schema_version`` a higher default when a field changes its meaning.
    """

    FILE: ClassVar[str]

    schema_version: int = 1
    provenance: Provenance

    def save(self, folder: Path) -> Path:
        """Write ``FILE`` in ``folder``, whole or not at all; return its path."""
        path = folder / self.FILE
        write_json(path, self.model_dump(mode="json"))
        return path

    @classmethod
    def load(cls: type[Saved], folder: Path) -> Saved:
        """Read ``FILE`` from ``folder``.

        Raises:
            StethoscopeError: the file is missing, damaged, or of another schema version.
        """
        return read_versioned(folder / cls.FILE, cls.model_fields["schema_version"].default, cls.model_validate)

    @classmethod
    def find(cls: type[Saved], folder: Path) -> Saved | None:
        """The saved result, or None if there is no file."""
        return cls.load(folder) if (folder / cls.FILE).exists() else None

    @classmethod
    def load_if_current(cls: type[Saved], folder: Path, provenance: Provenance) -> Saved | None:
        """The saved result if it was made from exactly these inputs, else None."""
        try:
            saved = cls.find(folder)
        except StethoscopeError as error:
            log.warning("%s: it is made again", error.message)
            return None
        return saved if saved and saved.provenance == provenance else None
