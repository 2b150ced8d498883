"""Hold the guide `patch-format`: a reader that was written from it makes what a patch was made of, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import slow, weights, write_model
from lib.models.patch_pairs import PAIRS, moved, plain, tree
from lib.oracles.naive_patch_reader import Reader, tensors_in

import loratool

NAMES = ("side files", "shards", "mixed", "other tensors", "empty and scalar", "only empty", "int4")
RENAMED = ("renamed", "only renamed", "renamed among others")
SLOW = ("to bf16", "to fp32")


def weights_of(path: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes()} if path.is_file() else tree(path)
    return {name: data for name, data in files.items() if name.endswith(".safetensors")}


def tensors_of(path: Path) -> dict[str, Any]:
    return {name: tensor for data in weights_of(path).values() for name, tensor in tensors_in(data).items()}


def check(base: Path, tuned: Path, patch: Path, **options: bool) -> Reader:
    report = loratool.patch(base, tuned, patch, **options)
    reader = Reader(patch.read_bytes())
    before, after = (tensors_of(each) for each in (base, tuned))
    assert reader.restore(before) == weights_of(tuned)
    assert reader.index["reversible"] is report.reversible
    if report.reversible:
        assert reader.restore(after, back=True) == weights_of(base)
    return reader


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", [*NAMES, *RENAMED, *map(slow, SLOW)])
def test_what_patch_writes(tmp_path: Path, name: str, fast: bool) -> None:
    base, tuned = PAIRS[name][0](tmp_path)
    check(base, tuned, tmp_path / "p", fast=fast)


def test_side_files(tmp_path: Path) -> None:
    base, tuned = PAIRS["side files"][0](tmp_path)
    reader = check(base, tuned, tmp_path / "p")
    before, after = ({k: v for k, v in tree(each).items() if not k.endswith(".safetensors")} for each in (base, tuned))
    assert {name: before[name] if data is None else data for name, (_, data) in reader.side.items()} == after
    back = {name: data for name, (_, data) in reader.base_side.items()}
    assert back == {name: data for name, data in before.items() if after.get(name) != data}


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float8_e4m3fn")])
def test_numbers_of_another_type(tmp_path: Path, dtypes: tuple[str, str]) -> None:
    """The base's numbers are rounded once, to nearest and ties to even."""
    first, second = (getattr(torch, each) for each in dtypes)
    state = {"x": weights(10, 30).to(first), "y": (torch.arange(40) * 2.0**-11 + 1).to(first)}
    after = {name: moved(x, 1e-2).to(second) for name, x in state.items()}
    pair = [write_model(tmp_path / name, each) for name, each in (("base", state), ("tuned", after))]
    assert check(*pair, tmp_path / "p").index["cast"]


BODIES = [("bfloat16", 2e-3, "fields"), slow("bfloat16", 0.3, "classes"), slow("float32", 1e-4, "planes")]


@pytest.mark.parametrize(("dtype", "share", "body"), BODIES)
def test_a_span_of_several_lanes(tmp_path: Path, dtype: str, share: float, body: str) -> None:
    """And with a table for each class."""
    before = {"x": weights(160, 128).to(getattr(torch, dtype)), "y": weights(8).to(getattr(torch, dtype))}
    after = {"x": moved(before["x"], share), "y": before["y"]}
    pair = [write_model(tmp_path / name, state) for name, state in (("base", before), ("tuned", after))]
    assert check(*pair, tmp_path / "p").index["bodies"] == [body]


@pytest.mark.slow
def test_tensors_of_several_pieces(tmp_path: Path) -> None:
    """Whole pieces first, then what is left of all tensors together."""
    before = {**plain(8), "large": torch.zeros((1 << 23) + 5, dtype=torch.bfloat16), "z": torch.ones(3).bfloat16()}
    after = {**before, "large": before["large"].clone(), "z": torch.full((3,), 2.0).bfloat16()}
    after["large"][-2:] = 1
    pair = [write_model(tmp_path / name, state) for name, state in (("base", before), ("tuned", after))]
    reader = check(*pair, tmp_path / "p")
    assert [len(pieces) for _, _, pieces in reader.spans()] == [1, len(before)]
