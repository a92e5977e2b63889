"""A pair of tiny Llamas in several shards, for every test of this room that does not ask for more."""

from pathlib import Path

import pytest
from tiny_models import LAYOUTS, save_pair

from stethoscope.checkpoints.checkpoint import Checkpoint
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.checkpoints.task_vector import TaskVector


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_pair(LAYOUTS["llama untied"], tmp_path_factory.mktemp("pair"), shard="8KB")


@pytest.fixture
def base(pair: tuple[Path, Path]) -> Checkpoint:
    return open_checkpoint(pair[0])


@pytest.fixture
def change(base: Checkpoint, pair: tuple[Path, Path]) -> TaskVector:
    return open_task_vector(base, pair[1])
