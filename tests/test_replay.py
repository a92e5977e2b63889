"""A forward restarted in the middle is the plain forward, bit for bit, in every class of model."""

from pathlib import Path

import pytest
import torch
from editing.tiny_models import LAYOUTS, save_pair

from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.editing.layers import LayerEdits
from stethoscope.losses import replaced_forward, run
from stethoscope.models.load import decoder_layers, load_model
from stethoscope.replay import Recording

IDS = torch.tensor([[5, 9, 12, 7, 3, 30], [8, 4, 11, 6, 0, 0]])


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_replay_is_the_plain_forward(layout: str, tmp_path: Path) -> None:
    base, tuned = save_pair(LAYOUTS[layout], tmp_path)
    model = load_model(base, dtype=torch.float32)
    edits = LayerEdits(model, open_task_vector(open_checkpoint(base), tuned))
    plain = run(model, IDS).last_hidden_state
    recording = Recording(model, IDS)
    for start in range(4):
        assert torch.equal(recording.replay(start).last_hidden_state, plain)
    for change in ({0: 1.0}, {1: 0.5}, {2: 1.0}, {1: 1.0, 2: -0.5}, {2: 1.0, 0: 1.0}):
        with edits.entered(change):
            edited = run(model, IDS).last_hidden_state
            replayed = recording.replay(min(change)).last_hidden_state
        assert torch.equal(replayed, edited)
        assert not torch.equal(edited, plain)
    assert torch.equal(run(model, IDS).last_hidden_state, plain)
    assert not any("forward" in vars(block) for block in decoder_layers(model))


@torch.no_grad()
def test_only_what_is_needed_is_kept_and_nothing_below_runs(llama) -> None:
    model = llama(layers=4)
    recording = Recording(model, IDS, starts=[2])
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: pytest.fail("a block below the start was run"))
    recording.replay(2)
    with pytest.raises(KeyError):
        recording.replay(3)
    assert not any("forward" in vars(block) for block in decoder_layers(model))


@torch.no_grad()
def test_a_forward_of_the_instances_own_comes_back(llama) -> None:
    model = llama(layers=2)
    block = model.model.layers[0]
    own = block.forward
    block.forward = own
    with replaced_forward(block, lambda hidden, **_: hidden):
        assert block(1) == 1
    assert vars(block)["forward"] is own


def test_edits_are_read_once_while_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = save_pair(LAYOUTS["llama tied"], tmp_path)
    change = open_task_vector(open_checkpoint(base), tuned)
    model = load_model(base)
    roomy, tight = LayerEdits(model, change), LayerEdits(model, change, memory=1)
    for edits in (roomy, tight):
        for layer in (0, 1):
            with edits.entered({layer: 1.0}):
                pass
    monkeypatch.setattr("stethoscope.editing.layers.prepare", lambda *_: pytest.fail("read again"))
    with roomy.entered({0: 1.0, 1: 1.0}), tight.entered({1: 1.0}):
        pass
    with pytest.raises(pytest.fail.Exception, match="read again"), tight.entered({0: 1.0}):
        pass
