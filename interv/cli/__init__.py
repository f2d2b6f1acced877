"""The command line: parse, call, print. One module for each command.

stdout is data, stderr is for people. Exit codes: 0 done, 1 some points failed or a reference
was missed, 2 bad spec or usage, 130 interrupted. Nothing heavy is imported until a command
that needs it runs.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Annotated, NoReturn

import typer

from interv.cli import (
    collect,
    compare,
    data,
    inspect,
    keep,
    patch,
    plan,
    report,
    reproduce,
    schema,
    trace,
    train,
    validate,
)
from interv.cli.output import err, out
from interv.errors import IntervError
from interv.version import __version__

app = typer.Typer(
    name="interv",
    help="Causal interventions on PyTorch models, from one YAML file.",
    epilog="Start with: interv trace configs/rome.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=trace.EPILOG)(trace.trace)
app.command(epilog=patch.EPILOG)(patch.patch)
app.command("train-das", epilog=train.EPILOG)(train.train)
app.command(epilog="Example: interv save outputs/das_ioi/1a2b3c4d name_position")(keep.save)
app.command(epilog="Example: interv load name_position")(keep.load)
app.command(epilog="Example: interv push name_position me/name-position")(keep.push)
app.command(epilog="Example: interv pull me/name-position name_position")(keep.pull)
app.command(epilog=reproduce.EPILOG)(reproduce.reproduce)
app.command(epilog=compare.EPILOG)(compare.compare)
app.command(epilog=collect.EPILOG)(collect.collect)
app.command(epilog=data.EPILOG)(data.data)
app.command(epilog=inspect.EPILOG)(inspect.inspect)
app.command(epilog=plan.EPILOG)(plan.plan)
app.command(epilog=report.EPILOG)(report.report)
app.command(epilog=validate.EPILOG)(validate.validate)
app.command(epilog=schema.EPILOG)(schema.schema)


_INTERRUPTED = 130


def _version(wanted: bool) -> None:
    if wanted:
        out(f"interv {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _show: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> NoReturn:
    """The console script; errors raised on purpose become a message and an exit code."""
    # On a machine that others use too, threads that spin while they wait for each other slow
    # every forward several times over; read when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = app(standalone_mode=False)
    except IntervError as error:
        err(f"interv: {error}")
        sys.exit(error.exit_code)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout is gone (`interv schema | head`); nothing is left to say.
        sys.stdout = None
        sys.exit(0)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # click's usage errors
            error.show()
            sys.exit(error.exit_code)
        if (told := _out_of_memory(error)) is None:
            raise
        err(f"interv: {told}")
        sys.exit(told.exit_code)
    if code == _INTERRUPTED:  # so typer too says it, in place of an error
        err("interv: interrupted")
    sys.exit(code if isinstance(code, int) else 0)


def _out_of_memory(error: Exception) -> IntervError | None:
    """What to say where an allocation failed outside of the work that halves itself."""
    if "torch" not in sys.modules and not isinstance(error, MemoryError):
        return None
    from interv.engine.memory import is_out_of_memory, out_of_memory

    return out_of_memory(error) if is_out_of_memory(error) else None


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    """A polite kill is a Ctrl-C."""
    raise KeyboardInterrupt
