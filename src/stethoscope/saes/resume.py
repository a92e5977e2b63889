"""Checkpoints of SAE training beside its output, so that the same command goes on where it was stopped or killed.

checkpoints = TrainingCheckpoints(out, begun={"width": 2304, ...})
position, step = checkpoints.position()                # None, 0 at the start
checkpoints.load(trainer)
checkpoints.save(trainer, position, step)

Weights, optimizers and schedules are SAELens' own checkpoint; the place in the stream of activations is added to it.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file

from stethoscope.artifacts import new_folder, write_json
from stethoscope.errors import SAEError
from stethoscope.saes.activations import StreamPosition
from stethoscope.saes.layouts.files import read_json

_STEP = "step_"


class TrainingCheckpoints:
    """The newest checkpoint of one training, in ``OUT.training``; removed when the training is done.

    Args:
        out: where the SAEs will lie.
        begun: all that decides what the training gives, as plain values.

    Raises:
        SAEError: there is a checkpoint of a training that was begun otherwise.
    """

    def __init__(self, out: Path, *, begun: Mapping[str, Any]) -> None:
        self.folder = out.with_name(out.name + ".training")
        self.begun = dict(begun)
        steps = [int(path.name.removeprefix(_STEP)) for path in self.folder.glob(f"{_STEP}*")]
        self.step = max(steps, default=0)
        if self.step:
            self._saved = read_json(self._at(self.step) / "training.json")
            known = self._saved["begun"]
            differ = [name for name in {**known, **self.begun} if known.get(name) != self.begun.get(name)]
            if differ:
                raise SAEError(
                    f"the training in `{self.folder}` was begun otherwise",
                    problems=[f"{name} was `{known.get(name)}`, now it is `{self.begun.get(name)}`" for name in differ],
                    hint="give the same settings and text to go on, or remove that folder to begin anew",
                )

    def position(self) -> StreamPosition | None:
        """Where the stream of activations stood; None at the beginning."""
        if not self.step:
            return None
        tensors = load_file(self._at(self.step) / "stream.safetensors")
        shuffle = tensors.pop("shuffle")
        return StreamPosition(shuffle=shuffle, rest=tensors, **self._saved["stream"])

    def load(self, trainer: MultiSAETrainer) -> None:
        """Put weights, optimizers and schedules back as they were."""
        if self.step:
            trainer.load_checkpoint(self._at(self.step))

    def save(self, trainers: Mapping[str, SAETrainer[Any, Any]], position: StreamPosition, step: int) -> None:
        """Write a checkpoint, whole or not at all, and only then remove the one before."""
        with new_folder(self._at(step)) as folder:
            for name, trainer in trainers.items():
                trainer.save_checkpoint(checkpoint_name=name, base_path=folder)
            rest = {name: value.contiguous() for name, value in position.rest.items()}
            save_file({"shuffle": position.shuffle, **rest}, folder / "stream.safetensors")
            stream = {"taken": position.taken, "given": position.given}
            write_json(folder / "training.json", {"begun": self.begun, "stream": stream})
        self.step = step
        for path in self.folder.iterdir():
            if path != self._at(step):
                shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """The training is done: nothing is left to go on with."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _at(self, step: int) -> Path:
        return self.folder / f"{_STEP}{step}"
