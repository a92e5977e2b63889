"""Arms beside a selection: which there are, and why there are not others."""

from itertools import combinations

import pytest

from stethoscope.selection.arms import CONTROL_ARMS, NoOthersError, control_plan, mean_coefficient, random_layers

ENERGY = {0: 4.0, 1: 1.0, 2: 3.0, 3: 2.0}
EXCESS = {0: 0.4, 1: 0.1, 2: 0.3, 3: 0.2}


@pytest.mark.parametrize("arm", CONTROL_ARMS)
def test_no_arm_is_the_selected_edit_itself(arm):
    with pytest.raises(NoOthersError):
        control_plan(arm, dict.fromkeys(ENERGY, 0.7), energy=ENERGY, excess=EXCESS)


def test_every_layer_at_coefficients_of_its_own_leaves_one_for_all():
    chosen = {0: 1.0, 1: 0.0, 2: 0.0, 3: 0.0}
    plan = control_plan("scaled", chosen, energy=ENERGY, excess=EXCESS)
    (coefficient,) = {c for kinds in plan.layers.values() for c in kinds.values()}
    assert coefficient == pytest.approx(0.4**0.5)


def test_an_edit_that_changes_nothing_has_no_others_of_its_energy():
    for energy in ({0: 0.0, 1: 3.0}, {0: 0.0, 1: 0.0}):  # of an adapter for other layers, and for none
        with pytest.raises(NoOthersError):
            control_plan("scaled", {0: 1.0}, energy=energy, excess=EXCESS)


def test_the_layers_that_stand_out_least_are_others_only_if_not_all_that_may_be_were_chosen():
    believed = {0: 0.4, 2: 0.3}
    assert control_plan("bottom_layers", {0: 1.0}, energy=ENERGY, excess=believed).selected_layers == (2,)
    with pytest.raises(NoOthersError, match="no other 2 layers"):
        control_plan("bottom_layers", {0: 1.0, 2: 1.0}, energy=ENERGY, excess=believed)


def test_random_sets_are_as_many_as_there_are():
    drawn = random_layers({0: 1.0, 3: 1.0}, 4, 3, seed=0)
    assert len({tuple(layers) for layers in drawn}) == 3
    every = random_layers({0: 1.0, 3: 1.0}, 4, 100, seed=0)
    assert [tuple(layers) for layers in every] == [pair for pair in combinations(range(4), 2) if pair != (0, 3)]
    with pytest.raises(NoOthersError):
        random_layers(dict.fromkeys(range(4), 1.0), 4, 1, seed=0)


def test_one_coefficient_is_its_own_mean():
    assert mean_coefficient(dict.fromkeys(range(3), 0.7)) == 0.7  # summed and divided it is 0.6999999999999998
    assert mean_coefficient({0: 0.5, 1: 1.0}) == 0.75
