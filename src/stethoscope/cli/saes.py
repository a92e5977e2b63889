"""The command that trains SAEs."""

import json
from pathlib import Path
from typing import Annotated

import typer

from stethoscope.cli.console import AsJSON, ConsoleReporter, Quiet, conclude
from stethoscope.cli.values import labelled, parse_layers


def train_saes(
    base: Annotated[str, typer.Option(help="The model that has none: a checkpoint folder or a hub id.")],
    text: Annotated[Path, typer.Option(help="What to train on: .jsonl, .parquet, .txt or a saved dataset.")],
    out: Annotated[Path, typer.Option(help="Folder to write; `OUT.training` beside it holds checkpoints meanwhile.")],
    field: Annotated[str, typer.Option(help="Field of the text that holds the documents.")] = "text",
    held_out: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[=NAME]", help="Text to measure health on; some of the text itself if absent."),
    ] = None,
    layers: Annotated[str, typer.Option(help="Layers, such as `3,5-8`, or `all`.")] = "all",
    site: Annotated[str, typer.Option(help="Where in a layer: resid_post, mlp_out, attn_out, ...")] = "resid_post",
    width: Annotated[int | None, typer.Option(help="Features; four times the model's width if absent.")] = None,
    k: Annotated[int, typer.Option(help="Features that fire on a token, on average.")] = 64,
    tokens: Annotated[int, typer.Option(help="Tokens to train on; the text repeats if it has fewer.")] = 1_000_000,
    batch: Annotated[int, typer.Option(help="Tokens to a step.")] = 1024,
    learning_rate: Annotated[float, typer.Option(help="Adam's.")] = 4e-3,
    max_tokens: Annotated[int, typer.Option(help="Documents are cut here.")] = 384,
    seed: Annotated[int, typer.Option(help="Of order and initial weights.")] = 0,
    checkpoint_seconds: Annotated[float, typer.Option(help="Time between checkpoints.")] = 120.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Train an SAE on every layer of a model, from one forward; run again after a stop, it goes on there."""
    from stethoscope.corpus import read_documents
    from stethoscope.models import load_tokenizer
    from stethoscope.saes.health import health_rows
    from stethoscope.saes.training import TrainingSettings, hold_out, load_for_training
    from stethoscope.saes.training import train_saes as train

    chosen = None if layers == "all" else parse_layers(layers)
    documents = read_documents(text, field=field)
    if held_out:
        named = {name or Path(path).stem: path for path, name in map(labelled, held_out)}
        held = {name: read_documents(path, field=field) for name, path in named.items()}
    else:
        documents, kept = hold_out(documents)
        held = {"held out": kept}
    reporter = ConsoleReporter(quiet=quiet)
    with reporter.stage("Load the model"):
        model, tokenizer = load_for_training(base), load_tokenizer(base)
    with reporter.stage("Train SAEs") as advance:
        train(
            model,
            tokenizer,
            documents,
            out,
            settings=TrainingSettings(
                width=width or 4 * model.config.get_text_config().hidden_size,
                k=k,
                tokens=tokens,
                batch=batch,
                learning_rate=learning_rate,
                max_tokens=max_tokens,
                seed=seed,
            ),
            held_out=held,
            layers=chosen,
            site=site,
            overwrite=overwrite,
            checkpoint_seconds=checkpoint_seconds,
            progress=advance,
        )
    found = json.loads((out / "health.json").read_text(encoding="utf-8"))
    conclude(
        {"out": str(out), **found},
        as_json=as_json,
        rows=health_rows(found["layers"]),
        says=["Variance explained by kind of text; L0, dead and dense features over all of it."],
        wrote=[out],
    )
