"""The command line. The file of a command only parses, calls the library and renders.

The module of a command is loaded when the command is called, so that `--help` needs neither rich nor torch. `main` is
the only error boundary: it turns exceptions into messages and exit codes.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any, TextIO

import click
from click.shell_completion import CompletionItem, shell_complete

from ..durable.interrupts import changing_models, resumable_outputs, stop_on_signals
from ..errors import is_debugging, on_terminal, shell_word
from .help import Command, Option, has_colour

if TYPE_CHECKING:
    from ..errors import LoratoolError

# title -> its commands, each with its line in `loratool -h`
SECTIONS = {
    "Look": {
        "inspect": "Show what is in a model or adapter, and what is wrong with it.",
        "diff": "Compare adapters, or two models.",
        "count": "Count the parameters that LoRA and other methods would train.",
        "verify": "Check that a model is a base with these adapters merged.",
    },
    "Merge": {
        "merge": "Merge adapters into a model, with exact rounding.",
        "unmerge": "Restore the base of a merge, bit for bit.",
        "recover": "End a change in place that was interrupted, or take it back.",
    },
    "Make and change adapters": {
        "extract": "Extract the best LoRA of a given rank from a full fine-tune.",
        "init": "Initialize an adapter to train: LoRA, PiSSA, DoRA and others.",
        "resize": "Change the rank of an adapter.",
        "combine": "Combine adapters: exactly, or by TIES, DARE, TSV and others.",
        "convert": "Convert an adapter or a model for another program.",
    },
    "Ship changes": {
        "patch": "Write the difference of two models, many times smaller than the model.",
        "apply": "Make a model of another by patches, bit for bit.",
    },
    "Automate": {
        "run": "Run a recipe: a file with commands and their options.",
    },
    "Help": {
        "demo": "Write small models and adapters for trying the commands.",
        "guide": "Read the manual: one page for each job.",
        "env": "Show versions, devices and caches, for a report of a bug.",
    },
}

COMMANDS = {name: line for commands in SECTIONS.values() for name, line in commands.items()}

# command -> the guide that its help names
GUIDES = {
    "apply": "patches",
    "combine": "combine-two",
    "convert": "kohya-to-diffusers",
    "count": "before-training",
    "demo": "tutorial",
    "diff": "init-and-resize",
    "env": "troubleshooting",
    "extract": "extract-adapter",
    "init": "before-training",
    "inspect": "healthy",
    "merge": "merging",
    "patch": "patches",
    "recover": "in-place",
    "resize": "shrink",
    "run": "recipes",
    "unmerge": "undo",
    "verify": "prove",
}

RANKED = "TORCHELASTIC_RUN_ID"  # `streaming.ranks.RUN_ID`, without the time that its import takes

COMPLETE = "_LORATOOL_COMPLETE"  # what a shell's completion calls us with, by click's rules

READ = ("help", "guide")  # commands that only show text

ASKS_FOR_HELP = {"-h", "--help", "-V", "--version", "--json-schema"}

SETTINGS = {"max_content_width": 100}

written_without_page: list[str] = []  # outputs that are written, and not yet their page

FIRST_CONTACT = """\
loratool works on LoRA adapters and the models under them, on disk.

  What is this file, is it sound?  loratool inspect adapter/
  Does it fit this model?          loratool inspect adapter/ --base base/
  Merge it                         loratool merge base/ adapter/ -o merged/
  Take it off again                loratool unmerge merged/ adapter/ -o base/
  Is this merge right?             loratool verify base/ adapter/ merged/
  Use it elsewhere                 loratool convert adapter/ --for vllm
  Adapter from a fine-tune         loratool extract base/ tuned/ -o adapter/

  base/ and adapter/ are folders, files, or org/name of the Hugging Face hub.
  All commands: loratool -h     Options: loratool merge -h     loratool guide"""


class Commands(Command, click.Group):
    """The commands of COMMANDS, loaded on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f".{name}", __name__), name)
        if RANKED in os.environ:
            from .torchrun import shared

            command = shared(command)
        if name in GUIDES:
            command.epilog = f"More: loratool guide {GUIDES[name]}"
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        commands = [CompletionItem(name, help=line) for name, line in COMMANDS.items() if name.startswith(incomplete)]
        return commands + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(max(map(len, COMMANDS))), line) for name, line in commands.items()])

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.format_commands(ctx, formatter)
        click.Command.format_options(self, ctx, formatter)

    format_usual = format_options


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        from importlib.metadata import version

        from ..commands.machine import native_line

        click.echo(f"loratool {version('loratool')}\n{native_line()}")
        ctx.exit()


