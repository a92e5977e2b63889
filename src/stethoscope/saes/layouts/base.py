"""What a layout is: how SAEs are stored, how what they read is found, and how their weights become SAELens' own.

With s for the input, features are relu(z) where z = s W_enc + b_enc passes a threshold, is among the k largest, or
opens a gate. SAELens' own loaders ask the network for shapes (Gemma Scope 2), transpose the decoder and take every
module for the residual stream (sparsify), or leave out norms and biases (dictionary_learning).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from stethoscope.artifacts import canonical_json, sha256_bytes, sha256_file
from stethoscope.saes.layouts.files import Shapes, State

# By SAELens' names. Both BatchTopK kinds load as the JumpReLU that they are once trained; `topk_transcoder`, which
# SAELens has no class for, loads as TopK.
ARCHITECTURES = (
    "standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk",
    "transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder", "topk_transcoder",
)  # fmt: skip
OUTPUT = "the module's output"  # every transcoder's metadata has a `hook_name_out`, by which it is known

Converted = tuple[dict[str, Any], State]  # SAELens' configuration and state dict


@dataclass(frozen=True, kw_only=True)
class SAEFolder:
    """One SAE on disk, unread.

    Attributes:
        path: its folder, or its file where one is a whole SAE.
        layout: how it is stored, a key of ``layouts.LAYOUTS``.
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


@dataclass(frozen=True)
class Stored:
    """What the files of one SAE hold; a layout adds to ``problems`` what it cannot use."""

    path: Path  # absolute
    weights: Path
    config: dict[str, Any]
    overrides: Mapping[str, Any]
    shapes: Shapes
    problems: list[str]

    def matrix(self, name: str) -> tuple[int, int]:
        """The two sizes of a matrix, for layouts whose configuration does not give them."""
        match self.shapes.get(name, ()):
            case (rows, columns):
                return rows, columns
        if self.shapes:
            self.problems.append(f"`{self.weights.name}` has no matrix `{name}`")
        return 1, 1  # the reason why there are none is a problem already, so these only need to pass as sizes


@dataclass(frozen=True)
class Claim:
    """What a layout finds, to be checked; ``wanted`` are the shapes of tensors that the sizes ask for."""

    hook_name: str
    architecture: str
    d_in: Any
    width: Any
    model_name: Any
    wanted: Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way of storing SAEs.

    Attributes:
        marker: the file that tells it from others; where one file is a whole SAE, how its name ends.
        config: the file of the configuration, if the layout has one.
        config_optional: whether an SAE may lack it.
        weights: the file of the weights; empty where one file is a whole SAE.
        read: finds what an SAE reads, without its weights.
        convert: SAE, configuration, tensors in float32 -> configuration and state dict for SAELens.
    """

    marker: str
    config: str | None = None
    config_optional: bool = False
    weights: str
    read: Callable[[Stored], Claim]
    convert: Callable[[SAEFolder, dict[str, Any], State], Converted]


def sae_lens_config(folder: SAEFolder, architecture: str, *, b_dec_to_input: bool, **extra: Any) -> dict[str, Any]:
    """SAELens' configuration of an SAE; ``extra`` are entries that only its architecture has."""
    import sae_lens

    about = {"sae_lens_version": sae_lens.__version__, "hook_name": folder.hook_name, "model_name": folder.model_name}
    if folder.transcoder:
        about["hook_name_out"] = OUTPUT
    sizes = {"d_in": folder.d_in, "d_sae": folder.width}
    return {"architecture": architecture, **sizes, "apply_b_dec_to_input": b_dec_to_input, "metadata": about, **extra}


def unit_decoder(state: State) -> State:
    """The same SAE with decoder rows of norm 1 and features as much larger."""
    norms = state["W_dec"].norm(dim=1).clamp(min=1e-8)
    larger = ("W_enc", "b_enc", "b_gate", "b_mag", "threshold")
    scaled = {name: value * norms if name in larger else value for name, value in state.items()}
    return {**scaled, "W_dec": state["W_dec"] / norms[:, None]}
