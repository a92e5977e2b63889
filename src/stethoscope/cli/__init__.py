"""The command line: arguments in, progress and tables out; no mathematics.

Data goes to stdout, progress and messages to stderr. Exit codes: 0 done, 1 a fault of this program, 2 something the
user can mend, 130 interrupted. Nothing heavy is imported before a command needs it.
"""

import logging
import os
import sys
from typing import Annotated, Any

import typer

from stethoscope.cli.console import ConsoleReporter, err, warn
from stethoscope.cli.proof import compare, evaluate
from stethoscope.cli.saes import train_saes
from stethoscope.cli.stages import cache_folder, calibrate, check, demo, hearing, report, run
from stethoscope.cli.weights import apply, edit, undo, verify
from stethoscope.errors import StethoscopeError

__all__ = ["ConsoleReporter", "app", "cache_folder", "main"]

INTERRUPTED = 130

app = typer.Typer(
    help="Find the layers where a fine-tune's skill lives, edit those only, and prove gain and cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (
    run, demo, check, report, calibrate, hearing,
    edit, apply, undo, verify,
    evaluate, compare,
    train_saes,
):  # fmt: skip
    app.command()(command)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an expected failure.")] = False,
) -> None:
    logging.basicConfig(level=logging.DEBUG if debug else logging.ERROR, stream=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: turns failures that the user can mend into a message, a hint and exit code 2."""
    # One bar per stage is ours; the libraries' own would interleave with it.
    for variable in ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        os.environ.setdefault(variable, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    argv: list[Any] = sys.argv[1:] if arguments is None else arguments
    try:
        # Typer hands back an exit code in place of Ctrl-C; a command that ends well gives None.
        code = app(argv, standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            sys.exit(code)
    except StethoscopeError as error:
        if "--debug" in argv:
            raise
        warn(f"error: {error}")
        sys.exit(2)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        err.print("\ninterrupted: run the same command again to go on where it stopped", highlight=False)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if not hasattr(error, "show"):  # what typer raises for a wrong command or option, from a private module
            raise
        error.show()
        sys.exit(2)
