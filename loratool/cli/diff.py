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
from .options import CHECK, HTML, chosen_format

TEXT = """\
Adapters can differ in format, rank and targets, because their deltas are compared: norms, distance, cosine, the
angles between subspaces, and phi of the LoRA paper. For three or more adapters, you see what each two share. Models
are compared tensor by tensor in a stream. Quantized weights are dequantized, so a model and its quantized version
give the quantization error.

\b
  loratool diff style/ task/ --base base/
  loratool diff style/ task/ lora/ --html together.html
  loratool diff base/ tuned/ --target q_proj,v_proj
  loratool diff merged/ rebuilt/ --fail-above 0
  loratool diff base/ tuned/ --spectra
  loratool diff base/ merged/ --headers

apart: the norm of B - A relative to the larger norm; 141% if they have nothing in common.

For adapters, angle: the largest angle between the input subspaces. phi: the share of A's directions that is in B's,
1 for all; -v shows a grid. amplified: the norm of the delta relative to the base's norm in the same directions.
interference: how much they use the same input and output directions, 0 for not at all and 1 for equal deltas. The
relation follows the cosine: alike (from 0.9), related (from 0.3), unrelated, or opposed (below -0.3). Unrelated ones
are crossing if their interference is at least 0.1 and twice that of random directions.

For models, changed: the share of numbers that differ. max |B-A|: the largest difference. ulps: the largest
difference in steps between numbers. Tensors are not comparable, and in no total, if their shapes differ, if only one
has nan or inf, or if they differ and are not floating-point. With --spectra, new: the number of intruder dimensions,
leading left singular vectors of a changed weight that match none of the base's.

With --headers, no weight is read, also of models on the hub or in a store. Tensors are compared under the names in the
files; a GGUF model has those of transformers beside a model of transformers. A quantized weight is one tensor if the
other model stores it in another format; otherwise its codes and scales are compared.
"""

PARAMETERS = [
    *options_for(call.diff, "a", "b", "others", "base"),
    Option(
        ["--fail-above"],
        title="Checks",
        type=click.FloatRange(0),
        metavar="X",
        help="Exit with 1 if any relative distance is above X. A tensor of only one side counts as 1; one that is not "
        "comparable is above every X. With --headers, 0 is for any difference.",
    ),
    Option(
        ["--spectra"],
        title="Checks",
        is_flag=True,
        help="Compare the singular vectors of a model and its fine-tune, and count the new ones.",
    ),
    *options_for(call.diff_spectra, "top", "threshold"),
    Option(
        ["--headers"],
        title="Checks",
        is_flag=True,
        help="Compare names, shapes and types of tensors, and read no weights.",
    ),
    HTML,
    *options_for(call.diff, "drop", "alpha", "target", "exclude", "layers", "digest", "device"),
    *CHECK,
]


def _diff(
    context: click.Context,
    /,
    others: tuple[str, ...],
    spectra: bool,
    headers: bool,
    fail_above: float | None,
    **options: Any,
) -> None:
    intruders = {name: options.pop(name) for name in ("top", "threshold")}
    form = chosen_format(options.pop("json"), options.pop("output_format"))
    shown = {"form": form, **{name: options.pop(name) for name in ("quiet", "verbose", "html")}}
    if fail_above is not None and math.isnan(fail_above):
        raise click.UsageError("--fail-above nan is not a number")
    if headers:
        context.exit(_headers(shown, fail_above, others=others, spectra=spectra, **intruders, **options))
    if spectra and others:
        raise click.UsageError("--spectra takes two paths: a model and its fine-tune")
    if spectra:
        _spectra(shown, fail_above=fail_above, **intruders, **options)
        return
    if any(value is not None for value in intruders.values()):
        raise click.UsageError("--top and --threshold need --spectra")
    from .progress import ProgressBar
    from .render import print_report

    with closing(ProgressBar("comparing", shown["quiet"] or shown["form"] != "text")) as bar:
        report = call.diff(options.pop("a"), options.pop("b"), *others, **library_arguments(options), progress=bar)
    if fail_above is not None and report.is_above(fail_above):
        report = replace(report, above=fail_above)
    print_report("diff", report, **shown, status=report.said_no)
    if report.said_no:
        context.exit(1)


def _headers(shown: dict[str, Any], fail_above: float | None, *, a: str, b: str, **options: Any) -> int:
    if any(value not in (None, (), False, "auto") for value in options.values()):
        raise click.UsageError("--headers takes two paths, and goes only with --fail-above and options of the output")
    from .render import print_report

    report = call.diff_headers(a, b)
    status = "different" if fail_above is not None and report.is_above(fail_above) else None
    print_report("diff", report, **shown, status=status)
    return 1 if status else 0


def _spectra(shown: dict[str, Any], **options: Any) -> None:
    for name in ("base", "drop", "alpha", "fail_above"):
        if options.pop(name) not in (None, ()):
            raise click.UsageError(
                f"--{name.replace('_', '-')} does not go with --spectra, which compares a model and its fine-tune"
            )
    from .progress import ProgressBar
    from .render import print_report

    with closing(ProgressBar("decomposing", shown["quiet"] or shown["form"] != "text", "matrices")) as bar:
        report = call.diff_spectra(**library_arguments(options), progress=bar)
    print_report("diff", report, **shown, status=None)


diff = make_command("diff", call.diff, TEXT, PARAMETERS, click.pass_context(_diff))
