"""Find SAEs and check that they fit the model, from configurations and headers alone, without torch; then load them.

saes = open_saes("saes/")                                                   # {layer: SAEFolder}
saes = open_saes("gemma-scope-2-4b-it-res-all", "layer_{layer}_width_16k_l0_small")
check_fit(saes, open_checkpoint("google/gemma-3-4b-it"))
sae = load_sae(saes[12])                                                    # a sae_lens SAE
"""

import logging
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.checkpoints.checkpoint import Checkpoint
from stethoscope.checkpoints.files import inside, read_json_object
from stethoscope.checkpoints.header import read_header
from stethoscope.errors import CheckpointError, SAEError
from stethoscope.models.sites import site_of
from stethoscope.saes.folder import SAEFolder, Stored
from stethoscope.saes.layouts import LAYOUTS, ONE_FILE, renamed, sae_lens_config
from stethoscope.saes.releases import fetch, find_on_hub, id_pattern, quoted, release_texts

if TYPE_CHECKING:
    import torch
    from sae_lens import SAE

__all__ = ["SAEFolder", "check_fit", "load_directions", "load_sae", "open_saes", "read_folder"]

log = logging.getLogger(__name__)

# By SAELens' names. Both BatchTopK kinds load as the JumpReLU that they are once trained; `topk_transcoder`, which
# SAELens has no class for, loads as TopK.
ARCHITECTURES = (
    "standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk",
    "transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder", "topk_transcoder",
)  # fmt: skip
# The layer, where it was said; the SAE's path; and what SAELens' directory corrects in its configuration.
Found = list[tuple[int | None, Path, Mapping[str, Any]]]
_DEPTH = 4  # folders below a folder of SAEs: Gemma Scope 1 has three


def open_saes(source: str | Path, sae_id: str | None = None, *, local: bool = False) -> dict[int, SAEFolder]:
    """Find SAEs and read their configurations and headers.

    Args:
        source: a folder that is an SAE or holds folders of SAEs; the name of a SAELens release; or a hub repository,
            ``owner/name``. Releases and repositories are taken from the hub library's cache, or fetched.
        sae_id: picks among several: their path below the folder or repository, or their id in the release, with
            ``{layer}`` for the number and ``*`` for anything within one name.
        local: of a release or a hub repository check only the names, and find no SAEs.

    Returns:
        The SAEs by layer, in order of depth.

    Raises:
        SAEError: nothing found, or anything unreadable, malformed, of a layout, architecture or site that is not
            supported, or two SAEs for one layer; all of it at once.
    """
    if Path(source).is_dir():
        found = _in_folder(Path(source), sae_id)
    else:
        repository, wanted = find_on_hub(str(source), sae_id)
        if local:
            return {}
        root = fetch(repository, list(wanted))
        found = [(None, root / path, corrections) for path, corrections in wanted.items()]
        if str(source) not in release_texts():
            found = _in_folder(root, sae_id)
    saes: dict[int, list[SAEFolder]] = {}
    problems: list[str] = []
    for layer, path, overrides in found:
        try:
            sae = read_folder(path, overrides)
        except SAEError as error:
            problems += [f"{problem}, from `{path}`" for problem in error.problems]
            continue
        if layer not in (None, sae.layer):
            problems.append(f"layer {layer}: the SAE reads layer {sae.layer} (`{sae.hook_name}`), from `{path}`")
        saes.setdefault(sae.layer, []).append(sae)
    problems += [
        f"layer {layer}: one SAE is wanted, there are {quoted([str(sae.path) for sae in several], 3)}"
        for layer, several in sorted(saes.items())
        if len(several) > 1
    ]
    if problems:
        hint = f"`sae_id` picks among several; the layouts {', '.join(LAYOUTS)} are understood"
        raise SAEError("some SAEs cannot be used", problems=problems, hint=hint)
    return {layer: several[0] for layer, several in sorted(saes.items())}


