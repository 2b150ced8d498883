"""Forge undo files that no merge wrote: every field of the index changed, records flipped and cut, bombs.

The result is the base's own bytes or exit 3, never an internal error and never other bytes.
"""

from __future__ import annotations

import base64
import copy
import filecmp
import json
import math
import random
import shutil
import struct
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIXTURES, factors, weights, write_model, write_peft
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import InputError
from loratool.undo.records import Restorer

KEPT = 2  # tensors of a kind whose entries are changed: the others' are no others
WRONG: tuple[Any, ...] = (None, "x", 5, -1, 1 << 62, 1 << 70, math.nan, math.inf, 0.5, True, [], {}, [[]], "x" * 300)


@dataclass(frozen=True)
class Case:
    """A merge, and its undo file in sections."""

    base: Path
    adapter: Path
    merged: Path
    records: bytes
    index: dict[str, Any]

    def forge(self, index: object, records: bytes | None = None) -> bytes:
        return assemble(self.records if records is None else records, json.dumps(index).encode())


def assemble(records: bytes, index: bytes) -> bytes:
    packed = zlib.compress(index)
    return records + packed + struct.pack("<QQ", len(records), len(packed)) + b"loraundo"


def read_case(base: Path, adapter: Path, merged: Path) -> Case:
    loratool.merge(base, adapter, merged)
    data = (merged / "loratool.undo" if merged.is_dir() else merged.with_suffix(".undo")).read_bytes()
    at, length = struct.unpack("<QQ", data[-24:-8])
    return Case(base, adapter, merged, data[:at], json.loads(zlib.decompress(data[at : at + length])))


