"""Hold what an undo file says of itself: its version, the base's card, codes found anew, and the tiling of records."""

from __future__ import annotations

import bz2
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, factors, weights, write_model, write_peft
from lib.files.undo_bytes import add_blob, forge, hashes_of, join_undo, split_undo, with_blob
from safetensors.torch import load_file

import loratool
from loratool.errors import InputError, MachineError
from loratool.files.dtypes import TensorSpec
from loratool.undo.checks import Tiles, coded_tiling, tiling
from loratool.undo.reader import UndoFile
from loratool.undo.table import ROW, UndoTable

CARD = b"---\nlicense: mit\n---\n# The base\n"
NAMES = ("model.safetensors", "model.safetensors.index.json")


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two files with a card, of which a merge changed one tensor."""
    folder = tmp_path_factory.mktemp("merged")
    tensors = {"x.weight": weights(6, 4), "y.weight": weights(6, 4)}
    base = write_model(folder / "base", tensors, {"model_type": "x"}, shards=2)
    (base / "README.md").write_bytes(CARD)
    loratool.merge(base, write_peft(folder / "adapter", {"x": factors(6, 4, 2)}), folder / "out")
    return folder


@pytest.fixture
def undo(merged: Path, tmp_path: Path) -> Iterator[Path]:
    yield Path(shutil.copy(merged / "out" / "loratool.undo", tmp_path / "forged.undo"))


def refusal(undo: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        UndoFile(undo)
    assert caught.value.culprit == str(undo)
    return caught.value


def test_the_bases_card_comes_back(merged: Path, undo: Path, tmp_path: Path) -> None:
    with closing(UndoFile(undo)) as file:
        assert file.side["README.md"] == CARD
    loratool.unmerge(merged / "out", merged / "adapter", tmp_path / "back")
    names = sorted(path.name for path in (merged / "base").iterdir())
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == names
    assert all((tmp_path / "back" / name).read_bytes() == (merged / "base" / name).read_bytes() for name in names)


def put_card(undo: Path, packed: bytes, nbytes: Any) -> None:
    """Write another card into an undo file, in the place of its own, which is its last blob."""
    body, index = split_undo(undo.read_bytes())
    body, index["card"] = add_blob(body[: index["card"][0]], packed)
    undo.write_bytes(join_undo(body, {**index, "card_bytes": nbytes}))


CARDS: dict[str, tuple[bytes, Any, str]] = {
    "damaged": (bz2.compress(CARD)[:20] + bytes(20), len(CARD), "its model card"),
    "no archive": (CARD, len(CARD), "its model card is damaged"),
    "cut off": (bz2.compress(CARD)[:-9], len(CARD), "its model card does not match its hash"),
    "longer": (bz2.compress(CARD + b"x"), len(CARD), "its model card does not match its hash"),
    "shorter": (bz2.compress(CARD), len(CARD) + 1, "its model card does not match its hash"),
    "something behind": (bz2.compress(CARD) + b"x", len(CARD), "its model card does not match its hash"),
    "without end": (bz2.compress(bytes(1 << 24)), len(CARD), "its model card does not match its hash"),
    "of no bytes": (bz2.compress(CARD), -1, "its model card"),
    "of many bytes": (bz2.compress(CARD), 1 << 40, "its model card"),
}


@pytest.mark.parametrize("case", CARDS)
def test_a_card_that_lies(undo: Path, case: str) -> None:
    packed, nbytes, message = CARDS[case]
    put_card(undo, bz2.compress(b"another"), len(b"another"))
    with closing(UndoFile(undo)) as file:
        assert file.side["README.md"] == b"another"
    put_card(undo, packed, nbytes)
    assert f"is cut off or damaged: {message}" in str(refusal(undo))


def test_a_python_without_bzip2(merged: Path, undo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so before anything is written; without a card nothing is missing."""
    monkeypatch.setitem(sys.modules, "bz2", None)
    for call in (
        lambda: UndoFile(undo),
        lambda: loratool.merge(merged / "base", merged / "adapter", tmp_path / "again"),
    ):
        with pytest.raises(MachineError, match="this Python has no module bz2") as refused:
            call()
        assert "libbz2" in (refused.value.remedy or "")
    assert not (tmp_path / "again").exists()
    base = shutil.copytree(merged / "base", tmp_path / "base", ignore=shutil.ignore_patterns("README.md"))
    loratool.merge(base, merged / "adapter", tmp_path / "again")
    loratool.unmerge(tmp_path / "again", merged / "adapter", tmp_path / "back")


