"""Define the command `loratool inspect`."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import click

from ..commands.convert.call import inspect_for
from ..commands.inspect import call
from .from_call import library_arguments, make_command, options_for
from .help import Option
from .options import HTML, TERMINAL

TEXT = """\
Matrices are grouped over layers. For a checkpoint, from headers alone: shapes, dtypes, sizes, what is tied or
quantized and in how many bits a weight, which weights LoRA could target. For an adapter, from its factors too:
format, rank, alpha, scale, the size and effective rank of its delta, and problems: factors that are zero, nan or
inf, a config that does not fit them, and with --base modules and shapes that do not fit the model.

With --for and --base, a line for each thing of an adapter that a server or another program would not apply as it
was trained; `loratool convert --for` writes what it applies.

With --spectra, of the modules that --target, --exclude and --layers select: the largest singular values, effective
and stable rank, and the ranks that hold 50, 90 and 99 % of the energy. With --base also the intruder dimensions:
how many of the leading left singular vectors of a merged weight are unlike all of the base's, which is where LoRA
forgets; new: their number, first new: the place of the first.

\b
  loratool inspect base/
  loratool inspect adapter/ --base base/ --strict
  loratool inspect adapter/ --for vllm --base base/
  loratool inspect base/ --spectra --target q_proj,v_proj
  loratool inspect adapter/ --base base/ --spectra --html spectra.html
"""

PARAMETERS = [
    *options_for(call.inspect, "path", "base"),
    Option(
        ["--strict"],
        title="Checks",
        is_flag=True,
        help="Exit with 1 where something is wrong with an adapter, or where it is no LoRA.",
    ),
    *options_for(inspect_for, "runtime"),
    Option(
        ["--spectra"],
        title="Checks",
        is_flag=True,
        help="The singular values, of a model's linear layers or an adapter's changes; with --base also what is new to "
        "the model.",
    ),
    *options_for(call.spectra, "top", "threshold"),
    Option(
        ["--metadata"],
        title="Output",
        is_flag=True,
        help="All metadata of the file, a line for each key; without it an image adapter's most useful is told.",
    ),
    HTML,
    *options_for(call.spectra, "target", "exclude", "layers", "alpha", "device"),
    *TERMINAL,
]


def _inspect(
    context: click.Context,
    /,
    strict: bool,
    runtime: str | None,
    spectra: bool,
    metadata: bool,
    path: str,
    base: str | None,
    **options: Any,
) -> None:
    shown = {name: options.pop(name) for name in ("json", "quiet", "verbose", "html")}
    intruders = {name: options.pop(name) for name in ("top", "threshold")}
    if spectra and (strict or runtime):
        raise click.UsageError("--spectra excludes --strict and --for")
    if metadata and (spectra or runtime):
        raise click.UsageError("--metadata excludes --spectra and --for")
    if runtime and strict:
        raise click.UsageError("--for excludes --strict, as it exits with 1 by itself")
    if spectra:
        _spectra(shown, path=path, base=base, **intruders, **options)
        return
    if any(value is not None for value in intruders.values()):
        raise click.UsageError("--top and --threshold are for --spectra")
    if options["target"] or options["exclude"] or options["layers"]:
        raise click.UsageError("--target, --exclude and --layers select what --spectra shows")
    if options["device"] != "auto":
        raise click.UsageError("--device is for --spectra")
    if runtime:
        context.exit(_for_runtime(shown, path=path, runtime=runtime, base=base, alpha=options["alpha"]))
    from ..views.inspect_model import CheckpointReport, MethodReport
    from .render import print_report

    report = call.inspect(path, base=base, alpha=options["alpha"])
    status = None
    if isinstance(report, MethodReport):
        status = "other method" if strict else None
    elif not isinstance(report, CheckpointReport):
        status = "problems" if strict and report.problems else None
    print_report("inspect", report, **shown, status=status, extra=report.metadata if metadata else {})
    if status:
        context.exit(1)


def _for_runtime(shown: dict[str, Any], **options: Any) -> int:
    from .render import print_report

    report = inspect_for(**options)
    print_report("inspect", report, **shown, status=report.said_no)
    return 1 if report.said_no else 0


def _spectra(shown: dict[str, Any], **options: Any) -> None:
    from .progress import ProgressBar
    from .render import print_report

    with closing(ProgressBar("decomposing", shown["quiet"] or shown["json"], "matrices")) as bar:
        report = call.spectra(**library_arguments(options), progress=bar)
    print_report("inspect", report, **shown, status=None)


inspect = make_command("inspect", call.inspect, TEXT, PARAMETERS, click.pass_context(_inspect))
