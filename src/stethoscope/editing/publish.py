"""An edit on the hub: its own files and no other, after every one has been compared with the manifest."""

import glob
from pathlib import Path

from stethoscope.checkpoints.files import refuse_links
from stethoscope.checkpoints.hub import HUB_ID
from stethoscope.editing.manifest import known_files, read_manifest
from stethoscope.errors import StethoscopeError


def publish(folder: Path, repository: str, *, private: bool = True) -> str:
    """Send an edit's files to a hub repository, which is made if there is none.

    Args:
        repository: ``owner/name``.
        private: for a repository that is made now; one that exists stays as it is.

    Returns:
        the address of the commit.

    Raises:
        StethoscopeError: the name is none; a file is a link out of the folder; the hub cannot be reached or says no.
    """
    if not HUB_ID.fullmatch(repository) or "/" not in repository:
        raise StethoscopeError(f"`{repository}` is no name of a hub repository", hint="write `owner/name`")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the client that it happens to use

    files = sorted(glob.escape(name) for name in known_files(read_manifest(folder)))
    refuse_links(folder)
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        made = api.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=files, commit_message="Edited with stethoscope"
        )
    except (HTTPError, OSError, ValueError) as error:
        said = str(error).strip().splitlines()
        raise StethoscopeError(
            f"`{folder}` could not be sent to `{repository}`: {said[0] if said else type(error).__name__}",
            hint="`hf auth login` with a token that may write there; what was sent before is not sent again",
        ) from error
    return str(made.commit_url)
