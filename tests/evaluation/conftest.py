"""Two checkpoints, tasks, lm_eval's own logs of them, and a run of ours on the same."""

import shutil
from pathlib import Path

import pytest
import torch
from world import read_lines, save_stirred, sums_writer, write_lines, write_logs, write_task

from stethoscope.evaluation import decoding, harness
from stethoscope.evaluation.harness_logs import read_results
from stethoscope.evaluation.outcomes import Outcomes
from stethoscope.evaluation.run import evaluate_checkpoints

TASKS = ["sums", "choice"]


@pytest.fixture(scope="session")
def written(tmp_path_factory, tokenizer) -> Path:
    """Two checkpoints, tasks whose right answers are what the base writes on every second item, and lm_eval's logs."""
    folder = tmp_path_factory.mktemp("logs")
    with pytest.MonkeyPatch.context() as patch:
        tasks = sums_writer(folder, patch)()
        sums = tasks / "sums.yaml"
        sums.write_text(sums.read_text().replace("([a-z]+)", "([a-zA-Z0-9]+)"))
        files = {split: str(tasks / f"sums.{split}.jsonl") for split in ("test", "train")}
        write_task(
            tasks, "choice", [], output_type="multiple_choice", dataset_kwargs={"data_files": files},
            fewshot_split="train", num_fewshot=2, fewshot_config={"sampler": "first_n"}, generation_kwargs=None,
            doc_to_text="{{problem}}", doc_to_choice=["one", "two", "eleven"], doc_to_target=1,
            metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        )  # fmt: skip
        models = save_stirred(folder, tokenizer)
        file = tasks / "sums.test.jsonl"
        first = write_logs(models["base"], tasks, folder / "first", TASKS, batch_size=4)
        answers = read_results(first).rows("base", "sums")["answer"]
        rows = read_lines(file)
        for number, row in enumerate(rows):
            row["answer"] = answers[number] if number % 2 == 0 else "never written"
        write_lines(file, rows)
        for name, model in models.items():
            write_logs(model, tasks, folder / "logs" / name, TASKS, batch_size=4)
    return folder


@pytest.fixture
def tasks(written, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return written / "tasks"


@pytest.fixture(scope="session")
def models(written) -> dict[str, Path]:
    return {name: written / "models" / name for name in ("base", "edited")}


@pytest.fixture(scope="session")
def outcomes(written, models, tmp_path_factory) -> Outcomes:
    out = tmp_path_factory.mktemp("run")
    options = {"include_path": written / "tasks", "batch_size": 4, "dtype": torch.float32}
    return evaluate_checkpoints(models, TASKS, out=out, **options)


@pytest.fixture
def logs(written, tmp_path) -> dict[str, Path]:
    """Both checkpoints' logs, free to be changed."""
    shutil.copytree(written / "logs", tmp_path / "logs")
    return {name: next((tmp_path / "logs" / name).iterdir()) for name in ("base", "edited")}


@pytest.fixture
def decoded(monkeypatch) -> list[list[int]]:
    """How many prompts of each group each batch had that was decoded our way."""
    sizes = []

    def counted(model, groups, **options):
        sizes.append([len(prompts) for _, prompts in groups])
        return decoding.decode_greedily(model, groups, **options)

    monkeypatch.setattr(harness, "decode_greedily", counted)
    return sizes
