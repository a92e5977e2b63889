"""What the report reads of each saved result, as validated data.

The stages' own classes import torch, which takes longer than the whole report; these hold the fields that are shown
and ignore the rest. They validate from a saved file and from the stages' objects alike.
"""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from stethoscope.artifacts import Provenance
from stethoscope.errors import StethoscopeError

SCHEMA = 1


def read_json(path: Path) -> Any:
    """The value that a file holds.

    Raises:
        StethoscopeError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StethoscopeError(f"`{path}` is missing", hint="run the stage that writes it first") from error
    except ValueError as error:
        raise StethoscopeError(f"`{path}` is not JSON: {error}") from error


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", from_attributes=True, allow_inf_nan=False)


# typing.Self would say this better, but beartype cannot check it in a class that is not decorated as a whole.
_AnyFile = TypeVar("_AnyFile", bound="_File")


class _File(_Shown):
    provenance: Provenance | None = None

    @classmethod
    def of(cls: type[_AnyFile], result: Any) -> _AnyFile:
        """The shown part of a stage's result, or of what is one already."""
        return result if isinstance(result, cls) else cls.model_validate(result)

    @classmethod
    def load(cls: type[_AnyFile], path: Path) -> _AnyFile:
        """Read a saved result.

        Raises:
            StethoscopeError: the file is missing, damaged, or of another schema version.
        """
        value = read_json(path)
        found = value.get("schema_version", value.get("schema")) if isinstance(value, dict) else None
        if found != SCHEMA:
            raise StethoscopeError(
                f"`{path}` has schema version `{found}`, this version reads `{SCHEMA}`",
                hint="run its stage again with this version of stethoscope",
            )
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise StethoscopeError(f"`{path}` does not have the expected form", problems=problems) from error

    @classmethod
    def find(cls: type[_AnyFile], path: Path) -> _AnyFile | None:
        """As `load`, and None where there is no such file."""
        return cls.load(path) if path.exists() else None


class Health(_Shown):
    variance_explained: float | None
    l0: float | None
    dead: float | None
    dense: float | None
    encoding_error: float | None = None


class Feature(_Shown):
    feature: int
    target_rate: float
    control_rate: float
    target_mass: float
    control_mass: float


class Layer(_Shown):
    layer: int
    score: float
    null: float
    excess: float
    interval: tuple[float, float]
    z: float
    p: float
    p_familywise: float
    rank: int | None = None
    stability: float | None = None
    increment: float
    increment_z: float | None = None
    against: str = "control"
    health: dict[str, Health]
    flag: str | None
    features: tuple[Feature, ...]

    @property
    def null_deviation(self) -> float:
        """Standard deviation of the permutation null, which the saved z holds."""
        return abs(self.excess / self.z) if self.z else 0.0


class CorpusSize(_Shown):
    documents: int
    blocks: int
    tokens: int
    sinks: int


class Diagnosis(_File):
    score: str
    corpora: dict[str, CorpusSize]
    layers: tuple[Layer, ...]
    warnings: tuple[str, ...] = ()

    @property
    def controls(self) -> list[str]:
        """The corpora that the target was compared with."""
        return [name for name in self.corpora if name != "target"]


class Context(_Shown):
    document: int
    before: str
    token: str
    after: str
    activation: float


class FeatureEvidence(_Shown):
    feature: int
    contexts: dict[str, tuple[Context, ...]]
    promotes: tuple[str, ...] | None = None
    link: str | None = None


class LayerEvidence(_Shown):
    layer: int
    features: tuple[FeatureEvidence, ...]


class Evidence(_File):
    documents: dict[str, int]
    layers: tuple[LayerEvidence, ...]


class Claim(_File):
    """Whether the items were new to the choice of layers."""

    kind: str
    seen_items: dict[str, tuple[int, ...]]


class CalibrationPoint(_Shown):
    coefficients: dict[int, float]
    threshold: float | None
    target_gain: float
    target_error: float
    control_cost: float
    control_error: float
    on_front: bool


class Calibration(_File):
    points: tuple[CalibrationPoint, ...]
    choice: int
    rule: str
    reason: str
    forwards: float


class SetEffect(_Shown):
    layers: tuple[int, ...]
    target_gain: float
    control_cost: float


class Share(_Shown):
    share: float
    low: float
    high: float


class SetHearing(_Shown):
    effect: SetEffect
    overlap: float
    beaten: Share
    beaten_matched: Share | None = None


class Correlation(_Shown):
    rho: float | None
    low: float | None
    high: float | None


class ScoreHearing(_Shown):
    kind: str
    values: dict[int, float]
    gain: Correlation
    trade_off: Correlation
    sets: dict[int, SetHearing]


