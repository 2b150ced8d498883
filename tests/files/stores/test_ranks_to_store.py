"""Send outputs to a store by torchrun's ranks, which share no folder: one process's bytes, and what faults leave."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_model, write_peft
from files.stores.test_objects import contents
from lib.harness.rank_threads import on_ranks
from lib.harness.stores import s3_at, s3_server
from lib.harness.torchrun import alone, ended, ranks_of
from lib.models.quantized_loading import fp8_blocks

import loratool
from loratool.commands.digests import digest_of_path
from loratool.files.stores import outgoing, uploads
from loratool.files.stores.outgoing import MARKER
from loratool.streaming.ranks import RankDone

# The command line of a rank with a home of its own and parts of 64 KiB, which a rank DIES or fails to send in the
# first start; it waits for each part a while, so that every rank has its share
PROGRAM = """
import itertools, os, signal, time
from pathlib import Path

rank, start = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
os.environ["HOME"] = os.environ["XDG_CACHE_HOME"] = str(Path.cwd() / f"home {rank}")

from loratool.errors import InputError, MachineError
from loratool.files.stores import outgoing, uploads

outgoing.PART = uploads.PART = 1 << 16
send, sent, count = uploads.S3Upload.send, [], itertools.count(1)

def noted(self, number, data):
    turn = next(count)
    time.sleep(0.02)
    if rank == os.environ.get("FAULT_OF") and start == "0" and turn == 8:
        fault = os.environ["FAULT"]
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise (InputError if fault == "refused" else MachineError)(f"the store {fault}", culprit="s3://bucket/out")
    send(self, number, data)
    sent.append(number)

def leave(code):
    Path(f"sent-{rank}").write_text(str(len(sent)))
    end(code)

