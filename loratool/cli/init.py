"""Define the command `loratool init`."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import click

from ..commands.choices import INIT_CHOICES
from .format_options import to_option
from .help import Command, option
from .options import (
    COUNT,
    PATH,
    PatternRank,
    architecture_option,
    card_option,
    complete_from,
    device_option,
    dry_run_option,
    dtype_option,
    exclude_option,
    force_option,
    json_option,
    layers_option,
    out_option,
    quiet_option,
    rank_option,
    run_command,
    save_recipe_option,
    seed_option,
    target_option,
    verbose_option,
)


@click.command(cls=Command)
@click.argument("base", type=PATH)
@out_option("init")
@option(
    "--method",
    title="Rank and method",
    default="lora",
    show_default=True,
    metavar="|".join(INIT_CHOICES),
    shell_complete=complete_from(*INIT_CHOICES),
    help="; ".join(f"{name}: {meaning}" for name, meaning in INIT_CHOICES.items()) + ".",
)
@rank_option("Rank of every weight.  [default: 8]")
@option(
    "--params",
    title="Rank and method",
    type=COUNT,
    metavar="4M",
    help="Choose the largest rank within this many parameters.",
)
@option(
    "--rank-pattern",
    title="Rank and method",
    type=PatternRank(),
    multiple=True,
    metavar="PATTERN=RANK",
    help="Other ranks by pattern: down_proj=16.",
)
@option("--alpha", title="Rank and method", type=float, metavar="N", help="Alpha of every module.  [default: its rank]")
@option("--dora", title="Rank and method", is_flag=True, help="DoRA: with magnitudes, the norms of the base's rows.")
@option("--rslora", title="Rank and method", is_flag=True, help="Scale the delta by alpha / sqrt(rank).")
@option(
    "--residual",
    title="Output",
    type=PATH,
    metavar="OUT",
    help="A folder for the base that pissa, milora and olora leave.",
)
@dtype_option("Dtype of the residual.")
@to_option
@architecture_option
@option(
    "--no-undo", title="Output", is_flag=True, help="Leave out the undo file, from which unmerge restores the base."
)
@seed_option("Seed of the random numbers.")
@target_option
@exclude_option
@layers_option
@card_option
@force_option
@dry_run_option
@device_option
@save_recipe_option
@quiet_option
@verbose_option
@json_option
def init(quiet: bool, verbose: bool, json: bool, **options: Any) -> None:
    """Initialize an adapter for a base, from its files alone, to train: a PEFT folder, or for an image model in one
    file kohya's, for a pipeline diffusers'.

    Without --target every linear layer but the head gets one. What is random follows from --seed and each weight's
    name. pissa, milora and olora take their factors out of the base: --residual writes what is left, on which the
    adapter belongs.

    \b
      loratool init base/ --rank 8 --target q_proj,v_proj -o started/
      loratool init base/ --method pissa --rank 16 --residual residual/ -o pissa/
      loratool init xl.safetensors --target to_k --to diffusers -o new.safetensors
    """
    from ..commands.init.command import init as run
    from .progress import ProgressBar
    from .render import print_report

    with closing(ProgressBar("initializing", quiet or json, last="syncing to disk")) as bar:
        report = run_command(run, options, bar)
    print_report("init", report, json=json, quiet=quiet, verbose=verbose)
