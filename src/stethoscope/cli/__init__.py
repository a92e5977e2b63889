"""The command line: arguments in, progress and tables out; no mathematics.

Nothing heavy is imported before a command needs it.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from typing import Annotated

import typer

from stethoscope.cli.console import ConsoleReporter, WarningPrinter, command_line, say, warn
from stethoscope.cli.options import hush
from stethoscope.cli.proof import compare, evaluate, logs
from stethoscope.cli.stages import cache_folder, check, demo, report, run, show, stage_command
from stethoscope.cli.weights import apply, edit, extend_vocabulary, push, train_saes, undo, verify
from stethoscope.errors import StethoscopeError, install, refused_by_system
from stethoscope.stages import STAGES

__all__ = ["ConsoleReporter", "app", "cache_folder", "main"]

USER_ERROR, INTERRUPTED, TERMINATED = 2, 130, 143
EXIT_CODES = (
    "Exit codes: 0 done; 1 a fault of this program, with a traceback; 2 something that you can mend, with a message"
    " and a hint; 130 interrupted; 143 terminated. A verdict of no benefit is a result, and exits with 0."
)
PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "A recipe, end to end": (run, demo, check, show, report),
    "One stage of a recipe": tuple(stage_command(stage) for stage in STAGES if stage.help),
    "Weights": (edit, apply, undo, verify, push, extend_vocabulary),
    "Proof": (evaluate, compare, logs),
    "SAEs": (train_saes,),
}
# Commands that go on where they stopped; the others write nothing before they are done.
RESUMED = {"push", "run", "demo", "evaluate", "train-saes", *(stage.name for stage in STAGES if stage.help)}

app = typer.Typer(
    help="Keep a fine-tune's skill, protect the rest of the model, and prove gain and cost.",
    epilog=EXIT_CODES,
    pretty_exceptions_enable=False,
)
for panel, commands in PANELS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)


def _version(asked: bool) -> bool:
    if asked:
        say(f"stethoscope {metadata.version('sae-stethoscope')}")
        raise typer.Exit
    return asked


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an expected failure.")] = False,
) -> None:
    level = logging.DEBUG if debug else logging.ERROR
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(level)  # some libraries set their loggers' levels themselves
    logging.basicConfig(level=level, handlers=[handler])
    own = logging.getLogger("stethoscope")
    own.setLevel(logging.NOTSET if debug else logging.WARNING)
    own.handlers = [] if debug else [WarningPrinter()]  # this function may be called again


def main(arguments: list[str] | None = None) -> None:
    """Entry point: turns failures that the user can mend into a message, a hint and exit code 2."""
    # One bar per stage is ours; the libraries' own would interleave with it.
    for variable in ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        os.environ.setdefault(variable, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    argv = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    resumed = next((word for word in argv if not word.startswith("-")), "") in RESUMED
    terminated = False

    def terminate(_signal: int, _frame: object) -> None:
        nonlocal terminated
        terminated = True
        raise KeyboardInterrupt  # what is unwound after Ctrl-C is then, too

    before = signal.getsignal(signal.SIGTERM)
    try:
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, terminate)
        # Typer hands back an exit code in place of Ctrl-C; a command that ends well gives None.
        code = app(argv, prog_name="stethoscope", standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            sys.exit(code)
    except StethoscopeError as error:
        if "--debug" in argv:
            raise
        warn(f"error: {error}")
        sys.exit(USER_ERROR)
    except ModuleNotFoundError as error:
        if "--debug" in argv or (error.name or "").split(".")[0] in ("", "stethoscope"):
            raise
        warn(f"error: this command needs `{error.name}`, which is not installed\n\nhint: {install('run')}")
        sys.exit(USER_ERROR)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        ended = "terminated" if terminated else "interrupted"
        warn(f"\n{ended}: " + ("finished work is kept; go on with" if resumed else "nothing was written; again with"))
        warn(f"  {command_line(*argv)}")
        sys.exit(TERMINATED if terminated else INTERRUPTED)
    except Exception as error:
        if "--debug" not in argv and (refused := refused_by_system(error)):
            warn(f"error: {refused}")
            if resumed:
                warn(f"\nfinished work is kept; go on with\n  {command_line(*argv)}")
            sys.exit(USER_ERROR)
        if not hasattr(error, "format_message"):  # what typer raises for a wrong command, from a private module
            raise
        about = getattr(getattr(error, "ctx", None), "command_path", "stethoscope")
        said = error.format_message().replace("'", "`").rstrip(".")
        warn(f"error: {said[:1].lower()}{said[1:]}\n\nhint: `{about} --help` lists what there is")
        sys.exit(USER_ERROR)
    finally:
        with suppress(ValueError):
            signal.signal(signal.SIGTERM, before)
        hush(False)
