"""Commands that test and compare models, with or without a recipe."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stethoscope.cli.console import ConsoleReporter, command_line, conclude, say, say_json, show_rows, warn
from stethoscope.cli.options import AsJSON, Device, GPUs, Quiet, RayAddress, Seed, Workers, labelled, parse_margin
from stethoscope.display import listed
from stethoscope.errors import StethoscopeError

if TYPE_CHECKING:
    from stethoscope.executor import RayExecutor
    from stethoscope.results.comparison import Comparison


def evaluate(
    model: Annotated[list[str], typer.Option(metavar="PATH[=NAME]", help="Checkpoint; repeat for more arms.")],
    tasks: Annotated[str, typer.Option(help="Harness tasks, groups or YAML files, separated by commas.")],
    out: Annotated[Path, typer.Option(help="Folder for outcomes and comparison; an unfinished one is continued.")],
    data: Annotated[Path | None, typer.Option(help="Local JSONL in the MATH schema for `minerva_math`.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of further task YAMLs.")] = None,
    allow_task_code: Annotated[
        bool, typer.Option("--allow-task-code", help="Run the Python that task files of your own name.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum items per task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded together.")] = 32,
    backend: Annotated[Literal["hf", "vllm"], typer.Option(help="Generation backend.")] = "hf",
    seed: Seed = 0,
    ray: RayAddress = None,
    workers: Workers = None,
    gpus: GPUs = None,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Run harness tasks on checkpoints, item by item, and compare the others with the first."""
    from stethoscope.evaluation.comparison import compare as compare_arms
    from stethoscope.evaluation.run import evaluate_checkpoints

    arms = {name or Path(path).name: path for path, name in map(labelled, model)}
    if len(arms) < len(model):
        raise StethoscopeError("two models have the same name", hint="name them: `--model PATH=NAME`")
    with _executor(ray, workers, gpus) as executor, ConsoleReporter(quiet=quiet).stage("Evaluate") as advance:
        outcomes = evaluate_checkpoints(
            arms,
            _names(tasks),
            out=out,
            backend=backend,
            include_path=include_path,
            task_code=allow_task_code,
            data=data,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            device=device or "auto",
            executor=executor,
            progress=lambda done, total, _: advance(done, total),
        )
    found = compare_arms(outcomes, baseline=outcomes.arms[0], seed=seed)
    found.save(out / "comparison.json")
    a, b, *more = [*outcomes.arms, "", ""]
    show_comparison(
        found,
        as_json=as_json,
        everything=len(arms) == 2,
        wrote=[out / "outcomes.parquet", out / "comparison.json"],
        then=command_line("compare", f"{out}={a}", f"{out}={b}") if any(more) else "",
    )


def _executor(ray: str | None, workers: int | None, gpus: float | None) -> "AbstractContextManager[RayExecutor | None]":
    if workers == 0 or (ray, workers, gpus) == (None, None, None):
        return nullcontext()
    from stethoscope.executor import RayExecutor, WorkerContext
    from stethoscope.recipe import Ray

    return RayExecutor(Ray(address=ray or "auto", workers=workers, gpus=gpus or 0.0), WorkerContext())


