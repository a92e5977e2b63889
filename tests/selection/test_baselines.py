"""Base against tuned, checked against plain loops over their activations."""

import pytest
import torch
from world import Planted, exact_sae

from stethoscope.checkpoints.open import open_task_vector
from stethoscope.editing.apply import applied
from stethoscope.editing.plan import EditPlan
from stethoscope.models.sites import hook_point, read_activations
from stethoscope.selection.baselines import residual_shift, tuned_shift

D = 32


@torch.no_grad()
def activations(made: Planted, layer: int, site: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per document, a site under the base and under tuned."""
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    point = {0: hook_point(made.model, layer, site)}
    for batch in made.texts["target"]:
        for row, document in enumerate(batch.documents):
            ids = batch.input_ids[row][batch.attention_mask[row]][None]
            base = read_activations(made.model, point, ids)[0][0]
            with applied(made.model, made.task_vector, EditPlan.everything()):
                found[document] = (base, read_activations(made.model, point, ids)[0][0])
    return [found[document] for document in sorted(found)]


def test_residual_shift_is_a_standardised_difference(planted):
    found = residual_shift(planted.model, planted.task_vector, planted.texts["target"])
    assert list(found) == list(range(6))
    for layer in (0, 3, 5):
        base, tuned = (torch.cat(x).double() for x in zip(*activations(planted, layer, "resid_post"), strict=True))
        pooled = (base.var(0, unbiased=False) + tuned.var(0, unbiased=False)) / 2
        expected = ((tuned.mean(0) - base.mean(0)) ** 2 / pooled).mean().sqrt()
        assert found[layer] == pytest.approx(float(expected), rel=1e-4)


def test_a_fine_tune_that_changed_nothing_shifts_nothing(planted):
    none = open_task_vector(planted.task_vector.base, planted.task_vector.base.path)
    assert not any(residual_shift(planted.model, none, planted.texts["target"]).values())
    found = tuned_shift(planted.model, none, {2: exact_sae()}, {2: {0: 1.0}}, planted.texts["target"])
    assert found == {2: 0}


def test_an_sae_that_never_fires_has_no_shift(planted):
    dead = exact_sae()
    dead.b_enc.data -= 1e6
    saes, features = {1: exact_sae(), 2: dead}, {1: {3: 1.0}, 2: {3: 1.0}}
    found = tuned_shift(planted.model, planted.task_vector, saes, features, planted.texts["target"])
    assert found[2] == 0 != found[1]


@pytest.mark.parametrize("site", ["resid_post", "mlp_out"])
def test_tuned_shift_sums_the_chosen_features(planted, site):
    features = {1: {3: 2.0, D + 7: 0.5}, 4: {}}
    found = tuned_shift(
        planted.model, planted.task_vector, {1: exact_sae(), 4: exact_sae()}, features, planted.texts["target"],
        site=site,
    )  # fmt: skip
    moved = mass = 0.0
    for base, tuned in activations(planted, 1, site):
        change = 2.0 * (tuned[:, 3].relu() - base[:, 3].relu()) + 0.5 * ((-tuned[:, 7]).relu() - (-base[:, 7]).relu())
        moved, mass = moved + float(change.sum()), mass + float(base.abs().sum())
    assert found == {1: pytest.approx(moved / mass, rel=1e-3, abs=1e-5), 4: 0}
