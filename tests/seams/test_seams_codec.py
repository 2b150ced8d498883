"""Hold the seam of codecs: one class and one row of the table, and every command reads the weights that it decodes.

The toy codec stores int8 codes and a float32 scale a row. Its codes have the weight's name or another, and its scales
may be in another shard. What is expected is computed in numpy's extended precision from the codes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bits, factors, load_model, weights, write_model, write_peft
from lib.files.undo_bytes import forge, split_undo, table_of
from lib.oracles.reference import change_reference, round_reference, to_longdouble
from safetensors.torch import load_file, save_file
from test_structure import PACKAGE
from torch import Tensor

import loratool
from loratool.errors import InputError
from loratool.files import codecs
from loratool.files.codecs.codec import Parts, StoredWeight, Unclaimed
from loratool.files.codecs.packing import Plain
from loratool.files.codecs.scaled import ScaledCodes, Scales
from loratool.files.dtypes import TensorSpec
from loratool.numerics.code_levels import Integers

Q, K, V, NORM = (
    f"model.layers.0.{name}.weight" for name in "self_attn.q_proj self_attn.o_proj mlp.up_proj norm".split()
)
ROWS, COLUMNS, RANK, ALPHA, EMPTY = 48, 32, 4, 6, 3


class Toy(ScaledCodes):
    key, ends, code_dtypes, code, bits = "toy int8", ("", ".toy_codes"), frozenset(["I8"]), "int8", 8

    def claim(self, path: str, name: str, unclaimed: Unclaimed) -> StoredWeight | None:
        path = name.removesuffix(".toy_codes")
        scale = f"{path}.toy_scale"
        return StoredWeight(self, TensorSpec("F64", unclaimed.specs[name].shape), (name, scale), ("codes", "scales"))

    def weight_name(self, path: str, end: str) -> str:
        return path.removesuffix(".toy_codes")

    def packing(self, parts: Parts) -> Plain:
        return Plain(parts.weight.spec.shape[-1], "int8")

    def levels(self, parts: Parts) -> Integers:
        return Integers(-127, 127, "int8")

    def scales(self, parts: Parts, start: int, stop: int) -> Scales:
        return Scales(parts["scales"].floats(start, stop - start)[:, None], 0)


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "CODECS", {Toy.key: Toy(), **codecs.CODECS})


def quantize(W: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and scales."""
    scale = W.abs().amax(-1) / 127
    return (W / scale[..., None]).round().to(torch.int8), scale


def write_base(
    folder: Path, ends: str, shards: int = 2, coded: Sequence[str] = (Q, K)
) -> tuple[Path, dict[str, Tensor]]:
    """Return a base's folder, and its weights as numbers: float64 of the coded ones. ends: of the codes' names."""
    stored: dict[str, Tensor] = {}
    numbers: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(1)
    for seed, name in enumerate((Q, K, V)):
        W = weights(ROWS, COLUMNS, seed=seed)
        if name in coded:
            codes, scale = quantize(W)
            if name == K:  # where the scale is 0, any code is the number 0
                scale[EMPTY] = 0.0
                codes[EMPTY] = torch.randint(1, 128, (COLUMNS,), generator=generator, dtype=torch.int8)
            stored |= {name + ends: codes, f"{name}.toy_scale": scale}
            numbers[name] = codes.double() * scale.double()[:, None]
        else:
            stored[name] = numbers[name] = W.bfloat16()
    stored[NORM] = numbers[NORM] = weights(COLUMNS, seed=9).bfloat16()
    return write_model(folder, stored, {"model_type": "llama", "dtype": "bfloat16"}, shards), numbers


def write_adapter(folder: Path, *names: str, size: float = 1e-3, **config: Any) -> tuple[Path, dict[str, Any]]:
    made = {}
    for seed, name in enumerate(names):
        A, B = factors(ROWS, COLUMNS, RANK, seed=seed)
        made[name.removesuffix(".weight")] = A * size, B
    return write_peft(folder, made, r=RANK, lora_alpha=ALPHA, **config), made


def merged_reference(W: Tensor, made: Mapping[str, Any], name: str, dtype: torch.dtype) -> Tensor:
    A, B = made[name.removesuffix(".weight")]
    return round_reference(to_longdouble(W) + change_reference(A, B, ALPHA / RANK), dtype)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


ENDS = pytest.mark.parametrize("ends", ["", ".toy_codes"], ids=["own name", "another name"])


