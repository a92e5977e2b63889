"""Outcomes out as harness logs: what lm_eval itself wrote, written again, is the same."""

import json
from pathlib import Path

import pytest
import torch
from test_harness_logs import CHOICE, checkpoints, tasks, written  # noqa: F401 - fixtures

from stethoscope.cli import main
from stethoscope.errors import EvaluationError
from stethoscope.evaluation.comparison import compare
from stethoscope.evaluation.harness_logs import join, read_results, write_logs
from stethoscope.evaluation.outcomes import Outcomes
from stethoscope.evaluation.run import evaluate_checkpoints
from stethoscope.evaluation.tasks import load_tasks


def lines(folder: Path, task: str) -> list[dict]:
    (path,) = folder.glob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def outcomes(written, tmp_path_factory) -> Outcomes:  # noqa: F811
    models = {name: written / "models" / name for name in ("base", "edited")}
    out = tmp_path_factory.mktemp("run")
    return evaluate_checkpoints(
        models, ["sums", "choice"], out=out, include_path=written / "tasks", batch_size=4, dtype=torch.float32
    )


def test_logs_are_those_of_the_harness(outcomes, written, tmp_path):  # noqa: F811
    write_logs(outcomes, tmp_path, load_tasks(["sums", "choice"], written / "tasks"))
    for arm in ("base", "edited"):
        theirs = next((written / "logs" / arm).iterdir())
        for task in ("sums", "choice"):
            ours, harness = lines(tmp_path / arm, task), lines(theirs, task)
            assert len(ours) == len(harness)
            for one, other in zip(ours, sorted(harness, key=lambda row: row["doc_id"]), strict=True):
                assert set(one) == set(other)
                same = set(one) - {"resps", "filtered_resps"}
                assert {key: one[key] for key in same} == {key: other[key] for key in same}
                if task == "sums":
                    assert one["filtered_resps"] == other["filtered_resps"]
                    assert one["resps"] == other["resps"]
                else:  # log likelihoods, to the last digits that batches leave alike
                    values = [[float(choice[0]) for choice in row["filtered_resps"]] for row in (one, other)]
                    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_logs_read_back_compare_the_same(outcomes, written, tmp_path):  # noqa: F811
    expected = compare(outcomes, baseline="base").contrasts[0]
    for known in (None, load_tasks(["sums", "choice"], written / "tasks")):
        folder = tmp_path / str(bool(known))
        write_logs(outcomes, folder, known)
        joined, left_out = join(read_results(folder / "base"), read_results(folder / "edited"))
        assert left_out == []
        found = compare(joined, baseline="base").contrasts[0]
        told = [{t.task: (t.mcnemar, t.difference) for t in contrast.tasks} for contrast in (found, expected)]
        assert told[0] == told[1]
        assert joined.rows("base", "sums")["extracted"].tolist() == outcomes.rows("base", "sums")["extracted"].tolist()


def test_other_tasks_and_unknown_arms_are_refused(outcomes, written, tmp_path):  # noqa: F811
    with pytest.raises(EvaluationError, match="there is no arm `nobody`"):
        write_logs(outcomes, tmp_path, arms=["nobody"])
    changed = load_tasks(["sums"], written / "tasks")
    changed["sums"].set_config(key="doc_to_text", value="Another: {{problem}}=")
    with pytest.raises(EvaluationError, match="had another prompt"):
        write_logs(outcomes, tmp_path, changed)


def test_the_logs_command(outcomes, tmp_path, capsys):
    outcomes.save(tmp_path / "run" / "outcomes.parquet")
    main(["logs", str(tmp_path / "run"), str(tmp_path / "logs")])
    shown = capsys.readouterr().out
    assert "4 logs of 2 arms, without the items' fields and prompts" in shown
    assert f"next: stethoscope compare {tmp_path / 'logs' / 'base'} {tmp_path / 'logs' / 'edited'}" in shown
    main(["logs", str(tmp_path / "run"), str(tmp_path / "one"), "--arm", "edited", "--json"])
    assert json.loads(capsys.readouterr().out) == {"edited": str(tmp_path / "one" / "edited")}
