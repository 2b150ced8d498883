"""Attack the journal of a run that died: what goes on with it makes the bytes of an undisturbed run, or is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import zlib
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from random import Random
from typing import Any, BinaryIO

import pytest
import torch
from conftest import factors, few, run_command, weights, write_model, write_peft
from safetensors.torch import load_file, save_file

import loratool
from loratool.durable import disk
from loratool.durable import journal as journals
from loratool.durable.journal import HEAD, Journal
from loratool.durable.partial import journal_path, partial_file, partial_folder, partial_path
from loratool.errors import InputError, MachineError, NeedsFlag, UsageError
from loratool.files.checkpoint import open_weights
from loratool.files.weights_file import described_inputs
from loratool.streaming import workers
from loratool.streaming.ranks import Job

NAMES = [f"model.layers.{n}.mlp.up_proj" for n in range(6)]
OUTS = ["out", "out.safetensors"]

Files = dict[str, bytes]


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the inputs of a merge with many items, and be where they are."""
    monkeypatch.chdir(tmp_path)
    for place, value in {"ROWS_ITEM": 200, "MIN_ROWS": 1, "BATCH": 1, "COPY_ITEM": 500}.items():
        monkeypatch.setattr(f"loratool.streaming.rewrite.{place}", value)
    monkeypatch.setattr("loratool.undo.checks.RECORD", 200)
    state = {f"{name}.weight": weights(24, 20, seed=seed).bfloat16() for seed, name in enumerate(NAMES)}
    state["model.norm.weight"] = weights(900).bfloat16()
    write_model(Path("base"), state, {"model_type": "llama"}, shards=2)
    shutil.copy(write_model(Path("one"), state) / "model.safetensors", "base.safetensors")
    for seed, name in enumerate(("adapter", "other")):
        write_peft(Path(name), {each: factors(24, 20, 3, seed) for each in NAMES})
    return tmp_path


def merge(out: str, weight: float = 1.0, base: str = "base", adapter: str = "adapter", **options: Any) -> None:
    ending = Path(out).suffix
    loratool.merge(f"{base}{ending}", (adapter, weight), out, workers=1, **options)


MADE: dict[tuple[str, float], Files] = {}


def made(out: str, weight: float = 1.0) -> Files:
    """Return what an undisturbed run makes of the same inputs in any folder, and leave nothing."""
    if (out, weight) not in MADE:
        merge(out, weight)
        MADE[out, weight] = taken()
        clear()
    return MADE[out, weight]


