"""Find SAEs and check that they fit the model, from configurations and headers alone, without torch; then load them.

saes = open_saes("saes/")                                                   # {layer: SAEFolder}
saes = open_saes("gemma-scope-2-4b-it-res-all", "layer_{layer}_width_16k_l0_small")
check_fit(saes, hidden_size=2560, num_layers=34)
sae = load_sae(saes[12])                                                    # a sae_lens SAE
"""

import importlib.util
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from stethoscope.checkpoints.hub import HUB_ID, hub_errors
from stethoscope.display import first_of
from stethoscope.errors import CheckpointError, SAEError
from stethoscope.models.sites import SITES
from stethoscope.saes.layouts import LAYOUTS, convert, layout_of, read_folder
from stethoscope.saes.layouts.base import SAEFolder

if TYPE_CHECKING:
    import torch
    from sae_lens import SAE

__all__ = ["SITES", "SAEFolder", "check_fit", "load_sae", "open_saes"]

log = logging.getLogger(__name__)

# The layer, where it was said; the SAE's path; and what SAELens' directory corrects in its configuration.
Found = list[tuple[int | None, Path, Mapping[str, Any]]]

# SAELens' names in its directory of releases for the layouts that are read here; None is its own.
_RELEASE_LAYOUTS = (
    None, "sae_lens", "gemma_3", "gemma_2", "llama_scope", "dictionary_learning_1", "sparsify", "qwen_scope",
)  # fmt: skip
# What it knows of a single SAE that the SAE's own configuration may lack.
_CORRECTIONS = {"norm_scaling_factor": "norm_scaling_factor", "neuronpedia": "neuronpedia_id"}
# The layer in the id of a release's SAE.
_LAYER_IN_ID = re.compile(r"(?<=layer_)\d+|(?<=layers\.)\d+|(?<=blocks\.)\d+|(?<=layer)\d+|(?<=^l)\d+")
ONE_FILE = LAYOUTS["qwen_scope"].marker  # what the name of an SAE in a single file ends with
_DEPTH = 4  # folders below a folder of SAEs: Gemma Scope 1 has three


def open_saes(source: str | Path | Mapping[int, str | Path], sae_id: str | None = None) -> dict[int, SAEFolder]:
    """Find SAEs and read their configurations and headers.

    Args:
        source: a folder that is an SAE or holds folders of SAEs; the SAE's folder for each layer; the name of a
            SAELens release; or a hub repository, ``owner/name``. Releases and repositories are taken from the hub
            library's cache, or fetched.
        sae_id: picks among several: their path below the folder or repository, or their id in the release, with
            ``{layer}`` for the number and ``*`` for anything within one name.

    Returns:
        The SAEs by layer, in order of depth.

    Raises:
        SAEError: nothing found, or anything unreadable, malformed, of a layout, architecture or site that is not
            supported, or two SAEs for one layer; all of it at once.
    """
    found: Found
    if isinstance(source, Mapping):
        found = [(int(layer), Path(path), {}) for layer, path in source.items()]
        if not found:
            raise SAEError("no SAEs were given")
    elif Path(source).is_dir():
        found = _in_folder(Path(source), sae_id)
    else:
        repository, wanted = _on_hub(str(source), sae_id)
        root = _snapshot(repository, [path.replace("{layer}", "*") for path in wanted])
        found = [(None, root / path, known) for path, known in wanted.items()]
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
        f"layer {layer}: one SAE is wanted, there are {_quoted([str(sae.path) for sae in several], 3)}"
        for layer, several in sorted(saes.items())
        if len(several) > 1
    ]
    if problems:
        hint = f"`sae_id` picks among several; the layouts {', '.join(LAYOUTS)} are understood"
        raise SAEError("some SAEs cannot be used", problems=problems, hint=hint)
    return {layer: several[0] for layer, several in sorted(saes.items())}


def check_source(source: str, sae_id: str | None = None) -> dict[int, SAEFolder]:
    """Open the SAEs of a folder; of a release or a hub repository check only its name and ``sae_id``.

    Returns:
        the SAEs of a folder by layer, else none.

    Raises:
        SAEError: as from `open_saes`, but for what only the hub can tell.
    """
    if Path(source).is_dir():
        return open_saes(source, sae_id)
    _on_hub(source, sae_id)
    return {}


