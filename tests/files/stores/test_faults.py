"""Read from stores that fail: every answer is right, or the command ends in time, with one line and what to do."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import few, write_model, write_peft
from lib.harness.fault_proxy import Proxy, Request, faulty
from lib.harness.stores import s3_at, s3_server, served

import loratool
from loratool.errors import InputError, LoratoolError, MachineError
from loratool.files.stores import objects, table

NAMES = [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]

SHARDS = 3


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of several requests a shard, and an adapter; and their merge."""
    folder, g = tmp_path_factory.mktemp("faults"), torch.Generator().manual_seed(0)
    base = {f"{name}.weight": torch.randn(512, 512, generator=g).bfloat16() for name in NAMES}
    write_model(folder / "model", base, {"model_type": "llama"}, shards=SHARDS)
    factors = {name: (torch.randn(2, 512, generator=g), torch.randn(512, 2, generator=g)) for name in NAMES}
    write_peft(folder / "adapter", factors, r=2, lora_alpha=2)
    loratool.merge(folder / "model", folder / "adapter", out=folder / "merged")
    return folder


@pytest.fixture(scope="module")
def s3_with_pair(pair: Path) -> Iterator[str]:
    with s3_server() as server, s3_at(f"http://{server}") as system:
        system.makedirs("faults", exist_ok=True)
        system.put(str(pair / "model"), "faults/model", recursive=True)
        system.put(str(pair / "adapter"), "faults/adapter", recursive=True)
        yield server


@pytest.fixture(params=few(("s3", "http"), "s3", "http"))
def store(request: pytest.FixtureRequest, pair: Path) -> Iterator[tuple[Proxy, str]]:
    """A proxy before a store, and the link to the folder with the pair there."""
    if request.param == "s3":
        with faulty(request.getfixturevalue("s3_with_pair")) as proxy, s3_at(proxy.endpoint):
            yield proxy, "s3://faults"
    else:
        pytest.importorskip("aiohttp")
        with served(pair) as server, faulty(server.removeprefix("http://")) as proxy:
            yield proxy, proxy.endpoint


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait a hundredth of the time between attempts, and less for an answer."""
    monkeypatch.setattr(objects, "PAUSES", tuple(pause / 100 for pause in objects.PAUSES))
    monkeypatch.setattr(objects, "PATIENCE", 4)
    monkeypatch.setattr(table, "SILENCE", 1)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def merge(link: str, pair: Path, out: Path) -> None:
    """Merge from a store, and require the bytes of the merge from here."""
    loratool.merge(f"{link}/model/", f"{link}/adapter/", out=out)
    assert contents(out) == contents(pair / "merged")


def is_body(request: Request) -> bool:
    return request.method == "GET" and bool(request.span)


def first_of_each(*faults: str) -> Callable[[Request], str]:
    """Return a fault that the first answers to each request have."""
    times: dict[tuple[str, str], int] = {}

    def fault(request: Request) -> str:
        key = request.path, request.span
        times[key] = times.get(key, -1) + 1
        return faults[times[key]] if is_body(request) and times[key] < len(faults) else ""

    return fault


@pytest.mark.parametrize(
    "faults",
    few(
        [("503", "429", "500"), ("503",) * 3, ("429",), ("502", "504"), ("reset",), ("end", "end"), ("drop",),
         ("short",), ("long",), ("hang",)],
        ("503", "429", "500"), ("reset",),
    ),
)  # fmt: skip
def test_what_passes_leaves_no_trace(
    faults: tuple[str, ...], store: tuple[Proxy, str], pair: Path, tmp_path: Path
) -> None:
    proxy, link = store
    proxy.fault = first_of_each(*faults)
    merge(link, pair, tmp_path / "out")
    assert {each.fault for each in proxy.log} >= {*faults}


@pytest.mark.parametrize("seed", few(range(4), 0))
def test_a_tenth_of_all_requests_is_lost(seed: int, store: tuple[Proxy, str], pair: Path, tmp_path: Path) -> None:
    proxy, link = store
    chance = random.Random(seed)
    proxy.fault = lambda request: chance.choice(("drop", "503", "reset", "short")) if chance.random() < 0.1 else ""
    merge(link, pair, tmp_path / "out")


LASTING: dict[str, tuple[type[LoratoolError], str]] = {
    "503": (MachineError, "could not be read from the store"),
    "429": (MachineError, "could not be read from the store"),
    "reset": (MachineError, "could not be read from the store"),
    "drop": (MachineError, "could not be read from the store"),
    "short": (MachineError, "could not be read from the store"),
    "long": (MachineError, "could not be read from the store"),
    "hang": (MachineError, "could not be read from the store"),
    "403": (InputError, "the store refuses it to these credentials"),
    "401": (InputError, "the store refuses it to these credentials"),
    "404": (InputError, "was written to or replaced while it was read"),
    "412": (InputError, "was written to or replaced while it was read"),
}


@pytest.mark.parametrize("fault", few(LASTING, "short", "403"))
@pytest.mark.parametrize("after", few((0, 5), 5))
def test_what_lasts_ends_the_command(
    fault: str, after: int, store: tuple[Proxy, str], pair: Path, tmp_path: Path
) -> None:
    """The store fails from the first range on, or in the middle of the merge."""
    proxy, link = store
    count = itertools.count()
    proxy.fault = lambda request: fault if is_body(request) and next(count) >= after else ""
    kind, words = LASTING[fault]
    begin = time.monotonic()
    with pytest.raises(kind, match=words) as raised:
        merge(link, pair, tmp_path / "out")
    assert time.monotonic() - begin < 30, "a bounded time"
    require_one_line(raised.value, link)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("fault", few(["503", "403", "drop", "hang", "404"], "403"))
def test_a_store_that_fails_from_the_first_question_on(fault: str, store: tuple[Proxy, str]) -> None:
    proxy, link = store
    proxy.fault = lambda request: fault
    begin = time.monotonic()
    with pytest.raises(LoratoolError) as raised:
        loratool.inspect(f"{link}/model/")
    assert time.monotonic() - begin < 60
    require_one_line(raised.value, link)
    missing = "no such object" in str(raised.value)
    assert missing == (fault == "404") and isinstance(raised.value, InputError) == (fault in ("403", "404"))


def require_one_line(error: Any, link: str) -> None:
    assert error.culprit.startswith(link) and "\n" not in error.message
    assert error.remedy or "no such object" in error.message


def test_another_tag_in_the_middle(store: tuple[Proxy, str], pair: Path, tmp_path: Path) -> None:
    """A cache before a web server may answer from another state than the one that was listed."""
    proxy, link = store
    if link.startswith("s3"):
        pytest.skip("S3 compares the tag itself, before it answers")
    count = itertools.count()
    proxy.fault = lambda request: "tag" if is_body(request) and next(count) >= 5 else ""
    with pytest.raises(InputError, match="was written to or replaced"):
        merge(link, pair, tmp_path / "out")


@pytest.mark.slow
def test_a_slow_line(store: tuple[Proxy, str], pair: Path, tmp_path: Path) -> None:
    """As long as bytes come, nothing is given up."""
    proxy, link = store
    proxy.latency, proxy.rate = 0.1, 400_000
    merge(link, pair, tmp_path / "out")


def test_the_real_time_is_bounded() -> None:
    """The tests above hurry; these are the seconds that a user waits for a store that never answers."""
    botocore = table.S3.options()["config_kwargs"]
    assert botocore["retries"] == {"total_max_attempts": 1} and botocore["read_timeout"] == table.SILENCE
    assert all(store.options() for store in table.STORES.values())
