"""Hold the writing of files on every system: the same bytes, and outputs that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, factors, slow, weights, write_model, write_peft
from lib.models.sharded_model import digest, write_adapter_of_two, write_sharded_model

import loratool
from loratool.durable import disk, fileio
from loratool.durable.fileio import open_for_reading, size, write_back_early
from loratool.errors import InputError, MachineError, UsageError

BASE, ADAPTER = FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter"
COMMAND = [sys.executable, "-c", "from loratool.cli import main; main()"]
# The same with a pause before each block, so that no machine is done before a signal comes.
SLOW = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored in the background
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and this one under nohup
import time
from loratool.cli import main
from loratool.streaming import workers
write = workers.write_at
workers.write_at = lambda *block: (time.sleep(2), write(*block))
main()
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_sharded_model(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter_of_two(tmp_path / "adapter")


def test_what_lies_where_the_partial_goes_and_is_not_ours(tmp_path: Path, model: Path, adapter: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("mine")
    (tmp_path / "out.loratool-partial").symlink_to("mine")
    (tmp_path / "x.safetensors.loratool-partial").symlink_to("mine/x")
    for out in ("out", "x.safetensors"):
        with pytest.raises(UsageError, match="is in the way"):
            loratool.merge(model, adapter, tmp_path / out)
    assert (tmp_path / "mine" / "x").read_text() == "mine"
    for other in ("z.partial", "z.former"):
        (tmp_path / other).mkdir()
    loratool.merge(model, adapter, tmp_path / "z")
    assert (tmp_path / "z.partial").is_dir() and (tmp_path / "z.former").is_dir()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), InputError("No space left")])
def test_a_failure_in_the_background_is_told_at_the_end(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells it once only, so that a later sync would be silent; a file that is reopened may be gone."""
    failed = threading.Event()

    def fail(_: Any) -> None:
        failed.set()
        raise error

    monkeypatch.setattr(fileio, "WRITE_BACK", 0.001)
    monkeypatch.setattr(disk, "sync_early", fail)
    with open(tmp_path / "x", "w+b", buffering=0) as file:
        with pytest.raises(type(error), match="No space left"), write_back_early([file]):
            assert failed.wait(10)
        with pytest.raises(RuntimeError, match="first"), write_back_early([file]):
            raise RuntimeError("first")