def clear() -> None:
    for path in Path.cwd().glob("out*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def taken() -> Files:
    """Return all that is made or left."""
    found = [path for place in Path.cwd().glob("out*") for path in (place, *place.rglob("*"))]
    return {str(path.relative_to(Path.cwd())): path.read_bytes() for path in found if path.is_file()}


def die(out: str, after: int = 9, **options: Any) -> None:
    """Let a merge die, as of a full disk, after some items."""
    left = iter(range(after))

    def progress(done: int, total: int) -> None:
        if next(left, None) is None:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        merge(out, progress=progress, **options)
    assert journal(out).is_dir() and Path(f"{out}.loratool-partial").exists()


def journal(out: str) -> Path:
    return Path(f"{out}.loratool-journal")


def resume(out: str, *words: str, base: str = "base", adapter: str = "adapter") -> tuple[int, str]:
    """Run the command that goes on, and return its exit code and what it said."""
    ran = run_command("merge", f"{base}{Path(out).suffix}", adapter, "-o", out, "--resume", *words)
    return ran.exit_code, ran.stderr


@pytest.fixture
def reused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of each item that is taken from a journal."""
    found: list[int] = []
    results = Journal.results

    def counted(journal: Journal, item: int) -> Any:
        found.append(item)
        return results(journal, item)

    monkeypatch.setattr(Journal, "results", counted)
    return found


@pytest.mark.parametrize("out", OUTS)
def test_what_is_finished_is_not_done_again(stage: Path, out: str, reused: list[int]) -> None:
    """By whichever of command line and library it died."""
    files = made(out)
    for after in (1, 9, 12):
        die(out, after)
        assert resume(out) == (0, "")
        assert len(reused) == after + 1 and taken() == files
        reused.clear()
        clear()


@pytest.mark.parametrize("out", OUTS)
def test_without_resume_the_next_run_begins_anew(stage: Path, out: str, reused: list[int]) -> None:
    files, other = made(out), made(out, weight=0.5)
    die(out)
    merge(out, 0.5)
    assert taken() == other and not reused
    clear()
    assert resume(out) == (0, "") and taken() == files and not reused  # there is nothing to go on with


def test_a_torn_end_that_its_rank_cuts_off_while_another_reads(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is then shorter than it was when it was opened; what is whole before that counts."""
    die("out")
    records = journal("out") / "0"
    whole = records.read_bytes()
    records.write_bytes(whole + whole[: HEAD.size + 30])
    read = journals.read_into

    def cut_meanwhile(file: BinaryIO, buffer: memoryview, offset: int) -> None:
        if offset >= len(whole):
            os.truncate(records, len(whole))
        read(file, buffer, offset)

    monkeypatch.setattr(journals, "read_into", cut_meanwhile)
    with closing(Journal(Path("out"), {}, rank=1)) as opened:
        opened.open()
        assert len(opened.finished) == 10 and records.read_bytes() == whole


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("command", ["merge", "unmerge"])
def test_undo_files_that_have_their_names_before_the_weights(stage: Path, command: str) -> None:
    """A kill between the two renames leaves an undo file without weights, which is no obstacle to the run itself."""
    merge("first.safetensors")
    merge("second.safetensors", base="first", adapter="other")

    def run(**options: Any) -> None:
        if command == "merge":
            merge("out.safetensors", base="first", adapter="other", **options)
        else:
            loratool.unmerge("second.safetensors", "other", "out.safetensors", workers=1, **options)

    run()
    whole = taken()
    clear()
    child = os.fork()
    if not child:
        rename = disk.rename

        def killed(path: Path, new: Path) -> None:
            if new.name == "out.safetensors":
                os.kill(os.getpid(), signal.SIGKILL)
            rename(path, new)

        disk.rename = killed
        run()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert Path("out.undo").exists() and not Path("out.safetensors").exists()
    with pytest.raises(NeedsFlag, match="exists already"):
        run()
    run(resume=True)
    assert taken() == whole


@pytest.mark.parametrize("out", OUTS)
def test_an_adapter_takes_the_place_of_what_is_left(stage: Path, out: str) -> None:
    die(out)
    loratool.resize("adapter", out, rank=1)
    assert not any("loratool-" in name for name in taken())


def test_a_death_says_what_stays(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "copy_range", full)
    ran = run_command("merge", "base", "adapter", "-o", "out")
    assert (ran.exit_code, ran.stderr.splitlines()) == (
        5,
        [
            "error: out: No space left on device",
            "hint: out.loratool-partial and out.loratool-journal stay: the same command with --resume goes on",
        ],
    )
    Path("recipe.json").write_text(
        json.dumps({"command": "merge", "base": "base", "adapters": ["adapter"], "out": "out"})
    )
    ran = run_command("run", "recipe.json")
    assert ran.exit_code == 5 and "stay: the next run replaces them" in ran.stderr and "--resume" not in ran.stderr
    words = ["--method", "pissa", "--rank", "1", "--target", "up_proj", "--residual", "res", "-o", "start"]
    ran = run_command("init", "base", *words)
    assert ran.exit_code == 5 and "stay" not in ran.stderr and not list(Path.cwd().glob("res*"))


@pytest.mark.parametrize(
    ("error", "stays"),
    [
        (OSError(5, "Input/output error"), True), (MemoryError(), True), (MachineError("a worker was killed"), True),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), True), (RuntimeError("CUDA error: device lost"), True),
        (KeyboardInterrupt(), False), (GeneratorExit(), False), (InputError("bad"), False), (NeedsFlag("bad"), False),
    ],
    ids=repr,
)  # fmt: skip
def test_what_stays_after_which_error(stage: Path, error: BaseException, stays: bool) -> None:
    def progress(done: int, total: int) -> None:
        raise error

    with pytest.raises(type(error)):
        merge("out", progress=progress)
    assert journal("out").exists() is Path("out.loratool-partial").exists() is stays


def full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


