"""Hold verify on several ranks: the report and the exit code of a single process, whoever compares what."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, load_model, weights, write_model, write_peft
from lib.harness.rank_threads import on_ranks
from lib.harness.torchrun import alone, ended, ranks_of
from lib.models.quantized_loading import fp8_blocks
from safetensors.torch import save_file

import loratool
from loratool.errors import InputError
from loratool.streaming import ranks
from loratool.streaming.ranks import Job, RankDone

NAMES = [f"model.layers.{i}.q" for i in range(12)]


def write(folder: Path, coded: bool) -> tuple[Path, Path]:
    """Write a base, plain or of codes, and an adapter for all its matrices but the last."""
    plain = {f"{name}.weight": weights(128, 128, seed=i, dtype=torch.bfloat16) for i, name in enumerate(NAMES)}
    codes = {key: each for name in NAMES for key, each in fp8_blocks(name, plain[f"{name}.weight"]).items()}
    how = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    config = {"model_type": "llama", "dtype": "bfloat16", **({"quantization_config": how} if coded else {})}
    base = write_model(folder / "base", codes if coded else plain, config)
    return base, write_peft(folder / "adapter", {n: factors(128, 128, 4, seed=i) for i, n in enumerate(NAMES[:-1])})


def edit(folder: Path, **changed: str) -> None:
    """Give tensors of a model of one file the values of others of its own; `q3="q5"`."""
    tensors, names = load_model(folder), {name.replace("model.layers.", "").replace(".q", ""): name for name in NAMES}
    before = dict(tensors)
    for one, other in changed.items():
        tensors[f"{names[one[1:]]}.weight"] = before[f"{names[other[1:]]}.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def together(inputs: Sequence[Path], *of_ranks: dict[str, Any]) -> list[tuple[Any, list[int]]]:
    """Verify on ranks by their options; return what each returned or raised, and its progress."""
    told = [list[int]() for _ in of_ranks]

    def work(job: Job) -> Any:
        def progress(done: int, total: int) -> None:
            told[job.rank].append(done)
            time.sleep(0.01)  # so that each rank gets some

        return loratool.verify(*inputs, **of_ranks[job.rank], workers=1, progress=progress)

    return list(zip(on_ranks(len(of_ranks), work), told, strict=True))


# The base is of codes; the output is like one of codes; tensors that get the values of others; the status
CASES: dict[str, tuple[bool, bool, dict[str, str], str]] = {
    "right": (False, False, {}, "proven"),
    "swapped": (False, False, {"q3": "q8", "q8": "q3", "q10": "q2"}, "wrong"),
    "codes": (True, False, {}, "proven"),
    "codes anew": (False, True, {}, "proven"),
    "altered codes": (True, False, {"q0": "q5", "q11": "q10"}, "wrong"),
}


@pytest.mark.parametrize("case", CASES)
def test_ranks_report_what_one_process_does(tmp_path: Path, case: str) -> None:
    coded, is_like, edits, status = CASES[case]
    base, adapter = write(tmp_path, coded)
    like = write(tmp_path / "like", coded=True)[0] if is_like else None
    merged, single = tmp_path / "merged", list[tuple[int, int]]()
    loratool.merge(base, adapter, merged, undo=False, like=like)
    edit(merged, **edits)
    wanted = loratool.verify(base, adapter, merged, workers=1, progress=lambda *each: single.append(each))
    assert wanted.status == status
    (report, own), *others = together((base, adapter, merged), {}, {}, {})
    assert report == wanted
    assert all(isinstance(end, RankDone) for end, _ in others)
    told = [own, *(each for _, each in others)]
    assert all(told), "each rank has verified some"
    assert len({*chain(*told)}) == len(single)
    assert max(chain(*told)) == single[-1][0] == single[-1][1]


def test_a_rank_that_verifies_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "SILENCE", 0.3)
    base, adapter = write(tmp_path, coded=False)
    (first, _), (other, told) = together((base, adapter, base), {}, {"target": ["model.layers.3.q"]})
    assert isinstance(other, InputError)
    assert other.message.endswith("sees another plan than rank 0")
    assert first.message.startswith("rank 1 ")
    assert not told


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("is_right", [True, False])
def test_torchrun_ends_as_one_process_does(tmp_path: Path, is_right: bool, count: int) -> None:
    base, adapter = write(tmp_path, coded=False)
    loratool.merge(base, adapter, tmp_path / "merged", undo=False)
    if not is_right:
        edit(tmp_path / "merged", q1="q2")
    arguments = ["verify", "base", "adapter", "merged", "--json"]
    wanted, out, _ = alone(tmp_path, "-m", "loratool", *arguments)
    [(code, told, err)] = ended(ranks_of(tmp_path, "-m", "loratool", *arguments, count=count))
    assert code == wanted == (0 if is_right else 1), err
    assert json.loads(told) == json.loads(out)
