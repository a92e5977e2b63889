"""How published SAEs are stored: a file per layout, which says what an SAE reads and converts its weights.

sae = read_folder(Path("resid_post_all/layer_12_width_16k_l0_small"))   # SAEFolder(layer=12, site="resid_post", ...)
config, state = convert(sae)                                            # SAELens' configuration and state dict

What a layout reads is a claim, which `read_folder` checks.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stethoscope.errors import SAEError
from stethoscope.saes.layouts import (
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    qwen_scope,
    sae_lens,
    sparsify,
)
from stethoscope.saes.layouts.base import ARCHITECTURES, Claim, Converted, Layout, SAEFolder, Stored
from stethoscope.saes.layouts.files import Shapes, read_json, read_shapes, read_tensors, unusable
from stethoscope.saes.layouts.hook_names import site_of

# In the order of looking: sparsify's folders hold a `cfg.json` too.
LAYOUTS = {
    "sparsify": sparsify.LAYOUT,
    "gemma_scope_2": gemma_scope_2.LAYOUT,
    "gemma_scope": gemma_scope.LAYOUT,
    "dictionary_learning": dictionary_learning.LAYOUT,
    "llama_scope": llama_scope.LAYOUT,
    "qwen_scope": qwen_scope.LAYOUT,
    "sae_lens": sae_lens.LAYOUT,
}


def layout_of(path: Path) -> str | None:
    """The layout of a folder by the files in it, or of a file that is an SAE itself; None if there is no SAE."""
    if path.name.endswith(qwen_scope.LAYOUT.marker) and path.is_file():
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
    layout, overrides, shapes = LAYOUTS[name], dict(overrides or {}), Shapes()
    config, weights = _config(layout, path), path / layout.weights
    problems: list[str] = []
    unread: tuple[str, ...] = ()
    try:
        shapes = read_shapes(weights)
    except SAEError as error:
        unread = error.problems
    claim = layout.read(Stored(path.absolute(), weights, config, overrides, shapes, problems))
    problems += [*unread, *_mistakes(claim, shapes)]
    if problems:
        raise unusable(problems)
    layer, site, tap = site_of(claim.hook_name)
    files = [file for file in (layout.config, layout.weights) if file is not None and (path / file).is_file()]
    return SAEFolder(
        path=path,
        layout=name,
        files=tuple(files),
        layer=layer,
        site=site,
        tap=tap,
        width=claim.width,
        d_in=claim.d_in,
        architecture=claim.architecture,
        hook_name=claim.hook_name,
        model_name=str(claim.model_name) if claim.model_name else None,
        overrides=overrides,
    )


def convert(folder: SAEFolder) -> Converted:
    """SAELens' configuration and state dict of an SAE, in float32.

    Raises:
        OSError, RuntimeError, ValueError, KeyError, TypeError: its files are not what its layout asks for.
    """
    layout = LAYOUTS[folder.layout]
    config = _config(layout, folder.path)
    return layout.convert(folder, config, read_tensors(folder.path / layout.weights))


def _config(layout: Layout, path: Path) -> dict[str, Any]:
    if layout.config is None or (layout.config_optional and not (path / layout.config).is_file()):
        return {}
    return read_json(path / layout.config)


def _mistakes(claim: Claim, shapes: Shapes) -> list[str]:
    """What is wrong with a claim, by itself and by the tensors' shapes."""
    problems = [
        f"`{size}` is `{value}`, not a positive whole number"
        for size, value in (("d_in", claim.d_in), ("d_sae", claim.width))
        if not isinstance(value, int) or isinstance(value, bool) or value < 1
    ]
    if claim.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        problems.append(f"the architecture `{claim.architecture}` is not supported; these are: {known}")
    try:
        site_of(claim.hook_name)
    except SAEError as error:
        problems += error.problems if claim.hook_name else ["it does not say which layer it reads"]
    return problems + [
        f"`{tensor}` should have shape {shape}, the file has {shapes.get(tensor, 'none')}"
        for tensor, shape in claim.wanted.items()
        if shapes and shapes.get(tensor) != shape
    ]
