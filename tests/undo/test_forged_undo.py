"""Forge undo files that no merge wrote: every field of the index changed, bytes flipped, cut and moved.

The result is the base's own bytes or exit 3, never an internal error and never other bytes.
"""

from __future__ import annotations

import copy
import filecmp
import hashlib
import json
import math
import random
import shutil
import struct
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, factors, slow, weights, write_model, write_peft
from lib.files.undo_bytes import (
    FIRST,
    TRAILER,
    Stretch,
    add_blob,
    hashes_of,
    join_undo,
    split_undo,
    table_of,
    with_blob,
    with_table,
)
from lib.models.undo_models import write_deeper, write_replaced_codes, write_resized, write_torch
from safetensors.torch import load_file, save_file

import loratool
from loratool.commands.adapter_requests import Adapters
from loratool.errors import InputError, NeedsFlag
from loratool.undo.reader import UndoFile

KEPT = 2  # tensors of a kind whose entries are changed: the others' are no others
WRONG: tuple[Any, ...] = (None, "x", 5, -1, 1 << 62, 1 << 70, math.nan, math.inf, 0.5, True, [], {}, [[]], "x" * 300)


@dataclass(frozen=True)
class Case:
    """A merge, and its undo file in sections."""

    base: Path
    adapter: Adapters
    merged: Path
    body: bytes  # the records and blobs
    index: dict[str, Any]

    def forge(self, index: object, body: bytes | None = None) -> bytes:
        return join_undo(self.body if body is None else body, index)


def read_case(base: Path, adapter: Adapters, merged: Path, way: str = "mixed") -> Case:
    loratool.merge(base, adapter, merged, quantized=way)
    undo = merged / "loratool.undo" if merged.is_dir() else merged.with_suffix(".undo")
    return Case(base, adapter, merged, *split_undo(undo.read_bytes()))


def cases(folder: Path) -> dict[str, Case]:
    gpt2, sdxl, llama = (FIXTURES / name for name in ("gpt2", "sdxl", "llama"))
    resized, pickled = write_resized(folder / "resized"), write_torch(folder / "torch")
    replaced, deeper = write_replaced_codes(folder / "replaced"), write_deeper(folder / "deeper")
    return {
        "llama": read_case(llama / "base", llama / "adapter", folder / "llama"),
        "gpt2": read_case(gpt2 / "base" / "model.safetensors", gpt2 / "adapter", folder / "gpt2.safetensors"),
        "sdxl": read_case(
            sdxl / "base.safetensors",
            (sdxl / "adapter.safetensors", 1, {"te": 0.5, "*fc1": 2}),
            folder / "sdxl.safetensors",
        ),
        "resized": read_case(resized / "base", resized / "adapter", folder / "cut"),
        "torch": read_case(pickled / "base", pickled / "adapter", folder / "pickled"),
        "deeper": read_case(deeper / "base", deeper / "adapter", folder / "repeated"),
        "fp8": read_case(llama / "fp8", llama / "adapter", folder / "decoded"),
        "codes": read_case(llama / "fp8", llama / "adapter", folder / "recoded", "requantize"),
        "replaced codes": read_case(replaced / "base", replaced / "adapter", folder / "of-numbers"),
    }


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """List every field, as the keys that lead to it; for a model's many tensors a few."""
    if path:
        yield path
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    many = path == ("tensors",) or path[-1:] == ("specs",)
    for key, inner in items[-KEPT:] if many else items:
        yield from places(inner, (*path, key))


