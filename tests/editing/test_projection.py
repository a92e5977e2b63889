"""Projections with known answers: whole, nothing, exact parts, and noise at the chance level."""

import warnings
from pathlib import Path

import pytest
import torch
from tiny_models import LAYOUTS, make, save_pair, stored
from torch import nn
from transformers.pytorch_utils import Conv1D

from stethoscope.checkpoints.adapter import AdapterTaskVector
from stethoscope.checkpoints.checkpoint import Checkpoint
from stethoscope.checkpoints.names import parse_name
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.apply import applied, live_tensors
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.residual_axis import residual_axes, residual_axis
from stethoscope.editing.scalpel import scalpel_plans
from stethoscope.editing.subspace import (
    FeatureProjection,
    energy_along,
    feature_basis,
    nested_basis,
)
from stethoscope.editing.writer import write_edit
from stethoscope.errors import CheckpointError, StethoscopeError
from stethoscope.recipe import SCALPEL_ARMS

WRITER = "layers.1.self_attn.o_proj.weight"  # [d, heads]
READER = "layers.1.mlp.up_proj.weight"  # [mlp, d]
D = 48


def random_directions(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def projection(directions: torch.Tensor) -> FeatureProjection:
    return FeatureProjection(bases={1: feature_basis(directions)})


def share_kept(made: FeatureProjection, name: str, delta: torch.Tensor) -> float:
    return float(made.apply(name, delta).square().sum() / delta.square().sum())


def test_basis_is_orthonormal_and_counts_duplicates_once():
    rows = random_directions(7)
    Q = feature_basis(torch.cat([rows, 3 * rows[:2], rows[:1] + 1e-6, torch.zeros(1, D)]))
    assert Q.shape == (D, 7)
    torch.testing.assert_close(Q.T @ Q, torch.eye(7, dtype=Q.dtype))
    torch.testing.assert_close(Q @ (Q.T @ rows.double().T), rows.double().T, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "shape"), [(WRITER, (D, 30)), (READER, (90, D))])
def test_features_that_span_everything_keep_everything(name, shape):
    delta = torch.randn(shape)
    torch.testing.assert_close(projection(random_directions(2 * D)).apply(name, delta), delta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["writer", "reader"])
def test_a_change_in_the_subspace_is_kept_whole_and_one_outside_it_not_at_all(side):
    made = projection(random_directions(5))
    Q = made.bases[1].float()
    off = torch.eye(D) - Q @ Q.T
    inside = Q @ torch.randn(5, 20)
    outside = off @ torch.randn(D, 20)
    if side == "writer":
        name, inside, outside = WRITER, inside, outside
    else:
        name, inside, outside = READER, inside.T, outside.T
    torch.testing.assert_close(made.apply(name, inside), inside, rtol=1e-4, atol=1e-5)
    assert share_kept(made, name, outside) < 1e-10


def test_isotropic_noise_is_kept_at_the_chance_level():
    made = projection(random_directions(12))
    delta = torch.randn(D, 4000, generator=torch.Generator().manual_seed(3))
    assert share_kept(made, WRITER, delta) == pytest.approx(12 / D, abs=0.005)


def test_raw_is_projected_plus_complement():
    made = projection(random_directions(9))
    delta = torch.randn(D, 30)
    kept = made.apply(WRITER, delta)
    rest = delta - kept
    assert float((kept * rest).sum()) == pytest.approx(0, abs=1e-3)
    assert kept.square().sum() + rest.square().sum() == pytest.approx(float(delta.square().sum()), rel=1e-5)


@pytest.mark.parametrize(
    "name", ["layers.1.input_layernorm.weight", "layers.2.self_attn.o_proj.weight", "embed_tokens.weight"]
)
def test_norms_and_other_layers_are_dropped(name):
    delta = torch.ones(D) if "norm" in name else torch.ones(D, D)
    assert not projection(random_directions(4)).apply(name, delta).any()


