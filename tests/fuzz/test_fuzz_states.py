"""Hold the readers of sharded training states, DCP's, ZeRO's and DTensors', against files that lie.

What they say of shapes, places and files goes through a pickle, whose own lies are in `test_fuzz_torch`.
"""

from __future__ import annotations

import copy
import io
import json
import random
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from damages import damaged_bytes
from fuzzing import Case, Fuzzer
from lib.models.training_runs import Replicate, Shard, cut, write_dcp, write_ranks, write_zero

pytestmark = pytest.mark.fuzz

COMMANDS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("inspect", "state"): (),
    ("convert", "state", "-o", "out"): ("out",),
    ("convert", "state", "-o", "out.safetensors"): ("out.safetensors",),
    ("diff", "state", "state"): (),
}

NUMBERS = (
    *(0, 1, 2, 3, 7, -1, -8, 1 << 31, 1 << 40, 1 << 62, 1 << 63, 1 << 64, 10**30, 0.5, True, None, "4", [4], (4, 2)),
)
PLACES = (
    "../x",
    "/etc/passwd",
    "x",
    "",
    ".",
    "..",
    "a\0b",
    "\x1b[31m",
    "__0_0.distcp",
    ".metadata",
    "x" * 300,
    5,
    None,
)
SIZES = (
    *map(torch.Size, ((), (0,), (8, 4), (4, 8), (32,), (1 << 40, 4), (1 << 62, 1 << 62), (1,) * 70, (16, 2))),
    *((-1, -4), (8.0, 4), [8, 4], None),
)
VALUES: tuple[Any, ...] = (
    *(*NUMBERS, *SIZES, {}, [], "", "x", "\x1b[31m", {"x": 1}),
    *map(torch.ones, ((3,), (2, 2), (0,), (40,))),
    *(torch.ones(4, 8).T, torch.ones(1).expand(32), torch.ones(32).bfloat16(), torch.ones(32).long()),
)


def tensors() -> dict[str, torch.Tensor]:
    numbers = torch.arange(32, dtype=torch.float32)
    return {"a.weight": numbers.view(8, 4), "b.weight": numbers.view(4, 8) + 100, "c.bias": numbers[:8].bfloat16()}


def files_of(write: Callable[[Path], Any]) -> dict[str, bytes]:
    """Return what a function writes into a folder, as the folder `state`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "state")
        write(folder)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        return {f"state/{p.relative_to(folder)}": p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def lie_in_state(state: Any, rng: random.Random) -> Any:
    """Return a copy of nested dicts and lists with one value another, missing, twice, or under another name."""
    state = copy.deepcopy(state)
    owners = [state]
    for owner in owners:
        inner = owner.values() if isinstance(owner, dict) else owner
        owners += [each for each in inner if isinstance(each, dict | list) and each]
    owner = rng.choice(owners)
    keys = [*owner] if isinstance(owner, dict) else [*range(len(owner))]
    key, other = rng.choice(keys), rng.choice(keys)
    match rng.randrange(6):
        case 0:
            del owner[key]
        case 1:
            owner[key], owner[other] = owner[other], owner[key]
        case 2 if isinstance(owner, dict):
            owner[rng.choice(("__metadata__", "x", "", "../x", "\x1b[31m", 5, None, (1,), "a.weight"))] = owner[key]
        case 2:
            owner.append(owner[key])
        case _:
            owner[key] = rng.choice(VALUES)
    return state


def damaged_zip(data: bytes, rng: random.Random) -> bytes:
    """Return a file of torch.save whose pickle has other bytes, with sound checksums."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(
                entry.filename, damaged_bytes(rng, content) if entry.filename.endswith("data.pkl") else content
            )
    return made.getvalue()


