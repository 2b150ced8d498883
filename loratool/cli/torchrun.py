"""Run a command on the ranks of torchrun. They share its work, and only rank 0 prints.

Other ranks have no stdout and no stderr, so that a user sees one report, one progress bar and each warning once. They
print only errors that rank 0 does not have: torchrun ends all ranks when one has ended with an error.
"""

from __future__ import annotations

import os
import sys
import time
from copy import copy
from functools import wraps
from typing import Any, TextIO

import click

from ..errors import UsageError, without_credentials
from ..streaming.ranks import RUN_ID, RankDone, current_job, is_launched, join_job
from .messages import warn

COMMANDS = ("merge", "unmerge", "extract", "convert", "verify", "patch", "apply")  # whose work ranks share

PATIENCE = 5  # seconds in which rank 0 may tell the same error, and torchrun end this rank

_stderr: TextIO | None = None  # of a rank other than 0


def mute_other_ranks() -> None:
    """Redirect stdout and stderr to devnull, if this process is a rank other than 0."""
    global _stderr
    if is_launched() and os.environ["RANK"] != "0":
        _stderr = sys.stderr
        sys.stdout, sys.stderr = open(os.devnull, "w"), open(os.devnull, "w")  # noqa: SIM115


def shared(command: click.Command) -> click.Command:
    """Return a command that joins torchrun's ranks, if it is run by one."""
    return _shared(command) if is_launched() else command


def _shared(command: click.Command) -> click.Command:
    alone = command.callback
    assert alone

    @wraps(alone)
    def run(*args: Any, **options: Any) -> None:
        if command.name not in COMMANDS:
            raise UsageError(
                f"{command.name} is for one process: torchrun's ranks share the work of {', '.join(COMMANDS)}",
                remedy=f"run it without torchrun; a program that torchrun runs must unset {RUN_ID} for it",
            )
        if options.get("dry_run"):
            if _stderr is None:
                alone(*args, **options)
            return
        join_job(_tell)
        code = 0
        try:
            alone(*args, **options)
        except RankDone:
            pass
        except click.exceptions.Exit as error:  # a check said no
            code = error.exit_code
        code = current_job().finish(code)
        if code:
            raise click.exceptions.Exit(code)

    together = copy(command)
    together.callback = run
    return together


def _tell(text: str) -> None:
    if _stderr is None:
        warn([text])
    else:
        print(f"rank {os.environ['RANK']}: {without_credentials(text)}", file=_stderr, flush=True)


def restore_stderr() -> str:
    """Restore stderr of a rank other than 0 for an error. Return the rank as the speaker, empty for rank 0.

    It waits first, as torchrun may end the process because rank 0 has the same error.
    """
    if _stderr is None:
        return ""
    time.sleep(PATIENCE)
    sys.stderr = _stderr
    return f"rank {os.environ['RANK']}: "