uploads.S3Upload.send = noted
end, os._exit = os._exit, leave
from loratool.cli import main
main()
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four shards, in one file and as codes, and an adapter of each of its weights."""
    folder, g = tmp_path_factory.mktemp("ranks"), torch.Generator().manual_seed(3)
    names = [f"model.layers.{i}.mlp.{kind}_proj" for i in range(6) for kind in ("gate", "up")]
    weights = {f"{name}.weight": torch.randn(384, 256, generator=g).bfloat16() for name in names}
    write_model(folder / "base", weights, {"model_type": "llama", "dtype": "bfloat16"}, shards=4)
    (folder / "base" / "tokenizer.json").write_text("{}")
    write_model(folder / "one", weights, {"model_type": "llama", "dtype": "bfloat16"})
    codes = {key: each for name in names for key, each in fp8_blocks(name, weights[f"{name}.weight"]).items()}
    how = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    write_model(folder / "fp8", codes, {"model_type": "llama", "quantization_config": how}, shards=4)
    factors = {name: (torch.randn(4, 256, generator=g), torch.randn(384, 4, generator=g)) for name in names}
    write_peft(folder / "adapter", factors, r=4, lora_alpha=4)
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    settings = pytest.importorskip("moto.settings")
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)
        assert settings
        yield server


@pytest.fixture
def s3(server: str) -> Iterator[Any]:
    with s3_at(f"http://{server}") as system:
        if system.exists("bucket"):
            system.rm("bucket", recursive=True)
        system.makedirs("bucket")
        yield system


def run(folder: Path, *arguments: str, **options: Any) -> tuple[int, str, str]:
    (folder / "program.py").write_text(PROGRAM)
    [done] = ended(ranks_of(folder, "program.py", *arguments, **options))
    return done


def stored(s3: Any) -> dict[str, bytes]:
    s3.invalidate_cache()
    return {name.removeprefix("bucket/"): s3.cat(name) for name in s3.find("bucket")}


def unfinished(s3: Any) -> list[str]:
    return [each["Key"] for each in s3.call_s3("list_multipart_uploads", Bucket="bucket").get("Uploads", ())]


def left(folder: Path) -> list[Path]:
    return [path for path in folder.glob("home */**/*") if path.is_file()]


PART = 1 << 16

MERGE = ("merge", "../base", "../adapter", "-o", "s3://bucket/out")


@dataclass(frozen=True)
class Case:
    """A command in a folder beside the inputs, after one of a single process; {out} is a path here, or a link."""

    arguments: str
    before: str = ""
    out: str = "out"


CASES = {
    "merge": Case("merge ../base ../adapter -o {out} --digest"),
    "merge into shards": Case("merge ../base ../adapter -o {out} --max-shard-size 300kB"),
    "merge into one file": Case("merge ../base ../adapter -o {out} --no-undo", out="out.safetensors"),
    "merge one file": Case("merge ../one/model.safetensors ../adapter -o {out}", out="out.safetensors"),
    "merge like codes": Case("merge ../base ../adapter -o {out} --like ../fp8 --no-undo --max-shard-size 250kB"),
    "merge into codes": Case("merge ../fp8 ../adapter -o {out} --quantized requantize"),
    "unmerge": Case("unmerge merged ../adapter -o {out}", "merge ../base ../adapter -o merged"),
    "unmerge roughly": Case(
        "unmerge merged ../adapter -o {out} --approximate", "merge ../base ../adapter -o merged --no-undo"
    ),
    "convert": Case("convert ../base -o {out} --dtype fp32"),
    "convert to torch": Case("convert ../base -o {out} --to torch"),
    "convert an adapter": Case("convert ../adapter -o {out} --to peft --plain"),
    "extract": Case(
        "extract ../base merged --params 20000 -o {out} --allow unrelated", "merge ../base ../adapter -o merged"
    ),
    "patch": Case("patch ../base merged -o {out}", "merge ../base ../adapter -o merged", "out.patch"),
}

# Commands whose shards two ranks share. Not "merge like codes", whose new scales are all in the last shard, nor
# "convert to torch", which sends nothing, and so waits for nothing, before one rank may have drawn all
SHARED = ("merge", "merge into shards", "merge into codes", "unmerge", "unmerge roughly", "convert")


def hold(s3: Any, inputs: Path, key: str, count: int) -> list[int]:
    """Hold what ranks send against the files of one process, and return how many parts each rank has sent."""
    case, folder = CASES[key], inputs / f"{key}, {count}"
    folder.mkdir()
    for call in filter(None, (case.before, case.arguments.format(out=case.out))):
        code, _, err = alone(folder, "-m", "loratool", *call.split())
        assert code == 0, err
    code, _, err = run(folder, *case.arguments.format(out=f"s3://bucket/{case.out}").split(), count=count)
    assert code == 0, err
    found = stored(s3)
    if (folder / case.out).is_dir():
        marker = json.loads(found.pop(f"out/{MARKER}"))
        digest = digest_of_path(folder / case.out) if "--digest" in case.arguments else None
        sizes = {name.removeprefix("out/"): len(data) for name, data in found.items()}
        assert marker == {"digest": digest or marker["digest"], "objects": sizes}
    assert found == {name: data for name, data in contents(folder).items() if name.startswith("out")}
    assert not unfinished(s3) and not left(folder)
    return [int((folder / f"sent-{rank}").read_text()) for rank in range(count)]


@pytest.mark.parametrize("store", ["s3", "memory"])
def test_ranks_send_what_one_process_writes(
    store: str, request: pytest.FixtureRequest, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As threads here, to stores that take parts in any order, and only from the front to the back."""
    system = request.getfixturevalue("s3") if store == "s3" else pytest.importorskip("fsspec").filesystem("memory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(outgoing, "PART", PART)
    monkeypatch.setattr(uploads, "PART", PART)
    link = f"{store}://bucket/threads"
    report, done = on_ranks(
        2, lambda job: loratool.merge(inputs / "base", inputs / "adapter", link, digest=True, workers=1)
    )
    loratool.merge(inputs / "base", inputs / "adapter", tmp_path / "near", digest=True)
    found = {name.partition("/threads/")[2]: system.cat(name) for name in system.find("bucket")}
    marker = json.loads(found.pop(MARKER))
    assert isinstance(done, RankDone) and found == contents(tmp_path / "near")
    assert marker["digest"] == report.digests[link] == digest_of_path(tmp_path / "near")
    assert marker["objects"] == {name: len(data) for name, data in found.items()}
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    system.rm("bucket", recursive=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "count"), [*((key, count) for key in CASES for count in (2, 3)), ("merge", 6), ("merge into one file", 6)]
)
def test_each_command_of_ranks(s3: Any, inputs: Path, key: str, count: int) -> None:
    sent = hold(s3, inputs, key, count)
    assert all(sent) or count > 2 or key not in SHARED


