"""`loratool inspect`."""

from __future__ import annotations

import click

from .options import alpha_option, json_option


@click.command()
@click.argument("path")
@click.option("--base", metavar="BASE", help="Hold an adapter against this model: what binds, and the change's size.")
@click.option(
    "--strict", is_flag=True, help="Exit with 1 where something is wrong with an adapter, or where it is no LoRA."
)
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
    from ..ops.inspect import CheckpointReport, MethodReport
    from ..ops.inspect import inspect as run
    from ..render import print_adapter, print_checkpoint, print_method, to_json

    report = run(path, base=base, alpha=alpha)
    status = None
    if isinstance(report, MethodReport):
        status = "other method" if strict else None
    elif not isinstance(report, CheckpointReport):
        status = "problems" if strict and report.problems else None
    if json:
        print(to_json("inspect", report, status=status))
    elif isinstance(report, CheckpointReport):
        print_checkpoint(report)
    elif isinstance(report, MethodReport):
        print_method(report)
    else:
        print_adapter(report)
    if status:
        context.exit(1)
