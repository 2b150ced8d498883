"""Hold extract on several ranks, and continued after a death, against one undisturbed process."""

from __future__ import annotations

import errno
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import weights, write_model
from lib.harness.rank_threads import on_ranks
from lib.harness.torchrun import alone, ended, ranks_of

import loratool
from loratool import UsageError
from loratool.adapters.formats.peft import Peft
from loratool.commands.extract import extraction
from loratool.durable.journal import Journal
from loratool.durable.partial import journal_path, partial_path
from loratool.streaming.ranks import RankDone
from loratool.streaming.threads import restore_threads, set_threads

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
SIDES = {"q_proj": (40, 32), "k_proj": (16, 32), "o_proj": (32, 40)}

# The command line, of which each rank tells how many results it has found; a budget asks more than the first rank
PROGRAM = """
import os, signal
from pathlib import Path
from loratool.durable.journal import Journal
from loratool.commands.extract import extraction

add, end, found = Journal.add, os._exit, []

def count(*arguments):
    found.append(1)
    rank, start = (os.environ.get(name) for name in ("RANK", "TORCHELASTIC_RESTART_COUNT"))
    if os.environ.get("DIES") == f"{rank} {len(found)}" and start == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return add(*arguments)

def leave(code):
    Path(f"found-{os.environ.get('RANK', 'alone')}").write_text(str(len(found)))
    end(code)

Journal.add, os._exit = count, leave
extraction.FIRST_RANK = 2
from loratool.cli import main
main()
"""

OPTIONS = {
    "rank": ("--rank", "3"),
    "energy": ("--energy", "0.9"),
    "noise": ("--rank-rule", "noise"),
    "budget that grows": ("--params", "4000"),
    "file": ("--size", "20KB", "--to", "peft"),
}


