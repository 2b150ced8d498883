"""The command line: one file a verb, each only parses, calls the library and renders.

A verb's module loads when that verb is called, so that `--help` needs neither rich nor torch. `main` is the
one error boundary: it alone turns exceptions into messages and exit codes.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from typing import Any

import click

# verb -> its line in `loratool -h`
VERBS = {
    "inspect": "Show what is in a checkpoint or an adapter, from headers alone.",
    "merge": "Add adapters to a base model's weights, rounded once, the same bytes everywhere.",
}

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Verbs(click.Group):
    """The verbs of VERBS, loaded on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        command: click.Command = getattr(import_module(f".{name}", __name__), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        from importlib.metadata import version

        click.echo(f"loratool {version('loratool')}")
        ctx.exit()


@click.group(cls=Verbs, context_settings=SETTINGS, no_args_is_help=True)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
def cli() -> None:
    """Surgery on LoRA checkpoints.

    LoRA trains a low-rank change of frozen weights, h = W x + s B A x. loratool works on the files: it adds
    adapters to models far larger than memory, and shows what is in them.

    \b
      loratool inspect model/
      loratool merge base.safetensors adapter.safetensors
      loratool merge base/ style/:0.7 task/ -o merged/

    Exit codes: 0 done, 2 usage, 3 an input is unreadable or does not belong, 4 needs the flag that the message
    names, 5 the machine failed, 70 internal error, 130 and 143 interrupted. Every option can be set from the
    environment, as LORATOOL_MERGE_DTYPE; LORATOOL_DEBUG=1 shows tracebacks.
    """


class Terminated(BaseException):
    """SIGTERM, raised in the main thread so that unfinished outputs are removed as after Ctrl-C."""


def _on_sigterm(*_: Any) -> None:
    raise Terminated


def main(argv: list[str] | None = None) -> None:
    """Run a command and exit with its documented code."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    argv = sys.argv[1:] if argv is None else argv
    sys.exit(_run(argv))


def _run(argv: list[str]) -> int:
    from ..errors import LoratoolError, MachineError, UsageError

    try:
        with cli.make_context("loratool", list(argv), auto_envvar_prefix="LORATOOL") as context:
            cli.invoke(context)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        if "--json" not in argv:
            error.show()
            return error.exit_code
        return _fail(UsageError(error.format_message()), argv)
    except (KeyboardInterrupt, click.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    except Terminated:
        print("terminated", file=sys.stderr)
        return 143
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at exit
        return 0
    except LoratoolError as error:
        return _fail(error, argv)
    except OSError as error:
        return _fail(MachineError(error.strerror or str(error), culprit=error.filename), argv)
    except MemoryError:
        return _fail(MachineError("out of memory"), argv)
    except Exception as error:
        return _fail(LoratoolError(f"internal error, please report it: {type(error).__name__}: {error}"), argv)


def _fail(error: Any, argv: list[str]) -> int:
    if os.environ.get("LORATOOL_DEBUG") == "1":
        import traceback

        traceback.print_exc()
    if "--json" in argv:
        from ..render import to_json

        print(to_json(argv[0], error=error))
    else:
        from ..render import escape

        print("\n".join(escape(line) for line in f"error: {error}".split("\n")), file=sys.stderr)
    code: int = error.exit_code
    return code
