"""Outcomes out as harness logs: what lm_eval itself wrote, written again, is the same."""

import json

import pytest
from world import read_lines

from stethoscope.cli import main
from stethoscope.errors import EvaluationError
from stethoscope.evaluation.comparison import compare
from stethoscope.evaluation.harness_logs import join, read_results, write_logs
from stethoscope.evaluation.tasks import load_tasks


def test_logs_are_those_of_the_harness(outcomes, written, tmp_path):
    write_logs(outcomes, tmp_path, load_tasks(["sums", "choice"], written / "tasks"))
    for arm in ("base", "edited"):
        theirs = next((written / "logs" / arm).iterdir())
        for task in ("sums", "choice"):
            ours, harness = (
                read_lines(next(folder.glob(f"samples_{task}_*.jsonl"))) for folder in (tmp_path / arm, theirs)
            )
            for one, other in zip(ours, sorted(harness, key=lambda row: row["doc_id"]), strict=True):
                assert set(one) == set(other)
                same = set(one) - {"resps", "filtered_resps"}
                assert {key: one[key] for key in same} == {key: other[key] for key in same}
                if task == "sums":
                    assert (one["filtered_resps"], one["resps"]) == (other["filtered_resps"], other["resps"])
                else:  # log likelihoods, to the last digits that batches leave alike
                    values = [[float(choice[0]) for choice in row["filtered_resps"]] for row in (one, other)]
                    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_logs_read_back_compare_the_same(outcomes, written, tmp_path):
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


def test_other_tasks_and_unknown_arms_are_refused(outcomes, written, tmp_path):
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
    assert "4 logs of 2 arms" in shown
    assert f"next: stethoscope compare {tmp_path / 'logs' / 'base'} {tmp_path / 'logs' / 'edited'}" in shown
    main(["logs", str(tmp_path / "run"), str(tmp_path / "one"), "--arm", "edited", "--json"])
    assert json.loads(capsys.readouterr().out) == {"edited": str(tmp_path / "one" / "edited")}
