"""Arguments that are small languages: layer numbers, labelled paths, margins."""

from pathlib import Path

from stethoscope.errors import StethoscopeError


def parse_layers(text: str) -> list[int]:
    """Layer numbers from `3,5-8`.

    Raises:
        StethoscopeError: the text is something else.
    """
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise StethoscopeError(f"`{part}` in `--layers {text}` is no layer", hint="write `3,5-8`, or `all`")
        layers += range(int(first), int(last or first) + 1)
    return layers


def labelled(text: str) -> tuple[str, str | None]:
    """A path and the name behind its last `=`, if there is one; a path that exists may hold `=` itself."""
    path, found, name = text.rpartition("=")
    return (path, name) if found and path and name and not Path(text).exists() else (text, None)


def parse_margin(text: str) -> tuple[str, float]:
    task, _, share = text.rpartition("=")
    try:
        return task, float(share)
    except ValueError as error:
        raise StethoscopeError(f"the margin `{text}` is no number", hint="`--margin 0.02`, or `TASK=0.05`") from error
