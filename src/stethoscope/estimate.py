"""About how long the stages of a run take on this machine, and how much memory, before any of them is run.

    estimate(recipe, check_recipe(recipe, folder))    # a second of measuring: no weights are loaded, no model is built

Work is counted from headers, in operations and bytes, and divided by this machine's speeds. What is small is left out.
"""

from collections import defaultdict
from collections.abc import Mapping
from math import ceil, inf, prod
from typing import NamedTuple

from stethoscope.check import Check
from stethoscope.checkpoints.adapter import AdapterTaskVector
from stethoscope.checkpoints.checkpoint import config_value
from stethoscope.editing.change import POOL
from stethoscope.editing.preview import COPY_RATE
from stethoscope.editing.residual_axis import READERS
from stethoscope.models.device import find_device, preferred_dtype
from stethoscope.models.speeds import measure
from stethoscope.recipe import ATTRIBUTION, GENERAL, HELD_OUT, Recipe
from stethoscope.stages import STAGES

CHARACTERS = 4  # of a token: English has about 4.5, code and mathematics about 3
STRENGTHS = 5  # of `editing.filter`, which imports Transformers
HEALTH, LEAST_HEALTH = 2048, 128  # tokens of each text, as `diagnosis.collect` takes them
ANSWERED = 0.5  # of the tokens that a task lets a model write
CALLS = 1e-3  # seconds of Python for a layer that decodes one token of a batch
# Bytes moved for each weight of an SAE that is loaded, or of an edit that is made; fitted as `models.speeds` says.
LOADING, MAKING = 60, 24
START = 10.0  # seconds of Python and imports
IMPORTED, LOGITS, KEPT = 8e8, 8e8, 8e9  # bytes of a process without a model, of logits, of edits that a search keeps

Number = int | float
Work = list[tuple[str, Number]]  # kind of speed, and operations or bytes
Stage = tuple[Work, Number]  # and the bytes that it holds beside the model


class Estimate(NamedTuple):
    """A stage's seconds, and its peak of bytes in main memory or else the GPU's; None where they cannot be known."""

    stage: str
    seconds: Number | None
    memory: Number | None


def estimate(recipe: Recipe, found: Check, speeds: Mapping[str, float] | None = None) -> list[Estimate]:
    """The stages of a whole run in this process, and last the sum of those that are known; [] without base and tuned.

    Args:
        found: from `check_recipe`, or from `check_run` with ``headers_only``, which also knows the tasks' prompts.
        speeds: from `models.speeds.measure`; measured now if None.

    Raises:
        StethoscopeError: this machine lacks the recipe's device.
    """
    device = find_device(recipe.device)
    if found.base is None or found.task_vector is None:
        return []
    dtype = preferred_dtype(device)
    run = _Run(recipe, found, dtype.itemsize)
    together = min(recipe.evaluate.batch_size, recipe.evaluate.limit or inf)
    speeds = {"seconds": 1.0, "reading": COPY_RATE} | dict(speeds or measure(device, dtype, int(together)))
    beside = run.parameters * dtype.itemsize + (IMPORTED if device.type == "cpu" else 0)
    rows = [Estimate("Start", START, None)]
    for stage in STAGES:
        if stage.wanted(recipe) and (count := getattr(run, stage.name, None)):
            try:
                work, held = count()
                rows.append(Estimate(stage.title, sum(much / speeds[kind] for kind, much in work), beside + held))
            except LookupError:  # a text or the SAEs lie on the hub, or the tasks were not built
                rows.append(Estimate(stage.title, None, None))
    return [*rows, Estimate("All of these", sum(e.seconds or 0 for e in rows), max(e.memory or 0 for e in rows))]


