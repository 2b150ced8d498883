"""Ask servers what they make of adapters, each in a process and an environment of its own (see `environment.sh`)."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent

# the server -> folders of its packages, below LORATOOL_SERVED
PACKAGES = {
    "vllm": ["vllm"],
    "sglang": ["sglang", "triton"],
    "exllamav3": ["exllamav3", "triton"],
    "lmdeploy": ["lmdeploy", "triton"],
}


class Server:
    """A process that answers questions about folders."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def ask(self, verb: str, *folders: Path) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        print(json.dumps([verb, *map(str, folders)]), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, "the server is gone"
        found: dict[str, Any] = json.loads(line)[1]
        assert "fault" not in found, found["trace"]
        return found

    def refusal(self, base: Path, merged: Path, adapter: Path) -> str | None:
        """Return what the server says where it refuses an adapter."""
        refused: str | None = self.ask("compare", base, merged, adapter).get("refused")
        return refused

    def wrong(self, base: Path, merged: Path, adapter: Path, within: float = 0.0) -> list[str]:
        """Return the served weights to which an adapter does not add what PEFT's merge adds, to the bit or a share."""
        found = self.ask("compare", base, merged, adapter)
        assert "refused" not in found, found["refused"]
        assert any(each["size"] for each in found["weights"].values()), "the merge changes nothing"
        return [name for name, each in found["weights"].items() if each["off"] > within * each["size"]]


@contextmanager
def running(name: str) -> Iterator[Server]:
    folder = os.environ.get("LORATOOL_SERVED")
    if not folder:
        pytest.skip("needs the folder that tests/served/environment.sh makes, named by LORATOOL_SERVED")
    paths = ":".join(f"{folder}/{each}" for each in PACKAGES[name])
    command = [f"{folder}/served-venv/bin/python", str(HERE / f"{name}_server.py")]
    options = {
        "env": os.environ | {"PYTHONPATH": paths},
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "text": True,
    }
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, **options) as process:
        try:
            yield Server(process)
        finally:
            process.terminate()


def convert(folder: Path, runtime: str, *flags: str, code: int = 0) -> Path:
    """Run `convert` of the pair in a folder for a runtime, and hold its exit code."""
    from loratool.cli import _run

    out = folder / "out"
    paths = [str(folder / "adapter"), "--base", str(folder / "base"), "-o", str(out)]
    assert _run(["convert", *paths, "--for", runtime, *flags]) == code
    return out