def lie_in_metadata(metadata: Any, rng: random.Random) -> None:
    """Change one thing that DCP's metadata says of keys, chunks or files."""
    entries, paths, places = metadata.state_dict_metadata, metadata.planner_data, metadata.storage_data
    key, index = rng.choice([*entries]), rng.choice([*places])
    entry, place = entries[key], places[index]
    match rng.randrange(14):
        case 0:
            entry.size = rng.choice(SIZES)
        case 1:
            chunk = rng.choice(entry.chunks)
            setattr(
                chunk, rng.choice(("offsets", "sizes")), rng.choice((*SIZES, torch.Size((4, 0)), torch.Size((4, 4))))
            )
        case 2:
            place.relative_path = rng.choice(PLACES)
        case 3:
            place.offset = rng.choice((*NUMBERS, place.offset + 1, place.offset - 1, place.offset + 64))
        case 4:
            place.length = rng.choice((*NUMBERS, place.length + 1, place.length - 1))
        case 5:
            places[index], places[other] = places[other := rng.choice([*places])], place
        case 6:
            del places[index]
        case 7:
            del entries[key]
        case 8:
            others = entries[rng.choice([*entries])].chunks
            own = list(entry.chunks or ())  # an earlier lie may have taken them
            entry.chunks = rng.choice(([], own * 2, own[:1], None, (), others))
        case 9:
            entry.properties.dtype = rng.choice((torch.float64, torch.int8, torch.complex64, torch.float16, torch.bool))
        case 10:
            paths = metadata.planner_data = dict(paths or {})
            named = ("model",), (), ("optimizer", "x"), key, None, ("model", "../x"), ("model", 5), ("x",) * 99
            paths[key] = rng.choice(named)
        case 11:
            place.transform_descriptors = ["zstd"]
        case 12:
            metadata.planner_data = rng.choice((None, {}, [], paths))
        case 13:
            entries[rng.choice(("__metadata__", "x", "../x", "\x1b[31m", "model.a.weight"))] = entries.pop(key)


def make_dcp(rng: random.Random) -> Case:
    state = {("model", name): tensor for name, tensor in tensors().items()}
    boxes = {
        ("model", "a.weight"): cut((8, 4), {0: [3, 5]}),
        ("model", "b.weight"): cut((4, 8), {0: [2, 2], 1: [4, 4]}),
    }

    def edit(metadata: Any) -> None:
        for _ in range(rng.choice((0, 1, 1, 1, 2))):
            lie_in_metadata(metadata, rng)

    files = files_of(lambda folder: write_dcp(folder, state, boxes, edit=edit))
    if rng.random() < 0.3:
        name = rng.choice([name for name in files if not name.endswith("config.json")])
        files[name] = damaged_bytes(rng, files[name])
    argv, outputs = rng.choice([*COMMANDS.items()])
    return Case(files, argv, outputs)


@cache
def zero(stage: int) -> dict[str, bytes]:
    groups = [{name: each.float() for name, each in tensors().items()}]
    more = {"f": torch.ones(4)}, {"g": torch.ones(2)}, {"h": "a.weight"}
    return files_of(lambda folder: write_zero(folder, stage, 2, groups, *more))


def make_zero(rng: random.Random) -> Case:
    valid = zero(rng.choice((1, 2, 3)))
    files = dict(valid)
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice([name for name in valid if name.endswith(".pt")])
        match rng.randrange(8):
            case 0:
                files[name] = damaged_zip(valid[name], rng)
            case 1:
                files.pop(name, None)
            case 2:
                files[name.replace("rank_0", rng.choice(("rank_2", "rank_00", "rank_99999999999")))] = valid[name]
            case 3:
                files[name] = valid[rng.choice([*valid])]
            case _:
                stream = io.BytesIO()
                torch.save(lie_in_state(torch.load(io.BytesIO(valid[name])), rng), stream)
                files[name] = stream.getvalue()
    argv, outputs = rng.choice([*COMMANDS.items()])
    return Case(files, argv, outputs)


@cache
def ranks() -> dict[str, bytes]:
    state = {
        "a.weight": (tensors()["a.weight"], [Shard(0)]),
        "b.weight": (tensors()["b.weight"], [Shard(1)]),
        "c.bias": (tensors()["c.bias"], [Replicate()]),
        "plain": torch.ones(3),
    }
    return files_of(lambda folder: write_ranks(folder, (2,), state))


def make_ranks(rng: random.Random) -> Case:
    valid = ranks()
    files, names = dict(valid), [name for name in valid if name.endswith(".pt")]
    for name in rng.sample(names, rng.choice((1, 1, 2))):
        match rng.randrange(8):
            case 0:
                del files[name]
            case 1:
                files[name.replace("_2_rank_", rng.choice(("_3_rank_", "_2_rank_1", "_0_rank_")))] = files.pop(name)
            case 2:
                files[name] = valid[rng.choice([*valid])]
            case 3:
                files[name] = damaged_bytes(rng, valid[name])
            case _:
                files[name] = damaged_zip(valid[name], rng)
    argv, outputs = rng.choice([*COMMANDS.items()])
    return Case(files, argv, outputs)


def test_dcp(fuzz: Fuzzer) -> None:
    fuzz(make_dcp, 3)


def test_zero(fuzz: Fuzzer) -> None:
    fuzz(make_zero, 3)


def test_ranks(fuzz: Fuzzer) -> None:
    fuzz(make_ranks, 4)
