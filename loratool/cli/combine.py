"""Define the command `loratool combine`."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import click

from ..commands.choices import COMBINE_ALLOW, COMBINE_METHODS, RANK_METHODS
from .format_options import to_option
from .help import Command, option
from .options import (
    WeightedPath,
    alpha_option,
    card_option,
    complete_from,
    device_option,
    drop_option,
    dry_run_option,
    energy_option,
    exclude_option,
    factor_dtype_option,
    force_option,
    html_option,
    imatrix_option,
    json_option,
    max_rank_option,
    out_option,
    params_option,
    quiet_option,
    rank_option,
    rank_rule_of_several_option,
    run_command,
    save_recipe_option,
    seed_option,
    size_option,
    target_option,
    verbose_option,
)


@click.command(cls=Command)
@click.argument("adapters", nargs=-1, required=True, type=WeightedPath(), metavar="ADAPTER[:WEIGHT]...")
@out_option("combine")
@option(
    "--method",
    title="Rank and method",
    default="cat",
    show_default=True,
    metavar="METHOD",
    shell_complete=complete_from(*COMBINE_METHODS),
    help="; ".join(f"{name}: {meaning}" for name, meaning in COMBINE_METHODS.items()) + ".",
)
@option(
    "--density",
    title="Rank and method",
    type=float,
    metavar="0.5",
    help="The share of each delta's entries that is kept; by tsv of its singular values, all by default.",
)
@seed_option("Seed of the random numbers.")
@rank_option("Rank of every module.  [default: the sum of the adapters']")
@option(
    "--rank-method",
    title="Rank and method",
    type=click.Choice(list(RANK_METHODS)),
    help="; ".join(f"{name}: {meaning}" for name, meaning in RANK_METHODS.items())
    + ".  [default: ctm with --rank, but for cat and della]",
)
@energy_option
@params_option
@size_option
@rank_rule_of_several_option
@max_rank_option
@imatrix_option
@target_option
@exclude_option
@to_option
@factor_dtype_option
@drop_option
@alpha_option
@option(
    "--allow",
    title="About the inputs",
    type=click.Choice(list(COMBINE_ALLOW)),
    multiple=True,
    help="Take all the same " + "; ".join(f"{name}: {meaning}" for name, meaning in COMBINE_ALLOW.items()) + ".",
)
@card_option
@force_option
@dry_run_option
@html_option
@device_option
@save_recipe_option
@quiet_option
@verbose_option
@json_option
def combine(quiet: bool, verbose: bool, json: bool, **options: Any) -> None:
    """Combine several adapters into one that does what they do with their weights.

    By default it is the exact sum of the weighted changes, whatever their ranks, targets and scales; weights may be
    negative. The other methods act on the changes B A themselves, module by module; `loratool guide combine` says
    which to use when. With --rank they run on the changes compressed to so many directions, and nothing is cut after.
    Image models' adapters may be of several formats: their modules meet by what they mean. Components and modules
    take weights of their own, as in merge, by the names of each adapter's own file.

    \b
      loratool combine style/:0.7 task/:0.3 -o both/
      loratool combine style/ task/ --method ties --density 0.3 --rank 16 -o ties/
      loratool combine a.safetensors b.safetensors:0.5 --to comfy -o c.safetensors
      loratool combine a.safetensors b.safetensors:te=0.4,fc1=0 -o d.safetensors

    Rows are groups of layers, and -v has one a module; the exact sum has none. delta: the size of the method's result.
    energy: the share of its square that the rank keeps. shared: the share of the changes' energy, each by its own size,
    in the directions that they were compressed to. error: the size of what is lost beside the result, as written. With
    --imatrix the energy is weighted by the inputs; out. error: the share of the outputs that is lost.
    """
    from ..commands.combine.command import combine as run
    from .progress import ProgressBar
    from .render import print_report

    with closing(ProgressBar("combining", quiet or json, "modules")) as bar:
        report = run_command(run, options, bar)
    print_report("combine", report, json=json, quiet=quiet, verbose=verbose, html=options["html"])
