"""Projections with known answers: whole, nothing, exact parts, and noise at the chance level."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from world import LAYOUTS, LINEAR, make, save_adapter, save_pair, stored

from stethoscope.checkpoints.names import parse_name
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.editing.apply import applied, live_tensors
from stethoscope.editing.change import energy_along
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.residual_axis import residual_axes, residual_axis
from stethoscope.editing.scalpel import scalpel_plans
from stethoscope.editing.subspace import FeatureProjection, nested_basis
from stethoscope.editing.writer import write_edit
from stethoscope.errors import CheckpointError, StethoscopeError
from stethoscope.recipe import SCALPEL_ARMS

WRITER = "layers.1.self_attn.o_proj.weight"  # [d, heads]
READER = "layers.1.mlp.up_proj.weight"  # [mlp, d]
D = 48


def random_directions(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def projection(directions: torch.Tensor) -> FeatureProjection:
    return FeatureProjection(bases={1: nested_basis(directions)[0]})


def energy_of(*deltas: torch.Tensor) -> float:
    return sum(float(delta.double().square().sum()) for delta in deltas)


@pytest.mark.parametrize("name", [WRITER, READER])
def test_what_lies_in_the_subspace_is_kept_and_what_lies_outside_is_not(name):
    def turned(x):
        return x if name == WRITER else x.T

    made = projection(random_directions(5))
    Q = made.bases[1].float()
    inside, any_change = turned(Q @ torch.randn(5, 20)), turned(torch.randn(D, 30))
    torch.testing.assert_close(made.apply(name, inside), inside, rtol=1e-4, atol=1e-5)
    outside = turned((torch.eye(D) - Q @ Q.T) @ torch.randn(D, 20))
    assert energy_of(made.apply(name, outside)) < 1e-10 * energy_of(outside)
    kept = made.apply(name, any_change)
    assert energy_of(kept, any_change - kept) == pytest.approx(energy_of(any_change), rel=1e-5)
    everything = projection(random_directions(2 * D)).apply(name, any_change)
    torch.testing.assert_close(everything, any_change, rtol=1e-4, atol=1e-5)
    assert nested_basis(torch.zeros(3, D))[0].shape == (D, 0)
    assert not projection(torch.zeros(3, D)).apply(name, any_change).any()


@pytest.mark.parametrize("name", ["layers.1.input_layernorm", "layers.2.self_attn.o_proj", "embed_tokens"])
def test_norms_and_other_layers_are_dropped(name):
    delta = torch.ones(D) if "norm" in name else torch.ones(D, D)
    assert not projection(random_directions(4)).apply(f"{name}.weight", delta).any()


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
    rows[9] = 0
    Q, came = nested_basis(rows)
    assert came.tolist() == [i for i in range(51) if i not in (4, 7, 9)]
    torch.testing.assert_close(Q.T @ Q, torch.eye(D, dtype=Q.dtype))
    for n in (1, 3, 6, 20):
        part = Q[:, came < n]
        torch.testing.assert_close(part @ (part.T @ rows[:n].double().T), rows[:n].double().T, rtol=0, atol=1e-5)


def test_rows_that_never_fill_the_space_add_what_they_span():
    rows = random_directions(300) @ torch.diag((torch.arange(D) < D - 3).float())
    Q, came = nested_basis(rows)
    assert came.tolist() == list(range(D - 3))
    torch.testing.assert_close(Q[: D - 3].T @ Q[: D - 3], torch.eye(D - 3, dtype=Q.dtype))


WRITES = {"o_proj", "down_proj", "c_proj", "dense", "fc2", "dense_4h_to_h"}


@pytest.mark.parametrize("layout", ["llama tied", "qwen2", "mistral", "gemma3 text", "gpt2", "phi", "phi3", "gpt-neox"])
def test_a_projected_matrix_sees_or_says_only_what_lies_in_the_subspace(layout):
    model = make(layout, dtype=torch.float64)
    Q = nested_basis(torch.randn(5, 16))[0]
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
    base = open_checkpoint(save_pair(layout, tmp_path)[0])
    for name, entry in base.entries.items():
        if entry.layer is not None and entry.kind != "buffer" and (axis := residual_axis(name, entry.shape, 16)):
            assert axis.writes == (name.split(".")[-2] in WRITES), name


def test_matrices_of_unknown_role_are_all_named(change):
    with pytest.raises(CheckpointError) as error:
        residual_axes(change, [0, 1], 24)
    assert len(error.value.problems) == 14
    with pytest.raises(CheckpointError, match=r"`layers.1.linear_attn.in_proj_qkvz.weight`: not known"):
        residual_axis("model.layers.1.linear_attn.in_proj_qkvz.weight", (64, D), D)
    with pytest.raises(CheckpointError, match="along axis 0"):  # a Linear under the name of a Conv1D
        residual_axis("transformer.h.1.attn.c_attn.weight", (3 * D, D), D)


GPT2 = ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True})
LLAMA, DORA = (("llama untied", {"target_modules": LINEAR, "use_dora": dora}) for dora in (False, True))


@pytest.mark.parametrize(("layout", "options"), [LLAMA, DORA, GPT2], ids=["llama", "dora", "gpt2"])
def test_the_factors_energy_is_the_products(layout, options, tmp_path):
    save_adapter(make(layout, dtype=torch.float32), tmp_path, r=3, **options)
    change = open_task_vector(open_checkpoint(tmp_path / "base"), tmp_path / "adapter")
    Q = nested_basis(torch.randn(5, 16))[0]
    made = FeatureProjection(bases={1: Q})
    axes = residual_axes(change, [1], 16)
    assert len(axes) >= 4
    for name, axis in axes.items():
        energy, along = energy_along(change, name, axis, Q)
        delta = change.delta(name)
        assert energy == pytest.approx(energy_of(delta), rel=1e-5)
        assert float(along.sum()) == pytest.approx(energy_of(made.apply(name, delta)), rel=1e-4)


BOTH = {1: 1.0, 2: 1.0}


def directions(layer: int) -> torch.Tensor:
    return torch.randn(16, 16, generator=torch.Generator().manual_seed(layer))


def scalpel_plan(arm: str, change, chosen=BOTH, *, features: int = 4, **options) -> EditPlan:
    return scalpel_plans([arm], change, chosen, directions, features=features, **options)[arm]


@pytest.mark.parametrize("arm", SCALPEL_ARMS)
def test_an_arm_in_memory_is_the_arm_on_disk(arm, base, change, pair, tmp_path):
    plan = scalpel_plan(arm, change, {1: 1.0, 2: 0.5}, layers=range(3))
    edited = stored(write_edit(base, change, plan, tmp_path / "edited").path)
    before = stored(pair[0])
    moved = {parse_name(name).layer for name in edited if not torch.equal(edited[name], before[name])}
    assert moved == ({0, 1, 2} if arm == "hybrid" else {1, 2})
    model = make("llama untied")
    with applied(model, change, plan):
        live = live_tensors(model)
        assert all(torch.equal(live[parse_name(name).canonical], tensor) for name, tensor in edited.items())


def test_the_parts_add_up_and_the_matched_one_has_the_raw_norm(base, change):
    arms = {arm: scalpel_plan(arm, change) for arm in SCALPEL_ARMS if arm != "hybrid"}
    for layer in (1, 2):
        raw = {name: change.delta(name) for name in change.names if base.entries[name].layer == layer}
        found = {arm: {n: plan.transform.apply(n, raw[n]) for n in raw} for arm, plan in arms.items()}
        projected, matched = found["projected"], found["projected_energy_matched"]
        for name, delta in raw.items():
            torch.testing.assert_close(projected[name] + found["complement"][name], delta)
        assert energy_of(*matched.values()) == pytest.approx(energy_of(*raw.values()), rel=1e-4)
        product = sum(float((projected[name] * matched[name]).sum()) for name in raw)
        energies = energy_of(*projected.values()) * energy_of(*matched.values())
        assert product**2 == pytest.approx(energies, rel=1e-4)  # the same direction
        for arm in ("projected", "random_subspace"):
            assert arms[arm].transform.bases[layer].shape[1] == 4
        random = energy_of(*found["random_subspace"].values())
        assert random != pytest.approx(energy_of(*projected.values()), rel=1e-3)


def energy_kept(change, Q: torch.Tensor) -> float:
    """The share of layer 1's energy that a basis keeps."""
    axes = residual_axes(change, [1], len(Q)).items()
    found = [energy_along(change, name, axis, Q) for name, axis in axes if axis]
    return sum(float(along.sum()) for _, along in found) / sum(energy for energy, _ in found)


