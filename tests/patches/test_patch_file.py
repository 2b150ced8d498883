"""Forge patches that `patch` did not write: each byte flipped, cut anywhere, every field of the index changed.

The result is the target's own bytes or exit 3, never an internal error, other bytes or a file outside the output.
"""

from __future__ import annotations

import bz2
import copy
import hashlib
import json
import math
import pickle
import shutil
import struct
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, slow, weights, write_model, write_peft
from lib.files.patch_bytes import FIRST, ONE_WAY, TRAILER, Parts, blobs, join_patch, split_patch, with_side
from lib.models.patch_pairs import PAIRS, moved, tree

import loratool
from loratool.errors import InputError, UsageError

WRONG: tuple[Any, ...] = (None, "x", 5, -1, 1 << 62, 1 << 70, math.nan, math.inf, 0.5, True, [], {}, [[]], "x" * 300)


@dataclass(frozen=True)
class Case:
    """A pair of models, and the parts of their patch."""

    base: Path
    tuned: Path
    data: bytes

    @property
    def parts(self) -> Parts:
        return split_patch(self.data)


def small(folder: Path) -> Case:
    """Return a patch that leads back and has few bytes, with a side file on both sides."""
    before = {"a.weight": weights(8, 8).bfloat16(), "b.weight": weights(4, 4), "c": torch.arange(8)}
    after = {**before, "a.weight": moved(before["a.weight"], 2e-2), "c": torch.arange(8).flip(0).contiguous()}
    base = write_model(folder / "base", before, {"model_type": "llama"})
    tuned = write_model(folder / "tuned", after, {"model_type": "llama", "x": 1})
    loratool.patch(base, tuned, folder / "p")
    return Case(base, tuned, (folder / "p").read_bytes())


def case_of(name: str, folder: Path) -> Case:
    base, tuned = PAIRS[name][0](folder)
    loratool.patch(base, tuned, folder / "p")
    return Case(base, tuned, (folder / "p").read_bytes())


def outcome(case: Case, data: bytes, folder: Path, reverse: bool = False) -> str:
    """Return `right`, `refused`, or what is wrong with the outcome of a patch."""
    work = folder / "work"
    work.mkdir(exist_ok=True)
    given, wanted = (case.tuned, case.base) if reverse else (case.base, case.tuned)
    out = work / f"out{wanted.suffix}"
    (work / "p").write_bytes(data)
    try:
        loratool.apply(given, work / "p", out, reverse=reverse, workers=1)
    except (InputError, UsageError) as error:  # of usage, where it says that the model is a file
        assert "\n" not in error.message
        return "refused" if [each.name for each in work.iterdir()] == ["p"] else "left something"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    right = tree(out) == tree(wanted) and {each.name for each in work.iterdir()} == {"p", out.name}
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    return "right" if right else "wrong bytes"


def refused(case: Case, data: bytes, folder: Path, match: str = "is cut off or damaged") -> int:
    """Return the most bytes that Python held while a patch was refused."""
    (folder / "forged").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=match):
            loratool.apply(case.base, folder / "forged", folder / "out", workers=1)
        assert not (folder / "out").exists()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return small(tmp_path)


def flipped(data: bytes, place: int, mask: int = 1) -> bytes:
    return data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]


def test_parts_make_the_patch(case: Case) -> None:
    """What the forgeries below are made by."""
    assert case.parts.joined() == case.data


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("every", [41, slow(1)])
def test_each_byte_flipped(case: Case, tmp_path: Path, every: int, reverse: bool) -> None:
    for place in range(0, len(case.data), every):
        assert outcome(case, flipped(case.data, place, 1 << place % 8), tmp_path, reverse) in ("refused", "right"), (
            place
        )


@pytest.mark.parametrize("every", [83, slow(1)])
def test_cut_at_each_length(case: Case, tmp_path: Path, every: int) -> None:
    for size in range(0, len(case.data), every):
        assert outcome(case, case.data[:size], tmp_path) == "refused", size


@pytest.mark.parametrize("more", [b"x", bytes(56), b"\n" * 1000])
def test_bytes_behind_the_end(case: Case, tmp_path: Path, more: bytes) -> None:
    refused(case, case.data + more, tmp_path)


