"""Measure a merge from a store to a store against `download, merge, upload`, with 20 ms latency and 1 Gbit/s.

The store is lib/harness/s3_server.py, in a process of its own on the same machine, whose work counts on both sides.

pytest -m slow -s tests/benchmarks/test_store_speed.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_model, write_peft

pytestmark = pytest.mark.slow

LATENCY, RATE = 0.02, 125e6  # seconds, bytes in a second
LAYERS, ROWS, COLUMNS = 70, 4096, 1024  # 587 MB of bfloat16
MOST_MEMORY = 600e6  # bytes
MOST_SPACE = 600e6  # bytes of the cache
COPY = "import sys, fsspec; getattr(fsspec.filesystem('s3'), sys.argv[1])(sys.argv[2], sys.argv[3], recursive=True)"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    pytest.importorskip("s3fs")
    folder = tmp_path / "store"
    (folder / "bucket").mkdir(parents=True)
    command = [sys.executable, "-m", "lib.harness.s3_server", folder, str(LATENCY), str(RATE)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT / "tests"
    ) as server:
        assert server.stdout
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.stdout.readline().strip())
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield folder / "bucket"
        server.kill()


def measured(arguments: list[str], cache: Path) -> tuple[float, int, int]:
    """Run a command, and return its seconds, its largest memory, and the most that its cache held."""
    begin, memory, space = time.monotonic(), 0, 0
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while process.poll() is None:
            try:
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
                files = [path.stat().st_blocks * 512 for path in cache.rglob("*") if path.is_file()]
            except OSError:
                continue
            memory, space = max(memory, pages * os.sysconf("SC_PAGE_SIZE")), max(space, sum(files))
            time.sleep(0.02)
        assert process.returncode == 0, process.stdout and process.stdout.read()
    return time.monotonic() - begin, memory, space


def test_from_a_store_to_a_store(store: Path, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(LAYERS)]
    weights = {f"{name}.weight": torch.randn(ROWS, COLUMNS, generator=g).bfloat16() for name in names}
    write_model(store / "model", weights, {"model_type": "llama"}, shards=2)
    factors = {name: (torch.randn(16, COLUMNS, generator=g), torch.randn(ROWS, 16, generator=g)) for name in names}
    write_peft(store / "adapter", factors, r=16, lora_alpha=16)

    def run(*arguments: object) -> tuple[float, int, int]:
        return measured(list(map(str, arguments)), tmp_path / "cache")

    download, *_ = run("-c", COPY, "get", "bucket/model", tmp_path / "model")
    shutil.copytree(store / "adapter", tmp_path / "adapter")
    merge, *_ = run("-m", "loratool", "merge", tmp_path / "model", tmp_path / "adapter", "-o", tmp_path / "out")
    (store / "copy").mkdir()
    upload, *_ = run("-c", COPY, "put", f"{tmp_path}/out/", "bucket/copy/")
    near = (*map("s3://bucket/{}".format, ("model", "adapter")), "-o", "s3://bucket/merged")
    far, memory, space = run("-m", "loratool", "merge", *near)
    print(
        f"\ndownload {download:.1f} s, merge {merge:.1f}, upload {upload:.1f}: {download + merge + upload:.1f} s; "
        f"from and to the store {far:.1f} s, {memory / 1e6:.0f} MB of memory, {space / 1e6:.0f} MB of the cache"
    )
    for path in (tmp_path / "out").iterdir():
        assert (store / "merged" / path.name).read_bytes() == path.read_bytes()
    assert memory < MOST_MEMORY and space < MOST_SPACE and far < download + merge + upload
