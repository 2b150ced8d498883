"""Run something on the ranks of torchrun, on one machine, which may play several nodes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from conftest import ROOT

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")

SECONDS = 100  # for a run that hangs


def environment(**changed: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changed}


def ranks_of(
    folder: Path,
    *program: str,
    count: int = 2,
    options: tuple[str, ...] = (),
    env: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.Popen[str]:
    """Start a script, or `-m` and a module with its arguments, on `count` ranks."""
    single = () if any(option.startswith("--rdzv") or option == "--nnodes" for option in options) else ("--standalone",)
    call = [*TORCHRUN, *single, *options, "--nproc-per-node", str(count), *program]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(call, cwd=folder, env=environment(**env), text=True, **pipes)


def alone(folder: Path, *program: str) -> tuple[int, str, str]:
    """Run a script, or `-m` and a module with its arguments, as a single process; return as `ended` does."""
    call = [sys.executable, *program]
    done = subprocess.run(call, cwd=folder, env=environment(), capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def ended(*runs: subprocess.Popen[str]) -> list[tuple[int, str, str]]:
    """Wait for runs, and return exit code, stdout and stderr of each; end them if they hang."""
    try:
        told = [run.communicate(timeout=SECONDS) for run in runs]
    finally:
        for run in runs:
            run.kill()
    return [(run.returncode, *words) for run, words in zip(runs, told, strict=True)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port: int = found.getsockname()[1]
        return port