def test_bodies_of_another_span(case: Case, tmp_path: Path) -> None:
    """Rows in each other's place, one more, one less, and other numbers in each."""
    parts = case.parts
    assert len(parts.rows) == 3
    for number, row in enumerate(parts.rows):
        others = [parts.rows[:number] + parts.rows[number + 1 :], [*parts.rows, row]]
        others += [[*parts.rows[:number], row, row, *parts.rows[number + 2 :]]] if number < 2 else []
        swapped = [*parts.rows]
        swapped[number], swapped[number - 1] = swapped[number - 1], row
        others.append(swapped)
        changed = [(row[0] + 1, *row[1:]), (row[0], row[1] + 1, *row[2:]), (*row[:2], row[2] + 1, *row[3:])]
        changed += [(*row[:3], bytes(32), row[4]), (*row[:4], bytes(32)), (*row[:2], ONE_WAY, *row[3:])]
        changed += [(row[0], 1 << 62, *row[2:]), (255, *row[1:]), (row[0] + 256, *row[1:]), (1 << 63, *row[1:])]
        others += [[*parts.rows[:number], each, *parts.rows[number + 1 :]] for each in changed]
        for rows in others:
            if rows != parts.rows:
                forged = parts.copy()
                forged.rows = rows  # type: ignore[assignment]
                assert outcome(case, forged.joined(), tmp_path) == "refused", rows