def test_a_write_of_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a device that takes no more: it would be asked for ever."""
    monkeypatch.setattr(disk, "write_some", lambda *_: 0)
    with open(tmp_path / "x", "w+b", buffering=0) as file, pytest.raises(OSError, match="wrote nothing"):
        fileio.write_at(file, memoryview(b"x"), 0)


def test_a_scratch_file_that_cannot_be_made_names_its_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as refused:
        fileio.open_scratch(tmp_path / "absent")
    assert refused.value.filename == str(tmp_path / "absent")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is a pipe or a device"):
        open_for_reading(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"), (999, "999 B"), (999.5, "1.00 kB"), (1000, "1.00 kB"), (32_768, "32.8 kB"), (999_499, "999 kB"),
        (999_500, "1.00 MB"), (2_920_000, "2.92 MB"), (10**12, "1.00 TB"), (5.4321e14, "543 TB"), (10**15, "1,000 TB"),
        (1 << 63, "9,223,372 TB"),
    ],
)  # fmt: skip
def test_sizes_have_three_digits(nbytes: float, text: str) -> None:
    assert size(nbytes) == text


class TestFallbacks:
    """What `test_fallbacks` takes away as a whole."""

    def test_copy_range_across_a_refusal_of_the_kernel(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any) -> int:
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
        monkeypatch.setattr(fileio, "COPY_CHUNK", 7)
        data = os.urandom(100)
        (tmp_path / "a").write_bytes(data)
        with open(tmp_path / "a", "rb", buffering=0) as a, open(tmp_path / "b", "w+b", buffering=0) as b:
            fileio.copy_range(a, 10, b, 3, 80)
            assert (tmp_path / "b").read_bytes() == bytes(3) + data[10:90]
            with pytest.raises(loratool.InputError, match="ends at byte 100"):
                fileio.copy_range(a, 90, b, 3, 80)


class TestFailure:
    def test_no_space_is_refused_before_the_first_byte(
        self, tmp_path: Path, model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 10))  # type: ignore[attr-defined]
        with pytest.raises(MachineError, match="kB are needed and 10 B are free"):
            loratool.merge(model, adapter, tmp_path / "out")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
        report = loratool.merge(model, adapter, tmp_path / "out", dry_run=True)  # which may be for another machine
        assert report.free_bytes == 10
        assert report.warnings[-1].endswith("kB are needed and 10 B are free")

    @pytest.mark.parametrize("kind", ["folder", "file"])
    @pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
    def test_whatever_is_raised_the_former_output_stays(
        self,
        tmp_path: Path,
        model: Path,
        adapter: Path,
        monkeypatch: pytest.MonkeyPatch,
        error: BaseException,
        kind: str,
    ) -> None:
        """At the first write, in the middle, and at the last one; the errors of a disk are in `tests/faults`.

        What a user stops leaves nothing else; what another run can go on with stays, until the next one replaces it.
        """
        out = tmp_path / ("out" if kind == "folder" else "out.safetensors")
        loratool.merge(model, adapter, out)
        before = {p: digest(p) for p in (out.iterdir() if kind == "folder" else [out, tmp_path / "out.undo"])}
        stays = {f"{out.name}.loratool-{part}" for part in ("journal", "partial") if isinstance(error, MemoryError)}
        for failing in (1, 3, 6) if kind == "folder" else (1, 2, 3):
            calls = iter(range(1, 1000))
            real = fileio.write_at

            def write_at(*arguments: Any, calls: Any = calls, failing: int = failing, real: Any = real) -> None:
                if next(calls) == failing:
                    raise error
                real(*arguments)

            with monkeypatch.context() as patched:
                patched.setattr("loratool.files.output.output.write_at", write_at)
                patched.setattr("loratool.streaming.workers.write_at", write_at)
                with pytest.raises(type(error)):
                    loratool.merge(model, (adapter, 2.0), out, force=True)
            names = {p.name for p in tmp_path.iterdir()} - {"adapter", "base", out.name, "out.undo"}
            assert names == stays if failing == (6 if kind == "folder" else 3) else names in (set(), stays)
            assert {p: digest(p) for p in before} == before

    @pytest.mark.skipif(os.name == "nt", reason="needs ulimit")
    @pytest.mark.parametrize("out", ["out", slow("out.safetensors")])
    def test_a_write_that_the_system_refuses(self, tmp_path: Path, out: str) -> None:
        """A real refusal before the weights, with which no run could go on: no file may grow past 100 kB."""
        (tmp_path / "work").mkdir()
        shell = f"ulimit -f 100; {' '.join(repr(c) for c in COMMAND)} merge {BASE} {ADAPTER} -o {out}"
        result = subprocess.run(["bash", "-c", shell], cwd=tmp_path / "work", capture_output=True, text=True)
        assert result.returncode == 5 and result.stderr == f"error: {out}: File too large\n"
        assert list((tmp_path / "work").iterdir()) == []

    @pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
    @pytest.mark.parametrize(
        ("sent", "code"),
        [(signal.SIGINT, 130), slow(signal.SIGTERM, 143), slow(signal.SIGHUP, 129), (signal.SIGKILL, -9)],
    )
    def test_a_signal_in_the_middle(self, tmp_path: Path, adapter: Path, sent: signal.Signals, code: int) -> None:
        """Ctrl-C leaves nothing; other signals and a kill what --resume goes on with, or the next run replaces."""
        base = write_model(
            tmp_path / "base",
            {f"{n}.weight": weights(512, 512, dtype=torch.bfloat16) for n in "abcdef"},
            {"model_type": "llama"},
        )
        big = write_peft(tmp_path / "big", {n: factors(512, 512, 8) for n in "abcdef"})
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW, "merge", str(base), str(big), "-o", str(tmp_path / "out"), "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        partial, deadline = tmp_path / "out.loratool-partial", time.monotonic() + 20
        while not (partial / "model.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.3)  # some blocks are written by then
        process.send_signal(sent)
        said, errors = process.communicate(timeout=60)
        assert process.returncode == code and errors == b""
        assert sent == signal.SIGKILL or json.loads(said)["exit_code"] == code
        assert not (tmp_path / "out").exists()
        journal = tmp_path / "out.loratool-journal"
        assert partial.exists() is journal.exists() is (sent != signal.SIGINT)
        if sent in (signal.SIGTERM, signal.SIGHUP):
            stay = f"{partial} and {journal.name} stay: the same command with --resume goes on"
            assert json.loads(said)["error"]["message"] == f"interrupted; {stay}"
        loratool.merge(base, big, tmp_path / "out")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "big", "out"]

    def test_a_truncated_shard_is_refused(self, tmp_path: Path, model: Path, adapter: Path) -> None:
        shard = model / "model-00003-of-00004.safetensors"
        shard.write_bytes(shard.read_bytes()[:-3])
        with pytest.raises(loratool.InputError, match="model-00003-of-00004.safetensors: is cut off"):
            loratool.merge(model, adapter, tmp_path / "out")
        assert not (tmp_path / "out").exists()
