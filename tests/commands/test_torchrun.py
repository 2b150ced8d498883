"""Hold what torchrun's ranks write together: the bytes, undo files and reports of a single process."""

from __future__ import annotations

import json
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import factors, weights, write_model, write_peft
from lib.harness.torchrun import alone, ended, free_port, ranks_of
from lib.models.quantized_loading import fp8_blocks
from safetensors.torch import load_file, save_file

ROWS, COLUMNS, RANK = 384, 1024, 8  # of each matrix, too large to be in a batch with another

# The command line, of which rank SLOW takes its time with each item, rank DIES is killed in its third one in the first
# start, and each rank tells how many it has done
PROGRAM = """
import os, signal, time
from pathlib import Path
from loratool.streaming import workers

rank, start = os.environ.get("RANK", "alone"), os.environ.get("TORCHELASTIC_RESTART_COUNT")

class Counted(workers.Worker):
    items = 0

    def __call__(self, item):
        Counted.items += 1
        time.sleep(0.3 if rank == os.environ.get("SLOW") else 0.02)
        if (rank, start, Counted.items) == (os.environ.get("DIES"), "0", 3):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(item)

def leave(code):
    Path(f"items-{rank}").write_text(str(Counted.items))
    end(code)

workers.Worker = Counted
end, os._exit = os._exit, leave
from loratool.cli import main
main()
"""


@dataclass(frozen=True)
class Case:
    """A command in a folder beside those that `inputs` has, after others that one process runs; it writes `out`."""

    arguments: str
    before: str = ""


