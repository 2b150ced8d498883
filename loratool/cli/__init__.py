"""Run the command line: each command is a file that only parses, calls the library and renders.

A command's module is loaded when that command is called, so that `--help` needs neither rich nor torch. `main` is the
one error boundary: it alone turns exceptions into messages and exit codes.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem, shell_complete

if TYPE_CHECKING:
    from ..errors import LoratoolError

# command -> its line in `loratool -h`
COMMANDS = {
    "combine": "Combine several adapters into one, exactly or by TIES, DARE, KnOTS.",
    "convert": "Write a checkpoint in another container, type or shards; an adapter in another format.",
    "count": "Count what LoRA and its rivals would train of a model, and what each adds at inference.",
    "diff": "Compare two adapters, or two models.",
    "extract": "Make an adapter of a full fine-tune: the best of its rank.",
    "guide": "Read the guides, each on one topic.",
    "init": "Initialize an adapter from a base's files, with any method that needs no data.",
    "inspect": "Show what is in a checkpoint or an adapter, and what is wrong with it.",
    "merge": "Add adapters to a base model's weights, correctly rounded, the same bytes everywhere.",
    "resize": "Change an adapter's rank, exactly.",
    "unmerge": "Restore the base of a merge, bit for bit.",
    "verify": "Prove that a model is a base with adapters added, or say what is wrong with it.",
}


# command -> the guide that its help names
GUIDES = {
    "combine": "combine",
    "convert": "formats",
    "count": "parameter-counts",
    "diff": "init-and-resize",
    "extract": "extract",
    "init": "init-and-resize",
    "inspect": "merging",
    "merge": "merging",
    "resize": "init-and-resize",
    "unmerge": "merging",
    "verify": "merging",
}


COMPLETE = "_LORATOOL_COMPLETE"  # what a shell's completion calls us with, by click's rules


SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Commands(click.Group):
    """The commands of COMMANDS, loaded on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f".{name}", __name__), name)
        if name in GUIDES:
            command.epilog = f"More: loratool guide {GUIDES[name]}"
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            from difflib import get_close_matches

            near = get_close_matches(args[0], COMMANDS, 1)
            ctx.fail(
                f"no such command: {args[0]!r}; "
                + (f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}")
            )
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        commands = [CompletionItem(name, help=line) for name, line in COMMANDS.items() if name.startswith(incomplete)]
        return commands + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        from importlib.metadata import version

        click.echo(f"loratool {version('loratool')}")
        ctx.exit()


@click.group(cls=Commands, context_settings=SETTINGS, no_args_is_help=True, subcommand_metavar="COMMAND ...")
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
def cli() -> None:
    """Surgery on LoRA checkpoints.

    LoRA trains a low-rank change of frozen weights, h = W x + s B A x. loratool works on the files: it adds
    adapters to models far larger than memory, takes them off again, makes them, and shows what is in them. The
    help of each command has examples.

    \b
      loratool inspect base/
      loratool merge base/ adapter/ -o merged/
      loratool verify base/ adapter/ merged/

    Exit codes: 0 done, 1 a check said no, 2 usage, 3 an input is unreadable or does not belong, 4 needs the flag
    that the message names, 5 the machine failed, 70 internal error, 129, 130 and 143 stopped by a signal. Every option
    can be set from the environment, as LORATOOL_MERGE_DTYPE; LORATOOL_DEBUG=1 shows tracebacks, and how
    a merge's weights were decided.
    """


class Terminated(BaseException):
    """SIGTERM or SIGHUP, raised in the main thread so that unfinished outputs are removed as after Ctrl-C."""


def _on_signal(number: int, _: Any) -> None:
    raise Terminated(number)


def main(argv: list[str] | None = None) -> None:
    """Run a command and exit with its documented code."""
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), _on_signal)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        getattr(sys, name).reconfigure(
            errors="backslashreplace"
        )  # paths and names may hold what a terminal cannot show
    gc.disable()  # a fifth of torch's import is collecting what it has just made, and a command is short
    code = _run(sys.argv[1:] if argv is None else argv)
    sys.stderr.flush()
    os._exit(code)  # all is written and synced; torch's teardown takes as long as a small merge


def _run(argv: list[str]) -> int:
    """Run a command, print its error if there is one, and return the exit code.

    A closed pipe is no error, but nothing more is written to it.
    """
    try:
        return _call(argv)
    except BrokenPipeError:
        return _silence_stdout(0)


def _call(argv: list[str]) -> int:
    from ..errors import Interrupted, LoratoolError, MachineError, UsageError

    if _is_debugging():
        _show_log()
    try:
        if instruction := os.environ.get(COMPLETE):
            return shell_complete(cli, {}, "loratool", COMPLETE, instruction)
        with cli.make_context("loratool", list(argv), auto_envvar_prefix="LORATOOL") as context:
            cli.invoke(context)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as error:
        sys.stdout.flush()
        return error.exit_code
    except click.ClickException as error:
        if not _wants_json(argv):
            error.show()
            return error.exit_code
        return _report_error(UsageError(" ".join(error.format_message().split())), argv)
    except (KeyboardInterrupt, click.Abort):
        return _report_error(Interrupted(signal.SIGINT), argv)
    except Terminated as error:
        return _report_error(Interrupted(error.args[0]), argv)
    except BrokenPipeError:
        raise
    except LoratoolError as error:
        return _report_error(error, argv)
    except OSError as error:
        return _report_error(MachineError(error.strerror or str(error), culprit=error.filename), argv)
    except MemoryError:
        return _report_error(MachineError("out of memory"), argv)
    except Exception as error:
        return _report_error(LoratoolError(f"internal error, please report it: {type(error).__name__}: {error}"), argv)


def _is_debugging() -> bool:
    return os.environ.get("LORATOOL_DEBUG") == "1"


def _show_log() -> None:
    """Print on stderr what the commands log."""
    import logging

    log = logging.getLogger("loratool")
    log.handlers = [logging.StreamHandler(sys.stderr)]
    log.setLevel(logging.DEBUG)


def _wants_json(argv: list[str]) -> bool:
    """Return whether JSON was asked for, also by a call that click cannot parse."""
    command = _command_name(argv)
    from_environment = os.environ.get(f"LORATOOL_{command.upper()}_JSON", "") if command else ""
    return "--json" in argv or from_environment.lower() in ("1", "true", "t", "yes", "y", "on")


def _command_name(argv: list[str]) -> str | None:
    return argv[0] if argv and argv[0] in COMMANDS else None


def _report_error(error: LoratoolError, argv: list[str]) -> int:
    """Print an error and return its exit code, which holds even if stdout and stderr are closed."""
    from .render import print_lines, to_json

    try:
        if _is_debugging():
            import traceback

            traceback.print_exc()
        if _wants_json(argv):
            print(to_json(_command_name(argv), error=error))
        else:
            print_lines(f"error: {error}", sys.stderr)
        sys.stdout.flush()
    except OSError:
        return _silence_stdout(error.exit_code)
    return error.exit_code


def _silence_stdout(code: int) -> int:
    """Send the interpreter's flush at exit to nowhere, since it would change the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code
