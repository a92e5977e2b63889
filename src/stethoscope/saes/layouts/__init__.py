"""How published SAEs are stored: a file per layout, which says what an SAE reads and converts its weights.

sae = read_folder(Path("resid_post_all/layer_12_width_16k_l0_small"))   # SAEFolder(layer=12, site="resid_post", ...)
config, state = convert(sae)                                            # SAELens' configuration and state dict
"""

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from stethoscope.checkpoints.header import read_header
from stethoscope.errors import CheckpointError
from stethoscope.saes.layouts import (
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    qwen_scope,
    sae_lens,
    sparsify,
)
from stethoscope.saes.layouts.base import Converted, SAEFolder, Stored, read_config, unusable


@dataclass(frozen=True)
class Layout:
    """One way of storing SAEs.

    Attributes:
        module: its `read`, which says what an SAE is without its weights, and its `convert`: SAE, configuration,
            tensors in float32 -> configuration and state dict for SAELens.
        marker: the file that tells it from others; where one file is a whole SAE, how its name ends.
        weights: the file of the weights, if not the marker; empty where one file is a whole SAE.
        config: the file of the configuration, if the layout has one.
        config_optional: whether an SAE may lack it.
    """

    module: ModuleType
    marker: str
    weights: str | None = None
    config: str | None = None
    config_optional: bool = False


# In the order of looking: sparsify's folders hold a `cfg.json` too.
LAYOUTS = {
    "sparsify": Layout(sparsify, "sae.safetensors", config="cfg.json"),
    "gemma_scope_2": Layout(gemma_scope_2, "params.safetensors", config="config.json", config_optional=True),
    "gemma_scope": Layout(gemma_scope, "params.npz"),
    "dictionary_learning": Layout(dictionary_learning, "ae.pt", config="config.json"),
    "llama_scope": Layout(llama_scope, "hyperparams.json", "checkpoints/final.safetensors", "hyperparams.json"),
    "qwen_scope": Layout(qwen_scope, ".sae.pt", weights=""),
    "sae_lens": Layout(sae_lens, "cfg.json", "sae_weights.safetensors", "cfg.json"),
}


def layout_of(path: Path) -> str | None:
    """The layout of a folder by the files in it, or of a file that is an SAE itself; None if there is no SAE."""
    if path.name.endswith(LAYOUTS["qwen_scope"].marker) and path.is_file():
        return "qwen_scope"
    return next((name for name, layout in LAYOUTS.items() if (path / layout.marker).is_file()), None)


def read_folder(path: Path, overrides: Mapping[str, Any] | None = None) -> SAEFolder:
    """What the SAE of a folder is and reads.

    Args:
        path: a folder with the files of one layout, or the one file of an SAE that needs no more.
        overrides: entries that replace the configuration's own.

    Raises:
        SAEError: it is not readable, sound and supported; everything that is wrong with it is in ``problems``.
    """
    name = layout_of(path)
    if name is None:
        markers = ", ".join(f"`{layout.marker}`" for layout in LAYOUTS.values())
        raise unusable([f"it holds none of {markers}" if path.is_dir() else "there is no such folder"])
    layout, overrides, problems = LAYOUTS[name], dict(overrides or {}), list[str]()
    weights = layout.marker if layout.weights is None else layout.weights
    # the configuration, if any, comes first
    files: tuple[str, ...] = (weights,)
    if layout.config and not (layout.config_optional and not (path / layout.config).is_file()):
        files = (layout.config, weights)
    config, file, shapes = _config(path, files), (path / weights).name, {}
    try:
        shapes = _read_shapes(path / weights)
    except CheckpointError as error:
        problems += error.problems or [f"`{file}`: {error.message}"]
    except (zipfile.BadZipFile, pickle.UnpicklingError):
        problems.append(f"`{file}` is damaged, or holds more than tensors")
    except (OSError, ValueError, TypeError, KeyError, EOFError, RuntimeError) as error:
        problems.append(f"`{file}` cannot be read: {str(error).splitlines()[0]}")
    stored = Stored(path.absolute(), file, {**config, **overrides}, shapes, problems)
    return replace(layout.module.read(stored), path=path, layout=name, files=files, overrides=overrides)


def convert(folder: SAEFolder) -> Converted:
    """SAELens' configuration and state dict of an SAE, in float32.

    Raises:
        OSError, RuntimeError, ValueError, KeyError, TypeError: its files are not what its layout asks for.
    """
    import torch

    path = folder.path / folder.files[-1]
    if path.suffix == ".npz":
        import numpy as np

        with np.load(path, allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays}
    elif path.suffix == ".pt":
        tensors = dict(torch.load(path, map_location="cpu", weights_only=True))
    else:
        from safetensors.torch import load_file

        tensors = load_file(path)
    wide = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    config = {**_config(folder.path, folder.files), **folder.overrides}
    return LAYOUTS[folder.layout].module.convert(folder, config, wide)


def _config(path: Path, files: tuple[str, ...]) -> dict[str, Any]:
    """The configuration of an SAE by the names of its files; empty where it has only weights."""
    return read_config(path / files[0]) if len(files) == 2 else {}


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a `.safetensors`, `.npz` or `.pt` file, without reading the tensors."""
    if path.suffix == ".safetensors":
        return {name: slot.shape for name, slot in read_header(path).items()}
    if path.suffix == ".npz":
        from numpy.lib import format as npy

        readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        shapes = {}
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as member:
                    shapes[name.removesuffix(".npy")] = readers[npy.read_magic(member)](member)[0]
        return shapes

    import torch  # alone reads this format's headers

    tensors = dict(torch.load(path, map_location="meta", weights_only=True))
    return {str(name): tuple(value.shape) for name, value in tensors.items() if hasattr(value, "shape")}