CASES = {
    "merge shards": Case("merge ../base ../adapter -o out --html out.html"),
    "merge one file": Case("merge ../one/model.safetensors ../adapter:0.5 -o out.safetensors"),
    "merge DoRA": Case("merge ../base ../dora -o out"),
    "merge two": Case("merge ../base ../adapter ../dora:0.5 -o out --max-shard-size 3MB --no-undo --dtype fp32"),
    "merge codes": Case("merge ../fp8 ../adapter -o out"),
    "merge into codes": Case("merge ../fp8 ../adapter -o out --quantized requantize"),
    "merge like codes": Case("merge ../base ../adapter -o out --like ../fp8 --no-undo"),
    "unmerge": Case("unmerge merged ../adapter -o out", "merge ../base ../adapter -o merged"),
    "unmerge codes": Case("unmerge merged ../adapter -o out", "merge ../fp8 ../adapter -o merged"),
    "unmerge roughly": Case(
        "unmerge merged ../adapter -o out --approximate", "merge ../base ../adapter -o merged --no-undo"
    ),
    "swap": Case("merge merged ../dora:0.5 --replace ../adapter -o out", "merge ../base ../adapter -o merged"),
    "convert dtype": Case("convert ../base -o out --dtype fp32 --max-shard-size 3MB"),
    "convert to torch": Case("convert ../base -o out --to torch"),
    "convert codes": Case("convert ../fp8 -o out --dtype bf16"),
    "convert an adapter": Case("convert ../adapter -o out --to peft --plain"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    names = [f"model.layers.{layer}.mlp.{name}_proj" for layer in range(6) for name in ("gate", "up")]
    plain = {f"{name}.weight": weights(ROWS, COLUMNS, seed=i, dtype=torch.bfloat16) for i, name in enumerate(names)}
    embedding = {"model.embed_tokens.weight": weights(500, 64, dtype=torch.bfloat16)}
    config = {"model_type": "llama", "dtype": "bfloat16"}
    write_model(folder / "base", {**embedding, **plain}, config, shards=3)
    write_model(folder / "one", {**embedding, **plain}, config)
    codes = {key: each for name in names for key, each in fp8_blocks(name, plain[f"{name}.weight"]).items()}
    how = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    write_model(folder / "fp8", {**embedding, **codes}, {**config, "quantization_config": how}, shards=3)
    pairs = {name: factors(ROWS, COLUMNS, RANK, seed=i) for i, name in enumerate(names)}
    write_peft(folder / "adapter", pairs)
    write_peft(folder / "dora", pairs, use_dora=True)
    file = folder / "dora" / "adapter_model.safetensors"
    sizes = {
        f"base_model.model.{name}.lora_magnitude_vector": plain[f"{name}.weight"].float().norm(dim=1) for name in names
    }
    save_file({**load_file(file), **sizes}, file, metadata={"format": "pt"})
    return folder


def place(inputs: Path, name: str, before: str) -> Path:
    folder = inputs / name
    folder.mkdir()
    (folder / "program.py").write_text(PROGRAM)
    if before:
        code, _, err = alone(folder, "program.py", *before.split())
        assert code == 0, err
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Return all that a command has left beside its inputs."""
    ours = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(("items-", "program."))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in ours}


def share(inputs: Path, key: str, count: int, slow: int = -1) -> list[int]:
    """Hold a case on ranks against a single process, and return how many items each rank has done."""
    case, own = CASES[key], f"{key}, {count}, {slow}"
    single, shared = (place(inputs, f"{kind}: {own}", case.before) for kind in ("one", "ranks"))
    arguments = [*case.arguments.split(), "--json"]
    code, out, err = alone(single, "program.py", *arguments)
    assert (code, err) == (0, "")
    run = ranks_of(shared, "program.py", *arguments, count=count, env={"SLOW": str(slow)})
    [(code, told, err)] = ended(run)
    assert code == 0, err
    assert json.loads(told) == json.loads(out)
    found, wanted = files(shared), files(single)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
    done = [int((shared / f"items-{rank}").read_text()) for rank in range(count)]
    assert sum(done) == int((single / "items-alone").read_text())
    return done


def test_two_ranks_merge_as_one_process_and_the_slow_one_does_less(inputs: Path) -> None:
    first, slow = share(inputs, "merge shards", 2, slow=1)
    assert 0 < slow < first


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("key", CASES)
def test_ranks_write_what_one_process_writes(inputs: Path, key: str, count: int) -> None:
    done = share(inputs, key, count)
    assert all(done) or key == "convert an adapter"


@pytest.mark.slow
@pytest.mark.parametrize("slow", [0, 3])
def test_a_slow_rank_does_less(inputs: Path, slow: int) -> None:
    done = share(inputs, "merge shards", 4, slow)
    assert done[slow] < min(done[:slow] + done[slow + 1 :])


@pytest.mark.slow
@pytest.mark.parametrize(
    "call",
    ["extract ../base merged --rank 2 -o out", "verify ../base ../adapter merged", "verify ../base ../dora merged"],
)
def test_rank_0_writes_one_page(inputs: Path, call: str) -> None:
    """As one process does, where a check says no too."""
    before, arguments = "merge ../base ../adapter -o merged", [*call.split(), "--html", "x.html"]
    single, shared = (place(inputs, f"{kind}: {call.replace('/', '')}", before) for kind in ("page", "pages"))
    code, out, err = alone(single, "program.py", *arguments)
    assert code == ("dora" in call), err
    [(ended_with, told, err)] = ended(ranks_of(shared, "program.py", *arguments))
    assert (ended_with, told) == (code, out), err
    assert files(shared) == files(single)


def left(folder: Path) -> list[str]:
    """Return what a command has left beside its inputs, an unfinished output too."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(("items-", "program.")))


@pytest.fixture(scope="module")
def merged(inputs: Path) -> dict[str, bytes]:
    folder = place(inputs, "merged alone", "merge ../base ../adapter -o out")
    return files(folder)


MERGE = ("program.py", "merge", "../base", "../adapter", "-o", "out")


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_is_killed_ends_all_and_the_run_is_resumed(
    inputs: Path, merged: dict[str, bytes], dies: int
) -> None:
    folder = place(inputs, f"killed {dies}", "")
    [(code, out, err)] = ended(ranks_of(folder, *MERGE, count=3, env={"DIES": str(dies)}))
    assert code != 0
    assert out == ""
    assert signal.SIGKILL.name in err
    assert left(folder) == ["out.loratool-journal", "out.loratool-partial"]
    [(code, _, err)] = ended(ranks_of(folder, *MERGE, "--resume", count=2))
    assert code == 0, err
    assert files(folder) == merged


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_torchrun_restarts_and_the_run_goes_on(inputs: Path, merged: dict[str, bytes], dies: int) -> None:
    folder = place(inputs, f"restarted {dies}", "")
    options = ("--max-restarts", "1")
    [(code, _, err)] = ended(ranks_of(folder, *MERGE, count=3, env={"DIES": str(dies)}, options=options))
    assert code == 0, err
    assert files(folder) == merged


@pytest.mark.slow
def test_a_damaged_adapter_is_refused_by_one_rank_and_nothing_stays(inputs: Path) -> None:
    folder = place(inputs, "damaged", "")
    shutil.copytree(inputs / "adapter", folder / "adapter")
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = max(tensors)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file)
    [(code, out, err)] = ended(ranks_of(folder, "program.py", "merge", "../base", "adapter", "-o", "out"))
    assert (code, out) == (1, "")
    [line] = [line for line in err.splitlines() if "error: " in line]
    assert line.startswith(f"error: {name}: holds nan or inf")
    assert left(folder) == ["adapter"]


@pytest.mark.slow
def test_an_overflow_is_told_by_the_rank_that_met_it(inputs: Path) -> None:
    folder = place(inputs, "overflow", "")
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.full((ROWS, COLUMNS), 1e38) for i in range(8)}
    write_model(folder / "base", tensors, {"model_type": "llama"}, shards=2)
    call = ("program.py", "convert", "base", "-o", "out", "--dtype", "fp16")
    [(code, out, err)] = ended(ranks_of(folder, *call, env={"SLOW": "0"}))
    assert (code, out) == (1, "")
    found = [line for line in err.splitlines() if line.startswith(("error: model.layers.", "rank 1: error: model."))]
    assert found
    assert all(line.endswith(f": {ROWS * COLUMNS} weights become infinite in F16") for line in found)
    assert left(folder) == ["base"]


