"""Projections with known answers: whole, nothing, exact parts, and noise at the chance level."""

import pytest
import torch

from stethoscope.editing.projection import FeatureProjection, feature_basis

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
