"""Geometry with known answers: a change planted in a feature subspace, noise, known spectra, LoRA and its product."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_projection import GPT2, LLAMA
from world import make, save_adapter, save_pair

from stethoscope.artifacts import Provenance
from stethoscope.checkpoints.names import parse_name
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.change import DrawnSpans, LinearChange
from stethoscope.editing.geometry import energy_curve, measure_geometry
from stethoscope.editing.residual_axis import residual_axes
from stethoscope.editing.subspace import FeatureProjection, LayerFeatures, nested_basis, principal_angles
from stethoscope.errors import SAEError, StethoscopeError
from stethoscope.results.geometry import Geometry
from stethoscope.text.tokens import TokenBatch

D, FEATURES = 16, 24


def directions(layer: int) -> torch.Tensor:
    return torch.randn(FEATURES, D, generator=torch.Generator().manual_seed(layer))


def features(chosen: int = 4, *, encoder: torch.Tensor | None = None) -> dict:
    """Features of layers 0 and 1, in an order that is not that of their numbers."""

    def load(layer: int) -> LayerFeatures:
        decoder = directions(layer)
        read = decoder.flip(0) if encoder is None else encoder
        return LayerFeatures(decoder=decoder, encoder=read, order=range(FEATURES)[::-1], chosen=chosen)

    return {layer: lambda layer=layer: load(layer) for layer in (0, 1)}


def basis(layer: int, chosen: int = 4) -> torch.Tensor:
    return nested_basis(directions(layer).flip(0)[:chosen])[0]


def save_change(folder: Path, change_of) -> TaskVector:
    """A float32 Llama and a tuned one that differs by ``change_of(name, shape, layer)``."""
    model = make("llama untied", dtype=torch.float32)
    model.save_pretrained(folder / "base")
    for name, tensor in model.named_parameters():
        parsed = parse_name(name)
        if parsed.layer in (0, 1) and tensor.ndim == 2:
            tensor.add_(change_of(parsed.canonical, tensor.shape, parsed.layer))
    model.save_pretrained(folder / "tuned")
    return open_task_vector(open_checkpoint(folder / "base"), folder / "tuned")


@pytest.fixture(scope="module")
def changed(tmp_path_factory) -> TaskVector:
    """Layer 0's change lies whole in its features' span; layer 1's is noise."""
    torch.manual_seed(0)

    def change(name: str, shape: torch.Size, layer: int) -> torch.Tensor:
        noise = torch.randn(shape)
        return FeatureProjection(bases={0: basis(0)}).apply(name, noise) if layer == 0 else noise

    return save_change(tmp_path_factory.mktemp("planted"), change)