def test_the_smallest_set_reaches_the_share_and_one_feature_less_does_not(change):
    half, whole = (
        scalpel_plan("fewest_features", change, {1: 1.0}, share=share).transform.bases[1] for share in (0.5, 1.0)
    )  # fmt: skip
    assert energy_kept(change, half) >= 0.5 > energy_kept(change, half[:, :-1])
    assert whole.shape == (16, 16)
    assert energy_kept(change, whole) == pytest.approx(1.0)


def test_a_hybrid_is_raw_where_it_was_selected(change, pair):
    plan = scalpel_plan("hybrid", change, {1: 1.0}, layers=range(3), share=0.3)
    tuned = stored(pair[1])
    model = make("llama untied")
    with applied(model, change, plan):
        live = live_tensors(model)
        for stored_name, tensor in tuned.items():
            name = parse_name(stored_name)
            if name.layer == 1 or (name.layer is not None and "proj" in stored_name):
                assert torch.equal(live[name.canonical], tensor) == (name.layer == 1)
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
        alone = scalpel_plan(arm, change, {1: 1.0, 2: 0.5}, **options)
        described = together[arm].to_json()
        assert alone.to_json() == described
        made = FeatureProjection.from_description(described["transform"], together[arm].transform.tensors())
        assert EditPlan.from_json(described, transform=made).to_json() == described


def test_no_factor_makes_nothing_large(change):
    with pytest.raises(StethoscopeError, match="layers 1, 2"):
        scalpel_plans(["projected_energy_matched"], change, BOTH, lambda _: torch.zeros(2, 16), features=2)