def write_resized(folder: Path) -> Path:
    """Write a vocabulary that the adapter cuts, so that rows are copied, and a tokenizer that it adds."""
    tensors = {"model.embed_tokens.weight": weights(24, 8), "model.x.weight": weights(6, 4), "model.n": torch.tensor(3)}
    write_model(folder / "base", tensors, {"model_type": "llama", "vocab_size": 24})
    adapter = write_peft(folder / "adapter", {"model.x": factors(6, 4, 2)}, modules_to_save=["embed_tokens"])
    own = load_file(adapter / "adapter_model.safetensors")
    own["base_model.model.model.embed_tokens.weight"] = weights(20, 8, seed=7)
    save_file(own, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    (adapter / "tokenizer_config.json").write_text("{}")
    return folder


def write_torch(folder: Path) -> Path:
    (folder / "base").mkdir(parents=True)
    torch.save({"x.weight": weights(6, 4), "y.weight": weights(6, 4)}, folder / "base" / "pytorch_model.bin")
    (folder / "base" / "config.json").write_text("{}")
    write_peft(folder / "adapter", {"x": factors(6, 4, 2)})
    return folder


def cases(folder: Path) -> dict[str, Case]:
    gpt2, sdxl, llama = (FIXTURES / name for name in ("gpt2", "sdxl", "llama"))
    resized, pickled = write_resized(folder / "resized"), write_torch(folder / "torch")
    return {
        "llama": read_case(llama / "base", llama / "adapter", folder / "llama"),
        "gpt2": read_case(gpt2 / "base" / "model.safetensors", gpt2 / "adapter", folder / "gpt2.safetensors"),
        "sdxl": read_case(sdxl / "base.safetensors", sdxl / "adapter.safetensors", folder / "sdxl.safetensors"),
        "resized": read_case(resized / "base", resized / "adapter", folder / "cut"),
        "torch": read_case(pickled / "base", pickled / "adapter", folder / "pickled"),
    }


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """List every field, as the keys that lead to it; for a model's many tensors a few."""
    if path:
        yield path
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    many = path in (("tensors",), ("untouched",)) or path[-1:] == ("specs",)
    for key, inner in items[-KEPT:] if many else items:
        yield from places(inner, (*path, key))


def forgeries(index: dict[str, Any], every: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return each field deleted, retyped, resized, exchanged with its neighbour, twice there, or the neighbour's.

    All but what version 1 of the layout cannot tell: that a tokenizer's file is new.
    """
    for path in list(places(index))[every // 2 :: every]:
        *above, key = path

        def made(above: list[Any] = above) -> tuple[dict[str, Any], Any]:
            whole = copy.deepcopy(index)
            owner: Any = whole
            for each in above:
                owner = owner[each]
            return whole, owner

        is_new = path[0] == "new_side"
        whole, owner = made()
        del owner[key]
        if not is_new:
            yield f"{path} deleted", whole
        whole, owner = made()
        keys = list(owner) if isinstance(owner, dict) else list(range(len(owner)))
        for value in WRONG:
            whole, owner = made()
            if (type(owner[key]) is not type(value) or owner[key] != value) and not (is_new and value == []):
                owner[key] = copy.deepcopy(value)
                yield f"{path} = {value!r}"[:200], whole
        other = keys[keys.index(key) - 1]
        whole, owner = made()
        if owner[key] != owner[other]:
            owner[key], owner[other] = owner[other], owner[key]
            yield f"{path} exchanged with {other}", whole
            whole, owner = made()
            owner[key] = copy.deepcopy(owner[other])
            yield f"{path} is {other}'s", whole
        whole, owner = made()
        if isinstance(owner, list):
            owner.insert(key, copy.deepcopy(owner[key]))
        else:
            owner["model.other.weight" if above else "other"] = copy.deepcopy(owner[key])
        yield f"{path} twice", whole
        whole, owner = made()
        if type(owner[key]) in (int, float):
            owner[key] += 1
            yield f"{path} + 1", whole


def untold(case: Case) -> list[tuple[int, int]]:
    """Return the bytes of which version 1 of the layout has no hash: rows that a merge cut off."""
    copied = [(entry["copied"][1], entry) for entry in case.index["tensors"].values() if "copied" in entry]
    later = [r[2] for entry in case.index["tensors"].values() for r in entry["records"]]
    return [(at, min([each for each in later if each > at], default=len(case.records))) for at, _ in copied]


def damages(case: Case) -> Iterator[tuple[str, bytes]]:
    """Return records flipped, cut, and in each other's place."""
    found = [r for entry in case.index["tensors"].values() for r in entry["records"] if r[3]]
    for number, (_, _, at, length, *_) in enumerate(found):
        for place in {at, at + length // 2, at + length - 1}:
            data = bytearray(case.records)
            data[place] ^= 0x55
            yield f"record {number} flipped at {place}", case.forge(case.index, bytes(data))
        cut = case.records[:at] + case.records[at + 1 :]
        yield f"record {number} cut", case.forge(case.index, cut)
        yield (
            f"record {number} zeroed",
            case.forge(case.index, case.records[:at] + bytes(length) + case.records[at + length :]),
        )
    whole = case.forge(case.index)
    for end in range(0, len(whole), max(1, len(whole) // 20)):
        yield f"cut at {end}", whole[:end]
        if not any(first <= end < last for first, last in untold(case)):
            yield f"flipped at {end}", whole[:end] + bytes([whole[end] ^ 0x20]) + whole[end + 1 :]


def outcome(case: Case, data: bytes, folder: Path) -> str:
    """Return `right`, `refused`, or what is wrong with the outcome of an undo file."""
    undo, out = folder / "forged.undo", folder / ("back" if case.merged.is_dir() else "back.safetensors")
    undo.write_bytes(data)
    try:
        loratool.unmerge(case.merged, case.adapter, out, undo=undo, workers=1)
    except InputError:
        return "refused" if [p.name for p in folder.iterdir()] == ["forged.undo"] else "left something"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    right = is_base(case, out)
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    return "right" if right else "wrong bytes"


def is_base(case: Case, out: Path) -> bool:
    if not out.is_dir():
        return filecmp.cmp(out, case.base, shallow=False)
    if (case.base / "pytorch_model.bin").exists():
        expected = torch.load(case.base / "pytorch_model.bin")
        back = load_file(out / "model.safetensors") if (out / "model.safetensors").exists() else {}
        same = back.keys() == expected.keys() and all(torch.equal(back[name], W) for name, W in expected.items())
        return same and {p.name for p in out.iterdir()} == {"config.json", "model.safetensors"}
    compared = filecmp.dircmp(case.base, out)
    names = compared.common_files
    return (
        not compared.left_only
        and not compared.right_only
        and filecmp.cmpfiles(case.base, out, names, False)[0] == names
    )


def campaign(folder: Path, every: int) -> Counter[str]:
    found: Counter[str] = Counter()
    bad = []
    (folder / "work").mkdir()
    for name, case in cases(folder).items():
        assert outcome(case, case.forge(case.index), folder / "work") == "right"
        forged = ((what, case.forge(index)) for what, index in forgeries(case.index, every))
        for what, data in chain(forged, list(damages(case))[every // 2 :: every]):
            came = outcome(case, data, folder / "work")
            found[came if came in ("right", "refused") else "wrong"] += 1
            bad += [] if came in ("right", "refused") else [f"{name}: {what}: {came}"]
            if bad and not came.startswith(("right", "refused")):
                for left in (folder / "work").iterdir():
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
    print(dict(found), *bad[:40], sep="\n")
    assert not bad, f"{len(bad)}: {bad[:5]}"
    return found


def damaged(case: Case, data: bytes, folder: Path) -> int:
    """Return the most bytes that Python held while an undo file was refused as damaged."""
    (folder / "forged.undo").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="is cut off or damaged"):
            loratool.unmerge(case.merged, case.adapter, folder / "back", undo=folder / "forged.undo")
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_bombs(tmp_path: Path) -> None:
    """Deflated zeros and brackets are refused before they have the memory."""
    folder = write_resized(tmp_path / "resized")
    case = read_case(folder / "base", folder / "adapter", tmp_path / "cut")
    assert damaged(case, assemble(case.records, b" " * (1 << 25)), tmp_path) < 1 << 24
    noise = json.dumps(random.Random(0).randbytes(150_000).hex()).encode()
    assert damaged(case, assemble(case.records, b'{"x":[' + noise + b",[]" * 1_500_000 + b"]}"), tmp_path) < 1 << 24
    bomb = base64.b64encode(zlib.compress(bytes(1 << 25), 9)).decode()
    for forged in (
        {**case.index, "side": {"config.json": bomb}},
        {**case.index, "shards": [{**case.index["shards"][0], "header": bomb}]},
    ):
        assert damaged(case, case.forge(forged), tmp_path) < 1 << 24
    for end in (struct.pack("<QQ", 16, 1 << 62), struct.pack("<QQ", 1 << 63, 1 << 63), struct.pack("<QQ", 0, 1 << 40)):
        assert damaged(case, case.records + end + b"loraundo", tmp_path) < 1 << 24


def test_a_bomb_in_a_record() -> None:
    data = zlib.compress(bytes(1 << 25), 9)
    restorer = Restorer("x", torch.float64, b"\1" + len(data).to_bytes(4, "little") + data, ("", ""))
    tracemalloc.start()
    with suppress(ValueError):
        restorer.difference(np.zeros(4, np.int64))
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


@pytest.mark.parametrize(
    "name", ["modeling_x.py", ".bashrc", "generation_config.json", "LICENSE", "x.json", "unet/config.json"]
)
@pytest.mark.parametrize("place", ["side", "new_side"])
def test_a_file_that_no_merge_edits(tmp_path: Path, name: str, place: str) -> None:
    folder = write_resized(tmp_path / "resized")
    case = read_case(folder / "base", folder / "adapter", tmp_path / "cut")
    index = copy.deepcopy(case.index)
    if place == "side":
        index["side"][name] = index["side"]["config.json"]
    else:
        index["new_side"].append(name)
    (tmp_path / "forged.undo").write_bytes(case.forge(index))
    with pytest.raises(InputError, match=f"it names '{name}', which is no file of a model"):
        loratool.unmerge(case.merged, case.adapter, tmp_path / "back", undo=tmp_path / "forged.undo")
    assert not (tmp_path / "back").exists()


def test_a_shard_beside_the_shards(tmp_path: Path) -> None:
    """Written after the weights, it would replace what was restored."""
    llama = FIXTURES / "llama"
    case = read_case(llama / "base", llama / "adapter", tmp_path / "merged")
    (tmp_path / "work").mkdir()
    for name in ("model-00001-of-00002.safetensors", "model-00003-of-00003.safetensors", "tokenizer.json"):
        index = copy.deepcopy(case.index)
        index["side"][name] = index["side"]["config.json"]
        assert outcome(case, case.forge(index), tmp_path / "work") == "refused"


def test_some_forgeries(tmp_path: Path) -> None:
    assert campaign(tmp_path, 131)["refused"] > 20


@pytest.mark.slow
def test_every_forgery(tmp_path: Path) -> None:
    found = campaign(tmp_path, 1)
    assert found.total() >= 1500 and found["wrong"] == 0