def check_fit(
    saes: Mapping[int, SAEFolder],
    *,
    hidden_size: int,
    num_layers: int,
    model_name: str | None = None,
    sites: Collection[str] = ("resid_post",),
    attn_width: int | None = None,
) -> None:
    """Refuse SAEs that cannot have been made for the model.

    A different model name is only logged: a checkpoint's folder may be called anything.

    Args:
        saes: what `open_saes` found.
        hidden_size: values per token in the model's residual stream, and in what attention and MLP add to it.
        num_layers: the model's decoder blocks.
        model_name: a hub id or folder.
        sites: those that can be listened to.
        attn_width: values per token of the site ``attn_z``, heads times their width: the columns of ``o_proj``. Not
            checked if None.

    Raises:
        SAEError: any has another width, layer or site; all of them at once.
    """
    problems = []
    for sae in saes.values():
        wrong, width, what = [], hidden_size, "the model's hidden size"
        if sae.site == "attn_z":
            width, what = attn_width or sae.d_in, "the model's width of all heads"
        if sae.d_in != width:
            wrong.append(f"the SAE reads {sae.d_in} values, {what} is {width}")
        if not 0 <= sae.layer < num_layers:
            wrong.append(f"the model has {num_layers} layers, 0 to {num_layers - 1} (`{sae.hook_name}`)")
        if sae.site not in sites:
            wrong.append(f"the site `{sae.site}` is not one of {', '.join(sites)}")
        problems += [f"layer {sae.layer}: {one}, from `{sae.path}`" for one in wrong]
    if len(places := sorted({sae.site for sae in saes.values()} & set(sites))) > 1:
        problems.append(f"the SAEs read {_quoted(places)}: layers would not be comparable")
    names = sorted({sae.model_name for sae in saes.values() if sae.model_name})
    if problems:
        made_for = f"were made for {_quoted(names)}" if names else "look made for another model"
        hint = f"these SAEs {made_for}; choose others in `saes`"
        raise SAEError("the SAEs do not fit the base model", problems=problems, hint=hint)
    for name in names if model_name is not None else ():
        if Path(name).name.lower() != Path(str(model_name)).name.lower():
            log.warning("the SAEs were made for `%s`, the base model is `%s`", name, model_name)


