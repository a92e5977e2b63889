"""Which SAEs there are and whether they fit the model, from configurations and headers alone: instant, without torch.

saes = open_saes("saes/")                       # {layer: SAEFolder}
check_fit(saes, hidden_size=576, num_layers=30)
sae = load_sae(saes[12])                        # a sae_lens SAE
"""

import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.artifacts import canonical_json, sha256_bytes, sha256_file
from stethoscope.checkpoints.header import read_header
from stethoscope.errors import CheckpointError, SAEError

if TYPE_CHECKING:
    import torch
    from sae_lens import SAE

log = logging.getLogger(__name__)

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ARCHITECTURES = ("standard", "gated", "jumprelu", "topk")
SITES = ("resid_post", "mlp_out", "attn_out")

_TRANSFORMER_LENS = re.compile(r"blocks\.(\d+)\.hook_(\w+)")
_TRANSFORMERS = re.compile(r"(?:[\w.]+\.)?(?:layers|h)\.(\d+)(?:\.(\w+))?(?:\.output)?")
_SITE_OF_MODULE = {
    None: "resid_post",
    "output": "resid_post",
    "mlp": "mlp_out",
    "post_feedforward_layernorm": "mlp_out",
    "self_attn": "attn_out",
    "attn": "attn_out",
}


@dataclass(frozen=True, kw_only=True)
class SAEFolder:
    """One SAE on disk in SAELens 6's layout, unread.

    Attributes:
        path: the folder of ``cfg.json`` and ``sae_weights.safetensors``.
        layer: the decoder block it reads, from 0.
        site: where in the block: ``resid_post``, ``mlp_out`` or ``attn_out``.
        width: number of features.
        d_in: values per token that it reads.
        architecture: SAELens' name for it.
        hook_name: the site as the SAE's own configuration names it.
        model_name: the model it was trained on, where it says.
    """

    path: Path
    layer: int
    site: str
    width: int
    d_in: int
    architecture: str
    hook_name: str
    model_name: str | None

    @cached_property
    def sha256(self) -> str:
        """One hash of the configuration and the weights; reads the whole file."""
        parts = [sha256_file(self.path / CONFIG), sha256_file(self.path / WEIGHTS)]
        return sha256_bytes(canonical_json(parts).encode())


def open_saes(source: str | Path | Mapping[int, str | Path], sae_id: str | None = None) -> dict[int, SAEFolder]:
    """Find SAEs and read their configurations and headers.

    Args:
        source: a folder that is an SAE or holds folders of SAEs; or the SAE's folder for each layer.
        sae_id: picks among a folder's SAEs: their path below it, with ``{layer}`` for the number.

    Returns:
        The SAEs by layer, in order of depth.

    Raises:
        SAEError: nothing found, or anything unreadable, malformed, of an architecture or site that is not supported,
            or two SAEs for one layer; all of it at once.
    """
    folders = list(_mapped(source) if isinstance(source, Mapping) else _found(Path(source), sae_id))
    saes: dict[int, SAEFolder] = {}
    problems: list[str] = []
    for wanted, folder in folders:
        try:
            sae = _read(folder)
        except SAEError as error:
            problems += [f"{problem}, from `{folder}`" for problem in error.problems]
            continue
        if wanted is not None and wanted != sae.layer:
            problems.append(f"layer {wanted}: the SAE reads layer {sae.layer} (`{sae.hook_name}`), from `{folder}`")
        elif sae.layer in saes:
            problems.append(f"layer {sae.layer}: both `{saes[sae.layer].path}` and `{folder}`")
        else:
            saes[sae.layer] = sae
    if problems:
        raise SAEError(
            "some SAEs cannot be used",
            problems=problems,
            hint="one folder per layer in SAELens' layout is expected; `sae_id` picks among several",
        )
    return dict(sorted(saes.items()))


def check_fit(
    saes: Mapping[int, SAEFolder],
    *,
    hidden_size: int,
    num_layers: int,
    model_name: str | None = None,
    sites: Collection[str] = ("resid_post",),
) -> None:
    """Refuse SAEs that cannot have been made for the model.

    A different model name is only logged: a checkpoint's folder may be called anything.

    Args:
        saes: what `open_saes` found.
        hidden_size: values per token in the model's residual stream.
        num_layers: the model's decoder blocks.
        model_name: a hub id or folder.
        sites: those that can be listened to.

    Raises:
        SAEError: any has another width, layer or site; all of them at once.
    """
    problems = []
    for sae in saes.values():
        where = f"from `{sae.path / CONFIG}`"
        if sae.d_in != hidden_size:
            problems.append(
                f"layer {sae.layer}: the SAE reads {sae.d_in} values, the model's hidden size is {hidden_size}, {where}"
            )
        if not 0 <= sae.layer < num_layers:
            problems.append(
                f"layer {sae.layer}: the model has {num_layers} layers, 0 to {num_layers - 1}"
                f" (`{sae.hook_name}`), {where}"
            )
        if sae.site not in sites:
            problems.append(f"layer {sae.layer}: the site `{sae.site}` is not one of {', '.join(sites)}, {where}")
    if problems:
        made_for = sorted({sae.model_name for sae in saes.values() if sae.model_name})
        hint = (
            f"these SAEs were made for {', '.join(f'`{name}`' for name in made_for)}"
            if made_for
            else ("these SAEs look made for another model")
        )
        raise SAEError("the SAEs do not fit the base model", problems=problems, hint=f"{hint}; choose others in `saes`")
    if model_name is not None:
        for name in sorted({sae.model_name for sae in saes.values() if sae.model_name}):
            if Path(name).name.lower() != Path(model_name).name.lower():
                log.warning("the SAEs were made for `%s`, the base model is `%s`", name, model_name)