@click.group(
    cls=Commands,
    context_settings=SETTINGS,
    subcommand_metavar="COMMAND ...",
    epilog="Options: loratool COMMAND -h     All options: loratool COMMAND --help",
)
@click.option(
    "-V",
    "--version",
    cls=Option,
    title="Running",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    allow_from_autoenv=False,  # LORATOOL_VERSION is what a container's file calls the one that it installs
    callback=_print_version,
    help="Show the version, and the compiled passes in use.",
)
def cli() -> None:
    """Work on LoRA adapters and the models under them, on disk.

    \b
      loratool inspect base/
      loratool merge base/ adapter/ -o merged/
      loratool verify base/ adapter/ merged/

    Exit codes: 0 done, 1 a check failed, 2 wrong usage, 3 an input is unreadable or does not belong, 4 add the flag
    that the message names, 5 the machine failed, 70 internal error, 129, 130 and 143 stopped by a signal.

    You can set every option by an environment variable, such as LORATOOL_MERGE_DTYPE. LORATOOL_DEBUG=1 shows
    tracebacks, and how each weight of a merge was decided.
    """


def main(argv: list[str] | None = None) -> None:
    """Run a command and exit with its documented code."""
    argv = sys.argv[1:] if argv is None else argv
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        # paths and names may hold what a terminal cannot show
        getattr(sys, name).reconfigure(errors="backslashreplace")
    if RANKED in os.environ:
        from .torchrun import mute_other_ranks

        mute_other_ranks()
    stop_on_signals(_signal_reporter(argv))
    gc.disable()  # a fifth of torch's import is collecting what it has just made, and a command is short
    code = _run(argv)
    sys.stderr.flush()
    os._exit(code)  # all is written and synced; torch's teardown takes as long as a small merge


def _signal_reporter(argv: list[str]) -> Callable[[int, Exception | None], int]:
    """Return a function that reports the signal that stopped the command. It imports nothing and takes no buffer."""
    from ..errors import Interrupted

    if (form := _output_format(argv)) != "text":
        from . import as_json, output_formats

        write = output_formats.writer_of(form)

    def tell(number: int, left: Exception | None) -> int:
        error = Interrupted(number, left, _output_status(argv))
        with suppress(OSError):
            if is_debugging():
                faulthandler.dump_traceback()
            if form in ("text", "github"):
                _write_line(sys.stderr, f"error: {error.message}")
            if form != "text" and not as_json.begun:
                _write_line(sys.stdout, write(_command_name(argv), error=error))
        return error.exit_code

    return tell


def _output_status(argv: list[str]) -> str:
    """Return a text on outputs that stay: resumable ones, and those without only their page. Empty if none do."""
    goes_on = "the next run replaces them" if _command_name(argv) == "run" else "the same command with --resume goes on"
    stay = [f"{' and '.join(resumable_outputs)} stay: {goes_on}"] if resumable_outputs else []
    for model in dict.fromkeys(changing_models):
        recover = f"loratool recover {shell_word(model)}"
        stay.append(f"{model} is in the middle of a change: {recover} ends it, and with --back takes it back")
    return "; ".join([*stay, *(f"{out} is written and whole, only its page is not" for out in written_without_page)])


def _write_line(stream: TextIO, text: str) -> None:
    """Write a line past a stream's buffer, which may be in use. On a terminal it replaces the progress bar."""
    if stream.isatty():
        text = "\r" + text.ljust(os.get_terminal_size(stream.fileno()).columns - 1)
    getattr(stream.buffer, "raw", stream.buffer).write(f"{text}\n".encode())  # without a buffer under python -u


def _run(argv: list[str]) -> int:
    """Run a command, print its error if there is one, and return the exit code.

    A closed pipe is no error, but nothing more is written.
    """
    token = on_terminal.set(True)
    try:
        return _call(argv)
    except BrokenPipeError:
        return _discard_stdout(0)
    finally:
        on_terminal.reset(token)


