"""Give fuzzers their server, and print how many cases a long run tried."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzzing import Fuzzer, Server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def fuzz(
    request: pytest.FixtureRequest, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Fuzzer]:
    if sys.platform != "linux":
        pytest.skip("the server of cases needs Linux: pidfd, memfd, and the peak of a process's memory")
    name = request.node.name.removeprefix("test_")
    option = request.config.getoption
    made = Fuzzer(name, server, tmp_path, option("--fuzz-seconds"), option("--fuzz-seed"))
    yield made
    if made.seconds:
        with capsys.disabled():
            print(f"\n{name}: {made.ran:,} cases")
