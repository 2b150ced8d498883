"""Define the command `loratool count`."""

from __future__ import annotations

from typing import Any

import click

from .help import Command, option
from .options import (
    COUNT,
    PATH,
    exclude_option,
    json_option,
    layers_option,
    library_arguments,
    quiet_option,
    target_option,
    verbose_option,
)


@click.command(cls=Command)
@click.argument("path", type=PATH, metavar="CONFIG-OR-CHECKPOINT")
@option(
    "--rank",
    title="Rank and method",
    type=click.IntRange(1),
    metavar="N",
    help="LoRA's rank, the adapters' bottleneck, the prefixes' length.  [default: 8]",
)
@option(
    "--params",
    title="Rank and method",
    type=COUNT,
    metavar="4M",
    help="Instead of --rank: the largest size of each method that fits.",
)
@target_option
@exclude_option
@layers_option
@quiet_option
@verbose_option
@json_option
def count(quiet: bool, verbose: bool, json: bool, **options: Any) -> None:
    """Count what LoRA and its rivals would train of a model, and what each adds at inference.

    From a checkpoint's headers, or from a config.json alone. LoRA goes to query and value, as in the paper, or to
    --target; q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj mean those parts in every family, also
    within a fused matrix.

    \b
      loratool count base/ --rank 16 --target q_proj,k_proj,v_proj,o_proj
      loratool count config.json --params 4K
    """
    from ..commands.count.command import count as run
    from .render import print_report

    report = run(**library_arguments(options))
    print_report("count", report, json=json, quiet=quiet, verbose=verbose)