def test_equal_descriptions_mean_equal_bases():
    one, two = projection(random_directions(4)), projection(random_directions(4))
    assert one.describe() == two.describe()
    assert one.describe() != projection(random_directions(4, seed=1)).describe()


@pytest.mark.parametrize("blocks", [1, 20])
def test_the_first_columns_span_the_first_directions(blocks, monkeypatch):
    monkeypatch.setattr("stethoscope.editing.subspace._BLOCK", -(-60 // blocks))
    rows = random_directions(60)  # more than there are dimensions
    rows[4] = -2 * rows[1]
    rows[7] = rows[:7].sum(0) + 1e-5 * rows[8]
    Q, came = nested_basis(rows)
    expected = [i for i in range(50) if i not in (4, 7)]
    assert came.tolist() == expected
    torch.testing.assert_close(Q.T @ Q, torch.eye(D, dtype=Q.dtype))
    for n in (1, 3, 6, 20):
        part = Q[:, came < n]
        torch.testing.assert_close(part @ (part.T @ rows[:n].double().T), rows[:n].double().T, rtol=0, atol=1e-5)


def test_no_directions_keep_nothing():
    assert feature_basis(torch.zeros(3, D)).shape == (D, 0)
    assert not projection(torch.zeros(3, D)).apply(WRITER, torch.randn(D, 5)).any()


WRITES = {"o_proj", "down_proj", "c_proj", "dense", "fc2", "dense_4h_to_h"}


@pytest.mark.parametrize("layout", ["llama tied", "qwen2", "mistral", "gemma3 text", "gpt2", "phi", "phi3", "gpt-neox"])
def test_a_projected_matrix_sees_or_says_only_what_lies_in_the_subspace(layout):
    model = make(LAYOUTS[layout], dtype=torch.float64)
    Q = feature_basis(torch.randn(5, 16))
    made = FeatureProjection(bases={1: Q})
    checked = 0
    for stored_name, module in model.named_modules():
        name = parse_name(f"{stored_name}.weight")
        if name.layer != 1 or not isinstance(module, nn.Linear | Conv1D):
            continue
        checked += 1
        writes = name.canonical.split(".")[-2] in WRITES
        inputs = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
        x = torch.randn(3, inputs, dtype=torch.float64)
        bias = 0 if module.bias is None else module.bias
        expected = (module(x) - bias) @ Q @ Q.T if writes else module(x @ Q @ Q.T) - bias
        module.weight.data = made.apply(name.canonical, module.weight.data)
        torch.testing.assert_close(module(x) - bias, expected)
        if module.bias is not None:
            kept = made.apply(name.canonical.replace("weight", "bias"), module.bias)
            torch.testing.assert_close(kept, module.bias @ Q @ Q.T if writes else torch.zeros_like(module.bias))
    assert checked >= 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_on_disk_has_known_roles(layout, tmp_path):
    base = open_checkpoint(save_pair(LAYOUTS[layout], tmp_path)[0])
    for name, entry in base.entries.items():
        if entry.layer is not None and entry.kind != "buffer" and (axis := residual_axis(name, entry.shape, 16)):
            assert axis.writes == (name.split(".")[-2] in WRITES), name


def test_matrices_of_unknown_role_are_all_named(pair, tmp_path):
    base = open_checkpoint(pair[0])
    change = open_task_vector(base, pair[1])
    with pytest.raises(CheckpointError) as error:
        residual_axes(change, [0, 1], 24)
    assert len(error.value.problems) == 14
    with pytest.raises(CheckpointError, match=r"`layers.1.linear_attn.in_proj_qkvz.weight`: not known"):
        residual_axis("model.layers.1.linear_attn.in_proj_qkvz.weight", (64, D), D)
    with pytest.raises(CheckpointError, match="along axis 0"):  # a Linear under the name of a Conv1D
        residual_axis("transformer.h.1.attn.c_attn.weight", (3 * D, D), D)


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapter(model: nn.Module, folder: Path, **options: object) -> AdapterTaskVector:
    """A random adapter for a model, as a task vector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig, get_peft_model

        model.save_pretrained(folder / "base")
        get_peft_model(model, LoraConfig(r=3, init_lora_weights=False, **options)).save_pretrained(folder / "adapter")
    change = open_task_vector(open_checkpoint(folder / "base"), folder / "adapter")
    assert isinstance(change, AdapterTaskVector)
    return change


@pytest.mark.parametrize("kind", ["llama", "dora", "gpt2"])
def test_the_factors_energy_is_the_products(kind, tmp_path):
    layout, options = ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}) if (
        kind == "gpt2"
    ) else ("llama untied", {"target_modules": LINEAR, "use_dora": kind == "dora"})  # fmt: skip
    change = adapter(make(LAYOUTS[layout], dtype=torch.float32), tmp_path, **options)
    Q = feature_basis(torch.randn(5, 16))
    made = FeatureProjection(bases={1: Q})
    axes = residual_axes(change, [1], 16)
    assert len(axes) >= 4
    for name, axis in axes.items():
        energy, along = energy_along(change, name, axis, Q)
        delta = change.delta(name)
        assert energy == pytest.approx(float(delta.square().sum()), rel=1e-5)
        assert float(along.sum()) == pytest.approx(float(made.apply(name, delta).square().sum()), rel=1e-4)


def test_energies_in_the_hardwares_dtype_are_those_in_float32(change, monkeypatch):
    name = "layers.1.mlp.down_proj.weight"
    axis = residual_axes(change, [1], 16)[name]
    Q = feature_basis(torch.randn(5, 16))
    exact = energy_along(change, name, axis, Q)
    monkeypatch.setattr("stethoscope.editing.subspace._LARGE", 0)
    monkeypatch.setattr("stethoscope.editing.subspace.preferred_dtype", lambda: torch.bfloat16)
    rough = energy_along(change, name, axis, Q)
    assert rough[0] == exact[0]
    torch.testing.assert_close(rough[1], exact[1], rtol=1e-2, atol=0)
    assert float(rough[1].sum()) == pytest.approx(float(exact[1].sum()), rel=2e-3)


def directions(layer: int) -> torch.Tensor:
    return torch.randn(16, 16, generator=torch.Generator().manual_seed(layer))


def changes_under(base: Checkpoint, change: TaskVector, plan: EditPlan, layer: int) -> dict[str, torch.Tensor]:
    assert plan.transform
    names = [name for name in change.names if base.entries[name].layer == layer]
    return {name: plan.transform.apply(name, change.delta(name)) for name in names}


def energy_of(changes: dict[str, torch.Tensor]) -> float:
    return sum(float(delta.double().square().sum()) for delta in changes.values())


def scalpel_plan(arm: str, *args: object, **options: object) -> EditPlan:
    return scalpel_plans([arm], *args, **options)[arm]


@pytest.mark.parametrize("arm", SCALPEL_ARMS)
def test_an_arm_in_memory_is_the_arm_on_disk(arm, base, change, pair, tmp_path):
    plan = scalpel_plan(arm, change, {1: 1.0, 2: 0.5}, directions, features=4, layers=range(3))
    edited = stored(write_edit(base, change, plan, tmp_path / "edited").path)
    before = stored(pair[0])
    moved = {parse_name(name).layer for name in edited if not torch.equal(edited[name], before[name])}
    assert moved == ({0, 1, 2} if arm == "hybrid" else {1, 2})
    model = make(LAYOUTS["llama untied"])
    with applied(model, change, plan):
        live = live_tensors(model)
        assert all(torch.equal(live[parse_name(name).canonical], tensor) for name, tensor in edited.items())
    assert EditPlan.from_json(plan.to_json(), transform=plan.transform) == plan


def test_the_parts_add_up_and_the_matched_one_has_the_raw_norm(base, change):
    arms = {
        arm: scalpel_plan(arm, change, {1: 1.0, 2: 1.0}, directions, features=4)
        for arm in SCALPEL_ARMS
        if arm != "hybrid"
    }
    for layer in (1, 2):
        found = {arm: changes_under(base, change, plan, layer) for arm, plan in arms.items()}
        raw = {name: change.delta(name) for name in found["projected"]}
        for name, delta in raw.items():
            torch.testing.assert_close(found["projected"][name] + found["complement"][name], delta)
        assert energy_of(found["projected_energy_matched"]) == pytest.approx(energy_of(raw), rel=1e-4)
        cosine = sum(float((found["projected"][n] * found["projected_energy_matched"][n]).sum()) for n in raw)
        assert cosine**2 == pytest.approx(
            energy_of(found["projected"]) * energy_of(found["projected_energy_matched"]), rel=1e-4
        )
        ranks = {arm: arms[arm].transform.bases[layer].shape[1] for arm in ("projected", "random_subspace")}
        assert ranks == {"projected": 4, "random_subspace": 4}
        assert energy_of(found["random_subspace"]) != pytest.approx(energy_of(found["projected"]), rel=1e-3)


def energy_kept(change: TaskVector, Q: torch.Tensor) -> float:
    """The share of layer 1's energy that a basis keeps."""
    axes = residual_axes(change, [1], len(Q)).items()
    found = [energy_along(change, name, axis, Q) for name, axis in axes if axis]
    return sum(float(along.sum()) for _, along in found) / sum(energy for energy, _ in found)


def test_the_smallest_set_reaches_the_share_and_one_feature_less_does_not(change):
    made = scalpel_plan("filtered", change, {1: 1.0}, directions, features=4, share=0.5).transform
    assert energy_kept(change, made.bases[1]) >= 0.5
    assert energy_kept(change, made.bases[1][:, :-1]) < 0.5
    whole = scalpel_plan("filtered", change, {1: 1.0}, directions, features=4, share=1.0).transform
    assert whole.bases[1].shape == (16, 16)
    assert energy_kept(change, whole.bases[1]) == pytest.approx(1.0)


def test_a_hybrid_is_raw_where_it_was_selected(base, change, pair):
    plan = scalpel_plan("hybrid", change, {1: 1.0}, directions, features=4, layers=range(3), share=0.3)
    tuned = stored(pair[1])
    model = make(LAYOUTS["llama untied"])
    with applied(model, change, plan):
        live = live_tensors(model)
        for name, tensor in tuned.items():
            canonical = parse_name(name)
            if canonical.layer == 1:
                assert torch.equal(live[canonical.canonical], tensor)
            elif canonical.layer is not None and "proj" in name:
                assert not torch.equal(live[canonical.canonical], tensor)
    assert set(plan.transform.bases) == {0, 2}


def test_arms_made_together_are_those_made_alone_and_a_layers_directions_are_asked_for_once(change):
    asked = []

    def counted(layer: int) -> torch.Tensor:
        asked.append(layer)
        return directions(layer)

    options = {"features": 4, "layers": range(3), "share": 0.3}
    together = scalpel_plans(SCALPEL_ARMS, change, {1: 1.0, 2: 0.5}, counted, **options)
    assert asked == [0, 1, 2]
    for arm in SCALPEL_ARMS:
        alone = scalpel_plan(arm, change, {1: 1.0, 2: 0.5}, directions, **options)
        assert alone.to_json() == together[arm].to_json()
        described = together[arm].to_json()
        made = FeatureProjection.from_description(described["transform"], together[arm].transform.tensors())
        assert EditPlan.from_json(described, transform=made).to_json() == described


def test_no_factor_makes_nothing_large(change):
    with pytest.raises(StethoscopeError, match="layers 1, 2"):
        scalpel_plan(
            "projected_energy_matched", change, {1: 1.0, 2: 1.0}, lambda _: torch.zeros(2, 16), features=2
        )  # fmt: skip
