"""Fixtures over what `made_arms` makes."""

from collections.abc import Callable
from pathlib import Path

import pytest
from made_arms import build, save_pair, task_writer
from transformers import PreTrainedModel, PreTrainedTokenizerFast


@pytest.fixture
def make_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    return task_writer(tmp_path, monkeypatch)


@pytest.fixture
def checkpoints(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    return save_pair(tmp_path, tokenizer)


@pytest.fixture(params=["llama", "gpt2", "gemma3", "gemma3-short-window"])
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build(request.param)


@pytest.fixture
def stirred_llama() -> PreTrainedModel:
    return build("llama")
