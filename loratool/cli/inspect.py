"""`loratool inspect`."""

from __future__ import annotations

import click

from .options import alpha_option, json_option


@click.command()
@click.argument("path")
@click.option("--base", metavar="BASE", help="Hold an adapter against this model: what binds, and the change's size.")
@click.option("--strict", is_flag=True, help="Exit with 1 where something is wrong with an adapter.")
@alpha_option
@json_option
@click.pass_context
def inspect(context: click.Context, path: str, base: str | None, strict: bool, alpha: float | None, json: bool) -> None:
    """Show what is in a checkpoint or an adapter, and what is wrong with it.

    Matrices are grouped over layers. For a checkpoint, from headers alone: shapes, dtypes, sizes, what is tied or
    quantized, which weights LoRA could target. For an adapter, from its factors too: format, rank, alpha, scale,
    the size and effective rank of its change, and problems: factors that are zero, nan or inf, a config that does
    not fit them, and with --base modules and shapes that do not fit the model.

    \b
      loratool inspect model/
      loratool inspect adapter/ --base model/ --strict
    """
    from ..ops.inspect import CheckpointReport
    from ..ops.inspect import inspect as run
    from ..render import print_adapter, print_checkpoint, to_json

    report = run(path, base=base, alpha=alpha)
    wrong = strict and not isinstance(report, CheckpointReport) and bool(report.problems)
    if json:
        print(to_json("inspect", report, status="problems" if wrong else None))
    elif isinstance(report, CheckpointReport):
        print_checkpoint(report)
    else:
        print_adapter(report)
    if wrong:
        context.exit(1)
