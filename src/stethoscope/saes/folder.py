"""One SAE on disk: what it is and reads, checked against the headers of its files, without its weights."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from stethoscope.artifacts import canonical_json, sha256_bytes, sha256_file


@dataclass(frozen=True, kw_only=True)
class SAEFolder:
    """One SAE on disk, unread.

    Attributes:
        path: its folder, or its file where one is a whole SAE.
        layout: how it is stored, a key of ``layouts.LAYOUTS``.
        files: its configuration, if it has one, and last its weights.
        layer: the decoder block it reads, from 0.
        site: where in the block, one of ``sites.SITES``.
        tap: the exact place relative to the block, as ``sites.hook_point`` takes it, where the makers name a module;
            None stands for the site's usual place.
        width: number of features.
        d_in: values per token that it reads.
        architecture: one of ``open.ARCHITECTURES``.
        hook_name: the place as the SAE's makers name it.
        model_name: the model it was trained on, where it says.
        tensors: the stored names of its tensors, by SAELens' names; one that lies the other way ends with ``.T``.
        options: entries of SAELens' configuration that follow from its layout.
        overrides: what SAELens' directory of releases corrects in the SAE's own configuration.
    """

    path: Path
    layout: str
    files: tuple[str, ...]
    layer: int
    site: str
    tap: str | None
    width: int
    d_in: int
    architecture: str
    hook_name: str
    model_name: str | None
    tensors: Mapping[str, str] = field(hash=False, repr=False)
    options: Mapping[str, Any] = field(hash=False, repr=False)
    overrides: Mapping[str, Any] = field(hash=False)

    @property
    def transcoder(self) -> bool:
        """Whether it predicts a module's output from its input: it has no reconstruction of what it reads."""
        return self.architecture.endswith("transcoder")

    def hashed(self, hash_file: Callable[[Path], str] = sha256_file) -> str:
        """One hash of configuration and weights, from a hash of each whole file."""
        parts: list[Any] = [hash_file(self.path / name) for name in self.files]
        return sha256_bytes(canonical_json([*parts, dict(self.overrides)] if self.overrides else parts).encode())


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What the files of one SAE hold, for a layout to say what it is.

    Attributes:
        where: its path, absolute: the names in it may say what the configuration does not.
        config: its configuration, as SAELens' directory corrects it; empty if it has none.
        shapes: of its tensors by stored name; empty if they cannot be read.
        problems: all that is wrong with it; a layout adds what it cannot use.
    """

    where: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    problems: list[str] = field(default_factory=list)

    def table(self, name: str) -> dict[str, Any]:
        """A table of the configuration, empty where there is none."""
        return value if isinstance(value := self.config.get(name), dict) else {}

    def number(self, name: str, value: Any, *, above: float = -math.inf) -> None:
        """Add a problem where a value is no finite number above a limit."""
        if type(value) not in (int, float) or not above < value < math.inf:
            limit = f" above {above:g}" if above > -math.inf else ""
            self.problems.append(f"`{name}` is `{str(value)[:60]}`, not a number{limit}")

    def matrix(self, name: str) -> tuple[int, int]:
        """The two sizes of a matrix, for layouts whose configuration does not give them."""
        match self.shapes.get(name):
            case (rows, columns):
                return rows, columns
        return 1, 1  # that it is not there is a problem already, so these only need to pass as sizes


class Claim(NamedTuple):
    """What the files of an SAE claim that it is, before they are checked; as in `SAEFolder`, but for ``sizes``.

    Attributes:
        sizes: values per token that it reads, features, and values that it writes, if not as many as it reads.
    """

    hook_name: str
    architecture: str
    sizes: Sequence[Any]
    tensors: Mapping[str, str]
    options: Mapping[str, Any] = {}
    model_name: Any = None
