"""What layouts share: a layout reads what an SAE claims to be, which is checked, and makes its weights SAELens' own.

With s for the input, features are relu(z) where z = s W_enc + b_enc passes a threshold, is among the k largest, or
opens a gate. SAELens' own loaders ask the network for shapes (Gemma Scope 2), transpose the decoder and take every
module for the residual stream (sparsify), or leave out norms and biases (dictionary_learning).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.artifacts import canonical_json, sha256_bytes, sha256_file
from stethoscope.errors import SAEError
from stethoscope.models.sites import site_of

if TYPE_CHECKING:
    from torch import Tensor

# By SAELens' names. Both BatchTopK kinds load as the JumpReLU that they are once trained; `topk_transcoder`, which
# SAELens has no class for, loads as TopK.
ARCHITECTURES = (
    "standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk",
    "transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder", "topk_transcoder",
)  # fmt: skip
OUTPUT = "the module's output"  # every transcoder's metadata has a `hook_name_out`, by which it is known

State = dict[str, "Tensor"]
Converted = tuple[dict[str, Any], State]  # SAELens' configuration and state dict


@dataclass(frozen=True, kw_only=True)
class SAEFolder:
    """One SAE on disk, unread.

    Attributes:
        path: its folder, or its file where one is a whole SAE.
        layout: how it is stored, a key of ``layouts.LAYOUTS``.
        files: those of its files that hold configuration and weights.
        layer: the decoder block it reads, from 0.
        site: where in the block, one of ``sites.SITES``.
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
    layout: str = ""
    files: tuple[str, ...] = ()
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

    def hashed(self, hash_file: Callable[[Path], str] = sha256_file) -> str:
        """One hash of configuration and weights, from a hash of each whole file."""
        parts: list[Any] = [hash_file(self.path / name) for name in self.files]
        return sha256_bytes(canonical_json([*parts, dict(self.overrides)] if self.overrides else parts).encode())


@dataclass(frozen=True)
class Stored:
    """What the files of one SAE hold, for a layout to say what it is.

    Attributes:
        path: of the SAE, absolute.
        weights: the name of the file of its tensors.
        config: its configuration, as SAELens' directory corrects it.
        shapes: of its tensors by stored name; empty if they cannot be read.
        problems: all that is wrong with it; a layout adds what it cannot use.
    """

    path: Path
    weights: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    problems: list[str]

    def table(self, name: str) -> dict[str, Any]:
        """A table of the configuration, empty where there is none."""
        return value if isinstance(value := self.config.get(name), dict) else {}

    def matrix(self, name: str) -> tuple[int, int]:
        """The two sizes of a matrix, for layouts whose configuration does not give them."""
        match self.shapes.get(name, ()):
            case (rows, columns):
                return rows, columns
        if self.shapes:
            self.problems.append(f"`{self.weights}` has no matrix `{name}`")
        return 1, 1  # the reason why there are none is a problem already, so these only need to pass as sizes

    def folder(
        self,
        hook_name: str,
        architecture: str,
        sizes: Sequence[Any],
        tensors: Mapping[str, str],
        *,
        model_name: Any = None,
    ) -> SAEFolder:
        """The SAE that its files claim to be.

        Args:
            sizes: values per token that it reads, features, and values that it writes, if not as many as it reads.
            tensors: the stored names of tensors that it needs, by SAELens' names; one that lies the other way ends
                with ``.T``.

        Raises:
            SAEError: it is not sound or not supported, with every reason.
        """
        problems, (d_in, width, d_out) = [*self.problems], (*sizes, sizes[0])[:3]
        for size, value in (("d_in", d_in), ("d_sae", width)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                problems.append(f"`{size}` is `{value}`, not a positive whole number")
        if architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            problems.append(f"the architecture `{architecture}` is not supported; these are: {known}")
        try:
            layer, site, tap = site_of(hook_name)
        except SAEError as error:
            problems += error.problems if hook_name else ["it does not say which layer it reads"]
        shapes = {"W_enc": (d_in, width), "W_dec": (width, d_out), "b_dec": (d_out,)}
        for ours, stored in tensors.items() if self.shapes else ():
            shape = shapes.get(ours, (width,))
            stored, shape = (stored[:-2], shape[::-1]) if stored.endswith(".T") else (stored, shape)
            if (found := self.shapes.get(stored, "none")) != shape:
                problems.append(f"`{stored}` should have shape {shape}, the file has {found}")
        if problems:
            raise unusable(problems)
        return SAEFolder(
            path=self.path,
            layer=layer,
            site=site,
            tap=tap,
            width=width,
            d_in=d_in,
            architecture=architecture,
            hook_name=hook_name,
            model_name=str(model_name) if model_name else None,
        )


def unusable(problems: list[str]) -> SAEError:
    """An SAE that cannot be used, and every reason."""
    return SAEError("the SAE cannot be used", problems=problems)


def read_config(path: Path) -> dict[str, Any]:
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


def sae_lens_config(folder: SAEFolder, architecture: str, *, b_dec_to_input: bool, **extra: Any) -> dict[str, Any]:
    """SAELens' configuration of an SAE; ``extra`` are entries that only its architecture has."""
    import sae_lens

    about = {"sae_lens_version": sae_lens.__version__, "hook_name": folder.hook_name, "model_name": folder.model_name}
    if folder.transcoder:
        about["hook_name_out"] = OUTPUT
    sizes = {"d_in": folder.d_in, "d_sae": folder.width}
    return {"architecture": architecture, **sizes, "apply_b_dec_to_input": b_dec_to_input, "metadata": about, **extra}


def renamed(tensors: State, names: Mapping[str, str]) -> State:
    """Tensors by SAELens' names, as `Stored.folder` takes them."""
    return {
        ours: tensors[theirs.removesuffix(".T")].T.contiguous() if theirs.endswith(".T") else tensors[theirs]
        for ours, theirs in names.items()
    }


def unit_decoder(state: State) -> State:
    """The same SAE with decoder rows of norm 1 and features as much larger."""
    norms = state["W_dec"].norm(dim=1).clamp(min=1e-8)
    larger = ("W_enc", "b_enc", "b_gate", "b_mag", "threshold")
    scaled = {name: value * norms if name in larger else value for name, value in state.items()}
    return {**scaled, "W_dec": state["W_dec"] / norms[:, None]}