class _Run:
    """The sizes of a run, and a method for each stage by its name: its work, and the bytes that it holds."""

    def __init__(self, recipe: Recipe, found: Check, itemsize: int) -> None:
        base, change = found.base, found.task_vector
        assert base is not None and change is not None  # noqa: PT018
        self.recipe, self.found, self.itemsize, self.base = recipe, found, itemsize, base
        self.files = base.nbytes + change.store.nbytes
        self.parameters = sum(prod(e.shape) for e in base.entries.values())
        blocks = [e for e in base.entries.values() if e.layer is not None and not base.predicts_ahead(e)]
        experts = config_value(base.config, "num_local_experts", "num_experts") or 1
        used = (config_value(base.config, "num_experts_per_tok") or 1) / experts
        self.blocks = sum(prod(e.shape) * (used if ".experts." in e.name else 1) for e in blocks)
        self.head = prod(base.entries["embed_tokens.weight"].shape)
        self.changed = [e for e in blocks if e.name in change.names and len(e.shape) == 2]
        self.cells = sum(prod(e.shape) for e in self.changed)
        self.rank = int(change.config.get("r") or 1) if isinstance(change, AdapterTaskVector) else 0
        self.arms = len(recipe.evaluated) + (recipe.random_sets - 1) * ("random_layers" in recipe.arms)
        self.saes = [sae.width * sae.d_in for sae in found.saes.values()]
        most = min(recipe.diagnose.max_tokens, found.window or inf)
        self.texts = {n: [min(len(str(d)) / CHARACTERS, most) for d in text] for n, text in found.texts.items()}

    def corpora(self, documents: int | None = None, most: Number = inf) -> Number:  # tokens of what is scored
        return sum(min(sum(self.texts[name][:documents]), most) for name in self.recipe.corpora)

    def healthy(self) -> Number:  # tokens on which the SAEs' health is measured
        texts = [sum(self.texts[name]) for name in self.recipe.corpora]
        return sum(min(HEALTH, max(tokens / 8, LEAST_HEALTH)) for tokens in texts)

    def forward(self, tokens: Number, predicted: Number = 0) -> Work:
        return [("model", 2 * (tokens * self.blocks + predicted * self.head))]

    def load_saes(self, layers: int | None = None) -> Stage:  # one after another, in float32
        return [("host", 2 * LOADING * sum(self.saes[:layers]))], 8 * (self.saes or [][0])[0]

    def make(self, times: Number) -> Work:  # all changed weights
        return [("host", MAKING * times * self.cells), ("double", 2 * self.rank * times * self.cells)]

    def diagnose(self) -> Stage:
        (work, held), tokens, sample = self.load_saes(), self.corpora(), self.healthy()
        encoders, limit = sum(self.saes) * self.itemsize, self.recipe.diagnose.sae_memory or inf
        passes = max(1.0, encoders / limit) + 4 * (self.recipe.score == ATTRIBUTION)  # which takes gradients
        work += self.forward(passes * tokens + sample)
        work += [("model", 2 * tokens * sum(self.saes)), ("single", 6 * sample * sum(self.saes))]  # health: exact
        work.append(("reading", 4.0 * self.files))  # hashed, looked through, loaded
        return work, min(encoders, limit) + held + 4096 * self.base.hidden_size * len(self.saes) * self.itemsize

    def evidence(self, layers: int | None = None) -> Stage:  # what features promote; their contexts were found before
        return [("memory", 200 * self.head), ("single", 16 * len(self.saes[:layers]) * self.head)], LOGITS

    def passed(self) -> Stage:
        layers = min((self.recipe.select.k or 5) + 1, self.base.layers - 1)
        (work, held), (loading, sae) = self.evidence(layers), self.load_saes(layers)
        # Of the features a quarter fires often enough; what a LoRA does along them costs nothing.
        judged = 0 if self.rank else max(self.saes) / self.base.hidden_size / 4
        return [*work, *loading, ("double", 4 * judged * layers * self.blocks / self.base.layers)], held + sae

    def calibrate(self) -> Stage:
        return self.search(60, sum(sum(self.texts[f"calibration {side}"]) for side in ("target", "control")))

    def recommend(self) -> Stage:
        judged = [
            self.texts[text][4::5] if text == name else self.texts[text] for name, text in self.recipe.judged.items()
        ]
        tokens = sum(min(sum(some), self.recipe.edit.tokens / 5) for some in judged)
        return self.search(self.recipe.edit.forwards, tokens)

    def search(self, forwards: int, tokens: Number) -> Stage:
        # half of a forward's weights were made for one before it
        kept = forwards / 2 * self.cells * self.itemsize
        times = forwards / 2 if kept <= KEPT else forwards * ceil(tokens / 2048)
        return self.forward(forwards * tokens, forwards * tokens) + self.make(times), min(KEPT, kept) + LOGITS

    def filter(self) -> Stage:
        strengths = STRENGTHS if self.recipe.edit.filter == "auto" else 1
        texts = []
        for name in ("target", *self.recipe.protected):
            back = sum(self.texts[name][4::5]) if self.recipe.judged.get(name) == name else 0  # held back, to judge
            texts.append(min(sum(self.texts[name]) - back, self.recipe.edit.tokens))
        met: dict[tuple[str, int], int] = defaultdict(int)  # rows that each input meets, and the input's width
        for entry in self.changed:
            part, _, module = entry.name.removesuffix(".weight").rpartition(".")
            met[part if module in READERS else entry.name, entry.shape[1]] += self.rank or entry.shape[0]
        work = [*self.forward(sum(texts)), ("host", 0 if self.rank else 40 * strengths * self.cells)]
        # With fewer tokens than an input has values, all is computed in the tokens' space.
        ranks = {d: min(sum(texts), d) for _, d in met}
        for (_, d), rows in met.items():  # moments; factors, and solves to tell texts apart; changes and their effects
            n = ranks[d]
            solved = strengths * (2 * min(n, rows) + 2 * rows * (rows > d)) + 4 * (1 + strengths) * rows
            work.append(("single", sum(texts) * d**2) if n == d else ("double", d * n**2))
            work.append(("double", n**3 * (strengths / 3 + (2.5 if n == d else 1)) + solved * n * d))
        moments = 4 * len(texts) * sum(ranks[d] * d for _, d in met) / self.base.layers
        held = max((48 * ranks[d] * d + 32 * rows * d for (_, d), rows in met.items()), default=0)
        return work, sum(texts) * self.base.hidden_size * self.itemsize + moments + held

    def geometry(self) -> Stage:
        (work, held), options, d = self.load_saes(), self.recipe.project, self.base.hidden_size
        chosen = options.features or 0.03 * d
        spans = 4 * options.draws * chosen**2
        work += self.forward(self.corpora(64, 4 * options.tokens))
        work.append(("double", len(self.saes) * (4 * d**3 + spans * d)))
        for n, rows in ((min(self.rank or d, d), self.rank or max(e.shape)) for e in self.changed):
            work.append(("single", rows * d * n + 8 * n**3))  # Gram matrix and spectrum
            work.append(("double", 4 * POOL * chosen * n * d + spans * n))
        return work, held + 40 * d**2

    def edit(self) -> Stage:
        seconds = self.found.edit.seconds if self.found.edit else 0.0
        return [("seconds", seconds), ("reading", 0 if self.rank else 2.0 * self.base.nbytes)], 3e8

    def outcomes(self) -> Stage:
        work, tasks = self.make(self.arms), self.found.answers.values() or [][0]
        for items, prompt, own, new in tasks:
            tokens = (prompt + items * own) / CHARACTERS  # what all prompts share is read once
            written = self.arms * items * new * ANSWERED
            work += self.forward(self.arms * tokens)
            work.append(("decoding", 2 * written * (self.blocks + self.head)))
        batch = self.recipe.evaluate.batch_size
        steps = max(max(new for *_, new in tasks), sum(items * new for items, *_, new in tasks) / batch)
        work.append(("seconds", self.arms * steps * self.base.layers * CALLS))
        return work, self.cells * self.itemsize + LOGITS

    def losses(self) -> Stage:
        texts = [sum(self.texts[name]) for name in (GENERAL, HELD_OUT) if name in self.recipe.texts]
        work = self.forward(self.arms * sum(texts), self.arms * sum(texts)) + self.make(self.arms)
        return work, self.cells * self.itemsize + LOGITS  # one arm at a time, made once for both texts
