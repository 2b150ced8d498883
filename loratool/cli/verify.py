"""Define the command `loratool verify`."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import click

from ..binding.merge.choices import TIED
from .help import Command, option
from .options import (
    PATH,
    WeightedPath,
    alpha_option,
    drop_option,
    exclude_option,
    html_option,
    json_option,
    layers_option,
    library_arguments,
    quiet_option,
    target_option,
    verbose_option,
)


@click.command(cls=Command)
@click.argument("base", type=PATH)
@click.argument("adapters", nargs=-1, required=True, type=WeightedPath(), metavar="ADAPTER[:WEIGHT]...")
@click.argument("merged", type=PATH)
@target_option
@exclude_option
@layers_option
@drop_option
@alpha_option
@option(
    "--tied",
    title="About the inputs",
    type=click.Choice(list(TIED)),
    default="untie",
    show_default=True,
    help="The value that was given to merge.",
)
@option("--initial", title="About the inputs", type=PATH, metavar="ADAPTER", help="The value that was given to merge.")
@option("--residual-base", title="About the inputs", is_flag=True, help="Pass it if it was given to merge.")
@option(
    "--allow",
    title="Checks",
    type=click.Choice(["inconclusive"]),
    multiple=True,
    help="Accept as proven an update below half an ulp everywhere.",
)
@html_option
@quiet_option
@verbose_option
@json_option
@click.pass_context
def verify(context: click.Context, /, html: str | None, quiet: bool, verbose: bool, json: bool, **options: Any) -> None:
    """Prove that MERGED is BASE with the adapters added, or say what is wrong with it.

    Each tensor is exact (our bits), right with another rounding (peft's, 16 bits on the way, ...), or wrong: not
    applied, applied twice, at another scale, transposed, swapped, altered since. Codes are exact if they are those
    that merge writes; of others', `verify` tells how much of the delta they keep. Exit 0 is proven, 1 is wrong or
    cannot be told. What --target, --exclude and --layers leave out must be the base's.

    \b
      loratool verify base/ adapter/ merged/
      loratool verify base/ style/:0.7 task/:-0.2 mixed/ --json
    """
    from ..commands.verify.command import verify as run
    from .progress import ProgressBar
    from .render import print_report

    with closing(ProgressBar("verifying", quiet or json)) as bar:
        report = run(**library_arguments(options), progress=bar)
    print_report("verify", report, json=json, quiet=quiet, verbose=verbose, html=html, status=report.said_no)
    if report.said_no:
        context.exit(1)