VERSIONS: dict[str, tuple[Callable[[bytes], bytes], str, str]] = {
    "1": (lambda data: data.replace(b"undo 4\n", b"undo 1\n", 1), "version 1, not 4", "that merged"),
    "3": (lambda data: data.replace(b"undo 4\n", b"undo 3\n", 1), "version 3, not 4", "that merged"),
    "5": (lambda data: data.replace(b"undo 4\n", b"undo 5\n", 1), "version 5, not 4", "that merged"),
    "another index": (
        lambda data: join_undo(split_undo(data)[0], {**split_undo(data)[1], "version": 7}), "another version", "--appr"
    ),
    "no number": (
        lambda data: join_undo(split_undo(data)[0], {**split_undo(data)[1], "version": True}), "another ver", "--appr"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", VERSIONS)
def test_other_versions_are_named(undo: Path, case: str) -> None:
    change, message, remedy = VERSIONS[case]
    undo.write_bytes(change(undo.read_bytes()))
    error = refusal(undo)
    assert message in str(error) and remedy in (error.remedy or "")


def test_what_is_no_undo_file(undo: Path) -> None:
    for data in (b"", b"loratool", b"x" * 999, undo.read_bytes()[:60]):
        undo.write_bytes(data)
        assert "is not an undo file" in str(refusal(undo))


SIDES: dict[str, tuple[str, Any]] = {
    "another map": ("model.safetensors.index.json", {"weight_map": {"x.weight": "model-00001-of-00002.safetensors"}}),
    "no map": ("model.safetensors.index.json", {}),
    "an index of another ending": ("model.index.txt", None),
}


@pytest.mark.parametrize("case", SIDES)
def test_an_index_that_is_not_that_of_the_files(undo: Path, case: str) -> None:
    """It would be written into the base's folder, and loaders go by it."""
    name, content = SIDES[case]
    body, index = split_undo(undo.read_bytes())
    at, length, digest = index["side"].pop("model.safetensors.index.json")
    if content is not None:
        data = json.dumps(content).encode().ljust(length)
        body, digest = body[:at] + data + body[at + length :], hashlib.sha256(data).hexdigest()
    undo.write_bytes(join_undo(body, {**index, "side": {**index["side"], name: [at, length, digest]}}))
    assert f"it names '{name}', which is not a file of a model that a merge edits" in str(refusal(undo))


def test_a_record_of_what_was_not_in_the_base(undo: Path) -> None:
    def add(index: dict[str, Any], **more: Any) -> None:
        index["tensors"]["lm_head.weight"] = {"spec": ["F32", [2, 2]], "row": 0, "placements": [], **more}

    forge(undo, add)
    assert "its hashes are not as many as its tensors have pieces" in str(refusal(undo))
    body, index = split_undo(undo.read_bytes())
    hashes = hashes_of(body, index)
    assert len(hashes) == 3 * 32  # of x and y of the base, and of x as the merge wrote it
    undo.write_bytes(join_undo(*with_blob(body, index, "hashes", hashes[:64] + bytes(32) + hashes[64:])))
    UndoFile(undo).close()
    forge(undo, lambda index: add(index, replaced=True))
    assert "lm_head.weight was not in the base" in str(refusal(undo))
    forge(undo, lambda index: add(index, row=1))
    assert "lm_head.weight: its rows of the table" in str(refusal(undo))


Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def test_codes_that_the_merge_did_not_change_need_no_record(tmp_path: Path) -> None:
    """To find the weight that it changed, the others are looked at too, of which the undo file has nothing."""
    path = FIXTURES / "coded" / "bnb_nf4.safetensors"
    vector = json.loads((path.parent / "index.json").read_text())["vectors"]["bnb_nf4"]
    base = write_model(
        tmp_path / "base",
        {**load_file(path), "model.norm.weight": weights(8).bfloat16()},
        {"model_type": "llama", "dtype": "bfloat16", **vector["config"]},
    )
    rows, columns = vector["weights"][f"{Q}.weight"]["shape"]
    adapter = write_peft(tmp_path / "adapter", {Q: factors(rows, columns, 2)})
    loratool.merge(base, adapter, tmp_path / "out", quantized="mixed")
    with closing(UndoFile(tmp_path / "out" / "loratool.undo")) as file:
        assert f"{Q}.weight" in file.weights and f"{DOWN}.weight" not in file.weights
        assert f"{DOWN}.weight.absmax" in file.specs
    loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    assert (tmp_path / "back" / NAMES[0]).read_bytes() == (base / NAMES[0]).read_bytes()


def test_codes_that_were_only_decoded(tmp_path: Path) -> None:
    """All weights become numbers, of which the adapter changes one: the other's records say which codes there were."""
    state = {}
    for seed, name in enumerate("xy"):
        state[f"{name}.weight"] = weights(6, 4, seed=seed).to(torch.float8_e4m3fn)
        state[f"{name}.weight_scale"] = torch.full((6, 1), 0.5).bfloat16()
    config = {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}
    base = write_model(tmp_path / "base", {**state, "norm.weight": weights(4).bfloat16()}, config)
    adapter = write_peft(tmp_path / "adapter", {"x": factors(6, 4, 2)})
    loratool.merge(base, adapter, tmp_path / "out", quantized="dequantize")
    found = load_file(tmp_path / "out" / NAMES[0])
    assert torch.equal(found["y.weight"].double(), state["y.weight"].double() * 0.5)
    loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    assert (tmp_path / "back" / NAMES[0]).read_bytes() == (base / NAMES[0]).read_bytes()


def placement(rows: int, start: int, stop: int) -> list[Any]:
    return [0, "x", None, 1.0, False, rows, start, stop, 0, None]


def test_the_runs_that_records_tile() -> None:
    F32, BF16, codes = (TensorSpec(dtype, (8, 4)) for dtype in ("F32", "BF16", "F8_E4M3"))
    empty, values = TensorSpec("F32", (8, 0)), TensorSpec("F64", (8, 4))
    two = [placement(8, 0, 4), placement(8, 2, 6)]
    assert tiling("x", F32, F32, two) == ([(0, 2), (2, 4), (4, 6)], None)
    assert tiling("x", F32, F32, [placement(8, 6, 8), placement(8, 0, 2)]) == ([(0, 2), (6, 8)], None)
    assert tiling("x", empty, empty, [placement(8, 0, 8)]) == ([], None)
    assert tiling("x", F32, F32, []) == ([(0, 8)], None)
    assert tiling("x", TensorSpec("F32", (5, 4)), F32, []) == ([(0, 5)], 5)
    assert tiling("x", TensorSpec("F32", (8, 5)), F32, []) == ([], 0)  # widened
    assert tiling("x", TensorSpec("I64", (3,)), TensorSpec("I64", (3,)), []) == ([], 0)
    assert coded_tiling("x", BF16, values, codes, two) == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert coded_tiling("x", BF16, values, codes, []) == [(0, 8)]
    nothing = TensorSpec("F64", (8, 0))
    assert coded_tiling("x", TensorSpec("BF16", (8, 0)), nothing, TensorSpec("F8_E4M3", (8, 0)), two) == []
    for spec, was, placements in (
        (BF16, F32, two),
        (F32, F32, [placement(9, 0, 4)]),
        (TensorSpec("F32", (8, 3)), F32, []),
        (TensorSpec("F32", (9, 5)), F32, []),
        (TensorSpec("F32", (8, 5)), F32, [placement(8, 0, 8)]),
    ):
        with pytest.raises(ValueError, match="x"):
            tiling("x", spec, was, placements)
    with pytest.raises(ValueError, match="x is"):
        coded_tiling("x", TensorSpec("I8", (8, 4)), values, codes, [])


def test_the_rows_of_records() -> None:
    """What is left of a run is a record of its own, and none crosses the edge of a run."""
    tiles = Tiles([(0, 7), (7, 8), (10, 16)], 3)
    assert [*tiles.records()] == [(0, 3), (3, 6), (6, 7), (7, 8), (10, 13), (13, 16)]
    assert tiles.count() == 6 and Tiles([], 1).count() == 0
    assert Tiles([(0, 1 << 62)], 1).count() == 1 << 62  # told before any record has its memory


def test_a_table_of_more_bytes_than_any_file() -> None:
    """Their sum in 64 bits would be small."""
    rows = [(1 << 63, 0), (1 << 63, 0), (5, 0)]
    with pytest.raises(ValueError, match="beyond any file"):
        UndoTable.one_after_another(b"".join(ROW.pack(*row) for row in rows), 16)
    with pytest.raises(ValueError, match="cut off"):
        UndoTable.one_after_another(bytes(15), 16)
    table, end = UndoTable.one_after_another(ROW.pack(3, 7) + ROW.pack(0, 1), 16)
    assert (end, len(table), table.at(1)) == (19, 2, 19)
    assert [each.length for each in table.rows(0, 2)] == [3, 0]
    assert UndoTable.one_after_another(b"", 16)[1] == 16
