"""No code from a checkpoint runs, whatever its files name and whatever is typed: the program itself on a terminal."""

import json
import os
import pty
import shutil
import subprocess
import sys
from contextlib import suppress

import pytest
from world import make

from stethoscope.editing.writer import write_edit
from stethoscope.models.load import load_model

CODE = "open({!r}, 'w').close()\nclass M: pass\n"
AUTO = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoModel"), "evil.M")
PLANTED = {
    "a model of its own": ("config.json", {"model_type": "strange", "architectures": ["M"], "auto_map": AUTO}),
    "a known model with code": ("config.json", {"auto_map": AUTO}),
    "a tokenizer of its own": (
        "tokenizer_config.json", {"tokenizer_class": "Strange", "auto_map": {"AutoTokenizer": ["evil.M", "evil.M"]}},
    ),
}  # fmt: skip


def typed(*command: str) -> str:
    """What a command writes to a terminal on which `y` is the answer to everything."""
    ours, theirs = pty.openpty()
    arguments = [sys.executable, "-m", "stethoscope.cli", *command]
    with subprocess.Popen(arguments, stdin=theirs, stdout=theirs, stderr=theirs):
        os.close(theirs)
        os.write(ours, b"y\n" * 8)
        written = b""
        with suppress(OSError):  # the terminal is closed
            while piece := os.read(ours, 4096):
                written += piece
    os.close(ours)
    return written.decode()


@pytest.mark.parametrize("case", PLANTED)
def test_code_of_a_checkpoint_does_not_run(case, world, tmp_path):
    file, changes = PLANTED[case]
    base = shutil.copytree(world / "base", tmp_path / "base")
    (base / "evil.py").write_text(CODE.format(str(tmp_path / "ran")))
    value = json.loads((base / file).read_text())
    (base / file).write_text(json.dumps(value | changes))
    said = typed("evaluate", "--model", str(base), "--tasks", "tiny_sum", "--include-path", str(world / "tasks"),
                 "--limit", "1", "--out", str(tmp_path / "out"))  # fmt: skip
    assert not (tmp_path / "ran").exists()
    assert "Traceback" not in said
    assert (tmp_path / "out" / "outcomes.parquet").exists() or "cannot be loaded" in " ".join(said.split())


def test_attention_from_a_hub_is_not_taken(tmp_path):
    make("llama untied").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    value = json.loads(path.read_text())
    for key in ("attn_implementation", "_attn_implementation"):
        path.write_text(json.dumps(value | {key: "someone/kernel"}))
        assert load_model(tmp_path).config._attn_implementation == "sdpa"


def test_code_is_not_copied_into_an_edit(base, change, tmp_path):
    from stethoscope.checkpoints.open import open_checkpoint
    from stethoscope.editing.plan import EditPlan

    own = shutil.copytree(base.path, tmp_path / "base")
    (own / "modeling_own.py").write_text(CODE)
    edit = write_edit(open_checkpoint(own), change, EditPlan.for_layers([1]), tmp_path / "edited")
    assert not list(edit.path.glob("*.py"))
    assert "modeling_own.py" in "\n".join(edit.warnings)