def _call(argv: list[str]) -> int:
    from ..errors import LoratoolError, MachineError, UsageError

    resumable_outputs.clear()
    changing_models.clear()
    written_without_page.clear()
    if is_debugging():
        _show_log()
    try:
        if instruction := os.environ.get(COMPLETE):
            return shell_complete(cli, {}, "loratool", COMPLETE, instruction)
        if not argv:
            click.echo(FIRST_CONTACT)
            return UsageError.exit_code
        _check_settings(argv)
        settings: dict[str, Any] = {"auto_envvar_prefix": "LORATOOL", "obj": argv, "color": has_colour(sys.stdout)}
        with cli.make_context("loratool", _as_options(argv), **settings) as context:
            cli.invoke(context)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as error:
        sys.stdout.flush()
        return error.exit_code
    except click.ClickException as error:
        from .messages import usage_error

        return _report_error(usage_error(error, _command_name(argv), COMMANDS), argv)
    except BrokenPipeError:
        raise
    except LoratoolError as error:
        if isinstance(error, UsageError) and error.argument:
            from .messages import spell_argument

            if command := cli.get_command(click.Context(cli), argv[0]):
                spell_argument(error, command)
        return _report_error(error, argv)
    except OSError as error:
        return _report_error(MachineError(error.strerror or str(error), culprit=error.filename), argv)
    except MemoryError:
        return _report_error(MachineError("out of memory"), argv)
    except Exception as error:
        return _report_error(LoratoolError(f"internal error, please report it: {type(error).__name__}: {error}"), argv)


def _check_settings(argv: list[str]) -> None:
    """Refuse or warn of environment variables that begin with LORATOOL_ and set no option.

    Help is not refused, since it says what is right.
    """
    if names := [name for name in os.environ if name.startswith("LORATOOL_")]:
        from .messages import check_settings, warn

        if argv[0] not in READ and not ASKS_FOR_HELP & {*argv}:
            warn(check_settings(names, COMMANDS, lambda name: getattr(import_module(f".{name}", __name__), name)))


def _as_options(argv: list[str]) -> list[str]:
    """Return the arguments with `help COMMAND` replaced by `COMMAND --help`."""
    return [*argv[1:2], "--help"] if argv[0] == "help" else [*argv]  # click empties the list


def _show_log() -> None:
    """Print the commands' log on stderr."""
    import logging

    log = logging.getLogger("loratool")
    log.handlers = [logging.StreamHandler(sys.stderr)]
    log.setLevel(logging.DEBUG)


def _output_format(argv: list[str]) -> str:
    """Return the format that the call asks for, a key of `output_formats.FORMATS`, even if click cannot parse it."""
    prefix = f"LORATOOL_{argv[0].upper()}_" if _command_name(argv) else ""
    from_environment = os.environ.get(f"{prefix}JSON", "") if prefix else ""
    if "--json" in argv or from_environment.lower() in ("1", "true", "t", "yes", "y", "on"):
        return "json"
    wanted = os.environ.get(f"{prefix}OUTPUT_FORMAT", "") if prefix else ""
    for word, following in zip(argv, [*argv[1:], ""], strict=False):  # no words at all are none
        option, equals, value = word.partition("=")
        if option == "--output-format":
            wanted = value if equals else following
    if wanted:
        from . import output_formats

        has_option = argv[0] in output_formats.COMMANDS
        return wanted if has_option and wanted in output_formats.FORMATS else "text"
    return "text"


def _command_name(argv: list[str]) -> str | None:
    return argv[0] if argv and argv[0] in COMMANDS else None


def _report_error(error: LoratoolError, argv: list[str]) -> int:
    """Print an error and return its exit code, even if stdout and stderr are closed."""
    from .messages import print_error, show_traceback

    if stays := _output_status(argv):
        error.remedy = f"{error.remedy}; {stays}" if error.remedy else stays
    speaker = ""
    if RANKED in os.environ:
        from .torchrun import restore_stderr

        speaker = restore_stderr()
    try:
        show_traceback()
        form = "text" if speaker else _output_format(argv)
        if form in ("text", "github"):
            print_error(error, speaker)
        if form != "text":
            from .as_json import print_output
            from .output_formats import writer_of

            try:
                print_output(writer_of(form)(_command_name(argv), error=error))
            except BrokenPipeError:
                raise
            except OSError:  # a full disk, say
                if form != "github":
                    print_error(error)
        sys.stdout.flush()
    except OSError:
        return _discard_stdout(error.exit_code)
    return error.exit_code


def _discard_stdout(code: int) -> int:
    """Send the interpreter's flush at exit to devnull, as its failure would change the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code
