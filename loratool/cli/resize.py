"""Define the command `loratool resize`."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import click

from ..files.dtypes import FACTOR_DTYPES as DTYPES
from ..ops.rank_rules import RANK_RULES
from .help import Command, option
from .options import (
    COUNT,
    PATH,
    SIZE,
    RuleValue,
    alpha_option,
    card_option,
    device_option,
    drop_option,
    dry_run_option,
    force_option,
    json_option,
    out_option,
    quiet_option,
    run_command,
    save_recipe_option,
    to_option,
    verbose_option,
)


@click.command(cls=Command)
@click.argument("adapter", type=PATH)
@out_option("resized")
@option(
    "--rank",
    title="Rank and method",
    type=click.IntRange(1),
    metavar="N",
    help="New rank of every module; padded with zeros where it grows.",
)
@option(
    "--energy",
    title="Rank and method",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="0.95",
    help="Keep this share of each module's change.",
)
@option(
    "--params",
    title="Rank and method",
    type=COUNT,
    metavar="4M",
    help="Budget for the whole adapter, in parameters, spent where it keeps most energy.",
)
@option(
    "--size",
    title="Rank and method",
    type=SIZE,
    metavar="40MB",
    help="Budget for the whole adapter, in bytes, spent where it keeps most energy.",
)
@option(
    "--rank-rule",
    title="Rank and method",
    type=RuleValue(),
    metavar="NAME=VALUE",
    help=f"Rank rule of each module: one of {', '.join(RANK_RULES)}.",
)
@option("--max-rank", title="Rank and method", type=click.IntRange(1), metavar="N", help="Upper limit for any module.")
@to_option
@option(
    "--dtype",
    title="Output",
    type=click.Choice(list(DTYPES)),
    default="fp32",
    show_default=True,
    help="Dtype of the factors.",
)
@drop_option
@alpha_option
@card_option
@force_option
@dry_run_option
@device_option
@save_recipe_option
@quiet_option
@verbose_option
@json_option
def resize(quiet: bool, verbose: bool, json: bool, **options: Any) -> None:
    """Change an adapter's rank: the best that it has of a lower one, the same change at a higher. With --to in another
    format, and the ranks are those of its modules.

    Exact, from the factors alone. Scales end up in the factors, alpha being each module's rank. kohya's rules sv_ratio,
    sv_cumulative and sv_fro mean what their names say, without the one rank too many.

    \b
      loratool resize adapter/ --rank 4 -o small/
      loratool resize adapter/ --energy 0.95 --max-rank 6 -o even/
      loratool resize style.safetensors --rank 8 --to diffusers -o small.safetensors

    The report has a line a module. |D|: the size of its change. energy: the share of |D|^2 that is kept. error: the
    size of what is lost beside |D|, as written. eff. rank: over how many directions the change spreads.
    """
    from ..ops.resize.command import resize as run
    from .progress import ProgressBar
    from .render import print_report

    with closing(ProgressBar("resizing", quiet or json, "modules")) as bar:
        report = run_command(run, options, bar)
    print_report("resize", report, json=json, quiet=quiet, verbose=verbose)