def forgeries(index: dict[str, Any], every: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return each field deleted, retyped, resized, exchanged with its neighbour, twice there, or the neighbour's.

    All but what nothing can tell when the hash of the index is forged too: that a tokenizer's file is new.
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


def damages(case: Case) -> Iterator[tuple[str, bytes]]:
    """Return records flipped, cut and in each other's place, and the file cut and flipped anywhere."""
    table = table_of(case.body, case.index)
    for number, (at, length, _) in enumerate(table):
        if not length:
            continue
        for place in {at, at + length // 2, at + length - 1}:
            yield f"record {number} flipped at {place}", case.forge(case.index, flipped(case.body, place, 0x55))
        yield f"record {number} cut", case.forge(case.index, case.body[:at] + case.body[at + 1 :])
        zeroed = case.body[:at] + bytes(length) + case.body[at + length :]
        yield f"record {number} zeroed", case.forge(case.index, zeroed)
    for what, rows in tables([tuple(row[1:]) for row in table]):
        body, index = with_table(case.body, case.index, rows)
        yield what, case.forge(index, body)
    for what, data in hash_lists(hashes_of(case.body, case.index)):
        body, index = with_blob(case.body, case.index, "hashes", data)
        yield what, case.forge(index, body)
    whole = case.forge(case.index)
    for end in range(0, len(whole), max(1, len(whole) // 20)):
        yield f"cut at {end}", whole[:end]
        yield f"flipped at {end}", flipped(whole, end, 0x20)


def tables(rows: list[Any]) -> Iterator[tuple[str, list[Any]]]:
    """Return tables with other lengths and sums, with rows in each other's place, and with one more or less."""
    yield "a table without its first row", rows[1:]
    yield "a table with its last row twice", [*rows, *rows[-1:]]
    for number, (length, total) in enumerate(rows):
        others = [(wrong % (1 << 64), total) for wrong in (0, length + 1, length - 1, 1 << 40, 1 << 63, (1 << 64) - 1)]
        for other in [*others, (length, total ^ 1)]:
            if other != (length, total):
                yield f"row {number} of the table = {other}", [*rows[:number], other, *rows[number + 1 :]]
        if number and rows[number - 1] != rows[number]:
            swapped = [*rows[: number - 1], rows[number], rows[number - 1], *rows[number + 1 :]]
            yield f"row {number} of the table before its neighbour", swapped
            yield f"row {number} of the table twice", [*rows[: number - 1], rows[number], *rows[number:]]


def hash_lists(hashes: bytes) -> Iterator[tuple[str, bytes]]:
    """Return the hashes of all pieces with one of them another, one more, one less, and two in each other's place."""
    yield "a byte less of the hashes", hashes[:-1]
    yield "a byte more of the hashes", hashes + b"\0"
    for at in range(0, len(hashes), 32):
        before, one, behind = hashes[:at], hashes[at : at + 32], hashes[at + 32 :]
        yield f"hash {at // 32} another", before + flipped(one, 7, 1) + behind
        yield f"hash {at // 32} left out", before + behind
        yield f"hash {at // 32} twice", before + one + one + behind
        if at and before[-32:] != one:
            yield f"hash {at // 32} before its neighbour", before[:-32] + one + before[-32:] + behind


def flipped(data: bytes, place: int, mask: int) -> bytes:
    return data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]


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


def damaged(case: Case, data: bytes, folder: Path, match: str = "is cut off or damaged") -> int:
    """Return the most bytes that Python held while an undo file was refused."""
    (folder / "forged.undo").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=match):
            loratool.unmerge(case.merged, case.adapter, folder / "back", undo=folder / "forged.undo")
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture
def resized(tmp_path: Path) -> Case:
    """A merge with records, copied rows, a header, side files and a new one."""
    folder = write_resized(tmp_path / "resized")
    return read_case(folder / "base", folder / "adapter", tmp_path / "cut")


def test_sizes_beyond_the_files_own(resized: Case, tmp_path: Path) -> None:
    """They are refused before they have the memory, and so is a pile of brackets."""
    piled = b'{"x":["' + b"x" * 300_000 + b'"' + b",[]" * 1_500_000 + b"]}"
    assert damaged(resized, resized.forge(piled), tmp_path) < 1 << 24
    digest = bytes(32)
    for at, length in ((16, 1 << 62), (1 << 63, 1 << 63), (0, 1 << 40), (len(resized.body), 1 << 40)):
        end = TRAILER.pack(at, length, digest, b"loraundo")
        assert damaged(resized, resized.body + end, tmp_path) < 1 << 24
    for owner, key in (("side", "config.json"), ("shards", 0)):
        index = copy.deepcopy(resized.index)
        place = index[owner][key]["header"] if owner == "shards" else index[owner][key]
        place[1] = 1 << 40
        assert damaged(resized, resized.forge(index), tmp_path) < 1 << 24


def test_a_place_that_names_share(resized: Case, tmp_path: Path) -> None:
    """Each of them would have the memory of the one blob, which is small beside the file."""
    index = copy.deepcopy(resized.index)
    body, place = add_blob(resized.body, bytes(1 << 22))
    index["side"] |= {f"tokenizer{number}.json": place for number in range(400)}
    assert damaged(resized, resized.forge(index, body), tmp_path) < (1 << 28) + (1 << 25)


def test_an_index_of_more_values_than_memory_holds(
    resized: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratool.files.containers.indexed_file.MOST_INDEX", 250_000_000)
    many = json.dumps({**resized.index, "more": [[300]] * 2_000_000}).encode()
    assert damaged(resized, resized.forge(many), tmp_path, "more than 250 MB of memory") < 1 << 26


@pytest.mark.parametrize("dry_run", [True, False])
def test_an_undo_file_that_nobody_would_read_is_not_written(
    resized: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry_run: bool
) -> None:
    for name, most in (("MOST_INDEX", 1000), ("MOST_BLOBS", 100)):
        with monkeypatch.context() as patch:
            patch.setattr(f"loratool.files.containers.indexed_file.{name}", most)
            with pytest.raises(NeedsFlag, match="would need an undo file of 2 changed tensors"):
                loratool.merge(resized.base, resized.adapter, tmp_path / "out", dry_run=dry_run)
            assert not (tmp_path / "out").exists()
    loratool.merge(resized.base, resized.adapter, tmp_path / "out", dry_run=dry_run)


@pytest.mark.parametrize("rows", [1 << 46, 1 << 58])
def test_a_tensor_of_more_hashes_than_memory_holds(tmp_path: Path, rows: int) -> None:
    folder = write_replaced_codes(tmp_path / "replaced")
    case = read_case(folder / "base", folder / "adapter", tmp_path / "merged")
    case.index["tensors"]["score.weight"]["spec"][1] = [rows, 4]
    assert damaged(case, case.forge(case.index), tmp_path, "its hashes") < 1 << 24


def test_hashes_of_more_or_fewer_pieces(resized: Case, tmp_path: Path) -> None:
    hashes = hashes_of(resized.body, resized.index)
    assert len(hashes) == (3 + 2) * 32  # the base has three tensors, of which the merge changed two
    for wrong in (b"", hashes[:-32], hashes[:-1], hashes[1:], hashes + b"\0", hashes + bytes(32), hashes * 2):
        body, index = with_blob(resized.body, resized.index, "hashes", wrong)
        damaged(resized, resized.forge(index, body), tmp_path, "its hashes are not as many as its tensors have pieces")


def test_a_hash_of_another_piece(resized: Case, tmp_path: Path) -> None:
    """Each of them is compared with the base or the merged file, or with what it says of the other."""
    hashes = hashes_of(resized.body, resized.index)
    names = ["model.embed_tokens.weight", "model.n", "model.x.weight"]
    faults = [f"{names[0]}: is not restored exactly", f"{names[1]}: is not what the merge wrote"]
    for number, fault in enumerate([*faults, f"{names[2]}: is not restored exactly"]):
        body, index = with_blob(resized.body, resized.index, "hashes", flipped(hashes, 32 * number + 5, 1))
        damaged(resized, resized.forge(index, body), tmp_path, fault)
        assert not (tmp_path / "back").exists()


@pytest.mark.slow
def test_a_flipped_bit_anywhere(resized: Case, tmp_path: Path) -> None:
    """Every byte is compared or under a hash, or it says what is."""
    whole, g = resized.forge(resized.index), random.Random(0)
    (tmp_path / "work").mkdir()
    for place in [*range(0, len(whole), len(whole) // 150), *range(len(whole) - TRAILER.size, len(whole), 7)]:
        assert outcome(resized, flipped(whole, place, 1 << g.randrange(8)), tmp_path / "work") == "refused", place


def test_records_of_another_span(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record of more rows than the format says would take more memory, one of fewer no merge wrote."""
    monkeypatch.setattr("loratool.undo.checks.RECORD", 8)
    base = write_model(tmp_path / "base", {"x.weight": weights(6, 4)}, {})
    case = read_case(base, write_peft(tmp_path / "adapter", {"x": factors(6, 4, 2)}), tmp_path / "merged")
    with closing(UndoFile(case.merged / "loratool.undo")) as undo:
        assert [(record.start, record.stop) for record in undo.records("x.weight")] == [(0, 2), (2, 4), (4, 6)]
    loratool.unmerge(case.merged, case.adapter, tmp_path / "whole")
    for height, fault in ((4, "fewer"), (16, "more"), (24, "more")):
        monkeypatch.setattr("loratool.undo.checks.RECORD", height)
        damaged(case, case.forge(case.index), tmp_path, f"its table has {fault} rows than its tensors")


def test_records_of_rows_that_were_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratool.undo.checks.RECORD", 16)
    folder = write_resized(tmp_path / "resized")
    case = read_case(folder / "base", folder / "adapter", tmp_path / "cut")
    assert len(table_of(case.body, case.index)) == 1 + 10 + 2  # the rows that were cut, what is beside, and x
    (tmp_path / "work").mkdir()
    assert outcome(case, case.forge(case.index), tmp_path / "work") == "right"


def test_an_index_with_the_hash_of_another(resized: Case, tmp_path: Path) -> None:
    """So that it is told that a file was new, which nothing else could."""
    assert resized.index["new_side"] == ["tokenizer_config.json"]
    other = resized.forge({**resized.index, "new_side": []})
    end = resized.forge(resized.index)[-TRAILER.size :]
    length = len(other) - len(resized.body) - TRAILER.size
    data = other[: -TRAILER.size] + end[:8] + length.to_bytes(8, "little") + end[16:]
    damaged(resized, data, tmp_path, "its index does not match its hash")


def first_of(case: Case, name: str) -> Stretch:
    return table_of(case.body, case.index)[case.index["tensors"][name]["row"]]


def test_a_damaged_row_that_was_copied(resized: Case, tmp_path: Path) -> None:
    at = first_of(resized, "model.embed_tokens.weight").at
    for place in (at, at + 4 * 8 * 4 - 1):
        data = resized.forge(resized.index, flipped(resized.body, place, 1))
        damaged(resized, data, tmp_path, r"model\.embed_tokens\.weight: is not restored exactly")
        assert not (tmp_path / "back").exists()


def overlapping(index: dict[str, Any], body: bytes) -> bytes:
    index["side"]["config.json"] = index["shards"][0]["header"]
    return body


def with_a_gap(index: dict[str, Any], body: bytes) -> bytes:
    return body + b"x"


def with_a_gap_before_a_blob(index: dict[str, Any], body: bytes) -> bytes:
    at = index["side"]["config.json"][0]
    index["side"]["config.json"][0] += 1
    return body[:at] + b" " + body[at:]


def shorter(index: dict[str, Any], body: bytes) -> bytes:
    index["side"]["config.json"][1] -= 1
    return body


def longer_record(index: dict[str, Any], body: bytes) -> bytes:
    rows = [tuple(row[1:]) for row in table_of(body, index)]
    body, forged = with_table(body, index, [*rows[:-1], (rows[-1][0] + 1, *rows[-1][1:])])
    index.update(forged)
    return body


@pytest.mark.parametrize("how", [overlapping, with_a_gap, with_a_gap_before_a_blob, shorter, longer_record])
def test_places_that_overlap_or_leave_a_gap(
    resized: Case, tmp_path: Path, how: Callable[[dict[str, Any], bytes], bytes]
) -> None:
    index = copy.deepcopy(resized.index)
    damaged(resized, resized.forge(index, how(index, resized.body)), tmp_path)


@pytest.mark.parametrize(
    "name",
    ["modeling_x.py", ".bashrc", "generation_config.json", "LICENSE", "x.json", "unet/config.json"]
    + ["2_Dense/model.safetensors", "additional_chat_templates/config.json", "additional_chat_templates/x.py"]
    + ["tokenizer_x.py", "vocab.py", "chat_template.py", "tokenizer.bin", "vocab.pt", "tokenizer.json.undo"],
)
@pytest.mark.parametrize("place", ["side", "new_side"])
def test_a_file_that_no_merge_edits(resized: Case, tmp_path: Path, name: str, place: str) -> None:
    index, body = copy.deepcopy(resized.index), resized.body
    if place == "side":
        body, index["side"][name] = add_blob(body, b"{}")
    else:
        index["new_side"].append(name)
    damaged(resized, resized.forge(index, body), tmp_path, f"it names '{name}', which is not a file of a model")
    assert not (tmp_path / "back").exists()


def test_a_shard_beside_the_shards(tmp_path: Path) -> None:
    """Written after the weights, it would replace what was restored."""
    llama = FIXTURES / "llama"
    case = read_case(llama / "base", llama / "adapter", tmp_path / "merged")
    (tmp_path / "work").mkdir()
    for name in ("model-00001-of-00002.safetensors", "model-00003-of-00003.safetensors"):
        index = copy.deepcopy(case.index)
        body, index["side"][name] = add_blob(case.body, b"{}")
        assert outcome(case, case.forge(index, body), tmp_path / "work") == "refused"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "loratool.undo", "x.sh", "x.py", "x", "x.gguf"])
def test_a_shard_that_is_not_named_as_weights(tmp_path: Path, name: str) -> None:
    """What stands in it is the forger's, and other programs go by the name."""
    llama = FIXTURES / "llama"
    case = read_case(llama / "base", llama / "adapter", tmp_path / "merged")
    index, other = copy.deepcopy(case.index), case.index["shards"][0]["name"]
    at, length, _ = index["side"]["model.safetensors.index.json"]
    assert (at + length, *index["side"]["model.safetensors.index.json"][:1]) == (len(case.body), at)
    weight_map = case.body[at:].replace(other.encode(), name.encode())
    body, index["side"]["model.safetensors.index.json"] = add_blob(case.body[:at], weight_map)
    index["shards"][0]["name"] = name
    damaged(case, case.forge(index, body), tmp_path, f"it names '{name}', which is not a file of a model")


def test_what_a_forger_of_all_hashes_reaches(resized: Case, tmp_path: Path) -> None:
    """Other numbers of a tensor that the merge changed, as a forger of the model itself does, and nothing beside."""
    at, length, *_ = first_of(resized, "model.embed_tokens.weight")
    assert (at, length) == (FIRST, 4 * 8 * 4)
    body = flipped(resized.body, at, 1)
    stored = load_file(resized.base / "model.safetensors")["model.embed_tokens.weight"].numpy().tobytes()
    assert stored[-length:] == resized.body[at : at + length]
    whole = stored[:-length] + body[at : at + length]
    hashes = hashes_of(body, resized.index)
    assert hashes.startswith(hashlib.sha256(stored).digest())
    body, index = with_blob(body, resized.index, "hashes", hashlib.sha256(whole).digest() + hashes[32:])
    (tmp_path / "forged.undo").write_bytes(resized.forge(index, body))
    loratool.unmerge(resized.merged, resized.adapter, tmp_path / "back", undo=tmp_path / "forged.undo")
    assert not filecmp.dircmp(resized.base, tmp_path / "back").right_only
    before, after = (load_file(folder / "model.safetensors") for folder in (resized.base, tmp_path / "back"))
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["model.embed_tokens.weight"]


def test_some_forgeries(tmp_path: Path) -> None:
    assert campaign(tmp_path, 131)["refused"] > 20


@pytest.mark.slow
def test_every_forgery(tmp_path: Path) -> None:
    found = campaign(tmp_path, 1)
    assert found.total() >= 1500 and found["wrong"] == 0


@pytest.mark.parametrize("norm", [5e-324, slow(1e-310), slow(1e-200), slow(1e200), 1.7e308, slow(0.0)])
def test_norms_of_another_row(tmp_path: Path, norm: float) -> None:
    """A norm has no hash of its own: what it makes of W is refused, however far it is from any row's."""
    base = write_model(tmp_path / "base", {"x.weight": weights(6, 20)}, {"model_type": "llama"})
    A, B = factors(6, 20, 2)
    write_peft(tmp_path / "a", {"x": (A, B)}, use_dora=True)
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    stored["base_model.model.x.lora_magnitude_vector"] = weights(6).abs() + 1
    save_file(stored, tmp_path / "a" / "adapter_model.safetensors")
    loratool.merge(base, tmp_path / "a", tmp_path / "m")
    undo = tmp_path / "m" / "loratool.undo"
    data, start = undo.read_bytes(), len(b"loratool undo 4\n") + 8 * 3
    undo.write_bytes(data[:start] + struct.pack("<d", norm) + data[start + 8 :])
    with pytest.raises(InputError, match=r"x\.weight: (is not restored exactly|cannot be restored)"):
        loratool.unmerge(tmp_path / "m", tmp_path / "a", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    undo.write_bytes(data)
    loratool.unmerge(tmp_path / "m", tmp_path / "a", tmp_path / "back")
