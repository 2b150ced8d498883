"""Hold what torchrun's ranks print: rank 0 speaks for all, and the others only of errors that it does not have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from loratool.cli import COMMANDS as ALL
from loratool.cli.torchrun import COMMANDS

PROGRAM = "import loratool.cli.torchrun as t; t.PATIENCE = 0; from loratool.cli import main; main()"


def rank(number: int, *arguments: str, **env: str) -> tuple[int, str, str]:
    """Run the command line as one of two ranks, whose torchrun does not answer."""
    launched = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
    full = {**os.environ, "PYTHONPATH": str(ROOT), **launched, **env}
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], env=full, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("arguments", [("--version",), ("inspect", "-h")])
def test_help_is_told_once(arguments: tuple[str, ...]) -> None:
    code, out, err = rank(0, *arguments)
    assert (code, err) == (0, "")
    assert "loratool" in out
    assert rank(1, *arguments) == (0, "", "")


@pytest.mark.parametrize("arguments", [("inspect", "base"), ("guide",)])
def test_a_command_that_ranks_cannot_share_is_refused(arguments: tuple[str, ...]) -> None:
    code, out, err = rank(0, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {arguments[0]} is for one process: torchrun's ranks share the work of merge, ")
    code, out, err = rank(1, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"rank 1: error: {arguments[0]} is for one process")


def test_errors_of_others_are_told_by_name_and_json_by_rank_0_alone() -> None:
    code, out, err = rank(1, "merge", "--json")
    assert (code, out) == (2, "")
    assert err.startswith("rank 1: error: ")
    code, out, err = rank(0, "merge", "--json")
    assert code == 2
    assert out.startswith('{"schema": 2')


def test_a_single_rank_is_a_process_like_any(tmp_path: Path) -> None:
    code, _, err = rank(0, "inspect", str(tmp_path / "nowhere"), WORLD_SIZE="1")
    assert (code, err.splitlines()[0]) == (3, f"error: {tmp_path / 'nowhere'}: no such file or folder")


@pytest.mark.slow
def test_a_store_that_does_not_answer_is_named() -> None:
    code, out, err = rank(0, "merge", "base", "adapter")
    assert (code, out) == (5, "")
    assert err.startswith("error: torchrun's store is out of reach: ")


def test_every_command_that_ranks_share_is_one() -> None:
    assert set(COMMANDS) < set(ALL)


def test_a_dry_run_is_rank_0s_alone() -> None:
    assert rank(1, "merge", "base", "adapter", "--dry-run") == (0, "", "")