def load_sae(folder: SAEFolder, dtype: "torch.dtype | None" = None) -> "SAE[Any]":
    """Load one SAE with SAELens, for inference.

    Args:
        folder: from `open_saes`.
        dtype: of the weights; float32 if None, whatever they are stored in.

    Raises:
        SAEError: SAELens cannot load it.
    """
    import torch
    from sae_lens import SAE

    name = str(dtype or torch.float32).removeprefix("torch.")
    try:
        sae: SAE[Any] = SAE.load_from_disk(folder.path, dtype=name)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise SAEError(f"the SAE `{folder.path}` cannot be loaded: {error}") from error
    return sae.requires_grad_(False).eval()


def site_of(hook_name: str) -> tuple[int, str]:
    """Layer and site of a hook name, in TransformerLens' style or as a module of a Transformers model.

    >>> site_of("blocks.12.hook_resid_post"), site_of("model.layers.12"), site_of("model.layers.3.mlp")
    ((12, 'resid_post'), (12, 'resid_post'), (3, 'mlp_out'))

    Raises:
        SAEError: it names no site that is known.
    """
    if match := _TRANSFORMER_LENS.fullmatch(hook_name):
        layer, site = int(match[1]), match[2]
    elif match := _TRANSFORMERS.fullmatch(hook_name):
        layer, site = int(match[1]), _SITE_OF_MODULE.get(match[2], "unknown")
    else:
        layer, site = -1, "unknown"
    if site not in SITES:
        raise SAEError(
            "unknown site", problems=[f"the hook `{hook_name}` is none of {', '.join(SITES)} as far as is known"]
        )
    return layer, site


def _mapped(source: Mapping[int, str | Path]) -> Iterator[tuple[int | None, Path]]:
    if not source:
        raise SAEError("no SAEs were given")
    for layer, path in source.items():
        yield int(layer), Path(path)


def _found(folder: Path, sae_id: str | None) -> list[tuple[int | None, Path]]:
    if not folder.is_dir():
        raise SAEError(f"there is no folder `{folder}` of SAEs", hint="give the path of a local folder as `saes`")
    if sae_id is None:
        found: list[tuple[int | None, Path]] = [(None, config.parent) for config in sorted(folder.glob(f"*/{CONFIG}"))]
        if (folder / CONFIG).is_file():
            found.append((None, folder))
        if not found:
            raise SAEError(f"no SAEs in `{folder}`", hint=f"a folder with `{CONFIG}` for each layer is expected")
        return found
    if "{layer}" not in sae_id or ".." in Path(sae_id).parts or Path(sae_id).is_absolute():
        raise SAEError(
            f"`{sae_id}` is no pattern of SAEs", hint="write a path below the folder, such as `layer_{layer}`"
        )
    pattern = re.compile(
        re.escape(sae_id).replace(re.escape("{layer}"), r"(\d+)", 1).replace(re.escape("{layer}"), r"\1")
    )
    names = sorted(
        (p.relative_to(folder).as_posix(), p) for p in folder.glob(sae_id.replace("{layer}", "*")) if p.is_dir()
    )
    matched: list[tuple[int | None, Path]] = [
        (int(match[1]), path) for name, path in names if (match := pattern.fullmatch(name))
    ]
    if not matched:
        have = ", ".join(sorted(path.name for path in folder.iterdir())[:6])
        raise SAEError(f"nothing in `{folder}` is called `{sae_id}`", hint=f"it has: {have}" if have else None)
    return matched


def _read(folder: Path) -> SAEFolder:
    """One SAE's configuration and header; every problem with it in one error."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise _unusable([f"`{CONFIG}` {reason}"]) from error
    problems: list[str] = []
    metadata = config.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    hook_name = metadata.get("hook_name") or config.get("hook_name") or ""
    sizes = {name: config.get(name) for name in ("d_in", "d_sae")}
    problems += [
        f"`{name}` is `{value}`, not a positive whole number"
        for name, value in sizes.items()
        if not isinstance(value, int) or isinstance(value, bool) or value < 1
    ]
    architecture = config.get("architecture", "standard")
    if architecture not in ARCHITECTURES:
        problems.append(f"the architecture `{architecture}` is not supported; these are: {', '.join(ARCHITECTURES)}")
    layer, site = -1, ""
    try:
        layer, site = site_of(str(hook_name))
    except SAEError as error:
        problems += error.problems if hook_name else ["it names no hook, so its layer is unknown"]
    try:
        shapes = {name: slot.shape for name, slot in read_header(folder / WEIGHTS).items()}
    except CheckpointError as error:
        problems += error.problems or [f"`{WEIGHTS}`: {error.message}"]
    else:
        for name, shape in {"W_enc": ("d_in", "d_sae"), "W_dec": ("d_sae", "d_in"), "b_dec": ("d_in",)}.items():
            wanted = tuple(sizes[size] for size in shape)
            if shapes.get(name) != wanted:
                problems.append(f"`{name}` should have shape {wanted}, the file has {shapes.get(name, 'none')}")
    if problems:
        raise _unusable(problems)
    return SAEFolder(
        path=folder,
        layer=layer,
        site=site,
        width=int(config["d_sae"]),
        d_in=int(config["d_in"]),
        architecture=architecture,
        hook_name=hook_name,
        model_name=metadata.get("model_name") or config.get("model_name") or None,
    )


def _unusable(problems: list[str]) -> SAEError:
    return SAEError("the SAE cannot be used", problems=problems)
