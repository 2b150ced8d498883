"""Merge, undo and unmerge without what this machine has, be it a call, a file or a setting: the bytes are the same."""

from __future__ import annotations

import ast
import errno
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES, ROOT, factors, weights, write_model, write_peft
from lib.models.sharded_model import write_adapter_of_two, write_sharded_model

import loratool
from loratool.durable import disk, interrupts
from loratool.errors import InputError, MachineError
from loratool.files.checkpoint import open_checkpoint
from loratool.streaming import workers

LLAMA = FIXTURES / "llama"


def state(folder: Path) -> dict[str, str]:
    """Return the hash of each file in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def roundtrip(base: Path, adapter: Path, folder: Path) -> dict[str, str]:
    """Merge to a folder and a file, unmerge both, replace the file; return the hash of all that was written."""
    folder.mkdir()
    for out in (folder / "merged", folder / "x.safetensors"):
        loratool.merge(base, adapter, out, workers=2)
        loratool.unmerge(out, adapter, out.with_name(f"back-{out.stem}"), workers=2)
    loratool.merge(base, (adapter, 0.5), folder / "x.safetensors", force=True, workers=2)
    return state(folder)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage")
    write_sharded_model(folder / "base")
    write_adapter_of_two(folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def expected(stage: Path) -> dict[str, str]:
    found = roundtrip(stage / "base", stage / "adapter", stage / "expected")
    base = state(stage / "base")
    assert {name: found[f"back-merged/{name}"] for name in base} == base
    return found


def without(*names: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Take attributes of os away."""

    def take(patched: pytest.MonkeyPatch) -> None:
        for name in names:
            assert hasattr(os, name)
            patched.delattr(os, name)

    return take


