"""Define the option --to of the commands that write an adapter, apart as the formats are long to load."""

from __future__ import annotations

import click

from ..adapters.formats import written_formats
from .help import option

FORMATS_HELP = "; ".join(each.title for each in written_formats().values())


to_option = option(
    "--to",
    title="Output",
    type=click.Choice(list(written_formats())),
    help=FORMATS_HELP + ".  [default: by the input]",
)