def load_sae(folder: SAEFolder, dtype: "torch.dtype | None" = None) -> "SAE[Any]":
    """Load one SAE as SAELens' own class, for inference on the CPU.

    It takes what ``sites.hear`` hears at the folder's site and tap: ``[..., d_in]``, heads side by side. A transcoder's
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
    try:
        config, state = convert(folder)
        sae: SAE[Any] = SAE.load_from_disk(
            folder.path, converter=lambda *_args, **_options: ({**config, **settings}, state)
        )
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise SAEError(f"the SAE `{folder.path}` cannot be loaded: {error}") from error
    return sae.requires_grad_(False).eval()


def _in_folder(folder: Path, sae_id: str | None) -> Found:
    """The SAE that a folder is, or those below it, of which a pattern picks some by their paths."""
    if sae_id is not None:
        found: Found = []
        pattern = _pattern(sae_id)
        for path in sorted(folder.glob(sae_id.replace("{layer}", "*"))):
            match = pattern.fullmatch(path.relative_to(folder).as_posix())
            if match and (path.is_dir() or path.name.endswith(ONE_FILE)):
                found.append((int(match[1]), path, {}))
        if not found:
            have = ", ".join(sorted(path.name for path in folder.iterdir())[:6])
            raise SAEError(f"nothing in `{folder}` is called `{sae_id}`", hint=f"it has: {have}" if have else None)
        return found
    if layout_of(folder):
        return [(None, folder, {})]
    markers = {layout.marker for layout in LAYOUTS.values()} - {ONE_FILE}
    below = (path for depth in range(1, _DEPTH + 1) for path in folder.glob("*/" * depth + "*"))
    paths = {path.parent for path in below if path.name in markers} | {*folder.glob(f"*{ONE_FILE}")}
    if not paths:
        files = _quoted(sorted(markers))
        hint = f"a folder for each layer is expected, with one of {files}, or files `layer*{ONE_FILE}`"
        raise SAEError(f"no SAEs in `{folder}`", hint=hint)
    return [(None, path, {}) for path in sorted(paths)]


def _pattern(sae_id: str) -> re.Pattern[str]:
    """A pattern of SAE ids or paths as a regular expression whose first group is the layer."""
    if "{layer}" not in sae_id or ".." in Path(sae_id).parts or Path(sae_id).is_absolute():
        raise SAEError(
            f"`{sae_id}` is no pattern of SAEs",
            hint="write what the SAEs are called, with `{layer}` for the number, such as `layer_{layer}`",
        )
    first, *rest = (re.escape(part).replace(r"\*", "[^/]*") for part in sae_id.split("{layer}"))
    return re.compile(rf"{first}(\d+)" + r"\1".join(rest))


@cache
def release_texts() -> dict[str, str]:
    """SAELens' directory of releases as YAML, a text for each, because to parse all together takes a second.

    The file is found without importing SAELens, which would bring torch.
    """
    spec = importlib.util.find_spec("sae_lens")
    assert spec is not None
    assert spec.origin is not None
    text = (Path(spec.origin).parent / "pretrained_saes.yaml").read_text(encoding="utf-8")
    starts = list(re.finditer(r"^([^\s#:][^:\n]*):", text, re.MULTILINE))
    ends = [*(start.start() for start in starts[1:]), len(text)]
    return {start[1].strip("\"'"): text[start.end() : end] for start, end in zip(starts, ends, strict=True)}


def read_release(name: str) -> dict[str, Any]:
    """A release of SAEs as SAELens' directory has it."""
    found: dict[str, Any] = yaml.load(release_texts()[name], Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return found


def _on_hub(source: str, sae_id: str | None) -> tuple[str, dict[str, dict[str, Any]]]:
    """The hub repository of a release or of a name; what is wanted of it, with what SAELens' directory corrects."""
    if source not in release_texts():
        if not HUB_ID.fullmatch(source) or "/" not in source:
            close = [] if "/" in source else get_close_matches(source, release_texts(), n=3)
            hint = f"did you mean {' or '.join(f'`{known}`' for known in close)}?" if close else None
            what = "folder of SAEs and no SAELens release" if HUB_ID.fullmatch(source) else "folder"
            raise SAEError(
                f"there is no {what} `{source}`", hint=hint or "give a folder, a SAELens release or a hub id"
            )
        if sae_id is None:
            hint = "give their path in it as `sae_id`, such as `layer_{layer}`; a repository may hold terabytes of them"
            raise SAEError(f"which SAEs of the hub repository `{source}` is not said", hint=hint)
        _pattern(sae_id)
        return source, {sae_id: {}}
    release = read_release(source)
    if (layout := release.get("conversion_func")) not in _RELEASE_LAYOUTS:
        raise SAEError(
            f"the SAEs of the release `{source}` are stored as `{layout}`, which is not supported",
            hint=f"these are: {', '.join(filter(None, _RELEASE_LAYOUTS))}",
        )
    saes = {str(sae["id"]): sae for sae in release["saes"]}
    patterns = list(dict.fromkeys(_LAYER_IN_ID.sub("{layer}", known, count=1) for known in saes))
    if sae_id is None and len(patterns) > 1:
        hint = f"choose with `sae_id`: {_quoted(patterns)}"
        raise SAEError(f"the release `{source}` has several SAEs for a layer", hint=hint)
    pattern = _pattern(sae_id or patterns[0])
    chosen = [sae for known, sae in saes.items() if pattern.fullmatch(known)]
    if not chosen:
        close = get_close_matches(sae_id or "", patterns, n=3, cutoff=0.3) or patterns
        raise SAEError(f"no SAE of the release `{source}` is called `{sae_id}`", hint=f"there are: {_quoted(close)}")
    known = release.get("config_overrides") or {}
    return release["repo_id"], {
        str(sae["path"]): {**known, **{ours: sae[theirs] for theirs, ours in _CORRECTIONS.items() if sae.get(theirs)}}
        for sae in chosen
    }


def _quoted(names: Sequence[str], most: int = 6) -> str:
    return first_of([f"`{name}`" for name in names], most)


def _snapshot(repository: str, wanted: list[str]) -> Path:
    """A folder with some SAEs of a hub repository, folders or files, from the cache or the network."""
    from huggingface_hub import snapshot_download

    try:
        with hub_errors(repository, None):
            patterns = [path if path.endswith(ONE_FILE) else f"{path}/*" for path in wanted]
            return Path(str(snapshot_download(repository, allow_patterns=patterns)))
    except CheckpointError as error:
        raise SAEError(error.message, hint=error.hint) from error
