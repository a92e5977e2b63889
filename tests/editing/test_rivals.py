"""Every rival on a case whose answer is known, and all of them at the value that leaves the fine-tune as it is."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from peft.utils import merge_utils
from world import make_tokenizer, save_pair

from stethoscope.artifacts import sha256_bytes
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.editing.apply import edited_tensor
from stethoscope.editing.plan import EditPlan, coefficients
from stethoscope.editing.rivals import (
    WHOLE,
    Changed,
    channel_importance,
    dropped,
    hard_threshold,
    layer_scaled,
    projected,
    relaxed,
    rivals,
    trimmed,
)
from stethoscope.editing.transfer import in_parallel
from stethoscope.models.load import load_model
from stethoscope.text.tokens import batches


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_lines_rises_linearly_with_depth_and_starts_below_outside_the_layers():
    plan = layer_scaled(5, 0.2)
    for layer, expected in enumerate([0.2, 0.4, 0.6, 0.8, 1.0]):
        for part in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm"):
            assert plan.coefficient(f"layers.{layer}.{part}.weight") == pytest.approx(expected)
    assert plan.coefficient("lm_head.weight") == plan.coefficient("embed_tokens.weight") == 0.2
    assert plan.coefficient("layers.4.mlp.up_proj.weight") == 1
    assert plan.coefficient("vision_tower.layers.0.weight") == 0
    assert layer_scaled(1, 0.5).coefficient("layers.0.mlp.up_proj.weight") == 0.5


@pytest.mark.parametrize("shape", [(200, 200), (300, 120), (120, 300)])
def test_dg_hard_keeps_what_is_planted_over_noise_and_nothing_else(shape):
    signal = 4 * math.sqrt(max(shape)) * torch.outer(*(one / one.norm() for one in map(noise, shape)))
    kept = hard_threshold("w", signal + noise(*shape, seed=1), scale=1.0)
    assert torch.linalg.matrix_rank(kept, rtol=1e-3) == 1
    assert torch.cosine_similarity(kept.flatten(), signal.flatten(), dim=0) > 0.9
    assert not hard_threshold("w", noise(*shape), scale=1.0).any()  # the edge of noise is below the threshold
    assert hard_threshold("w", noise(*shape), scale=0.6).any()


def test_dg_hard_leaves_an_exact_low_rank_vectors_and_small_matrices():
    low_rank = noise(90, 8) @ noise(8, 60, seed=1)
    torch.testing.assert_close(hard_threshold("w", low_rank, scale=16.0), low_rank, rtol=1e-4, atol=1e-4)
    for small in (noise(2000), noise(31, 32)):
        assert hard_threshold("w", small, scale=16.0) is small


def test_the_threshold_is_that_of_donoho_and_gavish():
    """Their table for noise of unknown size: 2.858 medians of a square matrix, 2.1711 at an aspect of one half."""
    for shape, medians in (((60, 60), 2.8582), ((120, 60), 2.1711)):
        Q, R = (torch.linalg.qr(noise(n, 60, seed=n))[0].double() for n in shape)
        values = torch.ones(60, dtype=torch.float64)
        values[:2] = torch.tensor([medians - 0.001, medians + 0.001])
        kept = hard_threshold("w", (Q * values @ R.T).float(), scale=1.0)
        assert float(kept.norm()) == pytest.approx(medians + 0.001, rel=1e-5)


def test_aim_of_equal_channels_is_scaling_and_else_spares_the_largest():
    delta = noise(6, 4)
    equal = {"w": torch.ones(4)}
    torch.testing.assert_close(relaxed("w", delta, omega=0.3, importance=equal), 0.3 * delta)
    uneven = {"w": torch.tensor([1.0, 0.5, 0.0, 0.25])}
    found = relaxed("w", delta, omega=0.2, importance=uneven)
    torch.testing.assert_close(found, delta * torch.tensor([0.2, 0.6, 1.0, 0.8]))
    assert relaxed("embed_tokens.weight", delta, omega=0.2, importance=uneven) is delta


@pytest.mark.parametrize("layout", ["llama untied", "gpt2"])
def test_importance_is_that_of_inputs_and_fits_every_weight(tmp_path, layout):
    base, tuned = save_pair(layout, tmp_path, dtype=torch.float32)
    change = open_task_vector(open_checkpoint(base), tuned)
    model = load_model(base, dtype=torch.float32)
    text = list(batches([[1, 5, 9, 12, 7, 3], [1, 8, 8, 30]], make_tokenizer(), batch_tokens=64))
    found = channel_importance(model, text, list(coefficients(change, WHOLE)))
    kinds = {name: change.base.entries[name].kind for name in change.names if not name.endswith("bias")}
    assert {name for name, kind in kinds.items() if kind in ("attention", "mlp", "norm", "head")} == set(found)
    for name, importance in found.items():
        assert importance.max() == pytest.approx(1)
        assert relaxed(name, change.delta(name), omega=0.5, importance=found).shape == change.delta(name).shape
    name = "layers.1.mlp.c_proj.weight" if layout == "gpt2" else "layers.1.mlp.down_proj.weight"
    assert found[name].shape == ((64, 1) if layout == "gpt2" else (32,))


def test_ties_and_dare_are_pefts_own():
    delta = noise(40, 30)
    kept = trimmed("w", delta, density=0.25)
    assert torch.equal(kept, merge_utils.magnitude_based_pruning(delta, 0.25))
    assert int((kept != 0).sum()) == 300
    thinned = dropped("w", delta, density=0.5, seed=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(sha256_bytes(b"3 w")[:15], 16))
        assert torch.equal(merge_utils.dare_linear([delta], torch.ones(1), 0.5), thinned)
    ratio = thinned / delta
    assert {round(value, 4) for value in ratio.flatten().tolist()} == {0.0, 2.0}
    assert float((ratio != 0).float().mean()) == pytest.approx(0.5, abs=0.06)
    state = torch.random.get_rng_state()
    assert torch.equal(dropped("w", delta, density=0.5, seed=3), thinned)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, seed in (("v", 3), ("w", 4)):
        assert not torch.equal(dropped(name, delta, density=0.5, seed=seed), thinned)


def test_dare_drops_the_same_whatever_other_threads_do():
    deltas = {str(n): noise(300, 200, seed=n) for n in range(24)}
    jobs = [(1, partial(dropped, name, delta, density=0.4, seed=0)) for name, delta in deltas.items()]
    state = torch.random.get_rng_state()
    for found, (_, again) in zip(in_parallel(jobs, arithmetic=True), jobs, strict=True):
        assert torch.equal(found, again())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_at_its_first_value_every_rival_is_the_fine_tune_and_later_it_is_less(change):
    importance = {name: torch.rand(change.base.entries[name].shape[-1]) for name in change.names}
    found = rivals(change.base.layers, importance)
    assert [one.name for one in found] == ["scaled", "LiNeS", "DG-Hard", "AIM", "TIES", "DARE"]
    for method in found:
        first, *_, last = method.plans.values()
        described = [plan and str(plan.to_json()) for plan in method.plans.values()]
        assert len(set(described)) == len(described)
        for name in coefficients(change, EditPlan.everything()):
            assert torch.equal(edited_tensor(change, first, name), change.edited(name, 1.0))
        name = "layers.0.mlp.up_proj.weight"
        if method.name != "DG-Hard" and last:  # the tensors are too small for it
            assert not torch.equal(edited_tensor(change, last, name), change.edited(name, 1.0))


def test_a_description_tells_other_importance_apart():
    one, other = ({"w": torch.full((4,), value)} for value in (0.5, 0.25))
    described = [Changed(partial(relaxed, omega=0.5, importance=found)).describe() for found in (one, other, one)]
    assert described[0] == described[2] != described[1]
    assert described[0]["kind"] == "relaxed"


def test_projection_onto_all_features_is_the_raw_change_of_matrices(change):
    width = change.base.hidden_size
    method = projected(change, {0: lambda: noise(3 * width, width)})
    assert next(iter(method.plans)) == width
    assert method.plans[0.0] is None
    name = "layers.0.mlp.up_proj.weight"
    sizes = [float(plan.transform.apply(name, change.delta(name)).norm()) for plan in method.plans.values() if plan]
    assert sizes[0] == pytest.approx(math.sqrt(change.energy(name)), rel=1e-3)
    assert np.all(np.diff(sizes) < 0)
