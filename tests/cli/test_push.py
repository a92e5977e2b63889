"""push: the program itself against a hub on this machine, over HTTP."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from blake3 import blake3
from local_hub import local_hub
from world import flip, save_pair

from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.cli import main
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.writer import write_edit


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder with an edit, and beside its files one that is none of its own."""
    folder = tmp_path_factory.mktemp("push")
    base, tuned = save_pair("llama tied", folder)
    base = open_checkpoint(base)
    write_edit(base, open_task_vector(base, tuned), EditPlan.for_layers([1]), folder / "run" / "edited")
    (folder / "run" / "edited" / "notes.txt").write_text("mine")
    return folder / "run"


def push(hub: str, token: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # without Xet, large files go over plain HTTP
    here = {"HF_ENDPOINT": hub, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "stethoscope.cli", "push", *arguments]
    return subprocess.run(
        command, env={**os.environ, **here}, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )


def test_an_edit_is_sent_with_its_own_files_to_a_private_repository(run):
    with local_hub() as hub:
        done = push(hub.address, hub.token, str(run), "me/edited", "--yes", "--quiet", "--json")
        assert done.returncode == 0
        assert json.loads(done.stdout) == {"commit": f"{hub.address}/me/edited/commit/1"}
        assert done.stderr == ""
        sent = hub.repositories["me/edited"]
        assert sent["private"] is True
        own = {path.name: path.read_bytes() for path in (run / "edited").iterdir() if path.name != "notes.txt"}
        assert sent["files"] == own
        refused = push(hub.address, "hf_other", str(run), "me/edited", "--yes")
    absent = push(hub.address, hub.token, str(run), "me/edited", "--yes")
    for failed in (refused, absent):
        assert failed.returncode == 2
        assert "could not be sent to `me/edited`" in failed.stderr
        assert "Traceback" not in failed.stderr
    assert "hf auth login" in refused.stderr


def test_nothing_is_sent_without_a_yes_or_if_the_edit_is_not_sound(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("stethoscope.editing.publish.publish", None)  # would fail if called
    for arguments, said in (
        ([str(run), "me/edited"], "there is no terminal to ask on"),
        ([str(tmp_path), "me/edited", "--yes"], "manifest.json"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["push", *arguments])
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    asked = []
    monkeypatch.setattr("typer.confirm", lambda text, **_: asked.append(text) or False)
    main(["push", str(run / "edited"), "me/edited", "--public"])
    said = capsys.readouterr().err
    assert "nothing was sent" in said
    own = {path.name for path in (run / "edited").iterdir()} - {"notes.txt"}
    assert {line.split()[-1] for line in said.splitlines() if " MB " in line} == own  # listed before it asks
    assert "`me/edited`, a public repository if it is new?" in asked[0]
    copy = shutil.copytree(run / "edited", tmp_path / "damaged")
    flip(copy / "model.safetensors")
    with pytest.raises(SystemExit):
        main(["push", str(copy), "me/edited", "--yes"])
    assert "is not what its manifest says" in capsys.readouterr().err


def test_a_link_out_of_an_edit_is_not_sent(run, tmp_path, capsys):
    copy = shutil.copytree(run / "edited", tmp_path / "edited")
    (copy / "config.json").rename(tmp_path / "config.json")
    (copy / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(SystemExit):
        main(["push", str(copy), "me/edited", "--yes"])
    assert "`config.json` leads to" in capsys.readouterr().err


def test_a_name_that_is_a_pattern_stands_for_itself(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run") / "edited"
    (folder / "*").write_text("a file called so")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["*"] = blake3((folder / "*").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with local_hub() as hub:
        assert push(hub.address, hub.token, str(tmp_path / "run"), "me/edited", "--yes").returncode == 0
        assert "notes.txt" not in hub.repositories["me/edited"]["files"]
