"""Find the files of a folder that hold its weights. An index that names a file outside the folder is refused."""

from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from stethoscope.errors import CheckpointError
from stethoscope.parsing import parse_json

INDEX = "model.safetensors.index.json"
# Fields of config.json that count something, under the names that families give them.
SIZES = ("hidden_size", "n_embd", "d_model", "num_hidden_layers", "n_layer", "num_layers")


def read_json_object(path: Path, *, hint: str) -> dict[str, Any]:
    """A JSON file that holds an object, or a CheckpointError that says why not."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read `{path}`: {error.strerror}", hint=hint) from error
    except ValueError as error:
        raise CheckpointError(f"`{path}` is not valid JSON: {error}", hint=hint) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"`{path}` is not a JSON object", hint=hint)
    return value


def inside(folder: Path, file: Path) -> bool:
    """Whether a file, links followed, lies in its folder, or with it in one repository of the hub library's cache."""
    place, home = file.resolve(), folder.resolve()
    blobs = [one.parents[1] / "blobs" for one in (home, *home.parents) if one.parent.name == "snapshots"]
    return any(place.is_relative_to(one) for one in (home, *blobs))


def refuse_links(folder: Path, *, deep: bool = False) -> None:
    """Raise for links that lead out of a folder: what they lead to is none of its files, and would be copied.

    Args:
        deep: look into folders within, and at links to folders.
    """
    found = sorted(folder.rglob("*") if deep else folder.iterdir())
    links = [path for path in found if path.is_symlink() and (deep or path.is_file())]
    if out := [path for path in links if not inside(folder, path)]:
        raise CheckpointError(
            f"links lead out of `{folder}`",
            problems=[f"`{path.relative_to(folder)}` leads to `{path.resolve()}`" for path in out],
            hint="put the files themselves there (`cp -rL`), or give the folder in which they lie",
        )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, its sizes whole numbers and its architectures names, or a CheckpointError that says why not."""
    config = read_json_object(folder / "config.json", hint="a checkpoint folder has a config.json")
    text = config.get("text_config")
    tables = {"": config, "text_config.": text if isinstance(text, dict) else {}}
    problems = [
        f"`{where}{key}` is `{str(value)[:60]}`, not a positive whole number"
        for where, table in tables.items()
        for key in SIZES
        if (value := table.get(key)) is not None and (type(value) is not int or value < 1)
    ]
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        problems.append(f"`architectures` is `{str(names)[:60]}`, not a list of names")
    if problems:
        raise CheckpointError(f"`{folder / 'config.json'}` cannot be used", problems=problems, hint="fetch it again")
    return config


def identity_files(folder: Path) -> list[Path]:
    """The files that decide what a checkpoint or adapter is."""
    return [path for path in folder.iterdir() if path.suffix in {".json", ".safetensors", ".jinja", ".model"}]


def weight_files(folder: Path) -> dict[str, frozenset[str] | None]:
    """The weight files of a checkpoint folder, each with the names its index promises (None: no index).

    Raises:
        CheckpointError: no safetensors, or an index that is unsound.
    """
    single = folder / "model.safetensors"
    if (folder / INDEX).exists():
        listed = _read_index(folder)
        if single.exists() and set(listed) != {single.name}:
            _ambiguous(folder, [INDEX, single.name])
        return listed
    if single.exists():
        return {single.name: None}
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    others = {path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")}
    pickled = sorted(others - {"training_args.bin", "optimizer.pt", "scheduler.pt"})  # these are no weights
    if whole := [name for name in pickled if names and name.startswith("pytorch_model")]:
        _ambiguous(folder, [*names, *whole])
    if len(names) == 1:
        return {names[0]: None}
    if names:
        raise CheckpointError(
            f"`{folder}` has {len(names)} safetensors files and no `{INDEX}`",
            hint="fetch the index, or keep one file of the weights",
        )
    if pickled:
        refuse_pickle(folder, pickled[0])
    raise CheckpointError(f"`{folder}` holds no safetensors file", hint="fetch the weights into this folder")


def refuse_pickle(folder: Path, name: str) -> NoReturn:
    """Raise: a pickle can run code when it is opened."""
    raise CheckpointError(
        f"`{folder / name}` is a pickle, which can run code when opened; it is not read",
        hint="load the model with Transformers or PEFT and `save_pretrained` it: that writes safetensors",
    )


def _ambiguous(folder: Path, names: list[str]) -> NoReturn:
    raise CheckpointError(
        f"`{folder}` holds several sets of weights, and Transformers would load another than is read here",
        problems=[f"`{name}`" for name in names],
        hint="keep one of them",
    )


def _read_index(folder: Path) -> dict[str, frozenset[str] | None]:
    index = read_json_object(folder / INDEX, hint="fetch the index again")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"`{folder / INDEX}` has no `weight_map`", hint="fetch the index again")
    problems = []
    promised: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if isinstance(file, str):
            promised.setdefault(file, set()).add(name)
        else:
            problems.append(f"`{name}` is in the file {str(file)[:60]!r}, which is not a name")
    for file in promised:
        # a name with a separator could lead out of the folder; no real index has one
        if PurePosixPath(file).name != file or "\\" in file or "\0" in file or file in (".", ".."):
            problems.append(f"the file name `{file}` leads out of the folder")
        elif not file.endswith(".safetensors"):
            problems.append(f"`{file}` is not a safetensors file")
        elif not (folder / file).is_file():
            problems.append(f"`{file}` is missing")
    if problems:
        raise CheckpointError(
            f"`{folder / INDEX}` cannot be used", problems=sorted(problems), hint="fetch the whole checkpoint again"
        )
    return {file: frozenset(names) for file, names in sorted(promised.items())}
