"""What to run, as validated data: a YAML file whose paths are relative to itself, every mistake reported at once."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from stethoscope.errors import RecipeError
from stethoscope.parsing import local_path, read_yaml, set_value

ScalpelArm = Literal[
    "projected", "projected_energy_matched", "complement", "random_subspace", "random_subspace_energy_matched",
    "hybrid", "fewest_features",
]  # fmt: skip
FilteredArm = Literal["recommended", "filtered", "selected_filtered"]
ArmName = Literal[
    "base", "tuned", "selected", "random_layers", "scaled", "norm_ranked", "bottom_layers", "random_matched",
    FilteredArm, ScalpelArm,
]  # fmt: skip
FILTERED_ARMS: tuple[FilteredArm, ...] = get_args(FilteredArm)
SCALPEL_ARMS: tuple[ScalpelArm, ...] = get_args(ScalpelArm)
ARMS: tuple[ArmName, ...] = ("base", "tuned", "selected", "random_layers", "scaled", "projected")
FEWEST_BLOCKS = 4  # of documents: fewer have so few relabellings that no layer could ever be significant at 5 %
ATTRIBUTION = "attribution"  # the score that needs the task vector
GENERAL, HELD_OUT = "general", "held-out target"  # names of the texts of `evaluate`
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
INPUTS = ("base", "tuned", "saes")
# Names that no text has, for all that decides a result has a name of its own: of the inputs, stages and settings.
TAKEN = (
    *INPUTS, "diagnose", "evidence", "calibrate", "select", "claim", "geometry", "filter", "passed", "recommend",
    "edit", "outcomes", "losses", "compare", "validate", "tradeoff", "report", "settings",
)  # fmt: skip


def _resolved(name: str, info: Any) -> str:
    """A path in the recipe's folder where that exists or the name is written as a path, else the name: a hub id."""
    if info.context is None:
        return name
    path = local_path(info.context, Path(name))
    written_as_path = name.startswith((".", "/", "~")) or path.suffix in (".jsonl", ".parquet", ".txt")
    return str(path) if written_as_path or path.exists() else name


