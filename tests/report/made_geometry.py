"""A geometry of thirty layers by the stage's own classes, and a comparison of every arm that cuts."""

import numpy as np
import torch
from made_results import make_comparison

from stethoscope.artifacts import Provenance
from stethoscope.editing.geometry import TensorEnergy, energy_curve, sum_energies
from stethoscope.results.comparison import Comparison
from stethoscope.results.geometry import Geometry, LayerGeometry, TensorGeometry, Written

WIDTH, FEATURES, CHOSEN = 100, 300, 5
# Arms by what they take off the loss of target text, and what they add to that of control text.
CUT = {
    "base": (0.0, 0.0),
    "selected": (0.4, 0.05),
    "projected": (0.04, 0.01),
    "projected_energy_matched": (0.3, 0.05),
    "random_subspace_energy_matched": (0.1, 0.05),
    "complement": (0.38, 0.04),
    "hybrid": (0.3, 0.2),
    "fewest_features": (0.39, 0.0),
}


def make_geometry(*, layers: int = 30) -> Geometry:
    rng = np.random.default_rng(0)
    made, energies = [], []
    for layer in range(layers):
        shares = torch.from_numpy(rng.dirichlet(np.linspace(3, 0.5, WIDTH)))
        energy = TensorEnergy(
            layer=layer, kind="mlp", energy=10.0, kept=10 * float(shares[:CHOSEN].sum()), chance=CHOSEN / WIDTH,
            features=10 * rng.normal(0.05, 0.004, 50), bases=10 * rng.normal(0.05, 0.004, 50),
        )  # fmt: skip
        energies.append(energy)
        tensor = TensorGeometry(
            name=f"layers.{layer}.mlp.down_proj.weight", kind="mlp", writes=True, kept=sum_energies([energy], rng),
            functional={"target": 0.1, "control": 0.08}, functional_chance={"target": 0.05, "control": 0.05},
            angles=(40.0, 80.0), overlap=0.07, effective_rank=12.5, stable_rank=3.0,
        )  # fmt: skip
        made.append(
            LayerGeometry(
                layer=layer, features=CHOSEN, rank=CHOSEN, kept=tensor.kept, unprojected=0.0,
                functional=tensor.functional, functional_chance=tensor.functional_chance,
                curve=energy_curve(shares, torch.arange(WIDTH), FEATURES, WIDTH),
                written=Written(share=0.06, chance=0.05), tensors=(tensor,),
            )
        )  # fmt: skip
    total = sum_energies(energies, rng)
    return Geometry(
        provenance=Provenance(), draws=50, leading=16, tokens={"target": 512, "control": 512}, layers=tuple(made),
        kinds={"mlp": total}, total=total, verdict=total.verdict,
    )  # fmt: skip


def make_cuts(**changed: tuple[float, ...]) -> Comparison:
    """Every cutting arm, compared by the real code.

    An arm is changed to a fall of target loss, a rise of control loss, and a gain of accuracy if that is not a quarter
    of the first.
    """
    effects: dict[str, tuple[float, ...]] = CUT | changed
    return make_comparison(
        arms={arm: (right[0] if right else gain / 4, harm) for arm, (gain, harm, *right) in effects.items()},
        subjects={"algebra": 0.4},
        items=40,
        target={arm: gain for arm, (gain, *_) in effects.items()},
        pairs=None,
    )
