"""A hub repository as a local folder, or its headers alone, from the hub library's cache or over the network."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stethoscope.checkpoints.header import Entry, make_entry
from stethoscope.errors import CheckpointError, refused_by_system

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
SIDE_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*"]


def from_hub(repository: str, revision: str | None, *, weights: bool = True) -> Path:
    """The folder of a hub repository, from the cache or the network.

    Args:
        weights: fetch the safetensors too, not only config and tokenizer.
    """
    require_hub_id(repository)
    from huggingface_hub import snapshot_download

    download: Callable[..., str] = snapshot_download
    wanted = [*SIDE_FILES, "*.safetensors"] if weights else SIDE_FILES
    with hub_errors(repository, revision):
        # other formats lie in folders of their own
        return Path(download(repository, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"]))


def headers_from_hub(repository: str, revision: str | None) -> dict[str, dict[str, Entry]]:
    """The tensors of each safetensors file of a repository, without fetching the files.

    The places of the tensors are counted from the first tensor's byte: these are for looking, not for reading.
    """
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    try:
        with hub_errors(repository, revision):
            found = get_safetensors_metadata(repository, revision=revision)
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise CheckpointError(
            f"`{repository}` has no sound safetensors files", hint="it may hold pickles: convert it first"
        ) from error
    return {
        file: {
            name: make_entry(name, file, info.dtype, info.shape, *info.data_offsets)
            for name, info in about.tensors.items()
        }
        for file, about in found.files_metadata.items()
    }


def require_hub_id(source: str) -> None:
    """Refuse a name that is no folder and cannot be a repository's."""
    if not HUB_ID.fullmatch(source):
        raise CheckpointError(f"there is no folder `{source}`", hint="give a folder, or a hub id like `owner/name`")


@contextmanager
def hub_errors(repository: str, revision: str | None) -> Iterator[None]:
    """Say what the hub library's errors mean."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"`{repository}` is gated on the hub", hint="accept its licence there, then `hf auth login`"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        where = f" at revision `{revision}`" if revision else ""
        raise CheckpointError(
            f"there is no folder and no hub repository `{repository}`{where}",
            hint="check the spelling; for a private repository, `hf auth login`",
        ) from error
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        if refused := refused_by_system(error):
            raise refused from error
        raise CheckpointError(
            f"`{repository}` is neither a folder nor in the hub's cache, and the hub cannot be reached",
            hint="fetch it once with a network (`hf download`), or give a local folder",
        ) from error