def batch() -> TokenBatch:
    ids = torch.randint(3, 48, (4, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[3, 6:] = False
    return TokenBatch(documents=(0, 1, 2, 3), input_ids=ids, attention_mask=mask, countable=mask, predicted=mask)


@pytest.fixture(scope="module")
def measured(changed) -> Geometry:
    model = make("llama untied", dtype=torch.float32)
    texts = {"target": [batch(), batch()], "control": [batch()]}
    return measure_geometry(
        changed, features(), provenance=Provenance(seed=1), model=model, texts=texts, draws=60, leading=4, tokens=30
    )


def test_a_planted_change_is_kept_whole_and_noise_at_chance(measured):
    whole, noise = measured.layers
    assert (whole.rank, whole.features, whole.unprojected) == (4, 4, 0)
    assert whole.kept.share == pytest.approx(1, abs=1e-5)
    assert whole.kept.over_chance == pytest.approx(4, abs=1e-4)
    assert whole.kept.interval == pytest.approx((4, 4), abs=1e-4)
    assert whole.kept.p == pytest.approx(1 / 61)
    # 1664 values of noise along each of 16 directions on average
    assert noise.kept.share == pytest.approx(0.25, abs=0.04)
    assert noise.kept.chance == 0.25
    assert noise.kept.random_bases.low < noise.kept.share < noise.kept.random_bases.high
    assert noise.kept.interval[0] < 1 < noise.kept.interval[1]
    for drawn in (whole.kept.random_bases, noise.kept.random_bases):
        assert drawn.mean == pytest.approx(0.25, abs=0.04)


def test_sums_over_tensors_are_weighed_by_energy(measured):
    energies = [tensor.kept.energy for layer in measured.layers for tensor in layer.tensors]
    shares = [tensor.kept.share for layer in measured.layers for tensor in layer.tensors]
    assert measured.total.energy == pytest.approx(sum(energies))
    assert measured.total.share == pytest.approx(np.average(shares, weights=energies))
    assert set(measured.kinds) == {"attention", "mlp"}
    assert sum(kind.energy for kind in measured.kinds.values()) == pytest.approx(sum(energies))


def test_functional_energy_is_that_of_the_projected_matrix_on_its_own_inputs(measured, changed):
    whole, noise = measured.layers
    assert whole.functional == pytest.approx({"target": 1, "control": 1}, abs=1e-4)
    assert 0 < noise.functional["target"] < 0.7
    assert 0 < noise.functional_chance["target"] < 0.7
    assert measured.tokens == {"target": 30, "control": 30}

    # all 42 tokens of one batch, against the model's own modules
    model = make("llama untied", dtype=torch.float32)
    made = measure_geometry(changed, features(), provenance=Provenance(), model=model, texts={"t": [batch()]}, draws=2)
    inputs = {}
    block = model.model.layers[1]
    for module, name in ((block.self_attn.k_proj, "self_attn.k_proj"), (block.mlp.down_proj, "mlp.down_proj")):
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
    model(batch().input_ids)
    projection = FeatureProjection(bases={1: basis(1)})
    for module, x in inputs.items():
        name = f"layers.1.{module}.weight"
        delta = changed.delta(name)
        x = x[batch().countable]
        expected = (x @ projection.apply(name, delta).T).square().sum() / (x @ delta.T).square().sum()
        found = next(tensor for tensor in made.layers[1].tensors if tensor.name == name)
        assert found.functional["t"] == pytest.approx(float(expected), rel=1e-3)


def test_angles_are_zero_where_the_change_was_planted(measured):
    for tensor in measured.layers[0].tensors:
        assert max(tensor.angles) < 0.1
        assert tensor.overlap == pytest.approx(1, abs=1e-4)
        assert tensor.effective_rank <= 4 + 1e-3
    for tensor in measured.layers[1].tensors:
        assert len(tensor.angles) == 4
        assert max(tensor.angles) > 30
        assert 1 <= tensor.stable_rank <= tensor.effective_rank <= 16


def test_the_curve_ends_whole_and_knows_how_many_are_needed(measured):
    whole, noise = measured.layers
    assert whole.curve.features == tuple(range(1, FEATURES + 1))
    assert whole.curve.share[3:] == pytest.approx([1.0] * 21, abs=1e-5)
    assert whole.curve.needed["99"] == 4
    assert noise.curve.share[3] == pytest.approx(noise.kept.share)
    assert noise.curve.share[15:] == pytest.approx([1.0] * 9, abs=1e-5)
    assert noise.curve.chance[:17] == pytest.approx([*(np.arange(1, 17) / 16), 1.0])
    assert 6 <= noise.curve.needed["50"] <= 10


def test_a_curve_in_numbers():
    curve = energy_curve(torch.tensor([0.4, 0.2, 0.3], dtype=torch.float64), torch.tensor([0, 2, 3]), 5, 10)
    assert curve.share == pytest.approx((0.4, 0.4, 0.6, 0.9, 0.9))
    assert curve.chance == pytest.approx((0.1, 0.1, 0.2, 0.3, 0.3))
    assert curve.needed == {"50": 3, "90": 4, "99": None}
    long = energy_curve(torch.full((1000,), 1e-3, dtype=torch.float64), torch.arange(1000), 1000, 1000)
    assert len(long.features) == 128
    assert (long.features[0], long.features[-1], long.needed["90"]) == (1, 1000, 900)


def test_what_is_written_into_what_the_features_read(tmp_path):
    """Writers aim at the encoder directions and readers elsewhere: only the former is alignment."""
    torch.manual_seed(0)
    encoder = torch.randn(FEATURES, D)
    aimed = FeatureProjection(bases={layer: nested_basis(encoder.flip(0)[:4])[0] for layer in (0, 1)})
    writers = ("o_proj.weight", "down_proj.weight")

    def change(name: str, shape: torch.Size, _layer: int) -> torch.Tensor:
        noise = torch.randn(shape)
        return aimed.apply(name, noise) if name.endswith(writers) else noise - aimed.apply(name, noise)

    planted = save_change(tmp_path, change)
    made = measure_geometry(planted, features(encoder=encoder), provenance=Provenance(), draws=5)
    for layer in made.layers:
        assert layer.written.share == pytest.approx(1, abs=1e-5)
        assert layer.written.chance == 0.25
        assert layer.functional == {}


def test_spectra_and_angles_in_closed_form(tmp_path):
    values = torch.tensor([8.0, 4.0, 2.0, 2.0])
    torch.manual_seed(0)
    left = {n: torch.linalg.qr(torch.randn(n, 4))[0] for n in (8, 16, 32)}

    def change(_name: str, shape: torch.Size, _layer: int) -> torch.Tensor:
        return left[shape[0]] @ torch.diag(values) @ left[shape[1]].T

    made = save_change(tmp_path, change)
    for name, axis in residual_axes(made, [0], D).items():
        if axis is None:
            continue
        spectrum = LinearChange.of(made, name, axis).spectrum(2)
        assert spectrum.stable_rank == pytest.approx(88 / 64, rel=1e-4)
        shares = values / values.sum()
        assert spectrum.effective_rank == pytest.approx(float((-(shares * shares.log()).sum()).exp()), rel=1e-3)
        assert spectrum.leading.shape == (D, 2)
        assert principal_angles(spectrum.leading, left[D][:, :2]) == pytest.approx([0, 0], abs=1e-2)
    plane = torch.eye(D)[:, :2]
    turned = torch.stack([plane[:, 0], np.cos(0.3) * plane[:, 1] + np.sin(0.3) * torch.eye(D)[:, 5]], 1)
    assert principal_angles(plane, turned) == pytest.approx([0, 0.3], abs=1e-3)


def adapter(folder: Path, layout: str, options: dict) -> TaskVector:
    save_adapter(make(layout, dtype=torch.float32), folder, r=3, **options)
    return open_task_vector(open_checkpoint(folder / "base"), folder / "adapter")


@pytest.mark.parametrize(("layout", "options"), [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_lora_factors_give_what_the_product_gives(layout, options, tmp_path):
    change = adapter(tmp_path, layout, options)
    for name, axis in residual_axes(change, [1], D).items():
        low = LinearChange.of(change, name, axis)
        assert low.left is not None
        delta = change.delta(name)
        linear = delta if axis.dim == (0 if axis.writes else 1) else delta.T
        full = LinearChange(left=None, right=linear, writes=axis.writes)
        x = torch.randn(5, linear.shape[1])
        torch.testing.assert_close(low.outputs(x), full.outputs(x), rtol=1e-4, atol=1e-4)
        one, two = low.spectrum(3), full.spectrum(3)
        assert one.effective_rank == pytest.approx(two.effective_rank, rel=2e-2)
        assert one.stable_rank == pytest.approx(two.stable_rank, rel=1e-3)
        assert np.cos(principal_angles(one.leading, two.leading)) == pytest.approx(np.ones(3), abs=1e-3)


def test_a_lora_of_a_rank_above_the_hidden_size(tmp_path):
    save_adapter(make("llama untied", dtype=torch.float32), tmp_path, r=D + 4, target_modules=["up_proj", "down_proj"])
    change = open_task_vector(open_checkpoint(tmp_path / "base"), tmp_path / "adapter")
    whole = measure_geometry(change, features(FEATURES), draws=3)
    assert whole.total.share == pytest.approx(1, abs=1e-3)
    assert whole.layers[0].curve.share[-1] == pytest.approx(1, abs=1e-3)


def test_gpt2_is_measured_too(tmp_path):
    change = adapter(tmp_path, *GPT2)
    model = make("gpt2", dtype=torch.float32)
    made = measure_geometry(change, features(), provenance=Provenance(), model=model, texts={"t": [batch()]}, draws=3)
    assert [len(layer.tensors) for layer in made.layers] == [4, 4]
    assert all(0 < tensor.functional["t"] <= 1.01 for layer in made.layers for tensor in layer.tensors)


def test_routers_are_measured_too(tmp_path):
    base, tuned = save_pair("mixtral", tmp_path, dtype=torch.float32)
    change = open_task_vector(open_checkpoint(base), tuned)
    model = make("mixtral", dtype=torch.float32)
    made = measure_geometry(change, features(), model=model, texts={"t": [batch()]}, draws=3)
    routers = [tensor for layer in made.layers for tensor in layer.tensors if tensor.name.endswith("gate.weight")]
    assert len(routers) == 2
    assert all(0 < tensor.functional["t"] <= 1.01 for tensor in routers)


def test_the_same_seed_gives_the_same_file_and_it_loads(measured, changed, tmp_path):
    one = measure_geometry(changed, features(), provenance=Provenance(seed=3), draws=5)
    two = measure_geometry(changed, features(), provenance=Provenance(seed=3), draws=5)
    assert one == two
    measured.save(tmp_path)
    assert Geometry.load(tmp_path) == measured


def test_the_verdict_says_how_it_compares_with_chance(measured):
    whole, noise = (layer.kept.verdict for layer in measured.layers)
    assert measured.verdict == measured.total.verdict
    assert f"keep {measured.total.share:.1%}" in measured.verdict
    assert ", no more than the 25.0% of random" in noise
    assert ", more than the 25.0% of random" in whole


def test_a_change_elsewhere_is_said(tmp_path):
    made = save_change(tmp_path, lambda _name, shape, _layer: torch.zeros(shape))
    with pytest.raises(StethoscopeError, match="changes no matrix"):
        measure_geometry(made, features(), provenance=Provenance(), draws=2)


def test_features_of_something_else_are_refused(changed):
    found = LayerFeatures(decoder=torch.randn(8, 12), encoder=torch.randn(8, 12), order=range(8), chosen=2)
    with pytest.raises(SAEError, match="12 values to write and 12 to read, it has 16"):
        measure_geometry(changed, {0: lambda: found}, provenance=Provenance(), draws=2)


@pytest.mark.parametrize("shape", [(400, 500), (500, 400), (800, 900), (900, 800)])
@pytest.mark.parametrize("writes", [True, False])
def test_spectra_of_large_matrices_are_those_of_their_svd(shape, writes):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    spectrum = LinearChange(left=None, right=matrix, writes=writes).spectrum(3)
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    shares = values / values.sum()
    assert spectrum.effective_rank == pytest.approx(float(torch.special.entr(shares).sum().exp()), rel=1e-6)
    assert spectrum.stable_rank == pytest.approx(float((values / values[0]).square().sum()), rel=1e-5)
    assert principal_angles(spectrum.leading, u[:, :3] if writes else v[:3].T) == pytest.approx(np.zeros(3), abs=1e-3)


def test_drawn_spans_keep_what_their_bases_keep():
    rows = torch.randn(9, D, generator=torch.Generator().manual_seed(0))
    rows[4], rows[7] = -2 * rows[1], 0
    spans = DrawnSpans.draw(rows, 6, 30, np.random.default_rng(0))
    assert any(len({4, 7, 1} & set(one.tolist())) > 1 for one in spans.sets)
    for change in (torch.randn(5, D), torch.randn(40, D)):
        linear = LinearChange(left=None, right=change, writes=False)
        bases = [nested_basis(spans.pool[one])[0] for one in spans.sets]
        expected = [float((change.double() @ Q).square().sum()) for Q in bases]
        assert spans.energies(linear) == pytest.approx(expected, rel=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_measures_what_the_cpu_measures(changed):
    found = {}
    for device in ("cpu", "cuda"):
        model = make("llama untied", dtype=torch.float32).to(device)
        texts = {"t": [batch()]}
        found[device] = measure_geometry(changed, features(), model=model, texts=texts, draws=5, tokens=30)
    for one, other in zip(found["cpu"].layers, found["cuda"].layers, strict=True):
        assert one.kept.share == pytest.approx(other.kept.share, rel=1e-5)
        assert one.curve.share == pytest.approx(other.curve.share, rel=1e-4)
        assert one.functional == pytest.approx(other.functional, rel=1e-3)
        assert one.kept.random_features.mean == pytest.approx(other.kept.random_features.mean, rel=1e-4)