class RandomSets(_Shown):
    equal_size: tuple[SetEffect, ...]
    matched: dict[str, tuple[SetEffect, ...]]


class Hearing(_File):
    """Every score against the true effects of layers, with one control."""

    scores: dict[str, ScoreHearing]
    random: dict[int, RandomSets]
    documents: dict[str, int]

    def size(self, wanted: int) -> int:
        """The size of set that was judged and is nearest to the one wanted."""
        return min(self.random, key=lambda k: (abs(k - wanted), k))


class Choice(_Shown):
    layer: int
    chosen: bool
    reason: str


class Selection(_File):
    policy: str
    layers: tuple[int, ...]
    choices: tuple[Choice, ...]
    warnings: tuple[str, ...] = ()


class Plan(_Shown):
    """An arm's edit: coefficients by layer and kind of module, and that of every tensor not spoken of."""

    layers: dict[int, dict[str, float]] = {}
    default: float = 0.0


class LayerEnergy(_Shown):
    layer: int
    energy: float
    share: float


class Edits(_File):
    plans: dict[str, Plan | None]
    energy: tuple[LayerEnergy, ...] = ()
    warnings: tuple[str, ...] = ()


class Draws(_Shown):
    low: float
    high: float


class Kept(_Shown):
    share: float
    chance: float
    random_features: Draws
    over_chance: float
    interval: tuple[float, float] | None


class Curve(_Shown):
    features: tuple[int, ...]
    share: tuple[float, ...]
    chance: tuple[float, ...]
    needed: dict[str, int | None]


class Written(_Shown):
    share: float
    chance: float


class TensorGeometry(_Shown):
    overlap: float | None
    effective_rank: float | None


class LayerGeometry(_Shown):
    layer: int
    features: int
    rank: int
    kept: Kept
    functional: dict[str, float]
    functional_chance: dict[str, float]
    curve: Curve
    written: Written | None
    tensors: tuple[TensorGeometry, ...]


class Geometry(_File):
    """What features' directions keep of the task vector, beside chance."""

    layers: tuple[LayerGeometry, ...]
    kinds: dict[str, Kept]
    total: Kept
    tokens: dict[str, int]
    draws: int
    verdict: str


class Difference(_Shown):
    """Mean of b - a with its interval, which is None where it is undefined."""

    n: int
    difference: float
    low: float | None
    high: float | None
    reason: str | None = None

    @property
    def clear(self) -> bool:
        """Whether the interval exists and leaves out 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


class Unpaired(_Shown):
    statistic: float | None
    p_value: float | None


class McNemar(_Shown):
    b: int
    c: int
    p_value: float


class NonInferiority(_Shown):
    shown: bool | None
    smallest_margin: float | None


class Flips(_Shown):
    gained: dict[str, int]
    lost: dict[str, int]


class TaskContrast(_Shown):
    task: str
    in_family: bool
    n: int
    accuracy_a: float
    accuracy_b: float
    unpaired: Unpaired | None
    mcnemar: McNemar | None
    p_adjusted: float | None
    difference: Difference
    non_inferiority: NonInferiority
    smallest_detectable_gain: float | None
    flips: Flips | None = None


class Contrast(_Shown):
    """Arm ``b`` against arm ``a``."""

    a: str
    b: str
    tasks: tuple[TaskContrast, ...]
    pooled: Difference
    pooled_mcnemar: McNemar | None
    loss: Difference | None
    target_loss: Difference | None = None
    verdict: str

    def task(self, name: str) -> TaskContrast | None:
        """The contrast on one task, if there is one."""
        return next((t for t in self.tasks if t.task == name), None)


class Accuracy(_Shown):
    task: str
    arm: str
    n: int
    accuracy: float


class Comparison(_File):
    baseline: str
    family: tuple[str, ...]
    controls: tuple[str, ...]
    alpha: float
    margin: float
    adjustment: str
    accuracy: tuple[Accuracy, ...]
    contrasts: tuple[Contrast, ...]

    @property
    def arms(self) -> list[str]:
        """Every arm: the baseline, the selected layers, then the others in the order in which they were run."""
        run = list(dict.fromkeys(row.arm for row in self.accuracy))
        first = [arm for arm in (self.baseline, "selected") if arm in run]
        return list(dict.fromkeys([*first, *run]))

    def contrast(self, b: str, a: str | None = None) -> Contrast | None:
        """Arm ``b`` against arm ``a`` (the baseline if not given), if they were compared."""
        wanted = (a or self.baseline, b)
        return next((c for c in self.contrasts if (c.a, c.b) == wanted), None)


def is_random(arm: str) -> bool:
    """Whether an arm is one of the random layer sets."""
    return arm.startswith("random_layers")