def fault(s3: Any, inputs: Path, kind: str, rank: int, *more: str, **options: Any) -> tuple[Path, int, str]:
    folder = Path(tempfile.mkdtemp(dir=inputs))
    code, out, err = run(folder, *MERGE, *more, count=3, env={"FAULT": kind, "FAULT_OF": str(rank)}, **options)
    assert code == 0 or (out == "" and not [name for name in stored(s3) if name.startswith("out/")])
    return folder, code, err


def merged(inputs: Path) -> dict[str, bytes]:
    place = inputs / "by one"
    if not place.exists():
        loratool.merge(inputs / "base", inputs / "adapter", place)
    return {f"out/{name}": data for name, data in contents(place).items()}


def without_marker(s3: Any) -> dict[str, bytes]:
    found = stored(s3)
    del found[f"out/{MARKER}"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["killed", "away"])
def test_a_rank_that_dies_leaves_what_was_sent_to_a_run_that_resumes(
    s3: Any, inputs: Path, kind: str, rank: int
) -> None:
    folder, code, err = fault(s3, inputs, kind, rank)
    assert code != 0 and unfinished(s3)
    assert ("error: s3://bucket/out: the store away" in err) == (kind == "away"), err
    code, _, err = run(folder, *MERGE, "--resume", count=2)
    assert code == 0, err
    assert without_marker(s3) == merged(inputs) and not unfinished(s3)
    sizes = [len(data) for name, data in merged(inputs).items() if name.endswith((".safetensors", ".undo"))]
    assert sum(int((folder / f"sent-{rank}").read_text()) for rank in range(2)) < sum(
        -(-size // PART) for size in sizes
    )


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_that_begins_anew_removes_what_one_that_died_has_sent(s3: Any, inputs: Path, rank: int) -> None:
    folder, code, _ = fault(s3, inputs, "killed", rank, "--no-undo")
    assert code != 0 and unfinished(s3)
    code, _, err = run(folder, *MERGE, count=2)
    assert code == 0, err
    assert without_marker(s3) == merged(inputs) and not unfinished(s3)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_restarts_and_the_run_goes_on(s3: Any, inputs: Path, rank: int) -> None:
    _, code, err = fault(s3, inputs, "killed", rank, options=("--max-restarts", "1"))
    assert code == 0, err
    assert without_marker(s3) == merged(inputs) and not unfinished(s3)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_rank_refuses_leaves_nothing(s3: Any, inputs: Path, rank: int) -> None:
    folder, code, err = fault(s3, inputs, "refused", rank)
    assert code != 0 and not unfinished(s3) and not left(folder)
    assert len([line for line in err.splitlines() if "error: s3://bucket/out: the store refused" in line]) == 1
    assert "--resume" not in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("apply ../base change.patch -o s3://bucket/out", "s3://bucket/out: apply to a store is for one process"),
        ("merge ../base ../adapter -o hf://me/out", "me/out: an output on the hub is for one process"),
    ],
)
def test_what_ranks_do_not_send(inputs: Path, arguments: str, message: str) -> None:
    folder = inputs / arguments.split()[0]
    folder.mkdir()
    code, out, err = run(folder, *arguments.split())
    assert (code, out) == (1, "") and f"error: {message}" in err
