"""Outputs of several processes: nobody's folder is deleted, a run's folder has one process, remains are cleared."""

import errno
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from world import contents

from stethoscope import artifacts
from stethoscope.artifacts import kept_for_one, new_folder, sha256_file
from stethoscope.cli import main
from stethoscope.editing.manifest import read_manifest
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.verify import verify
from stethoscope.editing.writer import write_edit
from stethoscope.errors import StethoscopeError
from stethoscope.recipe import Recipe
from stethoscope.run import run_recipe

PLAN = EditPlan.for_layers([1])


def without_flags(*_: object) -> None:
    raise OSError(errno.ENOSYS, "not on this system")


@pytest.fixture(params=["renameat2", "no renameat2"])
def system(request, monkeypatch):
    if request.param != "renameat2":
        monkeypatch.setattr(artifacts, "_renameat2", without_flags)


@contextmanager
def working(path):
    """A process that has begun a folder at a path, and works in another, until it is killed."""
    code = "import sys, time; from pathlib import Path; from stethoscope.artifacts import kept_for_one, new_folder\n"
    code += "with new_folder(Path(sys.argv[1])) as folder, kept_for_one(Path(sys.argv[1] + '-run')):\n"
    code += "    (folder / 'file').write_text('x'); print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("what", ["folder", "file", "edit"])
def test_what_appears_while_an_edit_works_is_left_alone(what, base, change, tmp_path):
    out = tmp_path / "out"

    def appear(done, total):
        if done == total and what == "folder":
            out.mkdir()
            (out / "mine").write_text("mine")
        elif done == total and what == "file":
            out.write_text("mine")
        elif done == total:
            write_edit(base, change, EditPlan.for_layers([0]), out)

    with pytest.raises(StethoscopeError, match=r"exists"):
        write_edit(base, change, PLAN, out, progress=appear)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    if what == "edit":
        assert verify(out).ok
        assert read_manifest(out)["layers"] == [0]
    else:
        assert (out.read_text() if what == "file" else (out / "mine").read_text()) == "mine"


@pytest.mark.usefixtures("system")
def test_an_edit_that_is_overwritten_leaves_only_the_new(base, change, tmp_path):
    for layer in (0, 1):
        write_edit(base, change, EditPlan.for_layers([layer]), tmp_path / "out", overwrite=True)
    write_edit(base, change, PLAN, tmp_path / "one")
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_killed_process_leaves_no_lock_and_its_remains_go_with_the_next_command_in_that_place(tmp_path):
    (tmp_path / f".own.json.x{artifacts.PARTIAL}").write_text("half")
    with working(tmp_path / "living"):
        with working(tmp_path / "dead"):
            for name in ("living-run", "dead-run"):
                with pytest.raises(StethoscopeError, match="another process works in"), kept_for_one(tmp_path / name):
                    pass
        with new_folder(tmp_path / "other"), kept_for_one(tmp_path / "dead-run"):
            (left,) = tmp_path.glob(".[!o]*")
            assert left.name.startswith(".living")
            assert (left / "file").read_text() == "x"
    with new_folder(tmp_path / "last"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dead-run", "last", "living-run", "other"]


def test_a_disk_that_is_full_at_any_stage_is_a_message_and_the_run_goes_on(world, finished, tmp_path, capsys):
    """For a disk stands a limit on the size of files: each of these is the first to be too large for it."""
    command = ["run", str(world / "recipe.yaml"), "--out", str(tmp_path / "run"), "--quiet"]
    firsts = (finished / name for name in ("statistics.safetensors", "edited/model.safetensors", "report.html"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for path in sorted(firsts, key=lambda path: path.stat().st_size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size - 1, hard))
        try:
            with pytest.raises(SystemExit) as stopped:
                main(command)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        said = capsys.readouterr().err
        assert stopped.value.code == 2, (path, said)
        assert "is full" in said, path
        assert not list(tmp_path.rglob(f"*{artifacts.PARTIAL}"))
    main(command)
    for name in ("comparison.json", "statistics.safetensors", "edited/model.safetensors"):
        assert sha256_file(tmp_path / "run" / name) == sha256_file(finished / name)


def test_a_run_that_is_killed_and_killed_again_ends_as_one_that_was_not(world, finished, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "stethoscope.cli", "run", str(world / "recipe.yaml"), "--out", str(out), "--quiet"]
    for appears in ("statistics.safetensors", "parts/*.jsonl", None):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                if appears and any(out.glob(appears)):
                    process.kill()
                time.sleep(0.01)
        assert process.returncode == (-signal.SIGKILL if appears else 0)
    for name in ("comparison.json", "edits.json", "statistics.safetensors", "edited/model.safetensors"):
        assert sha256_file(out / name) == sha256_file(finished / name)
    assert not list(tmp_path.rglob(f"*{artifacts.PARTIAL}"))


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_where_a_file_is_is_refused(name, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StethoscopeError, match="a file"), artifacts.kept_for_one(tmp_path / name):
        pass


def test_a_link_that_leads_nowhere_is_an_output_that_exists(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(StethoscopeError, match="exists"), artifacts.new_folder(tmp_path / "out"):
        pytest.fail("the work began")


def test_two_runs_in_one_folder_are_told_of_each_other(world, tmp_path):
    with kept_for_one(tmp_path / "run"), pytest.raises(StethoscopeError, match="another process works in"):
        run_recipe(Recipe.from_yaml(world / "recipe.yaml"), tmp_path / "run", until="diagnose")
    assert list((tmp_path / "run").iterdir()) == []
