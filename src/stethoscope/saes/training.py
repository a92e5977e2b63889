"""SAEs for a model that has none: one for a site of every layer, on SAELens' trainers, from one shared forward.

    stethoscope train-saes --base MODEL --text text.jsonl --out saes/

Stopped or killed, the same call goes on from its last checkpoint and gives the same SAEs.
`python demo/scripts/train_saes.py` made the demo's SAEs with it.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata, TrainStepInput, TrainStepOutput
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.prefetch import PrefetchingIterator
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stethoscope.artifacts import canonical_json, new_folder, sha256_bytes, write_json
from stethoscope.corpus import Document, documents_hash
from stethoscope.errors import SAEError, StethoscopeError
from stethoscope.models import decoder_layers, load_model
from stethoscope.results.diagnosis import SAEHealth
from stethoscope.saes.activations import ActivationStream
from stethoscope.saes.health import HealthSums, measure_health
from stethoscope.saes.resume import TrainingCheckpoints
from stethoscope.sites import SITES

# Encoder rows start as this multiple of the decoder's: many features that overlap fire on a token at first.
INIT_GAIN = 0.15


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How SAEs are trained.

    Attributes:
        width: features of each SAE.
        k: features that fire on a token, on average over a batch (BatchTopK).
        tokens: tokens to train on; documents repeat, in another order, if there are fewer.
        batch: tokens to a step.
        learning_rate: Adam's, after a warm-up over the first twentieth of the steps and before a linear decay to 0
            over the last half.
        buffer: tokens held and shuffled before they are cut into batches.
        max_tokens: documents are cut here.
        seed: of document order, shuffling and initial weights.
        model_name: written beside each SAE; the model's own name or folder if None.
    """

    width: int
    k: int
    tokens: int
    batch: int = 1024
    learning_rate: float = 4e-3
    buffer: int = 16384
    max_tokens: int = 384
    seed: int = 0
    model_name: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be trained.

        Raises:
            SAEError: all that is wrong, at once.
        """
        positive = ("width", "k", "tokens", "batch", "learning_rate", "buffer")
        problems = [f"{name} is `{getattr(self, name)}`, not above 0" for name in positive if getattr(self, name) <= 0]
        if self.k > self.width:
            problems.append(f"k is `{self.k}`, but there are {self.width} features only")
        if self.max_tokens < 2:
            problems.append(f"max_tokens is `{self.max_tokens}`, but a document's first token is left out")
        if problems:
            raise SAEError("SAEs cannot be trained so", problems=problems)


class _LeanBatchTopK(BatchTopKTrainingSAE):  # type: ignore[misc]  # SAELens is not typed
    """SAELens' BatchTopK SAE with a training step of few passes over memory, for which a CPU has little bandwidth.

    Products are in bfloat16, the error and the weights in float32. The cut between the k largest activations of the
    batch and the rest is found by partial sorting of the bfloat16 bit patterns, which order as their values do above 0.
    Values equal to the cut are left out, so that L0 falls short of k by about a hundredth.
    """

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        centred = step_input.sae_in.float() - self.b_dec
        # b_dec learns as a mean from the decoder's side alone: the encoder's side would cost one more product.
        encoded = torch.addmm(self.b_enc.bfloat16(), centred.detach().bfloat16(), self.W_enc.bfloat16())
        cut = self._cut(encoded.detach())
        features = functional.threshold(encoded, cut, 0.0)
        decoded = (features @ self.W_dec.bfloat16()).float()
        loss = (decoded - centred).square().sum(-1).mean()
        with torch.no_grad():
            self.topk_threshold.lerp_(self.topk_threshold.new_tensor(cut), self.cfg.topk_threshold_lr)
        return TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=decoded + self.b_dec,
            feature_acts=features.detach(),
            hidden_pre=encoded,
            loss=loss,
            losses={"mse_loss": loss},
        )

    def _cut(self, encoded: Float[Tensor, "tokens width"]) -> float:
        bits = encoded.contiguous().view(torch.int16).reshape(-1).cpu().numpy()
        place = max(bits.size - int(self.cfg.k) * len(encoded) - 1, 0)
        cut = torch.tensor(int(np.partition(bits, place)[place]), dtype=torch.int16).view(torch.bfloat16)
        return max(float(cut), 0.0)


def train_saes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    out: Path,
    *,
    settings: TrainingSettings,
    held_out: Mapping[str, Sequence[Document]],
    layers: Sequence[int] | None = None,
    site: str = "resid_post",
    overwrite: bool = False,
    checkpoint_seconds: float = 120.0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, dict[str, SAEHealth]]:
    """Train a BatchTopK SAE on a site of each layer and write them in SAELens' layout, as JumpReLU.

    Weights are stored in bfloat16 with decoder rows of norm 1, biases and thresholds in float32; they load in float32.
    Special tokens, each document's first position and attention sinks are left out.

    While it runs, checkpoints lie in ``OUT.training``. A call with the same model, text and settings goes on from there
    and gives the same SAEs as one that was never stopped, to the bit where the device repeats its sums.

    Args:
        model: whose activations are read; its head is never run.
        tokenizer: the model's own.
        documents: the text to train on.
        out: becomes a folder of ``layer_{layer}`` folders and ``health.json``, whole or not at all.
        settings: width, sparsity, length and pace.
        held_out: kinds of text that health is measured on after the weights were rounded, by name.
        layers: which; all if None.
        site: where in a layer, a key of ``sites.TAPS``.
        overwrite: replace ``out`` if it exists.
        checkpoint_seconds: time between checkpoints; at most so much work is lost.
        progress: called with tokens done and in all.

    Returns:
        Health by layer and kind of held-out text, with the kind ``all`` for all of it.

    Raises:
        SAEError: layers or a site that the model does not have, no text, or a checkpoint of another training.
        StethoscopeError: ``out`` exists.
    """
    if out.exists() and not overwrite:
        raise StethoscopeError(f"the output `{out}` exists", hint="choose another folder or remove it first")
    if site not in SITES:
        raise SAEError(f"there is no site `{site}`", hint=f"the sites are {', '.join(SITES)}")
    depth = len(decoder_layers(model))
    layers = sorted(set(range(depth) if layers is None else layers))
    if bad := [f"layer {layer}" for layer in layers if not 0 <= layer < depth]:
        raise SAEError(f"the model has {depth} layers, numbered from 0", problems=bad)
    if not documents or not layers:
        raise SAEError("there is nothing to train SAEs on", hint="pass documents and layers")
    torch.manual_seed(settings.seed)
    stream = ActivationStream(model, tokenizer, layers, site=site, max_tokens=settings.max_tokens)
    rows = stream.tokenize(documents)
    if not rows:
        raise SAEError("every document has one token only", hint="the first is never trained on: give longer text")
    checkpoints = TrainingCheckpoints(
        out,
        begun={
            **asdict(settings),
            "site": site,
            "layers": layers,
            "text": documents_hash(documents),
            "model": _fingerprint(model),
        },
    )
    saes = _fit(stream, rows, settings, checkpoints, checkpoint_seconds, progress)
    with new_folder(out, overwrite=overwrite) as folder:
        for layer in layers:
            _save(saes[stream.hooks[layer]], folder / f"layer_{layer}")
        health = measure_saes(
            {layer: SAE.load_from_disk(folder / f"layer_{layer}") for layer in layers}, stream, held_out
        )
        write_json(
            folder / "health.json",
            {
                "settings": asdict(settings),
                "layers": {str(layer): {kind: h.to_dict() for kind, h in health[layer].items()} for layer in layers},
            },
        )
    checkpoints.remove()
    return health


def _fit(
    stream: ActivationStream,
    rows: Sequence[Sequence[int]],
    settings: TrainingSettings,
    checkpoints: TrainingCheckpoints,
    checkpoint_seconds: float,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """Step every layer's SAELens trainer on the same tokens; the model runs ahead in a thread of its own."""
    steps = max(1, settings.tokens // settings.batch)
    start = checkpoints.position()
    activations = stream.shuffled(rows, batch=settings.batch, buffer=settings.buffer, seed=settings.seed, start=start)
    # Deep enough for the model to run on while the SAEs work through what it filled the buffer with.
    source = PrefetchingIterator(activations, prefetch=max(2, settings.buffer // settings.batch))
    try:
        batch, position = next(source)
        trainer = MultiSAETrainer(
            SAETrainerConfig(
                total_training_samples=steps * settings.batch,
                train_batch_size_samples=settings.batch,
                lr=settings.learning_rate,
                # decays from here to 0; SAELens refuses to start a decay at 0
                lr_end=settings.learning_rate,
                lr_warm_up_steps=max(2, steps // 20),
                lr_decay_steps=max(1, steps // 2),
                device=str(stream.model.device),
            ),
            saes={name: _new_sae(stream, name, values, settings) for name, values in batch.items()},
            hook_names={name: name for name in batch},
            data_provider=source,
        )
        for name, one in trainer.trainers.items():
            one.activation_scaler.scaling_factor = _scale(batch[name])
            for group in one.optimizer.param_groups:
                group.update(fused=True, foreach=False)  # one pass over the weights
        checkpoints.load(trainer)
        saved = time.monotonic()
        if progress and checkpoints.step:
            progress(checkpoints.step * settings.batch, steps * settings.batch)
        for step in range(checkpoints.step, steps):
            for name, one in trainer.trainers.items():
                one.step(batch[name])
                one.n_training_steps += 1
            if progress:
                progress((step + 1) * settings.batch, steps * settings.batch)
            if step + 1 < steps:
                if time.monotonic() - saved >= checkpoint_seconds:
                    checkpoints.save(trainer.trainers, position, step + 1)
                    saved = time.monotonic()
                batch, position = next(source)
    finally:
        source.close()
    for name, one in trainer.trainers.items():
        trainer.saes[name].fold_activation_norm_scaling_factor(one.activation_scaler.scaling_factor or 1.0)
        one.activation_scaler.scaling_factor = None
        one.set_final_sae_metadata()
    return trainer.saes


def _fingerprint(model: PreTrainedModel) -> str:
    """A hash of every weight's name, shape and a few of its values, which tells a model from its fine-tune."""
    few = [
        [name, list(value.shape), value.detach().flatten()[:: max(1, value.numel() // 64)][:64].float().tolist()]
        for name, value in model.named_parameters()
    ]
    return sha256_bytes(canonical_json(few).encode())


def _scale(hidden: Float[Tensor, "tokens d_in"]) -> float:
    """A power of two, exact in bfloat16, that brings activations about their mean to unit variance, about."""
    spread = float((hidden.float() - hidden.float().mean(0)).square().mean().sqrt())
    return 2.0 ** -round(math.log2(spread)) if spread > 0 else 1.0


@torch.no_grad()
def _new_sae(
    stream: ActivationStream, name: str, hidden: Float[Tensor, "tokens d_in"], settings: TrainingSettings
) -> _LeanBatchTopK:
    """An SAE whose features start as directions of real activations, which leaves few dead."""
    steps = max(1, settings.tokens // settings.batch)
    sae = _LeanBatchTopK(
        BatchTopKTrainingSAEConfig(
            d_in=hidden.shape[1],
            d_sae=settings.width,
            k=settings.k,
            device=str(stream.model.device),
            normalize_activations="expected_average_only_in",
            rescale_acts_by_decoder_norm=False,
            topk_threshold_lr=max(0.01, min(1.0, 10 / steps)),
            metadata=SAEMetadata(
                model_name=settings.model_name or Path(stream.model.name_or_path or "").name,
                model_class_name="AutoModelForCausalLM",
                hook_name=name,
                context_size=stream.max_tokens,
                prepend_bos=False,
                exclude_special_tokens=True,
            ),
        )
    )
    values = hidden.float() * _scale(hidden)
    mean = values.mean(0)
    chosen = torch.randint(len(values), (settings.width,), device=values.device)
    directions = functional.normalize(values[chosen] - mean + 1e-6 * torch.randn_like(values[chosen]), dim=-1)
    sae.b_dec.copy_(mean)
    sae.W_dec.copy_(directions)
    sae.W_enc.copy_(INIT_GAIN * directions.T)
    return sae


def _save(trained: _LeanBatchTopK, folder: Path) -> None:
    """Write an SAE as JumpReLU in SAELens' layout, matrices in bfloat16."""
    trained.save_inference_model(folder)
    sae = SAE.load_from_disk(folder, device="cpu")
    sae.fold_W_dec_norm()
    sae.cfg.device = "cpu"
    sae.save_model(folder)
    weights = load_file(folder / "sae_weights.safetensors")
    # A bias holds values far from 0 whose rounding would shift every activation; matrices hold all of the bytes.
    stored = {name: (value.bfloat16() if value.ndim == 2 else value.float()) for name, value in weights.items()}
    save_file({name: value.contiguous() for name, value in stored.items()}, folder / "sae_weights.safetensors")
    (folder / "sae_weights.safetensors").chmod(0o644)
    config = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    write_json(folder / "cfg.json", config)


def measure_saes(
    saes: Mapping[int, SAE[Any]], stream: ActivationStream, held_out: Mapping[str, Sequence[Document]]
) -> dict[int, dict[str, SAEHealth]]:
    """Health by layer and kind of text, with the kind ``all`` for all of it."""
    sums: dict[int, dict[str, HealthSums]] = {layer: {} for layer in saes}
    for kind, documents in held_out.items():
        for heard in stream.outputs(stream.tokenize(documents)):
            for layer, sae in saes.items():
                found = measure_health(sae, heard[stream.hooks[layer]])
                for name in (kind, "all"):
                    sums[layer][name] = sums[layer][name] + found if name in sums[layer] else found
    return {layer: {name: found.health() for name, found in kinds.items()} for layer, kinds in sums.items()}


def load_for_training(base: str | Path) -> PreTrainedModel:
    """A model whose activations SAEs are trained on: on a CPU with what is fastest there for short documents."""
    model = load_model(base)
    if model.device.type == "cpu":
        model.set_attn_implementation("eager")
        # The model and the SAEs run side by side, each with so many threads.
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    return model


def hold_out(documents: Sequence[Document], *, most: int = 64) -> tuple[list[Document], list[Document]]:
    """Documents to train on, and every twentieth, ``most`` at most, to measure health on; all are both if few."""
    held = list(documents[10::20][:most])
    if not held:
        return list(documents), list(documents)
    out = {10 + 20 * i for i in range(len(held))}
    return [document for i, document in enumerate(documents) if i not in out], held
