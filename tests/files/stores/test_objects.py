"""Read models and adapters from a store of S3 (moto's server) and from a web server, both on this machine."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_model, write_peft

import loratool
from loratool.errors import InputError
from loratool.files.stores.links import links_in_one_state

NAMES = [f"model.layers.{i}.self_attn.q_proj" for i in range(6)]


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    server_module = pytest.importorskip("moto.server")
    fsspec, _ = pytest.importorskip("fsspec"), pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patched:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patched.setenv(name, "test")
        patched.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # of another server
        system = fsspec.filesystem("s3")
        system.makedirs("bucket", exist_ok=True)
        yield system
    server.stop()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of two shards and an adapter."""
    folder, g = tmp_path_factory.mktemp("pair"), torch.Generator().manual_seed(0)
    base = {f"{name}.weight": torch.randn(96, 64, generator=g).bfloat16() for name in NAMES}
    write_model(folder / "model", base, {"model_type": "llama"}, shards=2)
    factors = {name: (torch.randn(2, 64, generator=g), torch.randn(96, 2, generator=g)) for name in NAMES}
    write_peft(folder / "adapter", factors, r=2, lora_alpha=2)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_merge_from_a_store_has_the_bytes_of_one_from_here(s3: Any, pair: Path, tmp_path: Path) -> None:
    s3.put(str(pair), "bucket/same", recursive=True)
    loratool.merge("s3://bucket/same/model", "s3://bucket/same/adapter", out=tmp_path / "far")
    loratool.merge(pair / "model", pair / "adapter", out=tmp_path / "near")
    assert contents(tmp_path / "far") == contents(tmp_path / "near")
    assert loratool.verify("s3://bucket/same/model", "s3://bucket/same/adapter", merged=tmp_path / "far").ok


def test_a_report_names_the_objects(s3: Any, pair: Path) -> None:
    s3.put(str(pair), "bucket/told", recursive=True)
    far, near = (asdict(loratool.inspect(path)) for path in ("s3://bucket/told/model", pair / "model"))
    assert far.pop("path") == "s3://bucket/told/model" and near.pop("path")
    assert far == near


def test_an_object_that_is_replaced_while_it_is_read(s3: Any, pair: Path, tmp_path: Path) -> None:
    s3.put(str(pair), "bucket/replaced", recursive=True)
    name = "s3://bucket/replaced/model"
    (shard,) = s3.glob("bucket/replaced/model/*-00002-*")
    with links_in_one_state():
        loratool.inspect(name)
        s3.pipe(shard, s3.cat(shard)[:-2] + b"\1\1")
        with pytest.raises(InputError, match=r"s3://bucket/replaced/model/.*: was written to or replaced"):
            loratool.merge(name, pair / "adapter", out=tmp_path / "out")
    assert not [*tmp_path.iterdir()]
    loratool.merge(name, pair / "adapter", out=tmp_path / "out")


@pytest.mark.parametrize("name", ["s3://bucket/nothing", "s3://no-bucket/model", "s3://bucket/nothing.safetensors"])
def test_what_a_store_does_not_have(s3: Any, name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: the store has no such object"):
        loratool.inspect(name)


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serve a folder with ranges and tags; the standard library's knows neither."""

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def send_head(self) -> Any:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return super().send_head()
        data, tag = path.read_bytes(), f'"{hash(path.read_bytes())}"'
        if self.headers.get("If-Match", tag) != tag:
            return self.send_error(412)
        span = self.headers.get("Range")
        if span:
            first, last = map(int, span.removeprefix("bytes=").split("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[first : last + 1]
        else:
            self.send_response(200)
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
        return None


@contextmanager
def served(folder: Path) -> Iterator[str]:
    handler = partial(_Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("ending", ["/", "/model.safetensors.index.json"])
def test_a_model_of_a_web_server(pair: Path, tmp_path: Path, ending: str) -> None:
    pytest.importorskip("aiohttp")
    with served(pair) as server:
        loratool.merge(f"{server}/model{ending}", f"{server}/adapter/", out=tmp_path / "far")
    loratool.merge(f"{pair}/model{ending}", pair / "adapter", out=tmp_path / "near")
    assert contents(tmp_path / "far") == contents(tmp_path / "near")


def test_a_signed_link_stands_nowhere(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("aiohttp")
    with served(pair) as server:
        link = f"{server}/adapter/adapter_model.safetensors?X-Amz-Signature=5ec7e7"
        report = loratool.merge(pair / "model", link, out=tmp_path / "out")
        with pytest.raises(InputError) as refusal:
            loratool.inspect(f"{server}/none.safetensors?token=5ec7e7")
    told = repr(report).encode() + str(refusal.value).encode() + b"".join(contents(tmp_path / "out").values())
    assert b"5ec7e7" not in told
