"""SAEs by a name: SAELens' directory of releases, and hub repositories, from the cache or the network."""

import importlib.util
import re
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from stethoscope.checkpoints.hub import HUB_ID, hub_errors
from stethoscope.display import first_of
from stethoscope.errors import CheckpointError, SAEError, require
from stethoscope.saes.layouts import ONE_FILE

# SAELens' names in its directory of releases for the layouts that are read here; None is its own.
_LAYOUTS = (
    None, "sae_lens", "gemma_3", "gemma_2", "llama_scope", "dictionary_learning_1", "sparsify", "qwen_scope",
)  # fmt: skip
# What it knows of a single SAE that the SAE's own configuration may lack.
_CORRECTIONS = {"norm_scaling_factor": "norm_scaling_factor", "neuronpedia": "neuronpedia_id"}
# The layer in the id of a release's SAE.
_LAYER_IN_ID = re.compile(r"(?<=layer_)\d+|(?<=layers\.)\d+|(?<=blocks\.)\d+|(?<=layer)\d+|(?<=^l)\d+")


@cache
def release_texts() -> dict[str, str]:
    """SAELens' directory of releases as YAML, a text for each, because to parse all together takes a second.

    The file is found without importing SAELens, which would bring torch.
    """
    require("sae_lens", extra="train")
    spec = importlib.util.find_spec("sae_lens")
    assert spec is not None
    assert spec.origin is not None
    text = Path(spec.origin).with_name("pretrained_saes.yaml").read_text(encoding="utf-8")
    starts = list(re.finditer(r"^([^\s#:][^:\n]*):", text, re.MULTILINE))
    ends = [*(start.start() for start in starts[1:]), len(text)]
    return {start[1].strip("\"'"): text[start.end() : end] for start, end in zip(starts, ends, strict=True)}


def read_release(name: str) -> dict[str, Any]:
    """A release of SAEs as SAELens' directory has it."""
    found: dict[str, Any] = yaml.load(release_texts()[name], Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return found


def find_on_hub(source: str, sae_id: str | None) -> tuple[str, dict[str, dict[str, Any]]]:
    """The repository of a release or a name, and what is wanted of it, from names alone.

    Returns:
        The repository; the SAEs' paths in it, or for a name the pattern of them, each with what SAELens' directory
        corrects.

    Raises:
        SAEError: there is no such name, or ``sae_id`` does not pick one SAE for a layer.
    """
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
        id_pattern(sae_id)
        return source, {sae_id: {}}
    release = read_release(source)
    if (layout := release.get("conversion_func")) not in _LAYOUTS:
        raise SAEError(
            f"the SAEs of the release `{source}` are stored as `{layout}`, which is not supported",
            hint=f"these are: {', '.join(filter(None, _LAYOUTS))}",
        )
    patterns = list(dict.fromkeys(_LAYER_IN_ID.sub("{layer}", str(sae["id"]), count=1) for sae in release["saes"]))
    if sae_id is None and len(patterns) > 1:
        hint = f"choose with `sae_id`: {quoted(patterns)}"
        raise SAEError(f"the release `{source}` has several SAEs for a layer", hint=hint)
    pattern = id_pattern(sae_id or patterns[0])
    chosen = [(match[1], sae) for sae in release["saes"] if (match := pattern.fullmatch(str(sae["id"])))]
    if len({layer for layer, _ in chosen}) < len(chosen):
        hint = f"choose among {quoted([str(sae['id']) for _, sae in chosen])}"
        raise SAEError(f"`{sae_id}` picks several SAEs for a layer in the release `{source}`", hint=hint)
    if not chosen:
        close = get_close_matches(sae_id or "", patterns, n=3, cutoff=0.3) or patterns
        raise SAEError(f"no SAE of the release `{source}` is called `{sae_id}`", hint=f"there are: {quoted(close)}")
    known = release.get("config_overrides") or {}
    return release["repo_id"], {
        str(sae["path"]): {**known, **{ours: sae[theirs] for theirs, ours in _CORRECTIONS.items() if sae.get(theirs)}}
        for _, sae in chosen
    }


def fetch(repository: str, paths: Sequence[str]) -> Path:
    """A folder with some SAEs of a hub repository, folders or files, from the cache or the network."""
    from huggingface_hub import snapshot_download

    try:
        with hub_errors(repository, None):
            names = [path.replace("{layer}", "*") for path in paths]
            patterns = [name if name.endswith(ONE_FILE) else f"{name}/*" for name in names]
            return Path(str(snapshot_download(repository, allow_patterns=patterns)))
    except CheckpointError as error:
        raise SAEError(error.message, hint=error.hint) from error


def id_pattern(sae_id: str) -> re.Pattern[str]:
    """A pattern of SAE ids or paths as a regular expression whose first group is the layer.

    Raises:
        SAEError: it has no ``{layer}``, matches across folders, or leads out of the folder.
    """
    if "{layer}" not in sae_id or "**" in sae_id or ".." in Path(sae_id).parts or Path(sae_id).is_absolute():
        raise SAEError(
            f"`{sae_id}` is no pattern of SAEs",
            hint="write what the SAEs are called, with `{layer}` for the number, such as `layer_{layer}`",
        )
    first, *rest = (re.escape(part).replace(r"\*", "[^/]*") for part in sae_id.split("{layer}"))
    return re.compile(rf"{first}(\d+)" + r"\1".join(rest))


def quoted(names: Sequence[str], most: int = 6) -> str:
    """Names in backticks, at most so many."""
    return first_of([f"`{name}`" for name in names], most)