def check_fit(saes: Mapping[int, SAEFolder], base: Checkpoint) -> None:
    """Refuse SAEs that cannot have been made for the model; another name is only logged, as any folder may have any.

    Raises:
        SAEError: any has another width or layer, or they read several sites; all of it at once.
    """
    problems = []
    heads = base.entries.get("layers.0.self_attn.o_proj.weight")
    for sae in saes.values():
        wrong, width, what = [], base.hidden_size, "the model's hidden size"
        if sae.site == "attn_z":
            width, what = heads.columns if heads else sae.d_in, "the model's width of all heads"
        if sae.d_in != width:
            wrong.append(f"the SAE reads {sae.d_in} values, {what} is {width}")
        if not 0 <= sae.layer < base.layers:
            wrong.append(f"the model has {base.layers} layers, 0 to {base.layers - 1} (`{sae.hook_name}`)")
        problems += [f"layer {sae.layer}: {one}, from `{sae.path}`" for one in wrong]
    places = sorted({sae.site for sae in saes.values()})
    if len(places) == 1:
        places = sorted({sae.tap for sae in saes.values() if sae.tap})
    if len(places) > 1:
        problems.append(f"the SAEs read {quoted(places)}: layers would not be comparable")
    names = sorted({sae.model_name for sae in saes.values() if sae.model_name})
    if problems:
        made_for = f"were made for {quoted(names)}" if names else "look made for another model"
        hint = f"these SAEs {made_for}; choose others in `saes`"
        raise SAEError("the SAEs do not fit the base model", problems=problems, hint=hint)
    for name in names:
        if Path(name).name.lower() != Path(base.source).name.lower():
            log.warning("the SAEs were made for `%s`, the base model is `%s`", name, base.source)


def read_folder(path: Path, overrides: Mapping[str, Any] | None = None) -> SAEFolder:
    """What the SAE of a folder is and reads.

    Args:
        path: a folder with the files of one layout, or the one file of an SAE that needs no more.
        overrides: entries that replace the configuration's own.

    Raises:
        SAEError: it is not readable, sound and supported; everything that is wrong with it is in ``problems``.
    """
    unusable, name = "the SAE cannot be used", _layout_of(path)
    if name is None:
        markers = ", ".join(f"`{layout.marker}`" for layout in LAYOUTS.values())
        reason = f"it holds none of {markers}" if path.is_dir() else "there is no such folder"
        raise SAEError(unusable, problems=[reason])
    layout, overrides = LAYOUTS[name], dict(overrides or {})
    files = layout.files
    if layout.config_optional and not (path / files[0]).is_file():
        files = files[1:]
    if out := [path / name for name in files if not inside(path if path.is_dir() else path.parent, path / name)]:
        raise SAEError(unusable, problems=[f"`{one.name}` is a link out of its folder" for one in out])
    try:
        shapes, problems = _read_shapes(path / files[-1])
        stored = Stored(
            where=path.absolute(), config={**_config(path, files), **overrides}, shapes=shapes, problems=problems
        )
        claim = layout.read(stored)
    except CheckpointError as error:
        raise SAEError(unusable, problems=[error.message]) from error
    d_in, width, d_out = (*claim.sizes, claim.sizes[0])[:3]
    for size, value in (("d_in", d_in), ("d_sae", width)):
        if type(value) is not int or value < 1:
            problems.append(f"`{size}` is `{str(value)[:60]}`, not a positive whole number")
    if "k" in claim.options and not _is_k(claim.options["k"], width):
        problems.append(f"`k` is `{str(claim.options['k'])[:60]}`, not a whole number from 1 to {width}")
    if claim.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        problems.append(f"the architecture `{claim.architecture}` is not supported; these are: {known}")
    wanted = {"W_enc": (d_in, width), "W_dec": (width, d_out), "b_dec": (d_out,), "W_skip": (d_out, d_in)}
    for ours, its in claim.tensors.items() if shapes else ():
        shape = wanted.get(ours, (width,))[:: -1 if its.endswith(".T") else 1]
        if (found := shapes.get(its.removesuffix(".T"), "none")) != shape:
            problems.append(f"`{its.removesuffix('.T')}` should have shape {shape}, the file has {found}")
    try:
        layer, site, tap = site_of(claim.hook_name)
    except SAEError as error:
        problems += error.problems if claim.hook_name else ["it does not say which layer it reads"]
    if problems:
        raise SAEError(unusable, problems=problems)
    return SAEFolder(
        path=path,
        layout=name,
        files=files,
        layer=layer,
        site=site,
        tap=tap,
        width=width,
        d_in=d_in,
        architecture=claim.architecture,
        hook_name=claim.hook_name,
        model_name=str(claim.model_name) if claim.model_name else None,
        tensors=claim.tensors,
        options=claim.options,
        overrides=overrides,
    )


