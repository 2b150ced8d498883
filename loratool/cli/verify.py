"""Define the command `loratool verify`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

import click

from ..commands.arguments import arguments_of, option_word
from ..commands.verify import call
from .from_call import library_arguments, make_command, options_for, run_function
from .options import CHECK, HTML, chosen_format
from .progress import ProgressBar

TEXT = """\
Each tensor is exact (the bits that merge writes), right with another rounding (PEFT's, a sum in 16 bits, ...), or
wrong, with a diagnosis: not applied, applied twice, wrong scale, transposed, swapped, or edited since. Quantized
weights are exact if they have the codes that merge writes. For codes of other programs, the report shows how much of
the delta they keep. Exit code 0 means proven, 1 means wrong or undecided. Modules that --target, --exclude and
--layers exclude must be equal to the base's.

\b
  loratool verify base/ adapter/ merged/
  loratool verify base/ style/:0.7 task/:-0.2 mixed/ --json
  loratool verify --attestation merged.intoto.json
"""

FILES = ("base", "adapters", "merged")

PARAMETERS = [
    *options_for(call.verify),
    *options_for(call.verify_attestation, "attestation"),
    HTML,
    *CHECK,
]

for parameter in PARAMETERS:
    if parameter.name in FILES:  # which a statement names too
        parameter.required, parameter.metavar = False, parameter.make_metavar(click.Context(click.Command("verify")))


def _verify(
    context: click.Context, /, attestation: str | None, quiet: bool, verbose: bool, json: bool,
    output_format: str | None, html: str | None, **options: Any,
) -> None:  # fmt: skip
    from .render import print_report

    form = chosen_format(json, output_format)
    if attestation is None:
        for parameter in PARAMETERS:
            if parameter.name in FILES and options[parameter.name] in (None, ()):
                raise click.MissingParameter(ctx=context, param=parameter)
    else:
        options = _with_statement(attestation, options)
    function = call.verify if attestation is None else call.verify_attestation
    with closing(ProgressBar("verifying", quiet or form != "text")) as bar:
        report = run_function(function, options, bar)
    status = report.said_no
    print_report("verify", report, form=form, quiet=quiet, verbose=verbose, html=html, status=status)
    if status:
        context.exit(1)


def _with_statement(attestation: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `verify_attestation`. Refuse those that the statement has."""
    known, defaults = arguments_of(call.verify_attestation), arguments_of(call.verify)
    for name, value in library_arguments(options).items():
        if name not in known and value != defaults[name].default:
            raise click.UsageError(f"--{option_word(name)} does not go with --attestation, which has the options")
    return {"attestation": attestation, **{name: value for name, value in options.items() if name in known}}


verify = make_command("verify", call.verify, TEXT, PARAMETERS, click.pass_context(_verify))
