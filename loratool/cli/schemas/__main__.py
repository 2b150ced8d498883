"""Write the schemas again: `python -m loratool.cli.schemas`, after a change of a report, a table or SCHEMA_VERSION."""

from __future__ import annotations

import json
import re
from pathlib import Path

from . import files

# The innermost objects and lists, which fit on a line of their own
SHORT = re.compile(r"[\[{]\n[^\[\]{}]{1,150}?\n *[\]}]")


for name, schema in files():
    text = SHORT.sub(lambda found: re.sub(r"\s*\n\s*", " ", found[0]), json.dumps(schema, indent=1))
    Path(__file__).with_name(name).write_text(text + "\n")
