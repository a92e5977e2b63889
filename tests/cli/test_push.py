"""push: an edit's own files go to a private repository, after a yes and if every byte is as it was written."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import filter_repo_objects
from world import flip, save_pair

from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.cli import main
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.writer import write_edit


class Hub:
    """What of `HfApi` a push uses, with repositories in memory."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.private, self.files = error, {}, {}
        self.commit_url = "https://hub/me/edited/commit/1"

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        if self.error:
            raise self.error
        self.private.setdefault(name, private)

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str
    ) -> "Hub":
        names = [path.name for path in folder_path.iterdir()]
        sent = filter_repo_objects(names, allow_patterns=allow_patterns)
        self.files[repo_id] = {name: (folder_path / name).read_bytes() for name in sent}
        return self


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder with an edit, and beside its files one that is none of its own."""
    folder = tmp_path_factory.mktemp("push")
    base, tuned = save_pair("llama tied", folder)
    base = open_checkpoint(base)
    write_edit(base, open_task_vector(base, tuned), EditPlan.for_layers([1]), folder / "run" / "edited")
    (folder / "run" / "edited" / "notes.txt").write_text("mine")
    return folder / "run"


def refusal(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["push", *map(str, arguments)])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_an_edit_is_sent_with_its_own_files_to_a_private_repository(run, monkeypatch, capsys):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    main(["push", str(run), "me/edited", "--yes", "--quiet", "--json"])
    said = capsys.readouterr()
    assert json.loads(said.out) == {"commit": hub.commit_url}
    assert said.err == ""
    assert hub.private == {"me/edited": True}
    own = {path.name: path.read_bytes() for path in (run / "edited").iterdir() if path.name != "notes.txt"}
    assert hub.files == {"me/edited": own}


@pytest.mark.parametrize("error", [None, HTTPError("401 Client Error: Invalid credentials")])
def test_a_hub_that_says_no_or_is_not_there_is_said(error, run, monkeypatch, capsys):
    if error:  # without, the hub's own client is offline
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: Hub(error))
    said = refusal(capsys, run, "me/edited", "--yes")
    assert "could not be sent to `me/edited`" in said
    assert "hf auth login" in said
    assert "Traceback" not in said


def test_nothing_is_sent_without_a_yes_or_if_the_edit_is_not_sound(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("stethoscope.editing.publish.publish", None)  # would fail if called
    assert "there is no terminal to ask on" in refusal(capsys, run, "me/edited")
    assert "manifest.json" in refusal(capsys, tmp_path, "me/edited", "--yes")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    asked = []
    monkeypatch.setattr("typer.confirm", lambda text, **_: asked.append(text) or False)
    main(["push", str(run / "edited"), "me/edited", "--public"])
    assert "nothing was sent" in capsys.readouterr().err
    assert "`me/edited`, a public repository if it is new?" in asked[0]
    copy = shutil.copytree(run / "edited", tmp_path / "damaged")
    flip(copy / "model.safetensors")
    assert "is not what its manifest says" in refusal(capsys, copy, "me/edited", "--yes")
