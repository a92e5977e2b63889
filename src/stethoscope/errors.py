"""What a user can get wrong, said once: what is wrong, and a hint."""

import errno
import os
import re
from collections.abc import Sequence
from importlib.util import find_spec


class StethoscopeError(Exception):
    """A failure that the user can mend.

    Args:
        message: what is wrong, with the offending value in backticks and where it came from.
        hint: what to do about it.
        problems: when several things of one kind are wrong, all of them, one line each.
    """

    def __init__(self, message: str, *, hint: str | None = None, problems: Sequence[str] = ()) -> None:
        self.message = _printable(message)
        self.hint = hint and _printable(hint)
        self.problems = tuple(map(_printable, problems))
        super().__init__(self.message)

    def __str__(self) -> str:
        lines = [self.message, *(f"  - {problem}" for problem in self.problems)]
        if self.hint:
            lines += ["", f"hint: {self.hint}"]
        return "\n".join(lines)


def refused_by_system(error: BaseException) -> StethoscopeError | None:
    """What the operating system refuses, in words: a full disk, a place to write to, memory; None for other errors.

    Libraries in Rust and C++ give the system's number, or less, in a text of their own.
    """
    said = str(error)
    number = getattr(error, "errno", None) or int((re.findall(r"os error (\d+)", said) or [0])[0])
    place = f" `{error.filename}`" if getattr(error, "filename", None) else ""  # type: ignore[attr-defined]
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "file write failed" in said:
        return StethoscopeError(f"the disk is full:{place or f' {said[:200]}'}", hint="free some space")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENAMETOOLONG):
        why = os.strerror(number)
        return StethoscopeError(f"cannot use{place or ' a file'}: {why}", hint="choose a folder that you can write to")
    # PyTorch's, oneDNN's and the loader's words
    short = r"out of memory|allocate memory|could not create a primitive|failed to map segment"
    if isinstance(error, MemoryError) or number == errno.ENOMEM or re.search(short, said):
        return StethoscopeError(f"there is not enough memory: {said[:200]}", hint="smaller batches or models take less")
    return None


def _printable(text: str) -> str:
    """Text that can be written: a file may hold half of a surrogate pair, which is quoted."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class CheckpointError(StethoscopeError):
    """A checkpoint, adapter or patch that cannot be used as asked."""


class SAEError(StethoscopeError):
    """Sparse autoencoders that cannot be read, or do not fit the model."""


class RecipeError(StethoscopeError):
    """A recipe that cannot be run as written."""


class EvaluationError(StethoscopeError):
    """Tasks or outcomes that cannot be run or compared as asked."""


def require(*packages: str, extra: str) -> None:
    """Check that packages of an extra of this one are installed, before work that needs them.

    Raises:
        StethoscopeError: some are not.
    """
    if missing := [name for name in packages if find_spec(name) is None]:
        raise StethoscopeError(f"not installed: {', '.join(missing)}", hint=install(extra))


def install(extra: str) -> str:
    """The command that installs an extra."""
    return f'pip install "sae-stethoscope[{extra}]"'
