"""Say of every type of model what `convert --for RUNTIME` does with an adapter of all its linear layers and experts.

    LORATOOL_SERVED=FOLDER python tests/served/every_type.py vllm|sglang|exllamav3 [TABLE:TYPE ...]

A line a type: exact, if every served weight gets what PEFT's merge adds; wrong, with weights that do not; refused by
loratool, with its message; refused by the server; or not served, where the server does not take the small model.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from lib.models import tiny
from pairs import pair
from servers import Server, running

from loratool.cli import _run


def outcome(server: Server, runtime: str, folder: Path, family: str) -> str:
    """Return one line on one type."""
    try:
        pair(folder, *family.split(":"))
    except Exception as fault:
        return f"no adapter: {fault}"
    paths = [str(folder / "adapter"), "--base", str(folder / "base"), "-o", str(folder / "out")]
    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())), contextlib.redirect_stderr(said):
        code = _run(["convert", *paths, "--for", runtime])
    if code:
        return f"refused by loratool: {said.buffer.getvalue().decode()}"
    try:
        found = server.ask("compare", *(folder / name for name in ("base", "merged", "out")))
    except AssertionError as fault:
        return f"not served: {str(fault).strip().splitlines()[-1]}"
    if "refused" in found:
        return f"refused by the server: {found['refused']}"
    wrong = [name for name, each in found["weights"].items() if each["off"]]
    return f"wrong: {wrong}" if wrong else "exact"


if __name__ == "__main__":
    runtime, *types = sys.argv[1:]
    every = [f"{table}:{each}" for table, each in tiny.tables() if table in ("causal", "image")]
    with running(runtime) as server:
        for family in types or every:
            with tempfile.TemporaryDirectory() as folder:
                line = " ".join(outcome(server, runtime, Path(folder), family).split())
            print(f"{family}: {line[:300]}", flush=True)
