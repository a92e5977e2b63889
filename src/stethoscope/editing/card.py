"""The model card of an edit, and the mergekit recipe that does the same where there is one."""

import html
import re
from collections.abc import Mapping
from typing import Any

import yaml

from stethoscope.checkpoints.adapter import AdapterTaskVector
from stethoscope.checkpoints.header import DTYPES
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.plan import EditPlan


def mergekit_recipe(task_vector: TaskVector, plan: EditPlan) -> str | None:
    """YAML for `mergekit-yaml` that makes the same weights, or None.

    There is none for transforms, for coefficients that differ between the modules of one layer (mergekit tells
    modules apart by substring only), for DoRA and for tensors outside the layers. With float32 arithmetic and one
    cast at the end mergekit's result equals this package's to the byte.
    """
    base = task_vector.base
    outside = [entry for entry in base.entries.values() if entry.layer is None and plan.coefficient(entry.name)]
    if plan.transform is not None or outside or isinstance(task_vector, AdapterTaskVector):
        return None
    weights = []
    for layer in range(base.layers):
        inside = {plan.coefficient(e.name) for e in base.entries.values() if e.layer == layer and e.kind != "buffer"}
        if len(inside) != 1:
            return None
        weights.append(inside.pop())
    # mergekit gives tensors outside the layers the weight of the first or last slice, so these are named apart
    outer = ("embed", "wte", "wpe", "lm_head", "model.norm", "final_layernorm", "ln_f")
    slices = []
    start = 0
    for stop in range(1, base.layers + 1):
        if stop < base.layers and weights[stop] == weights[start]:
            continue
        weight = weights[start]
        value = [*({"filter": name, "value": 0.0} for name in outer), {"value": weight}] if weight else weight
        tuned = {"model": task_vector.source, "layer_range": [start, stop], "parameters": {"weight": value}}
        slices.append({"sources": [{"model": base.source, "layer_range": [start, stop]}, tuned]})
        start = stop
    largest = max(base.entries.values(), key=lambda entry: entry.nbytes)
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": base.source,
        "slices": slices,
        "parameters": {"normalize": False},
        "dtype": "float32",
        "out_dtype": str(base.config.get("dtype") or base.config.get("torch_dtype") or DTYPES[largest.dtype].torch),
    }
    return yaml.safe_dump(recipe, sort_keys=False, width=1 << 20)  # a folded name could end the card's block of code


def model_card(manifest: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """README.md of an edit, with the metadata that the hub reads."""
    base, tuned = (_plain(manifest[key]["source"]) for key in ("base", "tuned"))
    kind = manifest["kind"]
    changed = {name: record for name, record in manifest["tensors"].items() if record.get("from") != "base"}
    metadata: dict[str, Any] = {"tags": ["stethoscope", "model-editing"]}
    if "/" in base:
        metadata["base_model"] = base
    if kind == "checkpoint":
        metadata["library_name"] = "transformers"
    elif kind == "adapter":
        metadata["library_name"] = "peft"
    name, results = f"{base}, edited", manifest.get("results")
    if results:
        metadata["model-index"] = _model_index(name, results)
    what = {
        "checkpoint": f"`{base}` with weights of `{tuned}` in some layers; all others are the base's, byte for byte.",
        "patch": f"The difference, base XOR edited, between `{base}` and an edit of it with `{tuned}`. "
        "`stethoscope undo` takes the edit back.",
        "adapter": f"The part of the adapter `{tuned}` for `{base}` that changes some layers.",
    }[kind]
    transform = manifest["plan"]["transform"]
    at = {
        key: f" at `{_plain(revision)}`" if (revision := manifest[key].get("revision")) else ""
        for key in ("base", "tuned")
    }
    rows = {
        "base": f"`{base}`{at['base']}",
        "tuned": f"`{tuned}`{at['tuned']}",
        "architecture": ", ".join(f"`{_plain(one)}`" for one in config.get("architectures") or ["unknown"]),
        "layers changed": ", ".join(map(str, manifest["layers"])) or "none",
        "tensors changed": f"{len(changed)} of {len(manifest['tensors'])}" if kind == "checkpoint" else len(changed),
        "transform": _transform(transform),
        "made by": f"stethoscope {manifest['stethoscope']}",
    }
    lines = ["---", yaml.safe_dump(metadata, sort_keys=True).strip(), "---", "", f"# {name}", "", what, ""]
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), ""]
    for note in manifest.get("notes", ()):
        lines += [f"Note: {_text(note)}.", ""]
    if results:
        lines += [
            "## Results",
            "",
            _text(results["verdict"]),
            "",
            *_result_rows(results),
            "",
        ]
    lines += ["`manifest.json` has the plan and the hash of every tensor; `stethoscope verify` checks them."]
    if manifest.get("mergekit"):
        lines += ["", "The same edit for mergekit:", "", "```yaml", manifest["mergekit"].rstrip(), "```"]
    elif transform:
        lines += ["", "mergekit has no recipe for this edit: it scales changes and does not transform them."]
    return "\n".join(lines) + "\n"


def _plain(name: object) -> str:
    """A name from elsewhere without what could end its place in the card, or be more than text there."""
    return " ".join(re.sub(r"[|<>\[\]`]", " ", str(name)).split())


def _text(words: object) -> str:
    """A sentence that quotes what is from elsewhere: in one line, without HTML and links."""
    return html.escape(" ".join(str(words).split()), quote=False).replace("[", "&#91;")


def _transform(described: Mapping[str, Any] | None) -> str:
    if not described:
        return "none, the raw change"
    if described.get("kind") != "filter":
        return f"`{_plain(described.get('kind', 'see manifest.json'))}`"
    tokens = ", ".join(
        f"{_plain(name)} ({count:,} tokens)" for name, count in described["tokens"].items() if name != "target"
    )
    return f"filter of strength {described['strength']:g} that protects {tokens}"


def _model_index(name: str, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Results in the hub's metadata format, which fills in the table beside a model's card."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    return eval_results_to_model_index(
        name,
        [
            EvalResult(
                task_type="text-generation",
                dataset_type=row["task"],
                dataset_name=row["task"],
                dataset_args={"items": row["items"]},
                metric_type=row["metric"],
                metric_value=row["accuracy"],
            )
            for row in results["tasks"]
        ],
    )


def _result_rows(results: Mapping[str, Any]) -> list[str]:
    lines = [
        f"| task | metric | items | {_plain(results['baseline'])} | edited | gain | adjusted p |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["tasks"]:
        metric = ", ".join(filter(None, [row["metric"], row["scale"] or "%"]))
        p = "-" if row["p_adjusted"] is None else f"{row['p_adjusted']:.2g}"
        cells = [_plain(row["task"]), _plain(metric), str(row["items"]), *row["shown"], p]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