def compare(
    a: Annotated[str, typer.Argument(metavar="A[=ARM]", help="Baseline: a log folder, a log, or a run.")],
    b: Annotated[str, typer.Argument(metavar="B[=ARM]", help="Under test; ARM names a log or chooses a run's arm.")],
    metric: Annotated[str | None, typer.Option(help="Metric to compare; each task's own by default.")] = None,
    margin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHARE|TASK=LOSS", help="Accepted loss: 0.02 of shares by default; of a task in its unit."
        ),
    ] = None,
    family: Annotated[str | None, typer.Option(help="Tasks corrected together; the others are controls.")] = None,
    correction: Annotated[Literal["holm", "bh"], typer.Option(help="Correction for multiple tests.")] = "holm",
    cluster: Annotated[
        str | None, typer.Option(metavar="FIELD", help="Field of a log's items with their source.")
    ] = None,
    shared_only: Annotated[bool, typer.Option("--shared-only", help="Leave out items that one arm lacks.")] = False,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Also write the comparison to this file.")] = None,
    as_json: AsJSON = False,
) -> None:
    """Compare two arms item by item, from `lm_eval --log_samples` folders or from runs; no model is needed."""
    from stethoscope.evaluation.comparison import compare as compare_arms
    from stethoscope.evaluation.harness_logs import join, read_results

    margins = dict(map(parse_margin, margin or ()))
    common = margins.pop("", 0.02)
    (path_a, arm_a), (path_b, arm_b) = labelled(a), labelled(b)
    first = read_results(Path(path_a), arm=arm_a, source=cluster)
    second = read_results(Path(path_b), arm=arm_b, source=cluster)
    if first.arms == second.arms:
        first, second = first.renamed(f"{first.arms[0]} (a)"), second.renamed(f"{second.arms[0]} (b)")
    joined, left_out = join(first, second, shared_only=shared_only)
    found = compare_arms(
        joined,
        baseline=first.arms[0],
        pairs=[(first.arms[0], second.arms[0])],
        family=None if family is None else _names(family),
        metric=metric,
        margin=common,
        margins=margins,
        adjustment=correction,
        seed=seed,
    )
    if wide := [task for task, loss in margins.items() if loss >= 1 and found.scale(task).is_share]:
        raise StethoscopeError(f"the margin of {listed(wide)} is not a share between 0 and 1", hint="`TASK=0.05`")
    if out:
        found.save(out)
    for line in left_out:
        warn(f"left out: {line}")
    show_comparison(found, as_json=as_json, everything=True, wrote=[out] if out else [])


def _names(text: str) -> list[str]:
    """Names separated by commas, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def logs(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or what `evaluate` wrote.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write, with a folder in it for each arm.")],
    arm: Annotated[list[str] | None, typer.Option(help="Only this arm; repeat for more.")] = None,
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Write a run's outcomes as `lm_eval --log_samples` would have, for other tools."""
    from stethoscope.evaluation.harness_logs import write_logs
    from stethoscope.evaluation.outcomes import Outcomes

    outcomes = Outcomes.load(run / "outcomes.parquet")
    with ConsoleReporter(quiet=quiet).stage("Build the tasks"):
        tasks, seed = _tasks_of(run)
    written = write_logs(outcomes, out, tasks, arms=arm, seed=seed)
    folders = list(dict.fromkeys(path.parent for path in written))
    named = {path.name: path for path in folders}
    first, *others = folders
    second = named.get("selected", others[0] if others else first)
    said = f"{len(written)} logs of {len(folders)} arms" + ("" if tasks else ", without the items' fields and prompts")
    conclude(
        {name: str(path) for name, path in named.items()},
        as_json=as_json,
        says=[said],
        wrote=folders,
        then=command_line("compare", first, second) if second != first else "",
    )


def _tasks_of(run: Path) -> tuple[dict[str, Any], int]:
    """The tasks of a run's recipe, and its seed; no tasks if there is no recipe or they cannot be loaded."""
    from stethoscope.evaluation.tasks import load_tasks
    from stethoscope.recipe import Recipe

    if not (run / "recipe.yaml").exists():
        return {}, 0
    recipe = Recipe.from_yaml(run / "recipe.yaml")
    options = recipe.evaluate
    try:
        names = [*options.tasks, *options.control_tasks]
        where: dict[str, Any] = {name: getattr(options, name) for name in ("include_path", "data", "task_code")}
        return load_tasks(names, **where, seed=recipe.seed), recipe.seed
    except StethoscopeError as error:
        warn(f"warning: {error}")
        return {}, recipe.seed


def show_comparison(
    found: "Comparison", *, as_json: bool, everything: bool, wrote: Sequence[Path] = (), then: str = ""
) -> None:
    """Show accuracies and verdicts, and all tests of every contrast if ``everything``."""
    from stethoscope.results.comparison_tables import accuracy_rows, contrast_rows, gain_rows, noise, notes

    if as_json:
        say_json(found.to_dict())
        return
    show_rows(accuracy_rows(found))
    for line in noise(found):
        say(f"noise: {line}")
    for contrast in found.contrasts:
        if everything:
            rows = contrast_rows(contrast)
            show_rows([row[:10] for row in rows])
            show_rows([row[:1] + row[10:] for row in rows if any(row[10:])])  # all would be too wide
            if gains := gain_rows(contrast):
                show_rows(gains)
            for line in notes(contrast):
                say(f"note: {line}")
            for task in contrast.tasks:
                say(f"{task.task}: {task.verdict}")
    conclude({}, as_json=False, says=[f"Verdict: {c.verdict}" for c in found.contrasts], wrote=wrote, then=then)