@pytest.mark.slow
def test_a_rank_that_sees_other_files_is_named(inputs: Path) -> None:
    folder = place(inputs, "other files", "")
    program = (folder / "program.py").read_text()
    (folder / "program.py").write_text(f"import os\nos.chdir('rank ' + os.environ['RANK'])\n{program}")
    for rank, base in enumerate(("base", "one")):
        (folder / f"rank {rank}").mkdir()
        (folder / f"rank {rank}" / "base").symlink_to(inputs / base)
    call = ("program.py", "merge", "base", str(inputs / "adapter"), "-o", str(folder / "out"))
    [(code, out, err)] = ended(ranks_of(folder, *call))
    assert (code, out) == (1, "")
    [line] = [line for line in err.splitlines() if line.startswith("rank 1: error: rank 1, on host ")]
    assert line.endswith(", sees another plan than rank 0")
    assert left(folder) == ["rank 0", "rank 1"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_told_once_and_a_stopped_run_is_resumed(
    inputs: Path, merged: dict[str, bytes], number: signal.Signals
) -> None:
    folder = place(inputs, f"stopped by {number.name}", "")
    run = ranks_of(folder, *MERGE, count=3, env={"SLOW": "1"})
    while run.poll() is None and not (folder / "out.loratool-journal" / "1").exists():
        time.sleep(0.02)
    run.send_signal(number)
    [(code, out, err)] = ended(run)
    assert code != 0
    assert out == ""
    assert len([line for line in err.splitlines() if line.startswith("error: interrupted; ")]) == 1
    assert not [line for line in err.splitlines() if line.startswith("rank ")]
    stays = number == signal.SIGTERM
    assert left(folder) == ["out.loratool-journal", "out.loratool-partial"] * stays
    [(code, _, err)] = ended(ranks_of(folder, *MERGE, *["--resume"] * stays))
    assert code == 0, err
    assert files(folder) == merged


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 3])
def test_two_nodes_merge_as_one_and_go_on_together(inputs: Path, merged: dict[str, bytes], dies: int) -> None:
    folder = place(inputs, f"nodes {dies}", "")
    meeting = ("--rdzv-backend", "c10d", "--rdzv-id", "job", "--rdzv-endpoint", f"localhost:{free_port()}")
    options = ("--nnodes", "2", *meeting, "--max-restarts", "1")
    nodes = [ranks_of(folder, *MERGE, "--json", options=options, env={"DIES": str(dies)}) for _ in range(2)]
    (first, told, err), (second, also, _) = ended(*nodes)
    assert (first, second) == (0, 0), err
    *before, last = (told + also).splitlines()  # one of each start
    assert json.loads(last)["ok"]
    assert all(json.loads(line)["error"]["kind"] == "interrupted" for line in before)
    assert files(folder) == merged
