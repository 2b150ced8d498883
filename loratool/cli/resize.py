"""Define the command `loratool resize`."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import click

from .format_options import to_option
from .help import Command
from .options import (
    PATH,
    alpha_option,
    card_option,
    device_option,
    drop_option,
    dry_run_option,
    energy_option,
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
    rank_rule_option,
    run_command,
    save_recipe_option,
    size_option,
    verbose_option,
)


@click.command(cls=Command)
@click.argument("adapter", type=PATH)
@out_option("resize")
@rank_option("New rank of every module; padded with zeros where it grows.")
@energy_option
@params_option
@size_option
@rank_rule_option
@max_rank_option
@imatrix_option
@to_option
@factor_dtype_option
@drop_option
@alpha_option
@card_option
@force_option
@dry_run_option
@html_option
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
      loratool resize ink.safetensors --rank 8 --to diffusers -o small.safetensors

    Rows are groups of layers, and -v has one a module. delta: its size. energy: the share of its square that is kept.
    eff. rank: over how many directions it spreads. With --imatrix the energy is weighted by the inputs; out. error: the
    share of the outputs that is lost; error: that of the change itself.
    """
    from ..commands.resize import resize as run
    from .progress import ProgressBar
    from .render import print_report

    with closing(ProgressBar("resizing", quiet or json, "modules")) as bar:
        report = run_command(run, options, bar)
    print_report("resize", report, json=json, quiet=quiet, verbose=verbose, html=options["html"])
