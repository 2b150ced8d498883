"""Define the command `loratool diff`."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace
from typing import Any

import click

from ..commands.diff import call
from .from_call import library_arguments, make_command, options_for
from .help import Option
from .options import HTML, TERMINAL

TEXT = """\
Adapters may be of different formats, ranks and targets. What is compared is the change that they make: its size,
distance and cosine, the angles between its subspaces, and the LoRA paper's phi. Of three or more it is what any
two share. Models are compared tensor by tensor, streaming; quantized weights by their numbers, so that of a model
and its quantization it is the error.

\b
  loratool diff style/ task/ --base base/
  loratool diff style/ task/ lora/ --html together.html
  loratool diff base/ tuned/ --target q_proj,v_proj
  loratool diff merged/ rebuilt/ --fail-above 0
  loratool diff base/ tuned/ --spectra

apart: the size of B - A beside the larger, 141% for what has nothing in common. Of adapters, angle: the largest
between the subspaces of the inputs; phi: how much of A's directions lies in B's, 1 is all, and with -v a grid of
it; amplified: the delta beside what the base has in the same directions; interference: how much they use the same
directions, on both sides and for whatever: 0 not at all, 1 as two equal ones. They are the same, or by their cosine
alike (from 0.9), related (from 0.3), unrelated or opposed (below -0.3); crossing are unrelated ones with an
interference from 0.1 on, twice that of random directions at least. Of models, changed: the share of numbers that
differ; max |B-A|: the largest difference; ulps: the same in steps between numbers. Tensors of another shape, with
nan or inf on one side, or different without being floating-point are not comparable, and in no total. With
--spectra, new: how many of the leading left singular vectors of a changed weight are unlike all of the base's, its
intruder dimensions.
"""

PARAMETERS = [
    *options_for(call.diff, "a", "b", "others", "base"),
    Option(
        ["--fail-above"],
        title="Checks",
        type=click.FloatRange(0),
        metavar="X",
        help="Exit 1 if any relative distance is above X; what one side lacks counts as 1, and what cannot be compared "
        "is above any X.",
    ),
    Option(
        ["--spectra"],
        title="Checks",
        is_flag=True,
        help="Of a model and its fine-tune: what is new in the leading singular vectors of the linear layers that "
        "changed.",
    ),
    *options_for(call.diff_spectra, "top", "threshold"),
    HTML,
    *options_for(call.diff, "drop", "alpha", "target", "exclude", "layers", "device"),
    *TERMINAL,
]


def _diff(
    context: click.Context,
    /,
    others: tuple[str, ...],
    spectra: bool,
    fail_above: float | None,
    html: str | None,
    quiet: bool,
    verbose: bool,
    json: bool,
    **options: Any,
) -> None:
    intruders = {name: options.pop(name) for name in ("top", "threshold")}
    if spectra and others:
        raise click.UsageError("--spectra compares a model and its fine-tune, which are two")
    if spectra:
        shown = {"json": json, "quiet": quiet, "verbose": verbose, "html": html}
        _spectra(shown, fail_above=fail_above, **intruders, **options)
        return
    if any(value is not None for value in intruders.values()):
        raise click.UsageError("--top and --threshold are for --spectra")
    from .progress import ProgressBar
    from .render import print_report

    if fail_above is not None and math.isnan(fail_above):
        raise click.UsageError("--fail-above nan would never fail")
    with closing(ProgressBar("comparing", quiet or json)) as bar:
        report = call.diff(options.pop("a"), options.pop("b"), *others, **library_arguments(options), progress=bar)
    if fail_above is not None and report.is_above(fail_above):
        report = replace(report, above=fail_above)
    print_report("diff", report, json=json, quiet=quiet, verbose=verbose, html=html, status=report.said_no)
    if report.said_no:
        context.exit(1)


def _spectra(shown: dict[str, Any], **options: Any) -> None:
    for name in ("base", "drop", "alpha", "fail_above"):
        if options.pop(name) not in (None, ()):
            raise click.UsageError(
                f"--spectra compares a model and its fine-tune: --{name.replace('_', '-')} is not for it"
            )
    from .progress import ProgressBar
    from .render import print_report

    with closing(ProgressBar("decomposing", shown["quiet"] or shown["json"], "matrices")) as bar:
        report = call.diff_spectra(**library_arguments(options), progress=bar)
    print_report("diff", report, **shown, status=None)


diff = make_command("diff", call.diff, TEXT, PARAMETERS, click.pass_context(_diff))
