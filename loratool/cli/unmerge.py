"""Define the command `loratool unmerge`."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import click

from .help import Command, option
from .options import (
    PATH,
    WeightedPath,
    alpha_option,
    device_option,
    drop_option,
    dry_run_option,
    force_option,
    json_option,
    out_option,
    quiet_option,
    resume_option,
    run_command,
    save_recipe_option,
    verbose_option,
)


@click.command(cls=Command)
@click.argument("merged", type=PATH)
@click.argument("adapters", nargs=-1, required=True, type=WeightedPath(), metavar="ADAPTER[:WEIGHT]...")
@out_option("unmerge")
@option(
    "--undo",
    title="About the inputs",
    type=PATH,
    metavar="FILE",
    help="The undo file, where it is not in or beside MERGED.",
)
@option(
    "--approximate",
    title="About the inputs",
    is_flag=True,
    help="Without an undo file: subtract and round; says how many weights can be wrong.",
)
@force_option
@resume_option
@dry_run_option
@drop_option
@alpha_option
@device_option
@save_recipe_option
@quiet_option
@verbose_option
@json_option
def unmerge(quiet: bool, verbose: bool, json: bool, **options: Any) -> None:
    """Restore the base of a merge, bit for bit.

    MERGED is what merge wrote, with its undo file in it (loratool.undo) or beside it (merged.undo); the adapters are
    those of the merge, with their weights. Every restored tensor is held against its hash; another adapter or weight,
    or a file edited since, is refused by name.

    \b
      loratool unmerge merged/ adapter/ -o base-again/
      loratool unmerge mixed/ style/:0.7 task/:-0.2 --approximate -o nearly/
    """
    from ..commands.unmerge import unmerge as run
    from .progress import ProgressBar
    from .render import print_report

    with closing(ProgressBar("restoring", quiet or json, last="syncing to disk")) as bar:
        report = run_command(run, options, bar)
    print_report("unmerge", report, json=json, quiet=quiet, verbose=verbose)
