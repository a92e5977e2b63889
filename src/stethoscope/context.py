"""The inputs of a run's stages: the recipe, what it refers to, and the model, loaded when it is first needed."""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.artifacts import Provenance, canonical_json, remembered_hashes, sha256_bytes, sha256_files
from stethoscope.check import Check
from stethoscope.checkpoints.checkpoint import Checkpoint
from stethoscope.checkpoints.files import identity_files
from stethoscope.checkpoints.header import Entry
from stethoscope.checkpoints.task_vector import TaskVector, bytes_finite
from stethoscope.editing.apply import applied, prepare
from stethoscope.editing.layers import LayerEdits
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.transfer import in_parallel
from stethoscope.errors import CheckpointError
from stethoscope.models.device import find_device, preferred_dtype
from stethoscope.models.load import load_model, load_tokenizer, room_beside
from stethoscope.recipe import Recipe
from stethoscope.saes.open import SAEFolder, load_sae
from stethoscope.text.documents import Document, documents_hash
from stethoscope.text.tokens import TokenBatch, batches, counted_tokens, prompt_lengths, tokenize, within

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stethoscope.executor import RayExecutor

# The published experiment projects onto 77 features of 2560 dimensions: 3 % of the width.
PROJECTED_SHARE = 0.03
INJECTED_TOKENS = 2048  # a batch's activations after every layer are held at once