@ENDS
def test_inspect_lists_the_weight_and_hides_its_companions(tmp_path: Path, ends: str) -> None:
    base, _ = write_base(tmp_path / "base", ends)
    report: Any = loratool.inspect(base)
    rows = {group.name: group for group in report.groups}
    assert rows.keys() == {Q, K, V, NORM}
    assert (rows[Q].codec, rows[Q].shape, rows[Q].role) == ("toy int8", (ROWS, COLUMNS), "linear")
    assert rows[Q].parameters == ROWS * COLUMNS and rows[Q].nbytes == ROWS * COLUMNS + 4 * ROWS
    assert report.nbytes == sum(t.nbytes for t in load_model(base).values()) and report.quantization == "toy int8"


@ENDS
@pytest.mark.parametrize("shards", [1, 3])
def test_merge_rounds_the_decoded_weight_once_and_unmerge_brings_the_codes_back(
    tmp_path: Path, ends: str, shards: int
) -> None:
    base, numbers = write_base(tmp_path / "base", ends, shards)
    adapter, made = write_adapter(tmp_path / "adapter", Q, V)
    loratool.merge(base, adapter, tmp_path / "out", dtype="bf16")
    found, stored = load_model(tmp_path / "out"), load_model(base)
    assert found.keys() == stored.keys() - {Q + ends, f"{Q}.toy_scale"} | {Q}
    for name in (Q, V):
        assert torch.equal(bits(found[name]), bits(merged_reference(numbers[name], made, name, torch.bfloat16)))
    for name in (K + ends, f"{K}.toy_scale", NORM):  # quantization is a tensor's: what no update changes stays
        assert torch.equal(bits(found[name]), bits(stored[name]))
    undo = (tmp_path / "out" / "loratool.undo").read_bytes()
    body, index = split_undo(undo)
    payload = table_of(body, index)[index["tensors"][Q]["row"] + 1].length  # the record, behind the scales
    assert payload < 40  # W' - D tells all codes, and no padding follows them
    loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(base)


@ENDS
def test_verify_proves_the_merge_and_finds_a_wrong_weight(tmp_path: Path, ends: str) -> None:
    base, _ = write_base(tmp_path / "base", ends, 1)
    adapter, _ = write_adapter(tmp_path / "adapter", Q, V, size=0.1)
    loratool.merge(base, adapter, tmp_path / "out", dtype="bf16", undo=False)
    report = loratool.verify(base, adapter, tmp_path / "out")
    assert report.status == "proven" and report.exact == 2
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors[K + ends][5, 7] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    wrong = [t.name for t in loratool.verify(base, adapter, tmp_path / "out").tensors if t.verdict == "wrong"]
    assert wrong == [K]


@ENDS
def test_verify_proves_requantized_codes_and_names_a_wrong_one(tmp_path: Path, ends: str) -> None:
    base, _ = write_base(tmp_path / "base", ends, 1)
    adapter, _ = write_adapter(tmp_path / "adapter", Q, K, size=0.1)
    loratool.merge(base, adapter, tmp_path / "out", quantized="requantize", undo=False)
    report = loratool.verify(base, adapter, tmp_path / "out")
    assert report.status == "proven" and report.exact == 2
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors[K + ends][5, 7] += 2
    save_file(tensors, file, metadata={"format": "pt"})
    wrong = [
        (t.name, t.detail) for t in loratool.verify(base, adapter, tmp_path / "out").tensors if t.verdict == "wrong"
    ]
    assert wrong == [(K, "1 code, in row 5, column 7, is not the nearest to the merge")]


@ENDS
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_convert_to_a_type_decodes_and_without_one_copies(tmp_path: Path, ends: str, dtype: str) -> None:
    base, numbers = write_base(tmp_path / "base", ends)
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    report: Any = loratool.convert_model(base, tmp_path / "out", dtype=dtype)
    found = load_model(tmp_path / "out")
    assert found.keys() == numbers.keys()
    for name, W in numbers.items():
        assert torch.equal(bits(found[name]), bits(round_reference(to_longdouble(W), kind)))
    assert ("toy int8" in {each.source_dtype for each in report.cast}) and len(report.cast) == (
        2 if dtype == "bf16" else 4
    )
    loratool.convert_model(base, tmp_path / "same")
    assert all(torch.equal(bits(x), bits(load_model(base)[n])) for n, x in load_model(tmp_path / "same").items())


