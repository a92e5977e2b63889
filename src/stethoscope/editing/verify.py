"""An edit's manifest against its bytes, in one read.

report = verify(Path("edited"))
report.ok, report.problems
"""

from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from stethoscope.checkpoints.checkpoint import Checkpoint
from stethoscope.checkpoints.header import DTYPES, Entry, read_header
from stethoscope.editing.manifest import known_files, read_manifest
from stethoscope.editing.transfer import Progress, hash_tensors
from stethoscope.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found.

    Attributes:
        kind: the edit's kind.
        tensors: tensors whose bytes were compared with the manifest.
        untouched: those of them that the manifest says are the base's.
        problems: everything that does not agree, one line each.
    """

    path: Path
    kind: str
    tensors: int
    untouched: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(path: Path, *, base: Checkpoint | None = None, progress: Progress | None = None) -> Verification:
    """Compare every tensor and file of an edit with its manifest.

    Args:
        base: also compare the untouched tensors, and what computed ones were made from, with this checkpoint itself.

    Raises:
        CheckpointError: there is no manifest, or it makes no sense. What does not agree is reported, not raised.
    """
    manifest = read_manifest(path)
    problems: list[str] = []
    entries: dict[str, Entry] = {}
    bits = manifest["kind"] == "patch"  # which are no numbers
    expected = {
        stored: (one["file"], f"U{DTYPES[one['dtype']].bits}" if bits else one["dtype"], one["shape"])
        for stored, one in manifest["tensors"].items()
    }
    for file in sorted({record["file"] for record in manifest["tensors"].values()}):
        try:
            inside = read_header(path / file)
        except CheckpointError as error:
            problems += [error.message, *(f"`{file}`: {problem}" for problem in error.problems)]
            continue
        problems += [
            f"`{stored}` in `{file}` is not in the manifest, or has another dtype or shape there"
            for stored, entry in inside.items()
            if (file, entry.dtype, list(entry.shape)) != expected.get(stored)
        ]
        entries |= inside
    present = [stored for stored in manifest["tensors"] if stored in entries]
    problems += [f"`{stored}` is missing" for stored in manifest["tensors"] if stored not in entries]
    store = Checkpoint(path, {}, entries, source=str(path))
    hashes = hash_tensors(store, [entries[stored] for stored in present], progress=progress)
    for stored, found in zip(present, hashes, strict=True):
        if found != manifest["tensors"][stored]["hash"]:
            problems.append(f"the bytes of `{stored}` are not those that were written")
    for name, expected in manifest["files"].items():
        if Path(name).name != name or not (path / name).is_file():
            problems.append(f"`{name}` is missing")
        elif blake3((path / name).read_bytes()).hexdigest() != expected:
            problems.append(f"`{name}` is not as it was written")
    weights = {item.name for item in path.glob("*.safetensors")}
    problems += [
        f"`{name}` is weights that the manifest does not know" for name in sorted(weights - known_files(manifest))
    ]
    if base is not None:
        problems += _against_base(manifest["tensors"], base)
    untouched = sum(record.get("from") == "base" for record in manifest["tensors"].values())
    return Verification(
        path=path, kind=manifest["kind"], tensors=len(present), untouched=untouched, problems=tuple(problems)
    )


def _against_base(records: dict[str, dict[str, object]], base: Checkpoint) -> list[str]:
    stored = {entry.stored: entry for entry in base.entries.values()}
    expected = {
        name: record["hash"] if record.get("from") == "base" else record["base_hash"]
        for name, record in records.items()
        if record.get("from") == "base" or "base_hash" in record
    }
    problems = [f"`{base.source}` has no tensor `{name}`" for name in expected if name not in stored]
    names = [name for name in expected if name in stored]
    found = hash_tensors(base, [stored[name] for name in names])
    return problems + [
        f"`{name}` of `{base.source}` is not what the edit was made from"
        for name, digest in zip(names, found, strict=True)
        if digest != expected[name]
    ]
