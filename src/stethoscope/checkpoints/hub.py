"""A hub repository as a local folder, from the hub library's cache or over the network."""

import re
from collections.abc import Callable
from pathlib import Path

from stethoscope.errors import CheckpointError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*"]


def from_hub(repository: str, revision: str | None, cache: Path | None) -> Path:
    """The folder of a hub repository, from the cache or the network; config, tokenizer and safetensors only."""
    if not HUB_ID.fullmatch(repository):
        raise CheckpointError(f"there is no folder `{repository}`", hint="give a folder, or a hub id like `owner/name`")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    download: Callable[..., str] = snapshot_download
    try:
        return Path(download(repository, revision=revision, cache_dir=cache, allow_patterns=HUB_FILES))
    except GatedRepoError as error:
        raise CheckpointError(
            f"`{repository}` is gated on the hub", hint="accept its licence there, then `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        where = f" at revision `{revision}`" if revision else ""
        raise CheckpointError(
            f"there is no folder and no hub repository `{repository}`{where}",
            hint="check the spelling; for a private repository, `hf auth login`",
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"`{repository}` is neither a folder nor in the hub's cache, and the hub cannot be reached",
            hint="fetch it once with a network (`hf download`), or give a local folder",
        ) from error
