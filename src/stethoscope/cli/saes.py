"""The command that trains SAEs."""

import json
from pathlib import Path
from typing import Annotated

import typer

from stethoscope.cli.console import ConsoleReporter, conclude
from stethoscope.cli.options import AsJSON, Layers, Quiet, Seed, labelled, parse_layers


def train_saes(
    base: Annotated[str, typer.Option(help="Model to train SAEs for: a checkpoint folder or a hub id.")],
    text: Annotated[Path, typer.Option(help="Training text: .jsonl, .parquet, .txt or a saved dataset.")],
    out: Annotated[Path, typer.Option(help="Folder to write; checkpoints are kept in `OUT.training` meanwhile.")],
    field: Annotated[str, typer.Option(help="Field that holds the documents.")] = "text",
    held_out: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[=NAME]", help="Text to measure health on; by default part of the training text."),
    ] = None,
    layers: Layers = "all",
    site: Annotated[str, typer.Option(help="Where in a layer: resid_post, mlp_out, attn_out, ...")] = "resid_post",
    width: Annotated[int | None, typer.Option(help="Features per SAE; by default four times the hidden size.")] = None,
    k: Annotated[int, typer.Option(help="Features that fire per token, on average.")] = 64,
    tokens: Annotated[int, typer.Option(help="Tokens to train on; shorter text is repeated.")] = 1_000_000,
    batch: Annotated[int, typer.Option(help="Tokens per step.")] = 1024,
    learning_rate: Annotated[float, typer.Option(help="Adam learning rate.")] = 4e-3,
    max_tokens: Annotated[int, typer.Option(help="Documents are cut to this many tokens.")] = 384,
    seed: Seed = 0,
    checkpoint_seconds: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 120.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Train an SAE for every layer of a model; the same command resumes a stopped training."""
    from stethoscope.models.load import load_tokenizer
    from stethoscope.saes import train as training
    from stethoscope.saes.health import health_rows
    from stethoscope.text.documents import read_documents

    chosen = None if layers == "all" else parse_layers(layers)
    documents = read_documents(text, field=field)
    if held_out:
        named = {name or Path(path).stem: path for path, name in map(labelled, held_out)}
        held = {name: read_documents(path, field=field) for name, path in named.items()}
    else:
        documents, kept = training.hold_out(documents)
        held = {"held out": kept}
    reporter = ConsoleReporter(quiet=quiet)
    with reporter.stage("Load the model"):
        model, tokenizer = training.load_for_training(base), load_tokenizer(base)
    with reporter.stage("Train SAEs") as advance:
        training.train_saes(
            model,
            tokenizer,
            documents,
            out,
            settings=training.TrainingSettings(
                width=width or 4 * model.config.get_text_config().hidden_size,
                k=k,
                tokens=tokens,
                batch=batch,
                learning_rate=learning_rate,
                max_tokens=max_tokens,
                seed=seed,
                layers=chosen,
                site=site,
            ),
            held_out=held,
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