def load_sae(folder: SAEFolder, dtype: "torch.dtype | None" = None) -> "SAE[Any]":
    """Load one SAE as SAELens' own class, for inference on the CPU.

    It takes activations at the folder's site and tap: ``[..., d_in]``, heads side by side. A transcoder's
    ``decode`` gives the output of its module (a linear skip left out), not its input.

    Args:
        folder: from `open_saes`.
        dtype: of the weights; float32 if None, whatever they are stored in.

    Raises:
        SAEError: it cannot be loaded.
    """
    import torch
    from sae_lens import SAE

    settings = {"dtype": str(dtype or torch.float32).removeprefix("torch."), "device": "cpu"}
    convert = LAYOUTS[folder.layout].convert
    with _loading(folder):
        tensors = {
            name: value.float() if value.is_floating_point() else value
            for name, value in _read_tensors(folder.path / folder.files[-1]).items()
        }
        config, state = sae_lens_config(folder), tensors
        if convert is None:
            state = renamed(tensors, folder.tensors)
        else:
            config, state = convert(folder, {**_config(folder.path, folder.files), **folder.overrides}, tensors)
        sae: SAE[Any] = SAE.load_from_disk(
            folder.path, converter=lambda *_args, **_options: ({**config, **settings}, state)
        )
        sae.requires_grad_(False).eval()
        _check_sound(sae, folder)
    return sae


def load_directions(sae: "SAE[Any] | SAEFolder", features: Sequence[int]) -> "tuple[torch.Tensor, str | None]":
    """Some features' decoder directions, ``[features, d_out]``, and the name of the SAE's pages at Neuronpedia, if any.

    Of an SAE that is stored as SAELens has it, only these rows are read; others are loaded.

    Raises:
        SAEError: it cannot be loaded.
    """
    name = None
    if isinstance(sae, SAEFolder):
        from safetensors import safe_open

        name, weights, stored = sae.overrides.get("neuronpedia_id"), sae.path / sae.files[-1], sae.tensors["W_dec"]
        as_it_is = LAYOUTS[sae.layout].convert is None and not stored.endswith(".T")
        if as_it_is and weights.suffix == ".safetensors":
            import torch

            with _loading(sae), safe_open(weights, "pt") as file:
                rows = file.get_slice(stored)
                return torch.cat([rows[:0], *(rows[n : n + 1] for n in features)]).float(), name
        sae = load_sae(sae)
    return sae.W_dec.detach()[list(features)], name or sae.cfg.metadata.neuronpedia_id


@contextmanager
def _loading(folder: SAEFolder) -> Iterator[None]:
    """Say which SAE cannot be loaded, and why: a damaged file makes the readers of its format raise almost anything."""
    try:
        yield
    except Exception as error:
        file = folder.path / folder.files[-1]
        raise SAEError(
            f"the SAE of layer {folder.layer} cannot be loaded: {_said(error)}",
            problems=[f"from `{file}`"],
            hint="fetch or train it again",
        ) from error


def _in_folder(folder: Path, sae_id: str | None) -> Found:
    """The SAE that a folder is, or those below it, of which a pattern picks some by their paths."""
    if sae_id is not None:
        found: Found = []
        pattern = id_pattern(sae_id)
        for path in sorted(folder.glob(sae_id.replace("{layer}", "*"))):
            match = pattern.fullmatch(path.relative_to(folder).as_posix())
            if match and (path.is_dir() or path.name.endswith(ONE_FILE)):
                found.append((int(match[1]), path, {}))
        if not found:
            have = ", ".join(sorted(path.name for path in folder.iterdir())[:6])
            raise SAEError(f"nothing in `{folder}` is called `{sae_id}`", hint=f"it has: {have}" if have else None)
        return found
    if _layout_of(folder):
        return [(None, folder, {})]
    markers = {layout.marker for layout in LAYOUTS.values()} - {ONE_FILE}
    below = (path for depth in range(1, _DEPTH + 1) for path in folder.glob("*/" * depth + "*"))
    paths = {path.parent for path in below if path.name in markers} | {*folder.glob(f"*{ONE_FILE}")}
    if not paths:
        files = quoted(sorted(markers))
        hint = f"a folder for each layer is expected, with one of {files}, or files `layer*{ONE_FILE}`"
        raise SAEError(f"no SAEs in `{folder}`", hint=hint)
    return [(None, path, {}) for path in sorted(paths)]