@ENDS
@pytest.mark.parametrize("config", [{"use_dora": True}, {"modules_to_save": ["o_proj"]}], ids=["dora", "replaced"])
def test_other_updates_come_off(tmp_path: Path, ends: str, config: dict[str, Any]) -> None:
    base, _ = write_base(tmp_path / "base", ends)
    adapter, _ = write_adapter(tmp_path / "adapter", Q, size=0.1, **config)
    file = adapter / "adapter_model.safetensors"
    more = {f"base_model.model.{Q.removesuffix('.weight')}.lora_magnitude_vector": weights(ROWS, seed=5).abs()}
    if "modules_to_save" in config:
        more = {f"base_model.model.{K}": weights(ROWS, COLUMNS, seed=5)}
    save_file(load_file(file) | more, file)
    loratool.merge(base, adapter, tmp_path / "out", dtype="bf16")
    assert load_model(tmp_path / "out")[Q].dtype == torch.bfloat16
    loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(base)


def test_rows_that_no_update_covers_are_recorded_too(tmp_path: Path) -> None:
    """Of a stack of experts an update changes some rows, but all of them are written as numbers."""
    name, size = "model.layers.0.mlp.experts.gate_up_proj", 20
    codes, scale = quantize(weights(3, 2 * size, COLUMNS))
    base = write_model(tmp_path / "base", {name: codes, f"{name}.toy_scale": scale}, {"model_type": "qwen3_moe"})
    A, B = factors(size, COLUMNS, RANK)
    made = {"model.layers.0.mlp.experts.1.up_proj": (A, B)}
    adapter = write_peft(tmp_path / "adapter", made, r=RANK, lora_alpha=ALPHA)
    loratool.merge(base, adapter, tmp_path / "out", dtype="bf16")
    expected = codes.double() * scale.double()[..., None]
    expected[1, size:] += (ALPHA / RANK) * B.double() @ A.double()
    found = load_model(tmp_path / "out")[name]
    assert torch.equal(found, expected.bfloat16())
    loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(base)


@ENDS
def test_by_default_what_changes_takes_the_type_of_the_plain_weights(tmp_path: Path, ends: str) -> None:
    base, numbers = write_base(tmp_path / "base", ends)
    adapter, made = write_adapter(tmp_path / "adapter", Q)
    loratool.merge(base, adapter, tmp_path / "out")
    found = load_model(tmp_path / "out")
    assert torch.equal(bits(found[Q]), bits(merged_reference(numbers[Q], made, Q, torch.bfloat16)))
    assert torch.equal(found[K + ends], load_model(base)[K + ends])


@pytest.mark.parametrize("what", ["record", "scales", "codec", "kept", "declared", "part"])
def test_a_damaged_or_forged_undo_file_is_refused(tmp_path: Path, what: str) -> None:
    """The base's hashes are of the codes: those of a row whose scale is 0 all decode to one number."""
    base, _ = write_base(tmp_path / "base", "")
    adapter, _ = write_adapter(tmp_path / "adapter", K)
    loratool.merge(base, adapter, tmp_path / "out", dtype="bf16")
    undo = tmp_path / "out" / "loratool.undo"
    (kept, *_), (at, *_) = table_of(*split_undo(undo.read_bytes()))
    if what in ("record", "scales"):
        data = bytearray(undo.read_bytes())
        data[at + 1 + EMPTY * COLUMNS if what == "record" else kept + 2] ^= 1
        undo.write_bytes(data)
    else:
        changes: dict[str, Any] = {
            "codec": lambda index: index["tensors"][K]["coded"].update(codec="float8"),
            "kept": lambda index: index["tensors"][K].update(row=1),
            "declared": lambda index: index.pop("declared"),
            "part": lambda index: index["tensors"].update({f"{K}.toy_scale": index["tensors"][K]}),
        }
        forge(undo, changes[what])
    with pytest.raises(InputError, match=r"record|is not restored exactly|damaged"):
        loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_the_undo_file_of_a_plain_base_says_nothing_of_codes(tmp_path: Path) -> None:
    base, _ = write_base(tmp_path / "base", "", coded=())
    adapter, _ = write_adapter(tmp_path / "adapter", K)
    loratool.merge(base, adapter, tmp_path / "out")
    index = json.dumps(split_undo((tmp_path / "out" / "loratool.undo").read_bytes())[1])
    assert '"coded"' not in index and '"configs"' not in index


def sources() -> Iterator[tuple[str, str]]:
    for path in PACKAGE.rglob("*.py"):
        yield path.relative_to(PACKAGE).as_posix(), path.read_text()


def test_only_the_codecs_know_how_float8_is_stored() -> None:
    """Others ask whether a type is float8."""
    knowing = {name for name, text in sources() if "FLOAT8[" in text and not name.startswith("files/codecs/")}
    assert knowing == set()
