"""What to run, as validated data: a YAML file whose paths are relative to itself, every mistake reported at once."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stethoscope.errors import RecipeError

ArmName = Literal[
    "base", "tuned", "selected", "random_layers",
    "scaled", "norm_ranked", "bottom_layers", "random_matched",
    "projected", "projected_energy_matched", "complement", "random_subspace", "random_subspace_energy_matched",
    "hybrid", "filtered",
]  # fmt: skip
# Of documents in a text: fewer have so few relabellings that no layer could ever be significant at 5 %.
FEWEST_BLOCKS = 4
# There are no such arms where every layer is selected, at one coefficient: they would be the selected edit, or nothing.
OTHERS: tuple[ArmName, ...] = (
    "random_layers", "scaled", "norm_ranked", "bottom_layers", "random_matched", "hybrid",
)  # fmt: skip
ScalpelArm = Literal[
    "projected", "projected_energy_matched", "complement", "random_subspace", "random_subspace_energy_matched",
    "hybrid", "filtered",
]  # fmt: skip
SCALPEL_ARMS: tuple[ScalpelArm, ...] = get_args(ScalpelArm)
ATTRIBUTION = "attribution"  # the score that needs the task vector
GENERAL, HELD_OUT = "general", "held-out target"  # names of the texts of `evaluate`
ARMS: tuple[ArmName, ...] = ("base", "tuned", "selected", "random_layers", "scaled", "projected")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Text(_Section):
    """Documents: a file, a saved dataset or one on the hub; what to read of it, and how many from the top.

    Attributes:
        dataset: a .jsonl, .parquet or .txt file, a saved dataset's folder, or ``owner/name/config:split`` on the hub.
        field: holds each document: a text, or a chat as a list of messages.
        split: of a dataset that has several.
        documents: at most so many.
    """

    dataset: str
    field: str = "text"
    split: str | None = None
    documents: int | None = Field(default=None, ge=1)


class LossText(Text):
    """Text on which an arm's loss is measured.

    Attributes:
        prompt: a field with what stands before each document; it is read, and its tokens do not count.
    """

    prompt: str | None = None


class Select(_Section):
    """How scores become layers.

    Attributes:
        policy: what decides, see `selection.policies`.
        k: layers, for ``top_k`` and ``spread``.
        z: least excess in standard deviations of the null, for ``threshold``.
        alpha: level over all layers, for ``significant``.
        share: of the excess to hold, for ``budget``.
        include_flagged: believe SAEs whose health is poor.
    """

    policy: Literal["top_k", "spread", "threshold", "significant", "budget", "gap", "calibrated"] = "top_k"
    k: int | None = Field(default=None, ge=1)
    z: float = Field(default=3.0, allow_inf_nan=False)
    alpha: float = Field(default=0.05, gt=0, lt=1)
    share: float = Field(default=0.5, gt=0, le=1)
    include_flagged: bool = False

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
    """The search for layers and coefficient on the loss of texts that nothing is claimed on.

    Attributes:
        target: other text that uses the skill; with a ``prompt``, only the loss of what follows it counts.
        control: other text that does not.
        budget: the share by which control loss may rise; without one, a nat of control weighs a nat of target.
        coefficients: those tried.
        per_layer: go on with one layer's coefficient at a time.
    """

    target: LossText
    control: LossText
    budget: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    coefficients: tuple[float, ...] = Field(default=(0.25, 0.5, 0.75, 1.0, 1.25, 1.5), min_length=1)
    per_layer: bool = False


class EditOptions(_Section):
    """How the task vector goes into the selected layers.

    Attributes:
        coefficient: how much of the change; negative takes the skill away.
    """

    coefficient: float = Field(default=1.0, allow_inf_nan=False)


class Diagnose(_Section):
    """How the listening is done; blocks are what permutations relabel.

    Attributes:
        block_size: documents to a block.
        max_tokens: documents are cut here.
        tokens: which count, of target and control alike: all, those that an assistant says in chats, or each
            document's last.
        permutations: relabellings that chance is judged by; the smallest p is 1 / (permutations + 1).
        resamples: draws of blocks, for intervals and the stability of ranks.
        sae_memory_gb: encoders that do not fit wait for another forward over the text; no limit by default.
        skip_broken: leave out documents that cannot be heard, instead of ending with their names.
    """

    block_size: int = Field(default=64, ge=1)
    max_tokens: int = Field(default=1024, ge=8)
    tokens: Literal["all", "assistant", "last"] = "all"
    permutations: int = Field(default=200, ge=19)
    resamples: int = Field(default=200, ge=19)
    sae_memory_gb: float | None = Field(default=None, gt=0)
    skip_broken: bool = False


class Project(_Section):
    """The arms that cut along feature directions.

    Attributes:
        features: how many per layer span the subspace; 3 % of the width if None, as published.
        share: of a layer's energy that ``filtered`` keeps in the selected layers, and ``hybrid`` in the others.
        draws: random feature sets, and as many random bases, that the geometry is compared with.
        tokens: of each corpus, on which functional energy is measured.
    """

    features: int | None = Field(default=None, ge=1)
    share: float = Field(default=0.5, gt=0, le=1)
    draws: int = Field(default=100, ge=20)
    tokens: int = Field(default=512, ge=1)


class Evaluate(_Section):
    """The proof: tasks of lm-evaluation-harness, and text on which the edit should cost nothing.

    Attributes:
        tasks: task or group names whose gain is claimed; Holm's family.
        control_tasks: tasks that the edit might hurt.
        include_path: a folder with task definitions of your own.
        data: local files of ``minerva_math``'s items, a folder or one file.
        limit: items per task; None for all.
        batch_size: prompts decoded together.
        control: text for the loss control.
        target: held-out target text, on which every arm's loss is measured: finer than accuracy, though no task.
        exploratory: test on items that the choice of layers has seen, and say so in the report.
    """

    tasks: tuple[str, ...] = Field(min_length=1)
    control_tasks: tuple[str, ...] = ()
    include_path: Path | None = None
    data: Path | None = None
    limit: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=16, ge=1)
    control: LossText | None = None
    target: LossText | None = None
    exploratory: bool = False


class Validation(_Section):
    """How ``validate`` judges the scores of layers against the effect of injecting them.

    Attributes:
        control: name of the control text whose loss is the cost.
        documents: of each text, from the top; the effect is measured on held-out target text if there is any.
        random_sets: random layer sets of each size to compare a score's layers with.
        matched: scores compared with random sets of equal energy too; the recipe's and ``attribution`` if None.
    """

    control: str = "control"
    documents: int = Field(default=32, ge=2)
    random_sets: int = Field(default=50, ge=10)
    matched: tuple[str, ...] | None = None


class Ray(_Section):
    """A Ray cluster that shares the work; the results are the same to the bit.

    Attributes:
        address: of a running cluster; ``auto`` finds one here or starts one on this machine.
        workers: how many; as many as the cluster has room for if None, and 0 for none: all in this process.
        threads: CPUs of each; if None as many as PyTorch uses here, with which the results are the same, or one beside
            a GPU.
        gpus: of each, one or a share of it; without, workers compute on CPUs.
    """

    address: str = "auto"
    workers: int | None = Field(default=None, ge=0)
    threads: int | None = Field(default=None, ge=1)
    gpus: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class Recipe(_Section):
    """One experiment, from two models and a set of SAEs to a verdict.

    Attributes:
        base: the model that is edited: a folder or a hub id.
        tuned: its fine-tune: a checkpoint of the same shapes, or a PEFT adapter.
        saes: one for each layer of the base: a folder, a SAELens release or a hub id.
        sae_id: picks among several: their id or path, with ``{layer}`` for the number.
        target: text that uses the skill.
        control: text that lacks the target's skill; a layer must stand out against it.
        controls: further such texts by name, against each of which a layer must stand out too.
        score: how layers are judged, see `diagnosis.scores`; or ``attribution``.
        increments: judge what each layer adds to the one before it, for SAEs that read the residual stream.
        diagnose: how the listening is done.
        select: how scores become layers.
        calibrate: the search that the policy ``calibrated`` rests on.
        edit: how the change goes into the selected layers.
        project: the arms that cut along feature directions.
        arms: the models that answer the items.
        random_sets: arms of layers drawn at random.
        validation: how ``validate`` judges the scores.
        evaluate: the proof.
        device: where this process computes: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``: a GPU if there is one, but the
            CPU beside workers, which may need the GPU.
        ray: a cluster that shares the work; without, all is done in this process.
        seed: of permutations, resamples, random layers and few-shot sampling.
    """

    base: str
    tuned: str
    saes: str
    sae_id: str | None = None
    target: Text
    control: Text
    controls: dict[str, Text] = {}
    score: str = "mass_shift"
    increments: bool = False
    diagnose: Diagnose = Diagnose()
    select: Select
    calibrate: Calibrate | None = None
    edit: EditOptions = EditOptions()
    project: Project = Project()
    arms: tuple[ArmName, ...] = ARMS
    random_sets: int = Field(default=2, ge=1)
    validation: Validation = Validation()
    evaluate: Evaluate
    device: str = Field(default="auto", pattern=r"^(cpu|auto|cuda(:\d+)?)$")
    ray: Ray | None = None
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _arms_make_sense(self) -> "Recipe":
        if len(set(self.arms)) != len(self.arms):
            raise ValueError("`arms` names an arm twice")
        if "base" not in self.arms:
            raise ValueError("`arms` must hold `base`, which the others are compared with")
        if self.select.policy == "calibrated" and self.calibrate is None:
            raise ValueError("the policy `calibrated` needs a section `calibrate` with texts")
        if self.validation.control not in self.all_controls:
            known = ", ".join(self.all_controls)
            raise ValueError(f"`validation.control`: there is no control `{self.validation.control}`, only {known}")
        own = {"target", "control", GENERAL, HELD_OUT, "calibration target", "calibration control"}
        if taken := own & set(self.controls):
            raise ValueError(f"`controls` cannot be called {', '.join(f'`{name}`' for name in sorted(taken))}")
        return self

    @property
    def all_controls(self) -> dict[str, Text]:
        """Every control by name, the first of which is ``control``."""
        return {"control": self.control, **self.controls}

    @property
    def corpora(self) -> tuple[str, ...]:
        """Names of the texts that layers are scored on."""
        return ("target", *self.all_controls)

    @classmethod
    def from_yaml(cls, path: Path, changes: Iterable[str] = ()) -> "Recipe":
        """Read and validate a recipe; relative paths in it are relative to its folder.

        Args:
            changes: values that replace the file's, each as ``section.key=value`` with a value in YAML.

        Raises:
            RecipeError: the file is missing or not YAML, or names, types and values in it are wrong, all at once.
        """
        try:
            value = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(f"the recipe `{path}` cannot be read: {error.strerror}") from error
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise RecipeError(f"the recipe `{path}` is not YAML: {error}") from error
        if not isinstance(value, dict):
            raise RecipeError(f"the recipe `{path}` is not a mapping of keys to values")
        for change in changes:
            _change(value, change)
        try:
            recipe = cls.model_validate(value)
        except ValidationError as error:
            raise RecipeError(
                f"the recipe `{path}` has mistakes",
                problems=[_problem(item) for item in error.errors()],  # type: ignore[arg-type]
                hint="`stethoscope check` reads a recipe without running it",
            ) from error
        return recipe._resolved(path.parent.resolve())

    def _resolved(self, folder: Path) -> "Recipe":
        def there(text: Text) -> Text:
            place = folder / Path(text.dataset).expanduser()
            here = place.suffix in (".jsonl", ".parquet", ".txt")
            return text.model_copy(update={"dataset": str(place) if here else _local(folder, text.dataset)})

        evaluate = self.evaluate.model_copy(
            update={
                "include_path": self.evaluate.include_path and folder / self.evaluate.include_path,
                "data": self.evaluate.data and folder / self.evaluate.data,
                "control": self.evaluate.control and there(self.evaluate.control),
                "target": self.evaluate.target and there(self.evaluate.target),
            }
        )
        calibrate = self.calibrate and self.calibrate.model_copy(
            update={side: there(getattr(self.calibrate, side)) for side in ("target", "control")}
        )
        return self.model_copy(
            update={
                "calibrate": calibrate,
                **{name: _local(folder, getattr(self, name)) for name in ("base", "tuned", "saes")},
                "target": there(self.target),
                "control": there(self.control),
                "controls": {name: there(text) for name, text in self.controls.items()},
                "evaluate": evaluate,
            }
        )


def _change(value: dict[str, Any], change: str) -> None:
    place, equals, given = change.partition("=")
    *sections, key = place.split(".")
    for section in sections:
        value = value.setdefault(section, {}) if isinstance(value, dict) else {}
    try:
        if not (equals and key and isinstance(value, dict)):
            raise RecipeError(f"`--set {change}` is not `section.key=value`", hint="`--set select.k=3`")
        value[key] = yaml.safe_load(given)
    except yaml.YAMLError as error:
        raise RecipeError(f"the value in `--set {change}` is not YAML: {error}") from error


def _local(folder: Path, name: str) -> str:
    """A path relative to the recipe where that exists or is written as one, else the name as it stands: a hub id."""
    path = folder / Path(name).expanduser()
    return str(path) if path.exists() or name.startswith((".", "/", "~")) else name


def _problem(error: dict[str, Any]) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        given = "" if error["type"] in ("missing", "value_error") else f" (given: `{error['input']}`)"
        known = re.findall(r"'([^']+)'", str(error.get("ctx", {}).get("expected", "")))
        close = get_close_matches(str(error["input"]), known, n=1)
        return f"{place or 'recipe'}: {error['msg']}{given}" + (f"; did you mean `{close[0]}`?" if close else "")
    section: type[BaseModel] = Recipe
    for part in error["loc"][:-1]:
        if str(part) in section.model_fields:  # else the name of an entry of `controls`
            section = _section(section.model_fields[str(part)].annotation)
    close = get_close_matches(str(error["loc"][-1]), list(section.model_fields), n=1)
    return f"{place}: unknown key" + (f"; did you mean `{close[0]}`?" if close else "")


def _section(annotation: Any) -> type[BaseModel]:
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
