"""`loratool inspect`."""

from __future__ import annotations

import click

from .options import alpha_option, json_option


@click.command()
@click.argument("path")
@click.option("--base", metavar="BASE", help="Hold an adapter against this model: which modules bind.")
@alpha_option
@json_option
def inspect(path: str, base: str | None, alpha: float | None, json: bool) -> None:
    """Show what is in a checkpoint or an adapter, from headers and scalar alphas alone.

    Matrices are grouped over layers. For a checkpoint: shapes, dtypes, sizes, what is tied or quantized, which
    weights LoRA could target. For an adapter: format, rank, alpha, scale, targets, and with --base its coverage.
    """
    from ..ops.inspect import CheckpointReport
    from ..ops.inspect import inspect as run
    from ..render import print_adapter, print_checkpoint, to_json

    report = run(path, base=base, alpha=alpha)
    if json:
        print(to_json("inspect", report))
    elif isinstance(report, CheckpointReport):
        print_checkpoint(report)
    else:
        print_adapter(report)
