"""Fixtures over what `world` makes."""

import copy
import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

from tokenizers import processors
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from world import Planted, make_llama, make_tokenizer, make_world, plant, save_pair, save_stirred, stirred, sums_writer

from stethoscope.checkpoints.checkpoint import Checkpoint
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.layers import LayerEdits
from stethoscope.recipe import Recipe
from stethoscope.run import run_recipe


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def llama() -> Callable[..., LlamaForCausalLM]:
    return make_llama


@pytest.fixture(scope="session")
def world(tmp_path_factory, tokenizer) -> Path:
    """A folder with a base, an adapter, SAEs, texts, tasks and a recipe; tests only read it."""
    return make_world(tmp_path_factory.mktemp("world"), tokenizer)


@pytest.fixture(scope="session")
def finished(world) -> Path:
    """A finished run of the world's recipe; tests only read it."""
    run_recipe(Recipe.from_yaml(world / "recipe.yaml"), world / "run")
    return world / "run"


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny Llama and its fine-tune in several shards."""
    return save_pair("llama untied", tmp_path_factory.mktemp("pair"), shard="8KB")


@pytest.fixture
def base(pair) -> Checkpoint:
    return open_checkpoint(pair[0])


@pytest.fixture
def change(base, pair) -> TaskVector:
    return open_task_vector(base, pair[1])


@pytest.fixture(scope="session")
def planted(tmp_path_factory, tokenizer) -> Planted:
    """Layers 1 and 4 of 6 have the skill."""
    return plant(tmp_path_factory.mktemp("planted"), tokenizer)


@pytest.fixture(scope="session")
def edits(planted) -> LayerEdits:
    return LayerEdits(planted.model, planted.task_vector)


@pytest.fixture
def chat_tokenizer(tokenizer):
    """One token per byte, so that what counts can be read off; it puts a BOS before every text."""

    def with_template(template: str):
        built = copy.deepcopy(tokenizer)
        built.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", built.bos_token_id)]
        )
        built.chat_template = template
        return built

    return with_template


@pytest.fixture
def make_task(tmp_path, monkeypatch) -> Callable[..., Path]:
    return sums_writer(tmp_path, monkeypatch)


@pytest.fixture
def checkpoints(tmp_path, tokenizer) -> dict[str, Path]:
    return save_stirred(tmp_path, tokenizer)


@pytest.fixture(params=["llama", "gpt2", "gemma3", "gemma3-short-window"])
def any_model(request) -> PreTrainedModel:
    return stirred(request.param)


@pytest.fixture
def stirred_llama() -> PreTrainedModel:
    return stirred("llama")
