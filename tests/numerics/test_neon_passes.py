"""Hold the compiled passes of 64-bit ARM, in an emulator, to the way without them: the same hostile blocks as here."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from lib.hostile.hostile_blocks import HostileBlock, make_block, make_cast
from lib.neon.remote_module import MISSING, RemoteModule
from test_passes import Takes, check

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("error::RuntimeWarning"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteModule]:
    remote = RemoteModule(tmp_path_factory.mktemp("neon"))
    yield remote
    remote.close()


@pytest.mark.parametrize("seed", range(20, 24))
@pytest.mark.parametrize("make", [make_block, make_cast])
def test_hostile_blocks_on_arm(
    make: Callable[[list[int]], HostileBlock], seed: int, module: RemoteModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratool.numerics.passes.native._load", lambda: (module, ""))
    takes = Takes(monkeypatch)
    check(0, 250, seed, make)
    assert module.VECTORS == "neon" and takes.counts[True] > 0.6 * takes.counts.total()
