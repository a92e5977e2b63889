"""Files of SAEs: configurations, shapes of tensors without the tensors, and the tensors by SAELens' names."""

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.checkpoints.header import read_header
from stethoscope.errors import CheckpointError, SAEError

if TYPE_CHECKING:
    from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
State = dict[str, "Tensor"]


def unusable(problems: list[str]) -> SAEError:
    """An SAE that cannot be used, and every reason."""
    return SAEError("the SAE cannot be used", problems=problems)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        SAEError: it is missing or holds none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise unusable([f"`{path.name}` {reason}"]) from error
    return value


def table(value: Any) -> dict[str, Any]:
    """A table of a configuration, empty where there is none."""
    return value if isinstance(value, dict) else {}


def read_shapes(path: Path) -> Shapes:
    """Shapes of the tensors of a `.safetensors`, `.npz` or `.pt` file, without reading the tensors.

    Raises:
        SAEError: the file is missing or not sound.
    """
    try:
        if path.suffix == ".safetensors":
            return {name: slot.shape for name, slot in read_header(path).items()}
        return _npz_shapes(path) if path.suffix == ".npz" else _pt_shapes(path)
    except CheckpointError as error:
        raise unusable([*(error.problems or (f"`{path.name}`: {error.message}",))]) from error
    except (OSError, ValueError, TypeError, KeyError, EOFError, RuntimeError) as error:
        raise unusable([f"`{path.name}` cannot be read: {str(error).splitlines()[0]}"]) from error
    except (zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise unusable([f"`{path.name}` is damaged, or holds more than tensors"]) from error


def _npz_shapes(path: Path) -> Shapes:
    from numpy.lib import format as npy

    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    shapes: Shapes = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as member:
                shapes[name.removesuffix(".npy")] = readers[npy.read_magic(member)](member)[0]
    return shapes


def _pt_shapes(path: Path) -> Shapes:
    import torch  # alone reads this format's headers

    tensors = dict(torch.load(path, map_location="meta", weights_only=True))
    return {str(name): tuple(value.shape) for name, value in tensors.items() if hasattr(value, "shape")}


def read_tensors(path: Path) -> State:
    """The tensors of a file, in float32 where they are floats."""
    import torch

    if path.suffix == ".npz":
        import numpy as np

        with np.load(path, allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays}
    elif path.suffix == ".pt":
        tensors = dict(torch.load(path, map_location="cpu", weights_only=True))
    else:
        from safetensors.torch import load_file

        tensors = load_file(path)
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def renamed(tensors: State, names: Mapping[str, str], turned: Mapping[str, str]) -> State:
    """Tensors by SAELens' names, which come first in both mappings; those of ``turned`` lie the other way."""
    state = {ours: tensors[theirs] for ours, theirs in names.items()}
    return state | {ours: tensors[theirs].T.contiguous() for ours, theirs in turned.items()}