PathOrHubId = Annotated[str, AfterValidator(_resolved)]
LocalPath = Annotated[Path, AfterValidator(lambda path, info: local_path(info.context, path) if info.context else path)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Text(_Section):
    """Documents in a file, a saved dataset or a dataset on the hub."""

    dataset: PathOrHubId
    """A .jsonl, .parquet or .txt file, a saved dataset's folder, or ``owner/name/config:split`` on the hub."""
    field: str = "text"
    """The field that holds each document: a text, or a chat as a list of messages."""
    split: str | None = None
    """The split to read, of a dataset that has several."""
    documents: int | None = Field(default=None, ge=1)
    """Maximum number of documents, from the top."""


class LossText(Text):
    """Text on which an arm's loss is measured."""

    prompt: str | None = None
    """A field with the text that precedes each document; its tokens do not count."""


class ProtectedText(Text):
    """Text on which the edit should change nothing."""

    weight: float = Field(default=1.0, gt=0)
    """Weight of its effects in the filter."""


class Select(_Section):
    """The policy that turns scores into a choice of layers."""

    policy: Literal["top_k", "spread", "threshold", "significant", "budget", "gap", "calibrated"] = "top_k"
    """The policy, see `selection.policies`."""
    k: int | None = Field(default=None, ge=1)
    """Number of layers, for ``top_k`` and ``spread``."""
    z: float = 3.0
    """Minimum excess in standard deviations of the null, for ``threshold``."""
    alpha: float = Field(default=0.05, gt=0, lt=1)
    """Family-wise significance level, for ``significant``."""
    share: float = Field(default=0.5, gt=0, le=1)
    """Share of the total excess to reach, for ``budget``."""
    include_flagged: bool = False
    """Include layers whose SAE has poor health."""

    @property
    def chooses_k(self) -> bool:
        """Whether the policy chooses exactly ``k`` layers."""
        return self.policy in ("top_k", "spread")

    @model_validator(mode="after")
    def _has_k(self) -> "Select":
        if self.chooses_k and self.k is None:
            raise ValueError(f"`{self.policy}` needs `k`, the number of layers")
        return self


class Calibrate(_Section):
    """The search for layers and coefficient by the loss on texts that no claim is tested on."""

    target: LossText
    """Other text that uses the skill; with a ``prompt``, only the loss of what follows it counts."""
    control: LossText
    """Other text that does not use it."""
    budget: float | None = Field(default=None, gt=0)
    """Share by which control loss may rise; without one, the policy ``calibrated`` sets a nat against a nat."""
    coefficients: tuple[Positive, ...] = Field(default=(0.25, 0.5, 0.75, 1.0, 1.25, 1.5), min_length=1)
    """Coefficients to try."""
    per_layer: bool = False
    """Tune one layer's coefficient at a time afterwards."""


class EditOptions(_Section):
    """The edit of the selected layers, and the filter that spares other text."""

    coefficient: float = 1.0
    """Factor of the task vector in the selected layers; negative removes the skill, and nothing is filtered then."""
    filter: Literal["auto", "none"] | Annotated[float, Field(ge=0)] = "auto"
    """The filter's strength: ``auto`` finds layers, coefficient and strength of a recommended edit together; a number
    fixes the strength; ``none`` makes no filter, and the edit is the raw change in the selected layers."""
    tokens: int = Field(default=20_000, ge=1)
    """Maximum tokens of each text for the filter, from the top; a fifth as many judge edits."""
    budget: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    """Nats per token by which a recommended edit may raise the loss on any other text; not with `calibrate.budget`."""
    forwards: int = Field(default=30, ge=3)
    """Forwards of the text that judges edits, for the search of the recommended one."""
    protect: dict[str, ProtectedText] = {}
    """Texts that the filter protects beside the control texts, by name."""


class Diagnose(_Section):
    """How SAE activations are collected and scored; permutations relabel blocks of documents."""

    block_size: int = Field(default=64, ge=1)
    """Documents in a block."""
    max_tokens: int = Field(default=1024, ge=8)
    """Documents are cut to this many tokens."""
    tokens: Literal["all", "assistant", "last"] = "all"
    """The tokens that count, in target and control: all, those of the assistant's messages, or each document's last."""
    permutations: int = Field(default=200, ge=19)
    """Relabellings for the null distribution; the smallest p is 1 / (permutations + 1)."""
    resamples: int = Field(default=200, ge=19)
    """Bootstrap draws of blocks, for intervals and the stability of ranks."""
    sae_memory_gb: float | None = Field(default=None, gt=0)
    """Memory for encoders; those that do not fit take another pass over the text. No limit by default."""
    skip_broken: bool = False
    """Leave out documents that the model cannot process, instead of an error that names them."""

    @property
    def sae_memory(self) -> int | None:
        """Memory for encoders in bytes."""
        return round(self.sae_memory_gb * 1e9) if self.sae_memory_gb else None


class Project(_Section):
    """The arms that project the task vector onto SAE feature directions."""

    features: int | None = Field(default=None, ge=1)
    """Features per layer that span the subspace; 3 % of the width if None, as published."""
    share: float = Field(default=0.5, gt=0, le=1)
    """Share of a layer's energy that ``fewest_features`` keeps in the selected layers, ``hybrid`` in the others."""
    draws: int = Field(default=100, ge=20)
    """Random feature sets, and random bases, that the geometry is compared with."""
    tokens: int = Field(default=512, ge=1)
    """Tokens of each corpus for the measurement of functional energy."""


class Evaluate(_Section):
    """The evaluation: tasks of lm-evaluation-harness, and text on which the edit should cost nothing."""

    tasks: tuple[str, ...] = Field(min_length=1)
    """Tasks or groups whose gain is claimed; the family of Holm's correction."""
    control_tasks: tuple[str, ...] = ()
    """Tasks that the edit might hurt."""
    include_path: LocalPath | None = None
    """A folder with further task definitions."""
    task_code: bool = False
    """Run the Python functions that these name with ``!function``; read them first."""
    data: LocalPath | None = None
    """Local items of ``minerva_math``, a folder or one file."""
    limit: int | None = Field(default=None, ge=1)
    """Maximum items per task; None for all."""
    batch_size: int = Field(default=16, ge=1)
    """Prompts decoded together."""
    control: LossText | None = None
    """Text for the loss control."""
    target: LossText | None = None
    """Held-out target text on which every arm's loss is measured, a finer measure than accuracy."""
    exploratory: bool = False
    """Allow test items that occur in the texts the layers were chosen by; the report says so."""


class Validation(_Section):
    """How ``validate`` compares the scores of layers with the effect of injecting them."""

    control: str = "control"
    """Name of the control text on which the cost is measured."""
    documents: int = Field(default=32, ge=2)
    """Documents of each text, from the top; gain is measured on held-out target text if there is any."""
    random_sets: int = Field(default=50, ge=10)
    """Random layer sets of each size to compare a score's layers with."""
    matched: tuple[str, ...] | None = None
    """Scores also compared with random sets of equal energy; the recipe's and ``attribution`` if None."""


class TradeOffOptions(_Section):
    """How ``tradeoff`` measures the filter and its rivals over their strengths."""

    documents: int = Field(default=64, ge=2)
    """Documents of each text, from the top."""
    strengths: tuple[NotNegative, ...] = Field(default=(0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0), min_length=1)
    """Strengths of the filter."""


class Ray(_Section):
    """A Ray cluster that shares the work; the results are the same to the bit."""

    address: str = "auto"
    """Address of a running cluster; ``auto`` finds one here or starts one on this machine."""
    workers: int | None = Field(default=None, ge=0)
    """Number of workers; as many as the cluster has room for if None; 0 for none: all is done in this process."""
    threads: int | None = Field(default=None, ge=1)
    """CPUs per worker; if None as many as PyTorch uses here, for which results are the same, or one beside a GPU."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs per worker, one or a share of it; 0 for CPUs only."""


class Recipe(_Section):
    """One experiment, from two models and a set of SAEs to a verdict."""

    base: PathOrHubId
    """The model that is edited: a folder or a hub id."""
    tuned: PathOrHubId
    """Its fine-tune: a checkpoint of the same shapes, or a PEFT adapter."""
    saes: PathOrHubId
    """The SAEs, one for each layer of the base: a folder, a SAELens release or a hub id."""
    sae_id: str | None = None
    """Chooses among several SAEs: their id or path, with ``{layer}`` for the number."""
    target: LossText
    """Text that uses the skill; with a ``prompt``, only the loss of what follows it judges edits."""
    control: Text
    """Text that lacks the target's skill; a layer must stand out against it."""
    controls: dict[str, Text] = {}
    """Further control texts by name; a layer must stand out against each."""
    score: str = "mass_shift"
    """The score of layers, see `diagnosis.scores`; or ``attribution``."""
    increments: bool = False
    """Score what each layer adds to the one before it, for SAEs that read the residual stream."""
    diagnose: Diagnose = Diagnose()
    """How activations are collected and scored."""
    select: Select
    """The policy that chooses layers."""
    calibrate: Calibrate | None = None
    """The search that the policy ``calibrated`` uses."""
    edit: EditOptions = EditOptions()
    """The edit of the selected layers, and the filter that spares other text."""
    project: Project = Project()
    """The arms that project onto feature directions."""
    arms: tuple[ArmName, ...] = ARMS
    """The models that are evaluated; where changes are filtered, ``recommended`` is, too."""
    random_sets: int = Field(default=2, ge=1)
    """Number of arms with random layers."""
    validation: Validation = Validation()
    """How ``validate`` compares the scores."""
    tradeoff: TradeOffOptions = TradeOffOptions()
    """How ``tradeoff`` measures the filter and its rivals."""
    evaluate: Evaluate
    """Tasks and texts of the evaluation."""
    device: str = Field(default="auto", pattern=r"^(cpu|auto|cuda(:\d+)?)$")
    """Device of this process, such as ``cuda:1``; ``auto`` is a GPU if there is one, but the CPU beside workers."""
    ray: Ray | None = None
    """The cluster that shares the work; without one, all is done in this process."""
    seed: int = Field(default=0, ge=0)
    """Seed of permutations, resamples, random layers and few-shot sampling."""

    @model_validator(mode="after")
    def _arms_make_sense(self) -> "Recipe":
        if len(set(self.arms)) != len(self.arms):
            raise ValueError("`arms` names an arm twice")
        if "base" not in self.arms:
            raise ValueError("`arms` must hold `base`, which the others are compared with")
        if self.select.policy == "calibrated" and self.calibrate is None:
            raise ValueError("the policy `calibrated` needs a section `calibrate` with texts")
        if self.validation.control not in (known := [*self.all_controls]):
            raise ValueError(f"`validation.control`: no control `{self.validation.control}`, only {', '.join(known)}")
        if not self.filters and (without := [arm for arm in self.arms if arm in FILTERED_ARMS]):
            raise ValueError(f"{', '.join(f'`{arm}`' for arm in without)} of `arms` takes a filter, see `edit.filter`")
        own = {*TAKEN, "target", "control", GENERAL, HELD_OUT, "calibration target", "calibration control"}
        for where, names in {"controls": set(self.controls), "edit.protect": set(self.edit.protect)}.items():
            if taken := own & names:
                raise ValueError(f"`{where}` cannot be called {', '.join(f'`{name}`' for name in sorted(taken))}")
            own |= names
        return self

    @property
    def all_controls(self) -> dict[str, Text]:
        """Every control by name, the first of which is ``control``."""
        return {"control": self.control, **self.controls}

    @property
    def scored_by(self) -> str:
        """The name of the score that chooses layers, as validation calls it."""
        return f"{self.score} increment" if self.increments and self.score != ATTRIBUTION else self.score

    @property
    def filters(self) -> bool:
        """Whether changes are filtered, and an edit is recommended: not where no arm is one, or a skill is removed."""
        edits = {"selected", *FILTERED_ARMS} & set(self.arms)
        return bool(edits) and self.edit.filter != "none" and self.edit.coefficient > 0

    @property
    def evaluated(self) -> tuple[ArmName, ...]:
        """The arms, with ``recommended`` and the published method beside it where an edit is recommended."""
        return tuple(dict.fromkeys([*self.arms, *(("recommended", "selected") if self.filters else ())]))

    @property
    def protected(self) -> dict[str, float]:
        """Texts that the filter protects, with their weights."""
        return dict.fromkeys(self.all_controls, 1.0) | {name: text.weight for name, text in self.edit.protect.items()}

    @property
    def judged(self) -> dict[str, str]:
        """The texts whose losses judge an edit: their names as corpora -> as texts; those of one name are held back."""
        own = {name: f"calibration {name}" if self.calibrate else name for name in ("target", "control")}
        others = () if self.calibrate else self.controls
        return own | {name: name for name in (*others, *self.edit.protect)}

    @property
    def corpora(self) -> tuple[str, ...]:
        """Names of the texts that layers are scored on."""
        return ("target", *self.all_controls)

    @property
    def texts(self) -> dict[str, Text]:
        """Every text by name."""
        texts = {"target": self.target, **self.all_controls, **self.edit.protect}
        if self.calibrate:
            texts |= {"calibration target": self.calibrate.target, "calibration control": self.calibrate.control}
        own = {GENERAL: self.evaluate.control, HELD_OUT: self.evaluate.target}
        return texts | {name: text for name, text in own.items() if text}

    @classmethod
    def from_yaml(cls, path: Path, changes: Iterable[str] = ()) -> "Recipe":
        """Read and validate a recipe; relative paths in it are relative to its folder.

        Args:
            changes: values that replace the file's, each as ``section.key=value`` with a value in YAML.

        Raises:
            RecipeError: the file is missing or not YAML, or names, types and values in it are wrong, all at once.
        """
        try:
            value = read_yaml(path)
        except OSError as error:
            raise RecipeError(f"the recipe `{path}` cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise RecipeError(f"the recipe `{path}` is not YAML that can be used: {error}") from error
        if not isinstance(value, dict):
            raise RecipeError(f"the recipe `{path}` is not a mapping of keys to values")
        for change in changes:
            try:
                set_value(value, change)
            except ValueError as error:
                raise RecipeError(f"`--set {change[:80]}` {error}", hint="`--set select.k=3`") from error
        try:
            return cls.model_validate(value, context=path.parent.resolve())
        except ValidationError as error:
            raise RecipeError(
                f"the recipe `{path}` has mistakes",
                problems=[_problem(item) for item in error.errors()],  # type: ignore[arg-type]
            ) from error


def _problem(error: dict[str, Any]) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        section: type[BaseModel] = Recipe
        for part in error["loc"][:-1]:
            if str(part) in section.model_fields:  # else the name of an entry of `controls`
                annotation = section.model_fields[str(part)].annotation
                types = [annotation, *getattr(annotation, "__args__", ())]
                section = next((t for t in types if isinstance(t, type) and issubclass(t, BaseModel)), section)
        close = get_close_matches(str(error["loc"][-1]), list(section.model_fields), n=1)
        message = f"{place}: unknown key"
    else:
        given = "" if error["type"] in ("missing", "value_error") else f" (given: `{str(error['input'])[:80]}`)"
        known = re.findall(r"'([^']+)'", str(error.get("ctx", {}).get("expected", "")))
        close = get_close_matches(str(error["input"]), known, n=1)
        message = f"{place or 'recipe'}: {error['msg']}{given}"
    return message + (f"; did you mean `{close[0]}`?" if close else "")
