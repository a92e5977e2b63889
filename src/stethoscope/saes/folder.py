"""One SAE on disk as a frozen description: what it reads, how wide it is, where its files are. No weights, no torch."""

import json
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from stethoscope.artifacts import canonical_json, sha256_bytes, sha256_file
from stethoscope.checkpoints.header import read_header
from stethoscope.errors import CheckpointError, SAEError

# By SAELens' names. Both BatchTopK kinds load as the JumpReLU that they are once trained; `topk_transcoder`, which
# SAELens has no class for, loads as TopK.
ARCHITECTURES = (
    "standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk",
    "transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder", "topk_transcoder",
)  # fmt: skip
SITES = ("resid_pre", "resid_post", "mlp_in", "mlp_out", "attn_z", "attn_out")

_TRANSFORMER_LENS = re.compile(r"blocks\.(\d+)\.(\w+(?:\.\w+)?)")
_SITE_OF_HOOK = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_post": "resid_post",
    "mlp.hook_in": "mlp_in",
    "hook_mlp_out": "mlp_out",
    "attn.hook_z": "attn_z",
    "hook_attn_out": "attn_out",
}
_TRANSFORMERS = re.compile(r"(?:[\w.]+\.)?(?:layers|h)\.(\d+)(?:\.([\w.]+))?")
# `post_attention_layernorm` is missing on purpose: it ends attention in Gemma and begins the MLP everywhere else.
_SITE_OF_TAP = {
    tap: site
    for site, taps in {
        "resid_pre": ("input",),
        "resid_post": ("output",),
        "mlp_in": ("mlp.input", "feed_forward.input", "pre_feedforward_layernorm.output"),
        "mlp_out": (
            "mlp.output", "feed_forward.output", "block_sparse_moe.output", "post_feedforward_layernorm.output",
        ),
        "attn_z": ("self_attn.o_proj.input", "self_attn.dense.input", "attn.c_proj.input", "attention.dense.input"),
        "attn_out": ("self_attn.output", "attn.output", "attention.output"),
    }.items()
    for tap in taps
}  # fmt: skip

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class SAEFolder:
    """One SAE on disk, unread.

    Attributes:
        path: its folder, or its file where one is a whole SAE.
        layout: how it is stored, a key of ``formats.LAYOUTS``.
        files: those of its files that hold configuration and weights.
        layer: the decoder block it reads, from 0.
        site: where in the block, one of ``SITES``.
        tap: the exact place relative to the block, as ``sites.hook_point`` takes it, where the makers name a module;
            None stands for the site's usual place.
        width: number of features.
        d_in: values per token that it reads.
        architecture: one of ``ARCHITECTURES``.
        hook_name: the place as the SAE's makers name it.
        model_name: the model it was trained on, where it says.
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
    overrides: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def transcoder(self) -> bool:
        """Whether it predicts a module's output from its input: it has no reconstruction of what it reads."""
        return self.architecture.endswith("transcoder")

    @cached_property
    def sha256(self) -> str:
        """One hash of configuration and weights; reads the whole files."""
        return self.hashed()

    def hashed(self, hash_file: Callable[[Path], str] = sha256_file) -> str:
        """One hash of configuration and weights, from a hash of each file."""
        parts: list[Any] = [hash_file(self.path / name) for name in self.files]
        return sha256_bytes(canonical_json([*parts, dict(self.overrides)] if self.overrides else parts).encode())


def site_of(hook_name: str) -> tuple[int, str, str | None]:
    """Layer, site and tap of a hook name, in TransformerLens' style or as a module of a Transformers model.

    A module named without an end is read at its output.

    >>> site_of("blocks.12.hook_resid_post"), site_of("model.layers.3.mlp")
    ((12, 'resid_post', None), (3, 'mlp_out', 'mlp.output'))

    Raises:
        SAEError: it names no site that is known.
    """
    if match := _TRANSFORMER_LENS.fullmatch(hook_name):
        if site := _SITE_OF_HOOK.get(match[2]):
            return int(match[1]), site, None
    elif match := _TRANSFORMERS.fullmatch(hook_name):
        tap = match[2] or "output"
        tap = tap if tap.endswith(("input", "output")) else f"{tap}.output"
        if site := _SITE_OF_TAP.get(tap):
            return int(match[1]), site, tap
    raise SAEError(
        "unknown site", problems=[f"the hook `{hook_name}` is none of {', '.join(SITES)} as far as is known"]
    )


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


def read_shapes(path: Path) -> Shapes:
    """Shapes of the tensors of a `.safetensors`, `.npz` or `.pt` file, without reading the tensors.

    Raises:
        SAEError: the file is missing or not sound.
    """
    import pickle

    readers = {".safetensors": _safetensors, ".npz": _npz, ".pt": _pt}
    try:
        return readers[path.suffix](path)
    except CheckpointError as error:
        raise unusable([*(error.problems or (f"`{path.name}`: {error.message}",))]) from error
    except (OSError, ValueError, TypeError, KeyError, EOFError, RuntimeError) as error:
        raise unusable([f"`{path.name}` cannot be read: {str(error).splitlines()[0]}"]) from error
    except (zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise unusable([f"`{path.name}` is damaged, or holds more than tensors"]) from error


def _safetensors(path: Path) -> Shapes:
    return {name: slot.shape for name, slot in read_header(path).items()}


def _npz(path: Path) -> Shapes:
    from numpy.lib import format as npy

    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    shapes: Shapes = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as member:
                shapes[name.removesuffix(".npy")] = readers[npy.read_magic(member)](member)[0]
    return shapes


def _pt(path: Path) -> Shapes:
    import torch  # alone reads this format's headers

    tensors = dict(torch.load(path, map_location="meta", weights_only=True))
    return {str(name): tuple(value.shape) for name, value in tensors.items() if hasattr(value, "shape")}