def make_sides(folder: Path, layers: int, scale: int = 1) -> None:
    """Write `base` and `tuned`, of which some tensors are equal, and those of layer 0 change most, at full rank."""
    base = {"model.embed_tokens.weight": weights(60, 32), "model.norm.weight": weights(32, seed=1)}
    for layer in range(layers):
        for seed, (name, shape) in enumerate(SIDES.items()):
            sizes = tuple(scale * side for side in shape)
            base[f"model.layers.{layer}.self_attn.{name}.weight"] = weights(*sizes, seed=7 * layer + seed)
    changed = {
        name: W + weights(*W.shape, seed=len(name)) * (0.3 if ".0." in name else 0.01) for name, W in base.items()
    }
    kept = {name: W for name, W in base.items() if "embed" in name or "k_proj" in name}
    write_model(folder / "base", base, LLAMA)
    write_model(folder / "tuned", {**changed, **kept}, LLAMA)


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sides")
    make_sides(folder, 4)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def extracted(sides: Path, out: Path, **options: Any) -> dict[str, bytes]:
    loratool.extract(sides / "base", sides / "tuned", out, **{"rank": 3, **options})
    return files(out)


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def died(sides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where an extraction has found all factors, and died as it wrote them."""
    with monkeypatch.context() as patched:
        patched.setattr(Peft, "fill", full)
        with pytest.raises(OSError, match="No space"):
            extracted(sides, tmp_path / "out")
    assert left(tmp_path) == ["out.loratool-journal", "out.loratool-partial"]
    return tmp_path / "out"


def run_alone(folder: Path, *arguments: str) -> tuple[str, dict[str, bytes]]:
    code, told, err = alone(folder, "program.py", *arguments)
    assert code == 0, err
    return told, files(folder / "out")


def shared(sides: Path, folder: Path, count: int, options: tuple[str, ...]) -> list[int]:
    """Hold ranks against a single process, and return how many results each rank has found."""
    call = ["extract", str(sides / "base"), str(sides / "tuned"), *options, "-o", "out", "--json"]
    (folder / "program.py").write_text(PROGRAM)
    told, wanted = run_alone(folder, *call)
    shutil.rmtree(folder / "out")
    [(code, out, err)] = ended(ranks_of(folder, "program.py", *call, count=count))
    assert code == 0, err
    assert json.loads(out) == json.loads(told)
    assert files(folder / "out") == wanted
    assert not [name for name in left(folder) if "loratool" in name]
    found = [int((folder / f"found-{rank}").read_text()) for rank in range(count)]
    assert sum(found) == int((folder / "found-alone").read_text())
    return found


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("options", [{"rank": 3}, {"params": 4000}], ids=str)
def test_ranks_find_what_one_process_finds(
    sides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], count: int
) -> None:
    def run() -> Any:
        return loratool.extract(sides / "base", sides / "tuned", tmp_path / "out", **options)

    monkeypatch.setattr(extraction, "FIRST_RANK", 2)
    wanted, written = run(), files(tmp_path / "out")
    assert max(row.rank for row in wanted.modules) > 24 or options == {"rank": 3}, "more than the first are asked for"
    shutil.rmtree(tmp_path / "out")
    first, *others = on_ranks(count, lambda job: run())
    assert first == wanted and files(tmp_path / "out") == written
    assert [type(each) for each in others] == [RankDone] * (count - 1), others
    assert left(tmp_path) == ["out"]


def test_a_rank_that_reads_the_results_late_still_finds_them(
    sides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0, which needs them only to write the adapter, removes the journal at its end."""
    read_all = Journal.read_all

    def late(self: Journal, ranks: int) -> None:
        time.sleep(0.3 if self._rank else 0)
        read_all(self, ranks)

    monkeypatch.setattr(Journal, "read_all", late)
    _, other = on_ranks(2, lambda job: loratool.extract(sides / "base", sides / "tuned", tmp_path / "out", params=4000))
    assert type(other) is RankDone, other


@pytest.mark.slow
@pytest.mark.parametrize(("options", "count"), [*((each, 2) for each in OPTIONS), ("budget that grows", 4)])
def test_ranks_extract_as_one_process(sides: Path, tmp_path: Path, options: str, count: int) -> None:
    shared(sides, tmp_path, count, OPTIONS[options])


def test_bytes_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    make_sides(tmp_path, 1, scale=8)
    before, found = set_threads(1), []
    try:
        for threads in (1, 2, 3):
            set_threads(threads)
            found.append(extracted(tmp_path, tmp_path / f"out {threads}", rank=8))
            assert set(set_threads(threads).values()) == {threads}
    finally:
        restore_threads(before)
    assert found[0] == found[1] == found[2]


class TestResumed:
    def test_what_is_found_is_not_computed_again(
        self, sides: Path, died: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wanted = extracted(sides, died.parent / "undisturbed")
        for work in ("factor_delta", "compare_sides"):
            monkeypatch.setattr(extraction, work, lambda *_: pytest.fail("it is done again"))
        assert extracted(sides, died, resume=True) == wanted
        assert left(died.parent) == ["out", "undisturbed"]

    @pytest.mark.parametrize("cuts", [20, pytest.param(200, marks=pytest.mark.slow)])
    def test_a_journal_cut_or_damaged_anywhere_is_gone_on_with(self, sides: Path, died: Path, cuts: int) -> None:
        """A kill leaves any beginning of it; a disk may lose what was not synced, or change a byte."""
        wanted, draw = extracted(sides, died.parent / "undisturbed"), random.Random(cuts)
        journal, kept = journal_path(died), died.parent / "kept"
        shutil.copytree(journal, kept)
        whole = (kept / "0").read_bytes()
        for cut in range(cuts):
            shutil.rmtree(journal, ignore_errors=True)
            shutil.copytree(kept, journal)
            partial_path(died).mkdir(exist_ok=True)
            at = draw.randrange(len(whole))
            damaged = (
                whole[:at] if cut % 2 else whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :]
            )
            (journal / "0").write_bytes(damaged)
            assert extracted(sides, died, resume=True) == wanted
            shutil.rmtree(died)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"rank": 4}, "is of a run with other options: rank was 3, and is 4"),
            ({"seed": 1}, "is of a run with other options: --seed was not given, and is 1"),
            ({"bias": False}, "is of a run with other options: bias=False was not given, and is given"),
        ],
    )
    def test_other_options_are_refused_by_name(
        self, sides: Path, died: Path, options: dict[str, Any], said: str
    ) -> None:
        with pytest.raises(UsageError, match=said):
            extracted(sides, died, resume=True, **options)
        assert left(died.parent) == ["out.loratool-journal", "out.loratool-partial"]

    def test_changed_inputs_are_refused_by_name(self, sides: Path, died: Path) -> None:
        (sides / "tuned" / "model.safetensors").touch()
        with pytest.raises(UsageError, match=r"run with other inputs: .*/tuned/model.safetensors has changed since"):
            extracted(sides, died, resume=True)

    def test_another_numpy_is_refused_by_name(self, sides: Path, died: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(np, "__version__", "9.9")
        with pytest.raises(UsageError, match=r"is of a run with other machine: numpy was .*, and is 9.9"):
            extracted(sides, died, resume=True)

    def test_without_resume_all_is_done_anew(self, sides: Path, died: Path) -> None:
        assert extracted(sides, died, rank=4) == extracted(sides, died.parent / "undisturbed", rank=4)
        assert left(died.parent) == ["out", "undisturbed"]

    def test_a_dry_run_leaves_a_journal_alone(self, sides: Path, died: Path) -> None:
        before = files(journal_path(died))
        loratool.extract(sides / "base", sides / "tuned", died, rank=5, dry_run=True)
        assert files(journal_path(died)) == before

    def test_bad_input_leaves_nothing(self, sides: Path, tmp_path: Path) -> None:
        with pytest.raises(loratool.NeedsFlag, match="not a fine-tune"):
            make_sides(tmp_path / "sides", 1)
            wild = {name: 9 * W for name, W in {"model.layers.0.self_attn.q_proj.weight": weights(40, 32)}.items()}
            write_model(tmp_path / "wild", wild, LLAMA)
            loratool.extract(tmp_path / "sides" / "base", tmp_path / "wild", tmp_path / "out")
        assert left(tmp_path) == ["sides", "wild"]


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
@pytest.mark.parametrize("dies", ["0 1", "0 4", "1 1", "1 3"])
def test_a_rank_is_killed(sides: Path, tmp_path: Path, dies: str, restarts: int) -> None:
    """torchrun's restart goes on with what is found, and so does --resume, on fewer ranks too."""
    call = ["extract", str(sides / "base"), str(sides / "tuned"), *OPTIONS["budget that grows"], "-o", "out"]
    (tmp_path / "program.py").write_text(PROGRAM)
    _, wanted = run_alone(tmp_path, *call, "-q")
    in_all = int((tmp_path / "found-alone").read_text())
    shutil.rmtree(tmp_path / "out")
    options = ("--max-restarts", str(restarts))
    [(code, _, err)] = ended(ranks_of(tmp_path, "program.py", *call, options=options, env={"DIES": dies}))
    if not restarts:
        assert code, err
        assert {"out.loratool-journal", "out.loratool-partial"} <= {*left(tmp_path)}
        run_alone(tmp_path, *call, "--resume", "-q")
        found = int(dies.split()[1]) - 1  # by the rank that died, at least
        assert int((tmp_path / "found-alone").read_text()) <= in_all - found
    assert files(tmp_path / "out") == wanted
    assert not [name for name in left(tmp_path) if "loratool" in name]