def fields(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """List every field, as the keys that lead to it."""
    if path:
        yield path
    items = list(value.items()) if isinstance(value, dict) else [*enumerate(value)] if isinstance(value, list) else []
    for key, inner in items:
        yield from fields(inner, (*path, key))


def forgeries(index: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return each field deleted, retyped, resized, the neighbour's, and twice there."""
    for path in list(fields(index)):
        *above, key = path

        def made(above: list[Any] = above) -> tuple[dict[str, Any], Any]:
            whole = copy.deepcopy(index)
            owner: Any = whole
            for each in above:
                owner = owner[each]
            return whole, owner

        whole, owner = made()
        del owner[key]
        yield f"{path} deleted", whole
        for value in WRONG:
            whole, owner = made()
            if type(owner[key]) is not type(value) or owner[key] != value:
                owner[key] = copy.deepcopy(value)
                yield f"{path} = {value!r}"[:200], whole
        whole, owner = made()
        keys = list(owner) if isinstance(owner, dict) else list(range(len(owner)))
        other = keys[keys.index(key) - 1]
        if owner[key] != owner[other]:
            owner[key], owner[other] = owner[other], owner[key]
            yield f"{path} exchanged with {other}", whole
        whole, owner = made()
        if isinstance(owner, list):
            owner.insert(key, copy.deepcopy(owner[key]))
        else:
            owner["other.weight" if above else "other"] = copy.deepcopy(owner[key])
        yield f"{path} twice", whole
        whole, owner = made()
        if type(owner[key]) is int:
            owner[key] += 1
            yield f"{path} + 1", whole


def raw_index(data: bytes) -> tuple[bytes, dict[str, Any]]:
    first, length, _, _ = TRAILER.unpack(data[-TRAILER.size :])
    return data[:first], json.loads(data[first : first + length])


MISSING = (" deleted", "= {}")  # a side file: nothing but the hash of the index can tell, which a forger makes again


def campaign(case: Case, folder: Path, every: int) -> Counter[str]:
    found: Counter[str] = Counter()
    bad = []
    body, index = raw_index(case.data)
    for number, (what, forged) in enumerate(forgeries(index)):
        if number % every or (what.startswith("('side'") and what.endswith(MISSING)):
            continue
        came = outcome(case, join_patch(body, forged), folder)
        found[came if came in ("right", "refused") else "wrong"] += 1
        bad += [] if came in ("right", "refused") else [f"{what}: {came}"]
        shutil.rmtree(folder / "work")
    print(dict(found), *bad[:40], sep="\n")
    assert not bad, f"{len(bad)}: {bad[:5]}"
    return found


@pytest.mark.parametrize(
    ("name", "every"),
    [("small", 13), *(slow(name, 1) for name in ("small", "torch", "other tensors", "diffusers", "renamed"))],
)
def test_every_field_of_the_index(tmp_path: Path, name: str, every: int) -> None:
    case = small(tmp_path) if name == "small" else case_of(name, tmp_path)
    found = campaign(case, tmp_path, every)
    assert found["refused"] > 5 * found["right"] > 0


STRANGE = [
    *("modeling_x.py", ".bashrc", "x.sh", "../x.json", "/x.json", "a/../x.json", "a\\b.json", "C:x.json", "a/b/c.json"),
    *("tokenizer_x.PY", "tokenizer.bin", "vocab.pt", "tokenizer.json.undo", "optimizer.json.pt", ".git/config.json"),
    *("model.safetensors", "x.safetensors", "pytorch_model.bin", "adapter_config.json", "unet/x.py"),
    *("", ".", "x\0.json"),
]


@pytest.mark.parametrize("name", STRANGE)
def test_side_files_that_no_patch_brings(case: Case, tmp_path: Path, name: str) -> None:
    data = with_side(case.parts, name, b"{}").joined()
    refused(case, data, tmp_path, "is not a side file that a patch can have")
    data = with_side(case.parts, name, b"{}", "base_side").joined()
    refused(case, data, tmp_path, "is not a side file that a patch can have")


@pytest.mark.parametrize("name", ["x.py", "m.bin", "x.sh", ".rc", "m.gguf", "../m.safetensors", "a/b/m.safetensors"])
def test_weights_that_are_not_named_as_weights(case: Case, tmp_path: Path, name: str) -> None:
    forged = case.parts
    forged.index["target"]["files"][0]["name"] = name
    refused(case, forged.joined(), tmp_path)


def without_tensors(case: Case, name: str, frame: bytes) -> Parts:
    """Return a patch of a file that is all frame."""
    forged = case.parts
    entry = {"name": name, "nbytes": len(frame), "head": 0, "frame": bz2.compress(frame), "frame_bytes": len(frame)}
    forged.index["target"] |= {"files": [{**entry, "tensors": {}}], "digest": hashlib.sha256(b"").hexdigest()}
    forged.index |= {"reversible": False, "base_side": {}, "cast": {}, "new": [], "bodies": []}
    forged.payload, forged.rows = b"", []
    return forged


def test_a_program_in_the_place_of_weights(case: Case, tmp_path: Path) -> None:
    for name in ("run.py", "model.safetensors", "model.gguf", "run.sh"):
        refused(case, without_tensors(case, name, b"import os").joined(), tmp_path, "is no name of weights")


class Evil:
    """Runs a program where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return exec, ("raise SystemExit",)


def test_a_pickle_that_runs_a_program(case: Case, tmp_path: Path) -> None:
    torch.save({"x": Evil()}, tmp_path / "evil.bin")
    for frame in (pickle.dumps(Evil()), (tmp_path / "evil.bin").read_bytes(), b"x"):
        data = without_tensors(case, "pytorch_model.bin", frame).joined()
        refused(case, data, tmp_path, "makes a torch file that is not of plain weights")


def test_a_pickle_of_other_tensors(tmp_path: Path) -> None:
    """Its tensors are read back before it gets its name."""
    case = case_of("torch", tmp_path)
    forged = case.parts
    entry = forged.index["target"]["files"][0]
    frame = bz2.decompress(entry["frame"]).replace(b"model.norm.weight", b"model.morn.weight")
    assert len(frame) == entry["frame_bytes"]
    entry["frame"] = bz2.compress(frame)
    refused(case, forged.joined(), tmp_path, "makes a torch file of other tensors than it says")


def header(tensors: dict[str, Any]) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def with_header(case: Case, tensors: dict[str, Any], nbytes: int) -> Parts:
    forged, head = case.parts, header(tensors)
    entry = forged.index["target"]["files"][0]
    entry |= {"head": len(head), "frame": bz2.compress(head), "frame_bytes": len(head), "nbytes": len(head) + nbytes}
    forged.index |= {"reversible": False, "base_side": {}}
    forged.index["base"]["files"] = None
    forged.rows = [(*row[:2], ONE_WAY, *row[3:]) for row in forged.rows]
    return forged


@pytest.mark.parametrize("bits", [30, 45, 61])
def test_a_tensor_of_more_bytes_than_memory(case: Case, tmp_path: Path, bits: int) -> None:
    tensors = {"a.weight": {"dtype": "U8", "shape": [1 << bits], "data_offsets": [0, 1 << bits]}}
    forged = with_header(case, tensors, 1 << bits)
    forged.index["new"] = ["a.weight"]
    assert refused(case, forged.joined(), tmp_path) < 1 << 24


def test_a_span_of_more_bytes_than_its_body(case: Case, tmp_path: Path) -> None:
    """A body of some bytes says that sixteen million are the same: the memory is the span's."""
    tensors = {"a.weight": {"dtype": "U8", "shape": [1 << 24], "data_offsets": [0, 1 << 24]}}
    forged = with_header(case, tensors, 1 << 24)
    forged.index |= {"new": ["a.weight"], "bodies": ["bytes"]}
    forged.payload, forged.rows = b"\1\7", [(0, 2, ONE_WAY, bytes(32), bytes(32))]
    assert refused(case, forged.joined(), tmp_path, "it makes other numbers than it says") < 5 << 24


@pytest.mark.parametrize("count", [10_000, slow(1_000_000)])
def test_many_tensors(case: Case, tmp_path: Path, count: int) -> None:
    tensors = {f"{i:x}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(count)}
    assert refused(case, with_header(case, tensors, 0).joined(), tmp_path, "damaged|more than 180 MB") < 4_000 * count


@pytest.mark.slow
def test_frames_that_unpack_to_more_than_memory(case: Case, tmp_path: Path) -> None:
    forged = case.parts
    zeros, nbytes = bz2.compress(bytes(1 << 27)), 1 << 27
    entry = {"nbytes": nbytes, "head": 0, "frame": zeros, "frame_bytes": nbytes, "tensors": {}}
    forged.index["target"]["files"] = [{**entry, "name": f"{i}.bin"} for i in range(20)]
    assert refused(case, forged.joined(), tmp_path, "larger than any") < 7 << 27
    forged = case.parts
    content = bytes(1 << 27)
    side = [hashlib.sha256(content).hexdigest(), zeros, nbytes]
    forged.index["side"] |= {f"tokenizer{i}.json": [*side] for i in range(20)}
    assert refused(case, forged.joined(), tmp_path, "larger than any") < 7 << 27


def test_sizes_beyond_the_files_own(case: Case, tmp_path: Path) -> None:
    body, index = raw_index(case.data)
    piled = b'{"x":["' + b"x" * 300_000 + b'"' + b",[]" * 1_500_000 + b"]}"
    assert refused(case, join_patch(body, piled), tmp_path) < 1 << 24
    assert refused(case, join_patch(body, b"[" * 100_000), tmp_path, ".") < 1 << 24
    for at, length in ((17, 1 << 62), (1 << 63, 1 << 63), (0, 1 << 40), (len(body), 1 << 40)):
        assert refused(case, body + TRAILER.pack(at, length, bytes(32), b"lorapatc"), tmp_path) < 1 << 24
    for owner, key in blobs(index):
        place = owner[key]
        text = json.dumps(index).replace(json.dumps(place), json.dumps([place[0], 1 << 40, place[2]]))
        assert refused(case, join_patch(body, text.encode()), tmp_path) < 1 << 24
    index["target"]["files"][0]["frame_bytes"] = 1 << 40
    assert refused(case, join_patch(body, index), tmp_path) < 1 << 24


def test_places_that_overlap_or_leave_a_gap(case: Case, tmp_path: Path) -> None:
    body, index = raw_index(case.data)
    refused(case, join_patch(body + b"x", index), tmp_path)
    index["side"]["config.json"][1] = index["target"]["files"][0]["frame"]
    refused(case, join_patch(body, index), tmp_path)


def test_digests_of_another_model(case: Case, tmp_path: Path) -> None:
    forged = case.parts
    forged.index["target"]["digest"] = "0" * 64
    refused(case, forged.joined(), tmp_path, "makes another model than it names")


def test_other_versions_and_kinds(case: Case, tmp_path: Path) -> None:
    other = case.data.replace(FIRST, b"loratool patch 2\n")
    refused(case, other, tmp_path, "is a patch of loratool of version 2, not 1")
    refused(
        case, case.data.replace(FIRST, b"loratool undo 4\n\n"), tmp_path, "is an undo file of loratool, not a patch"
    )
    forged = case.parts
    forged.index["version"] = 2
    refused(case, forged.joined(), tmp_path, "its index is of another version")
    forged.index |= {"version": 1, "bodies": ["zstd", *forged.index["bodies"][1:]]}
    refused(case, forged.joined(), tmp_path, "has numbers in a way that this loratool does not know")


@pytest.mark.parametrize("value", [None, "2", -1, 2.0, True, ...])
def test_arithmetic_of_adapters(tmp_path: Path, value: object) -> None:
    """A patch with adapters says by which version they are merged, and another patch says nothing."""
    case = small(tmp_path)
    write_peft(tmp_path / "adapter", {"a": factors(8, 8, 2)})
    loratool.patch(case.base, case.tuned, tmp_path / "adapter.patch", adapter=tmp_path / "adapter")
    predicted = split_patch((tmp_path / "adapter.patch").read_bytes())
    for parts in (predicted, case.parts):
        if value is ...:
            del parts.index["arithmetic"]
        elif parts.index["arithmetic"] != value:
            parts.index["arithmetic"] = value
        else:
            continue
        refused(case, parts.joined(), tmp_path)