def failing(name: str, number: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Let a function of os fail, as on a file system that cannot do it."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    def take(patched: pytest.MonkeyPatch) -> None:
        patched.setattr(os, name, refuse)

    return take


def no_module(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patched: patched.setitem(sys.modules, name, None)  # type: ignore[arg-type]


def no_signal(patched: pytest.MonkeyPatch) -> None:
    for name in ("SIGHUP", "setitimer"):
        patched.delattr(signal, name)
    patched.setattr(interrupts, "SIGNALS", [signal.SIGINT, signal.SIGTERM])


def no_folder_syncs(number: int) -> Callable[[pytest.MonkeyPatch], None]:
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    return lambda patched: patched.setattr(os, "fsync", refuse)


def locks_that_fail(patched: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    patched.setattr(fcntl, "flock", refuse)


def no_temporary_files(patched: pytest.MonkeyPatch) -> None:
    without("O_TMPFILE")(patched)
    patched.setattr(tempfile, "_O_TMPFILE_WORKS", False, raising=False)


def no_temporary_folder(patched: pytest.MonkeyPatch) -> None:
    """A folder of temporary files that is not there: all of ours are beside the output."""
    patched.setattr(tempfile, "tempdir", "/nowhere")


def no_home(patched: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "TMPDIR"):
        patched.delenv(name, raising=False)
    no_module("pwd")(patched)


def no_processes_seen(patched: pytest.MonkeyPatch) -> None:
    """Without /proc: what is opened there is not found."""
    real = open

    def refuse(file: Any, *arguments: Any, **options: Any) -> Any:
        if str(file).startswith("/proc/"):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(file))
        return real(file, *arguments, **options)

    patched.setattr("builtins.open", refuse)


def windows(patched: pytest.MonkeyPatch) -> None:
    """The calls that Windows lacks, all at once."""
    without("preadv", "pread", "pwrite", "copy_file_range", "sched_getaffinity", "posix_fadvise", "fdatasync")(patched)
    patched.setattr(disk, "POSIX", False)
    patched.setattr(workers, "CAN_FORK", False)
    no_module("fcntl")(patched)
    no_signal(patched)
    patched.delattr(signal, "pthread_sigmask")


def macos(patched: pytest.MonkeyPatch) -> None:
    without("copy_file_range", "sched_getaffinity", "posix_fadvise", "fdatasync")(patched)
    no_temporary_files(patched)
    patched.setattr(workers, "CAN_FORK", False)


MISSING: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "copy_file_range": without("copy_file_range"),
    "copy_file_range across disks": failing("copy_file_range", errno.EXDEV),
    "copy_file_range in the kernel": failing("copy_file_range", errno.ENOSYS),
    "copy_file_range of this file system": failing("copy_file_range", errno.EOPNOTSUPP),
    "copy_file_range that copies nothing": lambda patched: patched.setattr(os, "copy_file_range", lambda *_: 0),
    "preadv": without("preadv"),
    "pwrite": without("pwrite"),
    "offsets": without("preadv", "pread", "pwrite", "pwritev"),
    "fork": lambda patched: patched.setattr(workers, "CAN_FORK", False),
    "folders that sync": no_folder_syncs(errno.EINVAL),
    "folders that can be listed": no_folder_syncs(errno.EACCES),
    "sendfile": without("sendfile"),
    "O_TMPFILE": no_temporary_files,
    "posix_fadvise": without("posix_fadvise"),
    "advice that is taken": failing("posix_fadvise", errno.EINVAL),
    "fdatasync": without("fdatasync"),
    "sched_getaffinity": without("sched_getaffinity"),
    "fcntl": no_module("fcntl"),
    "locks of this file system": locks_that_fail,
    "os.link": without("link"),
    "hard links of this file system": failing("link", errno.EPERM),
    "SIGHUP": no_signal,
    "a temporary folder": no_temporary_folder,
    "a home": no_home,
    "/proc": no_processes_seen,
    "what Windows lacks": windows,
    "what macOS lacks": macos,
}


SAMPLE = ("what Windows lacks", "what macOS lacks", "folders that sync", "os.link")


@pytest.mark.parametrize(
    "missing", [pytest.param(each, marks=() if each in SAMPLE else pytest.mark.slow) for each in MISSING]
)
def test_the_bytes_are_the_same_without(
    missing: str, stage: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "WORTH_A_FORK", 0)
    MISSING[missing](monkeypatch)
    found = roundtrip(stage / "base", stage / "adapter", tmp_path / "out")
    monkeypatch.undo()
    assert found == expected


def test_an_error_of_the_disk_is_no_missing_call(stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that cannot be synced because its disk fails is an error."""
    no_folder_syncs(errno.EIO)(monkeypatch)
    with pytest.raises(OSError, match="Input/output error"):
        loratool.merge(stage / "base", stage / "adapter", tmp_path / "out")


def test_no_assert_does_work() -> None:
    """With `python -O` none of them runs."""
    pure = {"isinstance", "issubclass", "isclass", "len", "tuple", "all", "set"}
    texts = {path: path.read_text() for path in (ROOT / "loratool").rglob("*.py")}
    for path, text in texts.items():
        for node in ast.walk(ast.parse(text)) if re.search(r"^ *assert ", text, re.MULTILINE) else ():
            if not isinstance(node, ast.Assert):
                continue
            for part in ast.walk(node):
                assert not isinstance(part, ast.NamedExpr | ast.Await | ast.Yield), f"{path}:{node.lineno}"
                if isinstance(part, ast.Call):
                    called = part.func.attr if isinstance(part.func, ast.Attribute) else getattr(part.func, "id", "")
                    assert called in pure, f"{path}:{node.lineno} calls {called}"


class TestNamesOfOtherSystems:
    """Names that stand in files, and that Windows or macOS would take for others."""

    @pytest.mark.parametrize(
        "name",
        ["..\\model.safetensors", "sub\\model.safetensors", "C:model.safetensors", "C:\\model.safetensors"]
        + [
            "\\\\host\\share\\model.safetensors",
            "model.safetensors:stream",
            "/model.safetensors",
            "../model.safetensors",
        ],
    )
    def test_an_index_names_only_files_beside_it(self, name: str, tmp_path: Path) -> None:
        base = write_model(tmp_path / "base", {"a.weight": weights(6, 4), "b.weight": weights(6, 4)}, {}, shards=2)
        index = base / "model.safetensors.index.json"
        index.write_text(index.read_text().replace("model-00001-of-00002.safetensors", name.replace("\\", "\\\\")))
        shutil.copy(base / "model-00001-of-00002.safetensors", base / name.replace("/", "_"))
        with pytest.raises(InputError, match="which is not a file beside it"):
            open_checkpoint(base)

    @pytest.mark.parametrize("twins", [("NOTES.txt", "notes.txt"), ("gr\u00f6\u00dfe.txt", "gro\u0308\u00dfe.txt")])
    def test_two_names_that_are_one_elsewhere(
        self, twins: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Here they are two files, which both travel; where the second would replace the first, it is refused."""
        base = write_model(tmp_path / "base", {"a.weight": weights(6, 4)}, {"model_type": "llama"})
        adapter = write_peft(tmp_path / "adapter", {"a": factors(6, 4, 2)})
        for twin in twins:
            (base / twin).write_text(twin)
        loratool.merge(base, adapter, tmp_path / "out")
        assert [(tmp_path / "out" / twin).read_text() for twin in twins] == [*twins]

        def folded(name: str) -> str:
            return unicodedata.normalize("NFC", name).casefold()

        def lexists(path: Any) -> bool:
            with suppress(OSError):
                return folded(os.path.basename(path)) in map(folded, os.listdir(os.path.dirname(path) or "."))
            return False

        monkeypatch.setattr(os.path, "lexists", lexists)
        with pytest.raises(MachineError, match="does not tell the two names apart"):
            loratool.merge(base, adapter, tmp_path / "new")
        assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "out"]

    def test_an_input_under_a_name_in_other_letters(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its inode tells; here a hard link stands for the second name."""
        base = write_model(tmp_path / "base", {"a.weight": weights(6, 4)}, {})
        adapter = write_peft(tmp_path / "adapter", {"a": factors(6, 4, 2)})
        os.link(base / "model.safetensors", base / "MODEL.safetensors")
        with pytest.raises(loratool.UsageError, match="would overwrite an input"):
            loratool.merge(base / "model.safetensors", adapter, base / "MODEL.safetensors", force=True)


# What surrounds a process of its own -> the shell's words before the command
AROUND = {
    "python -O": "PYTHONOPTIMIZE=1",
    "python -OO": "PYTHONOPTIMIZE=2",
    "the C locale": "LC_ALL=C LANG=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0",
    "no environment": "env -i",
    "no temporary folder": "TMPDIR=/nowhere",
    "64 files": "ulimit -n 64;",
    "16 GB of addresses": "ulimit -v 16000000;",
    "no core": "ulimit -c 0; nice",
}

# Streams that are closed when the process starts -> the shell's words behind the command
CLOSED = {"stdin": "<&-", "stdout": ">&-", "stderr": "2>&-", "all": "<&- >&- 2>&-"}


def call(folder: Path, before: str, after: str, **options: Any) -> None:
    """Merge and unmerge the demo's files in processes of their own, in a folder whose names are no ASCII."""
    loratool.demo(demo := folder / "demo")
    base, adapter = folder / "gr\u00f6\u00dfe", folder / "\u5927"
    shutil.copytree(demo / "base", base)
    shutil.copytree(demo / "adapter", adapter)
    python = shlex.quote(sys.executable)
    merged, restored = folder / "\u00fc", folder / "z"
    for command in (["merge", base, adapter, "-o", merged], ["unmerge", merged, adapter, "-o", restored]):
        line = f"{before} {python} -P -m loratool {shlex.join(map(str, command))} -q {after}"
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        line = line.replace("env -i", f"env -i PYTHONPATH={shlex.quote(str(ROOT))}")
        done = subprocess.run(["bash", "-c", line], capture_output=True, env=environment, **options)
        assert done.returncode == 0, done.stderr
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    job = (ROOT / "loratool/guides/github-actions.md").read_text()
    pinned = re.findall(r"([0-9a-f]{64})  merged/(\S+)$", job, re.MULTILINE)
    assert [(state(merged)[name], name) for name in names] == pinned
    assert state(restored) == state(demo / "base")


@pytest.mark.slow
@pytest.mark.parametrize("around", AROUND)
def test_processes_in_other_surroundings(around: str, tmp_path: Path) -> None:
    call(tmp_path, AROUND[around], "")


@pytest.mark.slow
@pytest.mark.parametrize("streams", CLOSED)
def test_processes_without_streams(streams: str, tmp_path: Path) -> None:
    call(tmp_path, "", CLOSED[streams])


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A folder that any user can enter; pytest's own are root's."""
    folder = Path(tempfile.mkdtemp(prefix="loratool-test-"))
    folder.chmod(0o755)
    yield folder
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


def test_inputs_that_cannot_be_written(open_to_all: Path) -> None:
    """Nothing is opened for writing, locked or made beside an input, so whoever may only read it can merge."""
    for name in ("base", "adapter"):
        shutil.copytree(LLAMA / name, open_to_all / name)
        for path in (open_to_all / name).iterdir():
            path.chmod(0o444)
        (open_to_all / name).chmod(0o555)
    (open_to_all / "own").mkdir()
    merged, restored = open_to_all / "own" / "m", open_to_all / "own" / "z"

    def run(adapter: Path) -> None:
        loratool.merge(open_to_all / "base", adapter, merged, force=True, workers=1)
        loratool.unmerge(merged, adapter, restored, force=True, workers=1)

    run(open_to_all / "adapter")  # what it imports is root's, in a folder of root's
    shutil.rmtree(restored)
    if os.getuid() == 0:
        for path in (open_to_all / "own", merged, *merged.iterdir()):
            os.chown(path, 65534, 65534)
    child = os.fork()
    if child == 0:
        code = 1
        with suppress(BaseException):
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            run(open_to_all / "adapter")
            code = 0
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert state(restored) == state(LLAMA / "base")
