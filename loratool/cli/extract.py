"""Define the command `loratool extract`."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import click

from ..commands.choices import EMBED_CHOICES
from ..commands.namings import extract_formats
from .help import Command, option
from .options import (
    PATH,
    architecture_option,
    card_option,
    device_option,
    dry_run_option,
    energy_option,
    exclude_option,
    factor_dtype_option,
    force_option,
    html_option,
    imatrix_option,
    json_option,
    layers_option,
    max_rank_option,
    out_option,
    params_option,
    quiet_option,
    rank_option,
    rank_rule_option,
    resume_option,
    run_command,
    save_recipe_option,
    seed_option,
    size_option,
    target_option,
    verbose_option,
)


@click.command(cls=Command)
@click.argument("base", type=PATH)
@click.argument("tuned", type=PATH)
@out_option("extract")
@rank_option("Rank of every matrix.  [default: 8]")
@energy_option
@params_option
@size_option
@rank_rule_option
@max_rank_option
@imatrix_option
@option(
    "--embed",
    title="Which modules",
    type=click.Choice(list(EMBED_CHOICES)),
    default="lora",
    show_default=True,
    help="Changed embeddings and heads: "
    + "; ".join(f"{name}: {meaning}" for name, meaning in EMBED_CHOICES.items())
    + ".",
)
@option(
    "--certify",
    title="Rank and method",
    is_flag=True,
    help="Prove how far each matrix is from the best, where else it is estimated.",
)
@option("--no-bias", title="Which modules", is_flag=True, help="Leave changed biases and norms out.")
@option(
    "--to",
    title="Output",
    type=click.Choice(list(extract_formats())),
    help="; ".join(each.title for each in extract_formats().values()) + ".  [default: by BASE]",
)
@architecture_option
@factor_dtype_option
@seed_option("Seed of the SVD's starting block.")
@option(
    "--allow",
    title="About the inputs",
    type=click.Choice(["unrelated"]),
    multiple=True,
    help="Accept models that are no fine-tune.",
)
@target_option
@exclude_option
@layers_option
@card_option
@force_option
@resume_option
@dry_run_option
@html_option
@device_option
@save_recipe_option
@quiet_option
@verbose_option
@json_option
def extract(quiet: bool, verbose: bool, json: bool, **options: Any) -> None:
    """Make an adapter of a full fine-tune: the best of its rank for the change TUNED - BASE.

    Every matrix gets the top of its delta's SVD; biases and norms are kept exactly. The energy kept is exact, and how
    far it can be from the best is estimated, or proven with --certify. What is not in the adapter is named with its
    norm. Either model may be quantized.

    \b
      loratool extract base/ tuned/ --rank 8 -o extracted/
      loratool extract base/ tuned/ --params 30K --embed skip -o budget/

    Rows are groups of layers, and -v has one a matrix. delta/W: the size of the delta beside the base's weight. energy:
    the share of its square that is kept; residual: the size of what is not. gap: how far from the best of this rank,
    estimated or proven. eff. rank: over how many directions what is kept spreads. over noise: how many are larger than
    rounding can have made. With --imatrix the energy is weighted by the inputs; out. error: the share of the outputs
    that is lost; error: that of the change itself.
    """
    from ..commands.extract.command import extract as run
    from .progress import ProgressBar
    from .render import print_report

    with closing(ProgressBar("extracting", quiet or json, "matrices")) as bar:
        report = run_command(run, options, bar)
    print_report("extract", report, json=json, quiet=quiet, verbose=verbose, html=options["html"])