Arm = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, kw_only=True)
class Context:
    """A run's inputs. Nothing in it changes; models and workers are loaded on first use.

    Attributes:
        found: everything that the recipe refers to, opened by headers.
        hashes: content hash of each input by name: ``base``, ``tuned``, ``saes`` and every text.
        stack: stops workers when the run ends.
    """

    recipe: Recipe
    folder: Path
    found: Check
    base: Checkpoint
    task_vector: TaskVector
    hashes: Mapping[str, str]
    stack: ExitStack

    @cached_property
    def device(self) -> "torch.device":
        """The device of this process: `auto` leaves the GPUs to the workers, if there are any."""
        auto_beside_workers = self.recipe.device == "auto" and self.has_workers
        return find_device("cpu" if auto_beside_workers else self.recipe.device)

    @property
    def has_workers(self) -> bool:
        """Whether the recipe asks for workers."""
        return self.recipe.ray is not None and self.recipe.ray.workers != 0

    @property
    def dtype(self) -> "torch.dtype":
        """The type of weights of the model here and of the workers' models."""
        on_gpus = self.has_workers and self.recipe.ray and self.recipe.ray.gpus
        return preferred_dtype("cuda" if on_gpus else self.device)

    def check_weights(self) -> None:
        """Look for NaN and infinity in every weight of base and tuned.

        Raises:
            CheckpointError: some are, with every tensor and its file.
        """
        tensors = [
            (store, entry)
            for store in (self.base, self.task_vector.store)
            for entry in store.entries.values()
            if entry.kind != "buffer"
        ]

        def sound(store: Checkpoint, entry: Entry) -> bool:
            return all(bytes_finite(piece, entry.dtype) for piece in store.pieces(entry))

        found = in_parallel([(entry.nbytes, partial(sound, store, entry)) for store, entry in tensors])
        if bad := [one for one, finite in zip(tensors, found, strict=True) if not finite]:
            raise CheckpointError(
                "weights are NaN or infinite",
                problems=[f"`{entry.stored}` in `{store.path / entry.file}`" for store, entry in bad],
                hint="the training diverged, or the file is damaged",
            )

    @cached_property
    def model(self) -> "PreTrainedModel":
        """The base model on its device."""
        return load_model(self.base.path, dtype=self.dtype, device=self.device)

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The base model's tokenizer."""
        return load_tokenizer(self.base.path)

    @property
    def filters(self) -> Path:
        """The folder of filtered changes."""
        return (self.folder / "filter").absolute()

    @cached_property
    def executor(self) -> "RayExecutor | None":
        """Workers, if the recipe asks for any."""
        from stethoscope.executor import RayExecutor, WorkerContext

        if self.recipe.ray is None or not self.has_workers:
            return None
        worker = WorkerContext(base=self.base.path, tuned=self.recipe.tuned, dtype=self.dtype)
        return self.stack.enter_context(RayExecutor(self.recipe.ray, worker))

    @property
    def sae_site(self) -> SAEFolder:
        """Any of the SAEs, for its site, which is the same for all."""
        return next(iter(self.found.saes.values()))

    @property
    def projected_features(self) -> int:
        """Number of features per layer that span the subspace of projected arms."""
        return self.recipe.project.features or max(1, round(PROJECTED_SHARE * self.base.hidden_size))

    def provenance(self, *inputs: str, **settings: Any) -> Provenance:
        """The provenance of a result of these inputs, by name, and settings."""
        return provenance_of(self.recipe.seed, {name: self.hashes[name] for name in inputs}, settings)

    def load_saes(self) -> dict[int, Any]:
        """The weights of every SAE by layer."""
        return {layer: load_sae(sae) for layer, sae in self.found.saes.items()}

    def layer_edits(self) -> LayerEdits:
        """The task vector by layer, raw or filtered, to be added to the model."""
        return LayerEdits(self.model, self.task_vector, memory=room_beside(self.model), filters=self.filters)

    def arm(self, plan: EditPlan | None) -> Arm:
        """A context in which the model has an arm's weights; its tensors are made at each entry."""
        return nullcontext if plan is None else lambda: applied(self.model, self.task_vector, plan)

    def held_arm(self, plan: EditPlan | None) -> Arm:
        """As `arm`, with the changed tensors held in memory, for arms that are entered many times."""
        return prepare(self.model, self.task_vector, plan).entered if plan else nullcontext

    def held_back(self, text: str) -> range:
        """Positions of every fifth document of a text, if they judge edits, and so make no filter."""
        judges = self.recipe.judged.get(text) == text
        return range(4, len(self.found.texts[text]) if judges else 0, 5)

    def batches(
        self, text: str, limit: int | None = None, without: Collection[int] = (), *, most: int | None = None
    ) -> list[TokenBatch]:
        """Batches of tokens of a text's first ``limit`` documents, without those at some positions.

        Args:
            most: about so many tokens from the top.
        """
        options = self.recipe.diagnose
        rows, starts = self.rows(text, limit, max_tokens=options.max_tokens, without=without)
        if most is not None:
            rows = within(most, rows)
            starts = starts and starts[: len(rows)]
        counted = counted_tokens(
            self.documents(text, without)[: len(rows)],
            self.tokenizer,
            max_tokens=options.max_tokens,
            tokens=options.tokens if text in self.recipe.corpora else "all",
        )
        # few batches: edits are made again for each where not all fit in memory
        return list(
            batches(rows, self.tokenizer, batch_tokens=INJECTED_TOKENS, counted=counted, starts=starts, similar=0.0)
        )

    def rows(
        self, text: str, limit: int | None = None, *, max_tokens: int = 1024, without: Collection[int] = ()
    ) -> tuple[list[list[int]], list[int] | None]:
        """Token ids of a text's documents, and the lengths of their prompts in tokens if they have any."""
        found = tokenize(self.documents(text, without)[:limit], self.tokenizer, max_tokens=max_tokens)
        prompts = [prompt for n, prompt in enumerate(self.found.prompts.get(text, ())) if n not in without][:limit]
        if not prompts:
            return found, None
        return found, prompt_lengths(found, tokenize(prompts, self.tokenizer, max_tokens=max_tokens))

    def documents(self, text: str, without: Collection[int] = ()) -> list[Document]:
        """A text's documents, without those at some positions."""
        return [document for n, document in enumerate(self.found.texts[text]) if n not in without]


def provenance_of(seed: int, hashes: Mapping[str, str], settings: Mapping[str, Any]) -> Provenance:
    """The provenance of a result with these inputs, whose key is equal only if all of them are."""
    return Provenance(seed=seed, inputs={**hashes, "settings": sha256_bytes(canonical_json(settings).encode())})


def open_context(recipe: Recipe, folder: Path, found: Check, stack: ExitStack) -> Context:
    """A run's inputs with their hashes; ``stack`` stops workers when it closes."""
    assert found.base is not None
    assert found.task_vector is not None
    with remembered_hashes(folder / "hashes.json") as hash_file:

        def hashed(model: Path) -> str:
            return sha256_files(identity_files(model), hash_file)

        saes = {str(layer): sae.hashed(hash_file) for layer, sae in found.saes.items()}
        hashes = {
            "base": hashed(found.base.path),
            "tuned": hashed(found.task_vector.store.path),
            "saes": sha256_bytes(canonical_json(saes).encode()),
        }
    for name, documents in found.texts.items():
        hashes[name] = documents_hash([*documents, *found.prompts.get(name, ())])
    return Context(
        recipe=recipe,
        folder=folder,
        found=found,
        base=found.base,
        task_vector=found.task_vector,
        hashes=hashes,
        stack=stack,
    )
