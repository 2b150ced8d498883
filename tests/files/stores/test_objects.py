"""Read models and adapters from a store of S3 (moto's server) and from a web server, both on this machine."""

from __future__ import annotations

import base64
import gzip
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import few, load_model, run_command, write_model, write_peft
from lib.harness.fault_proxy import Request, faulty
from lib.harness.stores import WebHandler, s3_at, s3_server, served
from safetensors.torch import save_file

import loratool
from loratool.errors import InputError

NAMES = [f"model.layers.{i}.self_attn.q_proj" for i in range(6)]


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    with s3_server() as server, s3_at(f"http://{server}") as system:
        system.makedirs("bucket", exist_ok=True)
        yield system


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
    shard = "bucket/replaced/model/model-00002-of-00002.safetensors"

    def replace(request: Request) -> str:
        if request.method == "GET" and request.path == f"/{shard}":
            s3.pipe(shard, s3.cat(shard)[:-2] + b"\1\1")
        return ""

    server = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    with faulty(server) as proxy, s3_at(proxy.endpoint):
        proxy.fault = replace
        with pytest.raises(InputError, match=r"s3://bucket/replaced/model/.*: was written to or replaced"):
            loratool.merge("s3://bucket/replaced/model", pair / "adapter", out=tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_the_next_command_reads_what_replaced_it(s3: Any, pair: Path) -> None:
    s3.put(str(pair), "bucket/next", recursive=True)
    name, config = "s3://bucket/next/adapter", "bucket/next/adapter/adapter_config.json"
    before = loratool.inspect(name)
    s3.pipe(config, s3.cat(config).replace(b'"lora_alpha": 2', b'"lora_alpha": 8'))
    assert loratool.inspect(name) != before


@pytest.mark.parametrize("name", ["s3://bucket/nothing", "s3://no-bucket/model", "s3://bucket/nothing.safetensors"])
def test_what_a_store_does_not_have(s3: Any, name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: the store has no such object"):
        loratool.inspect(name)


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


@pytest.fixture(scope="module")
def memory(pair: Path) -> str:
    """The pair in fsspec's memory, as a link."""
    system = pytest.importorskip("fsspec").filesystem("memory")
    system.put(str(pair), "/pair", recursive=True)
    return "memory://pair"


@pytest.mark.parametrize(
    "command",
    ["merge {}/model {}/adapter --in-place", "unmerge {}/model {}/adapter --in-place", "recover {}/model",
     "apply {}/model {}/adapter --in-place"],
)  # fmt: skip
def test_nothing_in_a_store_is_changed_in_place(command: str, memory: str) -> None:
    result = run_command(*command.format(memory, memory).split())
    assert result.exit_code == 3 and f"error: {memory}/" in result.stderr, result.stderr
    assert "is in a store" in result.stderr and "hint: " in result.stderr


def test_two_links_with_one_path(pair: Path, tmp_path: Path) -> None:
    """A query may name a version, so what differs in it is another file."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name, scale in (("a", 1), ("b", 3)):
        write_peft(tmp_path / name, {NAMES[0]: (torch.ones(1, 64) * scale, torch.ones(96, 1))})

    class ByQuery(WebHandler):
        def translate_path(self, path: str) -> str:
            return super().translate_path(f"/{path.partition('?')[2]}{path.partition('?')[0]}")

    with served(tmp_path, ByQuery) as server:
        names = [f"{server}/adapter_model.safetensors?{name}" for name in "ab"]
        groups = [loratool.inspect(name, alpha=1).groups for name in names]
    assert groups == [loratool.inspect(tmp_path / name, alpha=1).groups for name in "ab"]
    assert groups[0] != groups[1]


def test_a_link_to_a_file_here(pair: Path, tmp_path: Path) -> None:
    link = (pair / "model").as_uri()
    loratool.merge(link, (pair / "adapter").as_uri(), out=tmp_path / "far")
    loratool.merge(pair / "model", pair / "adapter", out=tmp_path / "near")
    assert contents(tmp_path / "far").keys() == contents(tmp_path / "near").keys()
    assert loratool.inspect(Path(link)).groups == loratool.inspect(pair / "model").groups


def test_from_memory(memory: str, pair: Path, tmp_path: Path) -> None:
    loratool.merge(f"{memory}/model", f"{memory}/adapter", out=tmp_path / "far")
    loratool.merge(pair / "model", pair / "adapter", out=tmp_path / "near")
    assert contents(tmp_path / "far") == contents(tmp_path / "near")


class _Whole(WebHandler):
    ranges = False


class _Zipped(WebHandler):
    """Compress what is asked for, whatever the client takes."""

    def send_head(self) -> Any:
        path = Path(self.translate_path(self.path))
        data = gzip.compress(path.read_bytes() if path.is_file() else b"<html></html>")
        self.send_response(200)
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
        return None


class _Untagged(WebHandler):
    tag = ""


class _Weak(WebHandler):
    tag = 'W/"{}"'


class _Moved(WebHandler):
    def send_head(self) -> Any:
        if self.path.startswith("/moved"):
            return super().send_head()
        self.send_response(302)
        self.send_header("Location", f"/moved{self.path}")
        self.send_header("Content-Length", "0")
        return self.end_headers()

    def translate_path(self, path: str) -> str:
        return super().translate_path(path.removeprefix("/moved"))


class _Headless(WebHandler):
    """Know no HEAD, as signed links to GET do not."""

    def do_HEAD(self) -> None:
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()


class _Unlisted(WebHandler):
    """List no folder."""

    def send_head(self) -> Any:
        return super().send_head() if Path(self.translate_path(self.path)).is_file() else self.send_error(403)


def test_an_index_names_the_files_of_a_server_that_lists_none(pair: Path, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    index = "model/model.safetensors.index.json"
    with served(pair, _Unlisted) as server:
        loratool.merge(f"{server}/{index}", pair / "adapter", out=tmp_path / "far")
        with pytest.raises(InputError, match="the store refuses it"):
            loratool.inspect(f"{server}/model/")
    loratool.merge(pair / index, pair / "adapter", out=tmp_path / "near")
    assert contents(tmp_path / "far") == contents(tmp_path / "near")


def test_a_dry_run_asks_each_shard_once(pair: Path, tmp_path: Path) -> None:
    with served(pair) as server, faulty(server.removeprefix("http://")) as proxy:
        loratool.merge(f"{proxy.endpoint}/model/", pair / "adapter", out=tmp_path / "out", dry_run=True)
    shards = [each.path for each in proxy.gets() if each.path.endswith(".safetensors")]
    assert len(shards) == len({*shards}) == 2


SERVERS = {"no tag": _Untagged, "a weak tag": _Weak, "a redirect": _Moved, "no HEAD": _Headless}


@pytest.mark.parametrize("kind", few(SERVERS, "a weak tag"))
def test_a_web_server_with(kind: str, pair: Path, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    base = "adapter/adapter_model.safetensors" if kind == "a redirect" else "adapter/"  # it lists no folder
    with served(pair, SERVERS[kind]) as server:
        loratool.merge(pair / "model", f"{server}/{base}", out=tmp_path / "far")
    loratool.merge(pair / "model", pair / base, out=tmp_path / "near")
    assert contents(tmp_path / "far") == contents(tmp_path / "near")


@pytest.mark.parametrize(
    ("handler", "words"), [(_Whole, "sends only whole files"), (_Zipped, "does not tell its length")]
)
def test_a_web_server_without_ranges(
    handler: type[WebHandler], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small files can be whole; no byte of a larger one is guessed."""
    pytest.importorskip("aiohttp")
    save_file({"x.weight": torch.zeros(512, 512)}, tmp_path / "large.safetensors")
    with served(tmp_path, handler) as server, pytest.raises(InputError, match=words) as refusal:
        loratool.inspect(f"{server}/large.safetensors")
    assert refusal.value.remedy == "download it, and give the path of the file"


SECRET = "5ec7e75ec7e7"


class _Signed(WebHandler):
    """Send files only for a link with its signature, and only to one user."""

    def send_head(self) -> Any:
        user = base64.b64encode(f"me:{SECRET}".encode()).decode()
        if f"X-Signature={SECRET}" in self.path and self.headers.get("Authorization") == f"Basic {user}":
            return super().send_head()
        self.send_response(403)
        self.send_header("Content-Length", "0")
        return self.end_headers()


@pytest.mark.parametrize(
    "call",
    few(
        ["merge model {adapter} -o out --html page.html --save-recipe recipe.json --attest s.json --alpha 2 -v",
         "init {base} --rank 1 -o out --save-recipe recipe.json",
         "merge {base} adapter --dry-run --html page.html", "patch model {base} -o out.patch",
         "convert {adapter} --to peft --alpha 2 -o out", "inspect {base} --html page.html",
         "combine {adapter} adapter --alpha 2 -o out", "resize {adapter} --rank 1 --alpha 2 -o out",
         "diff {base} model", "verify model {adapter} model --alpha 2", "inspect {none}"],
        "merge model {adapter} -o out --html page.html --save-recipe recipe.json --attest s.json --alpha 2 -v",
    ),
)  # fmt: skip
@pytest.mark.parametrize("more", ["", "--json"])
def test_no_credentials_of_a_link_stand_anywhere(
    call: str, more: str, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp")
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    one = write_model(tmp_path / "one", load_model(pair / "model"), {"model_type": "llama"})
    monkeypatch.chdir(tmp_path)
    with served(tmp_path, _Signed) as server:
        there = server.replace("://", f"://me:{SECRET}@")
        links = {
            "adapter": f"{there}/adapter/adapter_model.safetensors?X-Signature={SECRET}",
            "none": f"{there}/none.safetensors?X-Signature={SECRET}",
            "base": f"{there}/{one.name}/model.safetensors?X-Signature={SECRET}",
        }
        result = run_command(*call.format_map(links).split(), *more.split())
    assert result.exit_code in ((2, 3) if "none" in call else (0, 1)), result.stderr
    told = result.stdout.encode() + result.stderr.encode() + b"".join(contents(tmp_path).values())
    assert SECRET.encode() not in told and b"/loratool-" not in told  # nor where the objects stand here
