"""Hold the harness to itself: every command of valid files ends well, and each broken promise is told."""

from __future__ import annotations

import pytest
from fuzzing import Case, Fuzzer
from valid_files import COMMANDS, everything

pytestmark = pytest.mark.fuzz


@pytest.mark.parametrize("shards", [False, True], ids=["file", "shards"])
def test_every_command_of_valid_files(fuzz: Fuzzer, shards: bool) -> None:
    for argv, outputs in COMMANDS.items():
        fuzz.run(Case(everything(shards=shards), argv, outputs), lambda case, ran, work: [f"{ran.code}"] * ran.code)
    fuzz.end()
