"""Study 4b: what breaks the edited model. Coefficients, few bits, and two edits after each other, by loss.

    python studies/edits.py [--vectors runs/studies] [--only coefficient bits two]

Needs `choice.py` for all vectors. Parts done before are kept. Writes `outcomes/edits.parquet`, a row per part, vector,
setting, arm, text and document, and `outcomes/undone.parquet`, what undoing gave back and what was said.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from common import NAMES, TEXTS, Bench, arguments, loss_rows, resume, save
from torch import Tensor, nn

from stethoscope.artifacts import sha256_file
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.editing.patch import apply_patch
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.writer import write_edit
from stethoscope.errors import StethoscopeError
from stethoscope.evaluation.text_loss import document_losses
from stethoscope.models.load import load_model
from stethoscope.selection.arms import control_plan

PARTS = ("coefficient", "bits", "two")
COEFFICIENTS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
PAIRS = (("math_0", "words"), ("math_0", "code"), ("words", "math_0"))


def coefficients(bench: Bench) -> Iterator[dict[str, Any]]:
    """The selected layers, and all of them, at coefficients from a quarter to two."""
    layers = range(bench.base.layers)
    yield from bench.rows({"base": None}, part="coefficient", setting="0")
    for c in COEFFICIENTS:
        plans = {
            "selected": EditPlan.for_layers(list(bench.chosen), coefficient=c),
            "all": EditPlan.for_layers(layers, coefficient=c),
        }
        yield from bench.rows(plans, part="coefficient", setting=f"{c:g}")


def few_bits(bench: Bench) -> Iterator[dict[str, Any]]:
    """Base and edited models with their matrices rounded, as weight-only quantisation does."""
    plans = {
        "base": None,
        "selected": EditPlan.for_layers(bench.chosen),
        "scaled": control_plan("scaled", bench.chosen, energy=bench.task_vector.energy_by_layer(), excess={}),
        "tuned": EditPlan.everything(),
    }
    for setting, bits, group in (("16 bits", 0, 0), ("8 bits, by row", 8, 0), ("4 bits, groups of 64", 4, 64)):
        for arm, plan in plans.items():
            for text in TEXTS:
                found = bench.losses(text, plan, partial(rounded, bits=bits, group=group))
                yield from loss_rows(found, part="bits", vector=bench.vector, setting=setting, arm=arm, text=text)


@contextmanager
def rounded(model: nn.Module, *, bits: int, group: int) -> Iterator[None]:
    """Every matrix of the blocks rounded to nearest, symmetrically about 0, per row or group of a row's values."""
    before: dict[nn.Linear, Tensor] = {}
    for name, module in model.named_modules():
        if bits and isinstance(module, nn.Linear) and ".layers." in name:
            before[module] = module.weight.data
            values = module.weight.data.float().view(-1, group or module.in_features)
            step = values.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            module.weight.data = ((values / step).round() * step).view_as(module.weight).to(module.weight.dtype)
    try:
        yield
    finally:
        for module, weight in before.items():
            module.weight.data = weight


def two(benches: dict[str, Bench], undone: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A second vector's selected layers put into a checkpoint that has the first's, and both taken out again."""
    for first, second in PAIRS:
        one, other, setting = benches[first], benches[second], f"{first}, then {second}"
        plans = {name: EditPlan.for_layers(benches[name].chosen) for name in (first, second)}
        with tempfile.TemporaryDirectory() as made:
            at = {name: Path(made) / name for name in ("first", "second", "both", "first patch", "second patch")}
            write_edit(one.base, one.task_vector, plans[first], at["first"])
            write_edit(one.base, one.task_vector, plans[first], at["first patch"], kind="patch")
            write_edit(other.base, other.task_vector, plans[second], at["second"])
            base = open_checkpoint(at["first"])
            task_vector = open_task_vector(base, other.recipe.tuned)
            write_edit(base, task_vector, plans[second], at["both"])
            write_edit(base, task_vector, plans[second], at["second patch"], kind="patch")
            for arm in ("base", "first", "second", "both"):
                model = load_model(one.base.path if arm == "base" else at[arm])
                for text, (rows, starts) in {
                    f"held-out target of {first}": one.tokens[TEXTS[0]],
                    f"held-out target of {second}": other.tokens[TEXTS[0]],
                    TEXTS[1]: one.tokens[TEXTS[1]],
                }.items():
                    found = document_losses(model, rows, starts=starts)
                    yield from loss_rows(found, part="two", vector=first, setting=setting, arm=arm, text=text)
            for patch, edited, wanted in (
                ("second patch", "both", at["first"]),
                ("first patch", "both", at["second"]),  # out of order
                ("first patch", "first", one.base.path),
            ):
                out = Path(made) / f"{patch} of {edited}"
                row: dict[str, Any] = {"setting": setting, "patch": patch, "edited": edited, "said": None}
                try:
                    apply_patch(at[patch], at[edited], out, undo=True)
                except StethoscopeError as error:
                    row |= {"said": str(error).replace(f"{made}/", ""), "exact": None}
                else:
                    row["exact"] = _tensors(out) == _tensors(wanted)
                row["shared layers"] = len(set(one.chosen) & set(other.chosen))
                undone.append(row)


def _tensors(folder: Path) -> dict[str, str]:
    """The hash of every file of weights."""
    return {path.name: sha256_file(path) for path in sorted(folder.glob("*.safetensors"))}


if __name__ == "__main__":
    options = arguments(__doc__, PARTS).parse_args()
    benches = {name: Bench(name, options.vectors) for name in NAMES}

    def make(part: str) -> Iterator[dict[str, Any]]:
        """A part's rows; what undoing gave is saved beside them."""
        if part == "two":
            undone: list[dict[str, Any]] = []
            yield from two(benches, undone)
            save("undone", undone)
        else:
            measure = coefficients if part == "coefficient" else few_bits
            for name in ("math_0", "words"):
                yield from measure(benches[name])

    resume("edits", "part", PARTS, options.only, make)