class TestDamage:
    """Whatever the machine does to the files of a journal, no wrong byte follows."""

    @pytest.mark.parametrize("out", OUTS)
    def test_torn_tails(self, stage: Path, out: str, reused: list[int]) -> None:
        files = made(out)
        dice = Random(28)
        for _ in range(4):
            die(out)
            data = (journal(out) / "0").read_bytes()
            (journal(out) / "0").write_bytes(data[: dice.randrange(len(data))])
            assert resume(out) == (0, "")
            assert taken() == files
            clear()
        assert 0 < len(reused) < 40

    def test_flipped_bits(self, stage: Path) -> None:
        files = made("out")
        dice = Random(28)
        for _ in range(8):
            die("out")
            flip(dice, journal("out") / "0")
            flip(dice, *Path("out.loratool-partial").glob("*.safetensors"))
            assert resume("out") == (0, "")
            assert taken() == files
            clear()

    def test_flipped_bits_of_the_head(self, stage: Path) -> None:
        files = made("out")
        dice, codes = Random(28), set()
        for _ in range(8):
            die("out")
            flip(dice, journal("out") / "head.json")
            left = taken()
            code, said = resume("out")
            assert code in (0, 2) and (taken() == (left if code else files))
            assert not code or (said.startswith("error: out.loratool-journal: is ") and "leave out --resume" in said)
            codes.add(code)
            clear()
        assert 2 in codes

    def test_heads_of_other_kinds(self, stage: Path) -> None:
        die("out")
        left = taken()
        others = [b"", b"[]", b"{", b"\xff", b"null", b"[" * 10**5, b'{"version": 1}', b'{"version": 1, "inputs": 3}']
        for head in others:
            (journal("out") / "head.json").write_bytes(head)
            code, said = resume("out")
            assert code == 2 and "out.loratool-journal" in said and "leave out --resume to begin again" in said, head
            assert {**taken(), "out.loratool-journal/head.json": b""} == {**left, "out.loratool-journal/head.json": b""}
        merge("out")
        files = taken()
        clear()
        assert files == made("out")

    def test_zeros_in_the_middle(self, stage: Path, reused: list[int]) -> None:
        """As a disk may have it after the power failed."""
        files = made("out")
        die("out")
        data = bytearray((journal("out") / "0").read_bytes())
        data[len(data) // 2 : len(data) // 2 + 100] = bytes(100)
        (journal("out") / "0").write_bytes(data)
        assert resume("out") == (0, "") and taken() == files and 0 < len(reused) < 10

    def test_records_of_other_kinds(self, stage: Path, reused: list[int]) -> None:
        """Beyond the end of their file; or with the right check sum, and a text that is no record's."""
        files = made("out")
        die("out")
        lengths = [(1 << 27, 0), (1 << 31, 0), (4, 1 << 62), (0, (1 << 64) - 1)]
        bad = [struct.pack("<4sIQI", b"lora", *each, 0) + b"null" for each in lengths]
        empty = {"item": 0, "place": ["x", 0, 0], "digest": "", "results": []}
        texts = [
            None, 3, [], {}, {"item": 0}, {**empty, "item": "0"}, {**empty, "place": []}, {**empty, "place": 7},
            {**empty, "item": 10**30}, {**empty, "item": -1}, {**empty, "place": ["x", 10**30, -1]},
        ]  # fmt: skip
        bad += [record(b"[" * 10**5), *(record(json.dumps(text).encode()) for text in texts)]
        with open(journal("out") / "0", "ab") as file:
            file.write(bad[0])
        for rank, each in enumerate(bad, 1):
            (journal("out") / str(rank)).write_bytes(each)
        assert resume("out") == (0, "") and taken() == files and len(reused) >= 9

    @pytest.mark.parametrize(
        "results",
        [[], {}, {"list": 5}, {"x": 1, "y": 2}, {"RoundingStats": 5}, {"list": [{"Other": []}]}, {"bytes": "x"}],
    )
    def test_results_of_other_kinds(self, stage: Path, results: object) -> None:
        die("out")
        place = journal("out") / "0"
        place.write_bytes(with_results(place.read_bytes(), results))
        code, said = resume("out")
        assert code == 3 and "out.loratool-journal: is damaged" in said and "leave out --resume" in said
        assert taken() == {}


def flip(dice: Random, *paths: Path) -> None:
    """Flip a bit of one of some files."""
    path = dice.choice(sorted(paths))
    data = bytearray(path.read_bytes())
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(data)


def record(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<4sIQI", b"lora", len(text), len(data), zlib.crc32(text + data)) + text + data


def with_results(data: bytes, results: object) -> bytes:
    """Return a journal's file with other results in every record."""
    made, at = b"", 0
    while at < len(data):
        _, length, nbytes, _ = struct.unpack_from("<4sIQI", data, at)
        found = json.loads(data[at + 20 : at + 20 + length])
        made += record(json.dumps({**found, "results": results}).encode())
        at += 20 + length + nbytes
    return made


class TestPartial:
    """What was done to the partial output while the journal stayed."""

    @pytest.mark.parametrize("out", OUTS)
    def test_it_is_cut_or_gone(self, stage: Path, out: str) -> None:
        files = made(out)
        for change in (cut, Path.unlink, cut_to_nothing):
            die(out)
            place = Path(f"{out}.loratool-partial")
            change(min(place.glob("*.safetensors")) if place.is_dir() else place)
            assert resume(out) == (0, "") and taken() == files
            clear()
        die("out")
        shutil.rmtree("out.loratool-partial")
        assert resume("out")[0] == 0

    def test_it_has_other_files(self, stage: Path) -> None:
        files = made("out")
        die("out")
        place = Path("out.loratool-partial")
        (place / "notes.txt").write_text("mine")
        (place / "folder" / "inside").mkdir(parents=True)
        (place / "loratool.undo").write_bytes(b"x")
        assert resume("out") == (0, "") and taken() == files

    @pytest.mark.skipif(os.name == "nt", reason="needs links")
    def test_a_link_is_not_followed(self, stage: Path) -> None:
        files = made("out")
        die("out")
        Path("mine").write_bytes(b"mine")
        shard = min(Path("out.loratool-partial").glob("*.safetensors"))
        shard.unlink()
        shard.symlink_to(Path("mine").absolute())
        assert resume("out") == (0, "") and taken() == files and Path("mine").read_bytes() == b"mine"

    def test_a_folder_is_in_the_way(self, stage: Path) -> None:
        files = made("out")
        die("out")
        shard = min(Path("out.loratool-partial").glob("*.safetensors"))
        shard.unlink()
        shard.mkdir()
        assert resume("out") == (0, "") and taken() == files
        die("out.safetensors")
        Path("out.safetensors.loratool-partial").unlink()
        Path("out.safetensors.loratool-partial").mkdir()
        code, said = resume("out.safetensors")
        assert code == 2 and "out.safetensors.loratool-partial: is in the way" in said
        assert journal("out.safetensors").is_dir()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_to_nothing(path: Path) -> None:
    path.write_bytes(b"")


class TestOtherRun:
    """A journal of other inputs or options is refused by their names, and stays."""

    @pytest.mark.parametrize(
        ("words", "named"),
        [
            (["--dtype", "fp32", "--no-undo"], "--dtype was not given, and is fp32"),
            (["--no-undo"], "--no-undo was not given, and is given"),
            (["--layers", "0-3"], "--layers was not given, and is 0-3"),
            (["--max-shard-size", "3KB"], "--max-shard-size was not given, and is 3000"),
            (["--no-card"], "the layout has changed"),
        ],
    )
    def test_options(self, stage: Path, words: list[str], named: str) -> None:
        die("out")
        left = taken()
        for more in ([], ["--dry-run"]):
            code, said = resume("out", *words, *more)
            assert code == 2 and "out.loratool-journal: is of a run with other" in said, said
            assert "repeat the former call, or leave out --resume to begin again" in said and taken() == left
        assert named in said
        assert resume("out")[0] == 0

    @pytest.mark.parametrize("adapter", ["other", "adapter:0.5"])
    def test_adapters(self, stage: Path, adapter: str) -> None:
        die("out")
        code, said = resume("out", adapter=adapter)
        assert code == 2 and f"inputs was base adapter, and is base {adapter}" in said
        merge("out")

    def test_another_base(self, stage: Path) -> None:
        shutil.copytree("base", "copy")
        die("out")
        code, said = resume("out", base="copy")
        assert code == 2 and "inputs was base adapter, and is copy adapter" in said

    @pytest.mark.parametrize("name", ["base/model-00002-of-00002.safetensors", "adapter/adapter_model.safetensors"])
    def test_an_edited_file(self, stage: Path, name: str) -> None:
        die("out")
        data = bytearray(Path(name).read_bytes())
        data[-1] ^= 1
        Path(name).write_bytes(data)
        code, said = resume("out")
        assert code == 2 and (f"{name} has changed since" in said or "layout has changed" in said)

    @pytest.mark.parametrize(
        ("name", "change"), [("adapter/adapter_config.json", {"lora_alpha": 7}), ("base/config.json", {"x": 1})]
    )
    def test_an_edited_config(self, stage: Path, name: str, change: dict[str, Any]) -> None:
        """Which decides what the weights mean."""
        die("out")
        Path(name).write_text(json.dumps({**json.loads(Path(name).read_text()), **change}))
        code, said = resume("out")
        assert code == 2 and "a config has changed since" in said, said

    def test_of_codes_that_are_decoded_otherwise(self, stage: Path) -> None:
        """No file of the output tells by which config it was decoded."""
        shutil.rmtree("base")
        state = {f"{name}.weight": weights(128, 128, seed=1).to(torch.float8_e4m3fn) for name in NAMES[:2]}
        state |= {f"{name}.weight_scale_inv": torch.full((1, 1), 0.5) for name in NAMES[:2]}
        fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        write_model(Path("base"), state, {"model_type": "llama", "quantization_config": fp8})
        write_peft(Path("adapter"), {name: factors(128, 128, 2) for name in NAMES[:2]})
        die("out", quantized="dequantize", undo=False)
        fp8["activation_scheme"] = "static"
        (Path("base") / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": fp8}))
        code, said = resume("out", "--quantized", "dequantize", "--no-undo")
        assert code == 2 and "a config has changed since" in said, said

    def test_another_command(self, stage: Path) -> None:
        die("out")
        ran = run_command("convert", "base", "--dtype", "fp32", "-o", "out", "--resume")
        assert ran.exit_code == 2 and "out.loratool-journal: is of a run with other options" in ran.stderr


class TestPlaces:
    @pytest.mark.parametrize("out", OUTS)
    @pytest.mark.parametrize("words", [[], ["--resume"], ["--dry-run"]])
    def test_what_is_no_folder_is_in_the_way(self, stage: Path, out: str, words: list[str]) -> None:
        Path("mine").mkdir()
        (Path("mine") / "head.json").write_text("{}")
        places: list[Callable[[Path], object]] = [lambda path: path.write_text("mine")]
        if os.name != "nt":
            places.append(lambda path: path.symlink_to("mine"))
        for make in places:
            make(journal(out))
            ran = run_command("merge", f"base{Path(out).suffix}", "adapter", "-o", out, *words)
            assert ran.exit_code == 2 and f"{out}.loratool-journal: is in the way" in ran.stderr
            assert [path.name for path in Path.cwd().glob("out*")] == [journal(out).name]
            journal(out).unlink()
        assert (Path("mine") / "head.json").read_text() == "{}"

    def test_an_input_is_not_removed(self, stage: Path) -> None:
        shutil.copytree("base", journal("out") / "base")
        with pytest.raises(UsageError, match="would overwrite an input"):
            loratool.merge(journal("out") / "base", "adapter", "out")
        assert (journal("out") / "base").is_dir()

    def test_a_records_place_is_a_folder(self, stage: Path) -> None:
        die("out")
        (journal("out") / "7").mkdir()
        code, said = resume("out")
        assert code in (2, 3) and "out.loratool-journal/7" in said

    def test_files_of_other_ranks(self, stage: Path, reused: list[int]) -> None:
        """Any record of an item is right, whichever rank has it, and records that are twice too."""
        files = made("out")
        die("out")
        (journal("out") / "0").rename(journal("out") / "3")
        shutil.copy(journal("out") / "3", journal("out") / "2")
        assert resume("out") == (0, "") and taken() == files and len(reused) == 10

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_more_ranks_than_descriptors(self, stage: Path) -> None:
        import resource

        files = made("out")
        die("out")
        for rank in range(1, 300):
            shutil.copy(journal("out") / "0", journal("out") / str(rank))
        child = os.fork()
        if child == 0:
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
                torch.set_num_threads(1)
                merge("out", resume=True)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert taken() == files


class TestTimes:
    @pytest.mark.parametrize("out", OUTS)
    def test_the_first_run_still_runs(self, stage: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is neither disturbed by a second one with --resume nor by one without."""
        monkeypatch.setattr("loratool.durable.locks.PATIENCE", 0.0)
        files, tried = made(out), []

        def progress(done: int, total: int) -> None:
            if len(tried) < 2:
                before = taken().keys()
                with pytest.raises(MachineError, match="another loratool"):
                    merge(out, resume=not tried)
                tried.append(done)
                assert taken().keys() == before

        merge(out, progress=progress)
        assert taken() == files and len(tried) == 2

    def test_the_output_is_whole(self, stage: Path) -> None:
        files = made("out")
        merge("out")
        with pytest.raises(NeedsFlag, match="force=True"):
            merge("out", resume=True)
        merge("out", resume=True, force=True)
        assert taken() == files

    def test_a_former_output_stays_until_the_new_one_is_whole(self, stage: Path) -> None:
        files, new = made("out", weight=0.5), made("out")
        merge("out", 0.5)
        die("out", force=True)
        assert {name: data for name, data in taken().items() if "loratool-" not in name} == files
        assert resume("out")[0] == 4
        assert resume("out", "--force") == (0, "") and taken() == new

    def test_a_dry_run_changes_nothing(self, stage: Path) -> None:
        die("out")
        left = taken()
        assert resume("out", "--dry-run")[0] == 0 and taken() == left

    def test_bad_input_leaves_nothing(self, stage: Path) -> None:
        """Nor does it when it is found by a run that goes on."""
        pairs = {name: factors(24, 20, 3) for name in NAMES}
        pairs[NAMES[-1]] = pairs[NAMES[-1]][0] * 1e30, pairs[NAMES[-1]][1] * 1e30
        write_peft(Path("adapter"), pairs)
        die("out", after=1)
        code, said = resume("out")
        assert code == 3 and "become infinite" in said and taken() == {}

    def test_a_damaged_input(self, stage: Path) -> None:
        die("out")
        shard = Path("base/model-00001-of-00002.safetensors")
        shard.write_bytes(shard.read_bytes()[:-3])
        with pytest.raises(InputError, match="is cut off"):
            merge("out", resume=True)


def keep_times(path: Path, change: Callable[[], object]) -> None:
    """Change what is at a path, and give it the times of what was there, as an archive does that has one for all."""
    before = {each: each.stat() for each in path.rglob("*.safetensors")}
    change()
    for each, status in before.items():
        assert each.stat().st_size == status.st_size
        os.utime(each, ns=(status.st_atime_ns, status.st_mtime_ns))


def write_other_base() -> None:
    state = {f"{name}.weight": weights(24, 20, seed=seed + 7).bfloat16() for seed, name in enumerate(NAMES)}
    write_model(
        Path("base"), {**state, "model.norm.weight": weights(900).bfloat16()}, {"model_type": "llama"}, shards=2
    )


def write_other_adapter() -> None:
    write_peft(Path("adapter"), {each: factors(24, 20, 3, 5) for each in NAMES})


@pytest.mark.parametrize("change", [write_other_base, write_other_adapter], ids=["base", "adapter"])
def test_another_input_of_the_same_size_and_time_is_refused(stage: Path, change: Callable[[], None]) -> None:
    path = Path("base" if change is write_other_base else "adapter")
    die("out")
    keep_times(path, change)
    code, told = resume("out")
    assert code == 2 and "has changed since" in told


def flip_at(path: Path, at: int) -> None:
    """Flip a bit of a file in place."""
    with open(path, "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def grow(path: Path) -> None:
    """Write a file again with a longer header, and give it the time that it had."""
    status = path.stat()
    save_file(load_file(path), path, {"format": "pt", "note": "x" * 64})
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def copy_anew(path: Path) -> None:
    shutil.copytree(path, "copy")
    shutil.rmtree(path)
    os.rename("copy", path)


@pytest.fixture
def large(stage: Path) -> Path:
    """Return the base's weights, of 240 KiB, of which `sampled` reads a fourth."""
    shutil.rmtree("base")
    model = write_model(Path("base"), {f"{name}.weight": weights(240, 256).bfloat16() for name in NAMES[:2]})
    write_peft(Path("adapter"), {name: factors(240, 256, 32) for name in NAMES[:2]})
    return model / "model.safetensors"


BETWEEN = 6000  # a byte between the first two pages that are compared, of a row that is soon finished

# What happens to an input between death and resume, and whether the guide `scale` says that it is seen
SEEN: dict[str, Callable[[Path], object]] = {
    "a time": lambda base: os.utime(base),
    "a size": grow,
    "a bit in the first page": lambda base: keep_times(base.parent, lambda: flip_at(base, 4000)),
    "a bit in the last page": lambda base: keep_times(base.parent, lambda: flip_at(base, base.stat().st_size - 1)),
    "any bit of an adapter": lambda _: keep_times(
        Path("adapter"), lambda: flip_at(Path("adapter/adapter_model.safetensors"), BETWEEN)
    ),
}
NOT_SEEN: dict[str, Callable[[Path], object]] = {
    "a bit between the pages": lambda base: keep_times(base.parent, lambda: flip_at(base, BETWEEN)),
    "its mode": lambda base: os.chmod(base, 0o600),
    "its links": lambda base: os.link(base, "link.safetensors"),
    "another file with the same bytes": lambda base: keep_times(base.parent, lambda: copy_anew(base.parent)),
}


@pytest.mark.parametrize("what", SEEN)
def test_what_resume_sees_of_an_input(what: str, large: Path) -> None:
    die("out", after=40)
    SEEN[what](large)
    code, told = resume("out")
    assert code == 2 and "has changed since" in told, told


@pytest.mark.skipif(os.name != "posix", reason="modes and hard links are POSIX's")
@pytest.mark.parametrize("what", few(NOT_SEEN, "a bit between the pages"))
def test_what_resume_does_not_see_of_an_input(what: str, large: Path, reused: list[int]) -> None:
    """As the guide `scale` says: no mode, link or inode; nor bytes between the pages, which `verify` does find."""
    merge("out")
    undisturbed = taken()
    clear()
    die("out", after=40)
    NOT_SEEN[what](large)
    assert resume("out") == (0, "")
    assert len(reused) == 41
    weights = "out/model.safetensors"
    if what == "a bit between the pages":  # the undo file and the card have the hash of what was read
        assert taken()[weights] == undisturbed[weights]
    else:
        assert taken() == undisturbed
    verified = loratool.verify("base", "adapter", "out")
    assert (verified.said_no is None) is (what != "a bit between the pages")


def test_ranks_are_told_by_content_and_not_by_time(stage: Path) -> None:
    def told() -> object:
        with closing(open_weights(Path("adapter/adapter_model.safetensors"))) as file:
            return next(iter(described_inputs([file], ()).values()))[-1]

    first = told()
    os.utime("adapter/adapter_model.safetensors")
    assert told() == first
    write_other_adapter()
    assert told() != first


def test_an_output_is_the_same_however_its_path_is_spelled(stage: Path, reused: list[int]) -> None:
    undisturbed = made("out")
    die("out")
    os.mkdir("below")
    os.chdir("below")
    loratool.merge("../base", "../adapter", stage / "out", workers=1, resume=True)
    os.chdir(stage)
    assert reused and taken() == undisturbed


def test_a_restart_of_what_had_not_begun_clears_what_an_earlier_run_left(
    stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = made("out")
    die("out", weight=0.5)
    monkeypatch.setattr("loratool.streaming.rewrite.current_job", lambda: Job(restarts=1))
    merge("out")
    assert taken() == undisturbed


@pytest.mark.parametrize("out", OUTS)
def test_a_written_output_leaves_the_journal_of_another_process(
    out: str, stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As soon as the output has its name, another process can lock its path and begin a journal of its own."""
    undisturbed = made(out)
    real, opener = disk.rename, partial_folder if out == "out" else partial_file
    other = ExitStack()

    def rename(path: Path, new: Path) -> None:
        real(path, new)
        if new == Path(out):
            other.enter_context(opener(new))
            journal_path(new).mkdir()

    with monkeypatch.context() as patch:
        patch.setattr(disk, "rename", rename)
        merge(out)
    assert journal_path(Path(out)).exists() and partial_path(Path(out)).exists()
    assert {name: data for name, data in taken().items() if "loratool-" not in name} == undisturbed
    other.close()