def _check_sound(sae: "SAE[Any]", folder: SAEFolder) -> None:
    """Raise ValueError for what would fail, or spoil every number, only once the SAE is used."""
    import torch

    # smallest and largest are found many times as fast as each value is looked at, and NaN is both
    ends = {name: torch.stack(value.aminmax()) for name, value in sae.state_dict().items()}
    if bad := [f"`{name}`" for name, both in ends.items() if not bool(both.isfinite().all())]:
        raise ValueError(f"NaN or infinity in {', '.join(bad)}")
    if not _is_k(getattr(sae.cfg, "k", 1), folder.width):
        raise ValueError(f"`k` is `{sae.cfg.k}`, not a whole number from 1 to {folder.width}")
    if not bool(sae.encode(sae.b_dec.new_ones(1, folder.d_in)).isfinite().all()):
        raise ValueError("its configuration makes NaN or infinity of a plain input")


def _is_k(k: Any, width: Any) -> bool:
    return type(k) is int and type(width) is int and 1 <= k <= width


def _said(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__


def _layout_of(path: Path) -> str | None:
    """The layout of a folder by the files in it, or of a file that is an SAE itself; None if there is no SAE."""
    if path.name.endswith(ONE_FILE) and path.is_file():
        return "qwen_scope"
    return next((name for name, layout in LAYOUTS.items() if (path / layout.marker).is_file()), None)


def _config(path: Path, files: tuple[str, ...]) -> dict[str, Any]:
    """The configuration of an SAE by the names of its files; empty where it has only weights."""
    return read_json_object(path / files[0], hint="fetch the SAE again") if len(files) == 2 else {}


def _read_shapes(path: Path) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Shapes of the tensors of a `.safetensors`, `.npz` or `.pt` file, from its headers, and what is wrong with it."""
    try:
        if path.suffix == ".safetensors":
            shapes = {name: entry.shape for name, entry in read_header(path).items()}
        elif path.suffix == ".npz":
            shapes = _npz_shapes(path)
        else:
            import torch  # alone reads this format's headers

            tensors = dict(torch.load(path, map_location="meta", weights_only=True))
            shapes = {str(name): tuple(value.shape) for name, value in tensors.items() if hasattr(value, "shape")}
    except CheckpointError as error:
        return {}, list(error.problems) or [f"`{path.name}`: {error.message}"]
    except OSError as error:
        return {}, [f"`{path.name}` cannot be read: {error}"]
    except Exception as error:  # as in `_loading`
        log.debug("`%s`", path, exc_info=True)
        return {}, [f"`{path.name}` is damaged, or holds more than tensors: {_said(error)}"]
    return shapes, [] if shapes else [f"`{path.name}` holds no tensors"]


def _npz_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays in an archive of NumPy's, of which no more is unpacked than their headers."""
    from numpy.lib import format as npy

    shapes = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            with archive.open(info) as member:
                reader = npy.read_array_header_1_0 if npy.read_magic(member) == (1, 0) else npy.read_array_header_2_0
                shape, _, dtype = reader(member)
                if math.prod(shape) * dtype.itemsize != info.file_size - member.tell():
                    raise ValueError(f"`{info.filename}` is {dtype} {shape}, its bytes are not as many")
            shapes[info.filename.removesuffix(".npy")] = shape
    return shapes


def _read_tensors(path: Path) -> "dict[str, torch.Tensor]":
    """The tensors of such a file."""
    import torch

    if path.suffix == ".npz":
        import numpy as np

        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays}
    if path.suffix == ".pt":
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    from safetensors.torch import load_file

    return load_file(path)
