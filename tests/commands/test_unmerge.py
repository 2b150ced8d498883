"""Hold unmerge after merge: the base's files byte for byte, for every update; and what must be refused."""

from __future__ import annotations

import filecmp
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    FIXTURES,
    SHARED,
    covering,
    factors,
    load_model,
    needs_shared,
    weights,
    write_kohya,
    write_model,
    write_peft,
)
from lib.files.undo_bytes import add_blob, forge, hashes_of, join_undo, split_undo, table_of, with_blob
from lib.models.peft_models import FAMILIES, kinds, kinds_of_families, write_pair
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import InputError, MachineError, NeedsFlag, UsageError
from loratool.files.digest import PIECE
from loratool.undo.reader import UndoFile
from loratool.undo.records import EDITED, NOT_RESTORED

pytestmark = [pytest.mark.filterwarnings("ignore")]
EMBED = "model.embed_tokens.weight"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def same_folder(one: Path, two: Path) -> bool:
    compared = filecmp.dircmp(one, two)
    names = compared.common_files
    return not compared.left_only and not compared.right_only and filecmp.cmpfiles(one, two, names, False)[0] == names


def recast(base: Path, dtype: torch.dtype) -> None:
    for file in base.glob("*.safetensors"):
        save_file({k: v.to(dtype) for k, v in load_file(file).items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", ["bf16", *(pytest.param(d, marks=pytest.mark.slow) for d in DTYPES if d != "bf16")])
@pytest.mark.parametrize(("family", "kind"), [*kinds_of_families()])
def test_every_update_comes_off(tmp_path: Path, family: str, kind: str, dtype: str) -> None:
    """Subtracting a rounded delta would leave 7 % of the weights changed; every byte must come back."""
    names = FAMILIES[family]
    pair = write_pair(tmp_path / "x", names.make(), **kinds(names)[kind])
    recast(pair.base, DTYPES[dtype])
    adapters = [(pair.adapter, 1.0 if "all" in kind or "resize" in kind else 0.75)]
    try:
        loratool.merge(pair.base, adapters, tmp_path / "out")
    except InputError as error:  # what an adapter brings along has a weight of 1 or none
        assert "weight must be 1" in str(error)
        adapters = [(pair.adapter, 1.0)]
        loratool.merge(pair.base, adapters, tmp_path / "out")
    assert not same_folder(pair.base, tmp_path / "out")
    loratool.unmerge(tmp_path / "out", adapters, tmp_path / "back", workers=1)
    assert same_folder(pair.base, tmp_path / "back")


@pytest.mark.parametrize(
    ("rank", "dtype", "relative"),  # pairs of float64, which have no GEMM that decides, take seconds at high ranks
    covering((1, 16, 256), DTYPES, (1e-4, 1e-2, 1.0), never=lambda rank, dtype, _: rank == 256 and dtype == "fp64"),
)
def test_whatever_the_weights_and_the_size_of_the_change(
    tmp_path: Path, rank: int, relative: float, dtype: str
) -> None:
    """Zeros of both signs, subnormals, powers of two, the largest numbers, inf and nan; two adapters; any blocks."""
    base = odd_weights(DTYPES[dtype])
    A, B = factors(300, 1100, rank)
    B = B * (relative * 0.02 * base.shape[1] ** 0.5 / (0.02 * rank**0.5))
    C, D = factors(300, 1100, 3, seed=5)
    model = write_model(tmp_path / "base", {"x.weight": base, "y.weight": weights(4, 4)}, shards=2)
    one, two = write_peft(tmp_path / "a", {"x": (A, B)}), write_peft(tmp_path / "b", {"x": (C, D * relative)})
    adapters = [(one, 1.0), (two, -0.5)]
    loratool.merge(model, adapters, tmp_path / "out", workers=2)
    loratool.unmerge(tmp_path / "out", adapters[::-1], tmp_path / "back", workers=1)
    assert same_folder(model, tmp_path / "back")
    assert not torch.equal(load_model(tmp_path / "out")["x.weight"], base)


def odd_weights(dtype: torch.dtype) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    base = (torch.randn(300, 1100, generator=g) * 0.02).to(dtype)
    tiny, top = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    base[0], base[1], base[2, :550], base[2, 550:] = 0.0, -0.0, torch.inf, -torch.inf
    base[3] = torch.nan
    base[4] = (torch.randn(1100, generator=g, dtype=torch.float64) * tiny).to(dtype)
    base[5] = (2.0 ** torch.randint(-12, 3, (1100,), generator=g)).to(dtype)
    base[6] = (torch.rand(1100, generator=g, dtype=torch.float64) * top * 0.9).to(dtype)
    base[7, ::2] = 0.0
    return base


def of_pieces(patch: pytest.MonkeyPatch, piece: int) -> None:
    """Hash tensors by pieces of other sizes."""
    for module in ("undo.reader", "streaming.digests", "files.digest"):  # the last one is what the others import
        patch.setattr(f"loratool.{module}.PIECE", piece)


class TestFiles:
    def test_a_file_has_it_beside_and_a_folder_in_it(self, tmp_path: Path) -> None:
        base, adapter = FIXTURES / "gpt2" / "base" / "model.safetensors", FIXTURES / "gpt2" / "adapter"
        report = loratool.merge(base, adapter, tmp_path / "merged.safetensors")
        assert (
            report.undo == str(tmp_path / "merged.undo")
            and report.undo_bytes == (tmp_path / "merged.undo").stat().st_size
        )
        with pytest.raises(NeedsFlag, match="force=True"):
            loratool.merge(base, adapter, tmp_path / "merged.safetensors")
        loratool.unmerge(tmp_path / "merged.safetensors", adapter, tmp_path / "back.safetensors")
        assert filecmp.cmp(base, tmp_path / "back.safetensors", shallow=False)
        assert (loratool.merge(base, adapter, tmp_path / "bare.safetensors", undo=False)).undo is None
        assert not (tmp_path / "bare.undo").exists()

    @pytest.mark.parametrize("how", [{"max_shard_size": 100_000}, {}])
    def test_another_layout_goes_back_to_the_bases(self, tmp_path: Path, how: dict[str, Any]) -> None:
        base, adapter = FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter"
        out = tmp_path / ("out" if how else "out.safetensors")
        loratool.merge(base, adapter, out, **how)
        loratool.unmerge(out, adapter, tmp_path / "back")
        files = [f.name for f in base.iterdir() if how or f.name != "generation_config.json"]  # not in a single file
        assert all(filecmp.cmp(base / name, tmp_path / "back" / name, shallow=False) for name in files)

    def test_stacked_merges_come_off_in_order(self, tmp_path: Path) -> None:
        base, adapter = FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter"
        half = (adapter, 0.5)
        loratool.merge(base, adapter, tmp_path / "one")
        loratool.merge(tmp_path / "one", half, tmp_path / "two")
        loratool.merge(tmp_path / "two", adapter, tmp_path / "three")
        assert {p.name for p in (tmp_path / "three").glob("*.undo*")} == {
            "loratool.undo", "loratool.undo.1", "loratool.undo.2",
        }  # fmt: skip
        with pytest.raises(InputError, match="merged with weight 1, not 0.5"):
            loratool.unmerge(tmp_path / "three", half, tmp_path / "no")
        for merged, used, back in (("three", adapter, "b2"), ("b2", half, "b1"), ("b1", adapter, "b0")):
            loratool.unmerge(tmp_path / merged, used, tmp_path / back)
        assert same_folder(base, tmp_path / "b0") and same_folder(tmp_path / "one", tmp_path / "b1")

    def test_a_single_file_carries_the_earlier_ones_too(self, tmp_path: Path) -> None:
        base, adapter = FIXTURES / "gpt2" / "base" / "model.safetensors", FIXTURES / "gpt2" / "adapter"
        one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
        loratool.merge(base, adapter, one)
        loratool.merge(one, adapter, two)
        assert (tmp_path / "two.undo.1").is_file()
        loratool.unmerge(two, adapter, tmp_path / "a.safetensors")
        loratool.unmerge(tmp_path / "a.safetensors", adapter, tmp_path / "b.safetensors")
        assert filecmp.cmp(base, tmp_path / "b.safetensors", shallow=False)

    def test_a_torch_base_comes_back_as_safetensors(self, tmp_path: Path) -> None:
        (tmp_path / "base").mkdir()
        tensors = {"x.weight": weights(6, 4), "steps": torch.tensor(3)}
        torch.save(tensors, tmp_path / "base" / "pytorch_model.bin")
        adapter = write_peft(tmp_path / "a", {"x": factors(6, 4, 2)})
        loratool.merge(tmp_path / "base", adapter, tmp_path / "out")
        report = loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")
        assert not report.exact_files
        back = load_model(tmp_path / "back")
        assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())

    def test_kohya_and_a_missing_alpha(self, tmp_path: Path) -> None:
        base = write_model(tmp_path / "base", {"x.weight": weights(6, 4, dtype=torch.bfloat16)})
        adapter = write_kohya(tmp_path / "k.safetensors", {"x": factors(6, 4, 2)})
        loratool.merge(base, adapter, tmp_path / "out", alpha=4)
        with pytest.raises(InputError, match="another rank, alpha or config"):
            loratool.unmerge(tmp_path / "out", adapter, tmp_path / "no")
        loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back", alpha=4)
        assert same_folder(base, tmp_path / "back")


def write_pieces(folder: Path, rows: int) -> tuple[Path, Path]:
    """Write a base with tensors of more than 200 bytes, of which an adapter changes one, and resizes one of 14 rows."""
    tensors = {"model.x.weight": weights(9, 8), "model.copied": weights(70), EMBED: weights(14, 8)}
    base = write_model(folder / "base", tensors, {"model_type": "llama", "vocab_size": 14})
    adapter = write_peft(folder / "a", {"model.x": factors(9, 8, 2)}, modules_to_save=["embed_tokens"])
    own = load_file(adapter / "adapter_model.safetensors")
    own[f"base_model.model.{EMBED}"] = weights(rows, 8, seed=7)
    save_file(own, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    return base, adapter


def with_bit(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


class TestRefusals:
    @pytest.fixture
    def merged(self, tmp_path: Path) -> Path:
        loratool.merge(FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter", tmp_path / "merged")
        return tmp_path / "merged"

    def refused(self, merged: Path, match: str, adapters: Any = FIXTURES / "llama" / "adapter", **options: Any) -> None:
        with pytest.raises(InputError, match=match):
            loratool.unmerge(merged, adapters, merged.parent / "back", **options)
        assert not (merged.parent / "back").exists() and not list(merged.parent.glob("*partial*"))

    def test_another_adapter_or_weight(self, merged: Path, tmp_path: Path) -> None:
        adapter = FIXTURES / "llama" / "adapter"
        other = shutil.copytree(adapter, tmp_path / "other")
        tensors = load_file(other / "adapter_model.safetensors")
        save_file({k: v + 1 for k, v in tensors.items()}, other / "adapter_model.safetensors")
        self.refused(merged, r"other: is not an adapter of the merge, which used adapter \(sha256", other)
        both = loratool.merge(FIXTURES / "llama" / "base", [adapter, (other, -0.2)], tmp_path / "both").out
        for given, missing in ((adapter, r"other .* with weight -0\.2"), ((other, -0.2), "adapter .* with weight 1")):
            self.refused(Path(both), rf"loratool\.undo: the merge also used {missing}", given)
        self.refused(merged, "merged with weight 1, not 0.5", (adapter, 0.5))
        self.refused(merged, "was not part of the merge", [adapter, other])
        config = json.loads((adapter / "adapter_config.json").read_text())
        again = shutil.copytree(adapter, tmp_path / "again")
        (again / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 99}))
        self.refused(merged, "another rank, alpha or config", again)

    def test_a_merged_file_edited_since(self, merged: Path) -> None:
        for file in sorted(merged.glob("*.safetensors"))[:1]:
            tensors = load_file(file)
            name = next(name for name in tensors if "q_proj" in name)
            tensors[name][3, 5] += 1
            save_file(tensors, file, metadata={"format": "pt"})
        self.refused(merged, f"{name}: is not what the merge wrote: the merged file was edited|cannot be restored")

    def test_an_untouched_tensor_edited_since(self, merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its bytes go to the restored base as they are, so they must be those that the merge left."""
        name = "model.norm.weight"
        file = next(f for f in sorted(merged.glob("*.safetensors")) if name in load_file(f))
        tensors = load_file(file)
        tensors[name][3] += 1
        for piece in (PIECE, 100):  # one piece or several, as the merge hashed it
            of_pieces(monkeypatch, piece)
            loratool.merge(FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter", merged, force=True)
            save_file(tensors, file, metadata={"format": "pt"})
            self.refused(merged, f"{name}: is not what the merge wrote")

    @pytest.mark.parametrize("rows", [9, 20])
    def test_an_edit_in_each_piece(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
        """Of what the merge copied, changed, cut or added; in the merged file, in the hashes and in the payload."""
        of_pieces(monkeypatch, 64)
        base, adapter = write_pieces(tmp_path, rows)
        out, back = tmp_path / "out", tmp_path / "back"
        loratool.merge(base, adapter, out)
        loratool.unmerge(out, adapter, back)
        assert same_folder(base, back)
        shutil.rmtree(back)
        undo, file = out / "loratool.undo", out / "model.safetensors"
        whole, weights = undo.read_bytes(), file.read_bytes()
        body, index = split_undo(whole)
        stored = {name: x.nbytes for name, x in sorted(load_model(base).items())}
        merged = {name: x.nbytes for name, x in sorted(load_model(out).items())}
        both = (stored, {name: merged[name] for name in sorted(index["tensors"])})
        names = [name for each in both for name in each for _ in range(-(-each[name] // 64))]
        hashes = hashes_of(body, index)
        assert len(hashes) == 32 * len(names) and min(names.count(name) for name in stored) > 3
        for number, name in enumerate(names):
            undo.write_bytes(join_undo(*with_blob(body, index, "hashes", with_bit(hashes, 32 * number))))
            is_written = number >= sum(-(-size // 64) for size in stored.values())
            if not is_written or (name == EMBED and rows > 14):  # otherwise records have sums of what the merge wrote
                fault = EDITED if is_written or name == "model.copied" else NOT_RESTORED
                self.refused(out, f"{name}: {fault}", adapter)
        first = table_of(body, index)[index["tensors"][EMBED]["row"]]
        for place in range(first.at, first.at + first.length, 64) if rows < 14 else ():
            undo.write_bytes(with_bit(whole, place))
            self.refused(out, f"{EMBED}: {NOT_RESTORED}", adapter)
        undo.write_bytes(whole)
        (size,) = struct.unpack("<Q", weights[:8])
        for name, nbytes in merged.items():
            begin = 8 + size + json.loads(weights[8 : 8 + size])[name]["data_offsets"][0]
            for place in range(begin, begin + nbytes, 64):
                file.write_bytes(with_bit(weights, place))
                self.refused(out, f"{name}: ({EDITED}|cannot be restored)", adapter)

    @pytest.mark.parametrize("weight", [0.99, 1.01, -1.0])
    def test_another_weight_in_the_undo_file(self, merged: Path, weight: float) -> None:
        """The records fit it, or seem to; what they restore is not what the merge read."""

        def change(index: dict[str, Any]) -> None:
            for entry in index["tensors"].values():
                for placement in entry["placements"]:
                    placement[3] = weight

        forge(merged / "loratool.undo", change)
        self.refused(merged, r"weight: (is not restored exactly|cannot be restored)")

    @pytest.mark.parametrize("piece", [PIECE, 50])
    @pytest.mark.parametrize("edit", ["a head that was untied", "rows that were added"])
    def test_what_the_merge_added_edited_since(
        self, edit: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        of_pieces(monkeypatch, piece)
        tied, module = edit == "a head that was untied", "base_model.model.model.embed_tokens"
        config = {"model_type": "llama", "tie_word_embeddings": tied, "vocab_size": 20}
        base = write_model(tmp_path / "base", {"model.embed_tokens.weight": weights(20, 8)}, config)
        factors = {f"{module}.lora_embedding_A": weights(2, 20), f"{module}.lora_embedding_B": weights(8, 2)}
        adapter, merged = tmp_path / "adapter", tmp_path / "merged"
        adapter.mkdir()
        save_file(factors if tied else {f"{module}.weight": weights(24, 8)}, adapter / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["embed_tokens"]}
        (adapter / "adapter_config.json").write_text(json.dumps(settings))
        loratool.merge(base, adapter, merged)
        loratool.unmerge(merged, adapter, tmp_path / "ok")
        assert same_folder(base, tmp_path / "ok")
        found = load_file(merged / "model.safetensors")
        name, row = ("lm_head.weight", 3) if tied else ("model.embed_tokens.weight", 22)
        found[name][row] += 1
        save_file(found, merged / "model.safetensors", metadata={"format": "pt"})
        self.refused(merged, f"{name}: is not what the merge wrote: the merged file was edited since", adapter)
        del found[name]
        save_file({"other": weights(1), **found}, merged / "model.safetensors", metadata={"format": "pt"})
        self.refused(merged, f"other: is not in the output|{name}: is missing, but the merge wrote", adapter)

    @pytest.mark.parametrize("piece", [PIECE, 50])
    def test_rows_without_an_update_edited_since(
        self, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The adapter changes some rows of a fused matrix; the other rows go to the base unchanged."""
        of_pieces(monkeypatch, piece)
        folder, file = FIXTURES / "sdxl", tmp_path / "merged.safetensors"
        loratool.merge(folder / "base.safetensors", folder / "adapter.safetensors", file)
        loratool.unmerge(file, folder / "adapter.safetensors", tmp_path / "ok.safetensors")
        assert filecmp.cmp(folder / "base.safetensors", tmp_path / "ok.safetensors", shallow=False)
        found = load_file(file)
        name = next(name for name in found if "in_proj_weight" in name)
        found[name][40] += 1
        save_file(found, file, metadata={"format": "pt"})
        with pytest.raises(InputError, match=f"{name}: is not what the merge wrote"):
            loratool.unmerge(file, folder / "adapter.safetensors", tmp_path / "back.safetensors")
        assert not (tmp_path / "back.safetensors").exists()

    def test_a_tensor_added_since(self, tmp_path: Path) -> None:
        base, adapter, file = FIXTURES / "gpt2" / "base", FIXTURES / "gpt2" / "adapter", tmp_path / "m.safetensors"
        loratool.merge(base / "model.safetensors", adapter, file)
        tensors = load_file(file)
        save_file({**tensors, "added.weight": tensors["transformer.ln_f.weight"].clone()}, file)
        with pytest.raises(InputError, match="added.weight: is not in the output"):
            loratool.unmerge(file, adapter, tmp_path / "back.safetensors")

    def test_a_merged_tensor_of_another_shape(self, merged: Path) -> None:
        file = sorted(merged.glob("*.safetensors"))[0]
        tensors = load_file(file)
        name = next(name for name in tensors if "q_proj" in name)
        tensors[name] = tensors[name][:, :8].contiguous()
        save_file(tensors, file, metadata={"format": "pt"})
        self.refused(merged, f"{name}: is .*edited since")

    def test_no_undo_file(self, merged: Path, tmp_path: Path) -> None:
        (merged / "loratool.undo").rename(tmp_path / "elsewhere.undo")
        self.refused(merged, "has no undo file .*loratool.undo")
        loratool.unmerge(merged, FIXTURES / "llama" / "adapter", tmp_path / "ok", undo=tmp_path / "elsewhere.undo")
        assert same_folder(FIXTURES / "llama" / "base", tmp_path / "ok")

    @pytest.mark.parametrize("cut", [0, 5, 15, 16, 40, 300, -1, -8, -30])
    def test_a_damaged_undo_file(self, merged: Path, cut: int) -> None:
        data = (merged / "loratool.undo").read_bytes()
        (merged / "loratool.undo").write_bytes(data[:cut])
        self.refused(merged, "not an undo file|cut off or damaged")

    @pytest.mark.parametrize("name", ["../evil", "{folder}/evil", "a/../../evil", ""])
    @pytest.mark.parametrize("place", ["side", "shards"])
    def test_an_undo_file_that_leads_elsewhere(self, merged: Path, name: str, place: str) -> None:
        name = name.format(folder=merged.parent)

        body, index = split_undo((merged / "loratool.undo").read_bytes())
        if place == "side":
            body, index["side"][name] = add_blob(body, b"{}")
        else:
            index["shards"][0]["name"] = name
        (merged / "loratool.undo").write_bytes(join_undo(body, index))
        before = sorted(merged.parent.iterdir())
        self.refused(merged, "which is not a file of a model")
        assert sorted(merged.parent.iterdir()) == before

    @pytest.mark.parametrize(
        "field", ["adapters", "arithmetic", "file", "new_side", "shards", "side", "tensors", "hashes", "payload"]
    )
    @pytest.mark.parametrize("value", [None, 5, [{}], {"a": 5}, [[1]]])
    def test_an_index_of_another_form(self, merged: Path, field: str, value: Any) -> None:
        """Its hash is right, so that only its content is wrong."""
        forge(merged / "loratool.undo", lambda index: index.update({field: value}))
        self.refused(merged, "damaged|with arithmetic 5")

    @pytest.mark.parametrize(
        "entry",
        [
            {"row": [1]},
            {"row": 1},
            {"spec": ["XX", [1]]},
            {"spec": ["BF16"]},
            {"placements": [[0]]},
            {"placements": [[9, "m", None, 1.0, False, 1, 0, 1, 0, None]]},
            {"placements": [[0, "another", None, 1.0, False, 1, 0, 1, 0, None]]},
            {"spec": ["F32", [1, 1 << 58]]},
        ],
    )
    def test_an_entry_of_another_form(self, merged: Path, entry: dict[str, Any]) -> None:
        forge(merged / "loratool.undo", lambda index: next(iter(index["tensors"].values())).update(entry))
        self.refused(merged, "damaged|has no another, which the undo file names")

    def test_flipped_bits_in_a_record(self, merged: Path) -> None:
        undo = UndoFile(merged / "loratool.undo")
        name, record = next((n, r) for n in undo.index["tensors"] for r in undo.records(n) if r.length)
        undo.close()
        data = bytearray((merged / "loratool.undo").read_bytes())
        data[record.offset] ^= 0xFF
        (merged / "loratool.undo").write_bytes(data)
        self.refused(merged, f"{name}: (does not come back as it was|cannot be restored)")

    @pytest.mark.parametrize(
        ("field", "match"), [("version", "its index is of another version"), ("arithmetic", "arithmetic 9")]
    )
    def test_another_version(self, merged: Path, field: str, match: str) -> None:
        forge(merged / "loratool.undo", lambda index: index.update({field: 9}))
        self.refused(merged, match)

    def test_an_older_file(self, merged: Path, run: Callable[..., Any]) -> None:
        undo, adapter = merged / "loratool.undo", FIXTURES / "llama" / "adapter"
        undo.write_bytes(b"loratool undo 3\n" + undo.read_bytes()[16:])
        told = run("unmerge", merged, adapter, "-o", merged.parent / "back")
        assert told.exit_code == 3 and "of version 3, not 4" in told.stderr and "the loratool that" in told.stderr

    def test_another_type_needs_no_undo(self, tmp_path: Path) -> None:
        arguments = (FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter", tmp_path / "out")
        with pytest.raises(NeedsFlag, match="undo=False"):
            loratool.merge(*arguments, dtype="fp32")
        assert loratool.merge(*arguments, dtype="fp32", undo=False).undo is None
        loratool.merge(FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter", tmp_path / "same", dtype="bf16")

    @pytest.mark.parametrize("approximate", [False, True])
    def test_a_full_disk(self, merged: Path, monkeypatch: pytest.MonkeyPatch, approximate: bool) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))  # type: ignore[attr-defined]
        arguments, how = (merged, FIXTURES / "llama" / "adapter", merged.parent / "back"), {"approximate": approximate}
        with pytest.raises(MachineError, match="are needed and 10 B are free"):
            loratool.unmerge(*arguments, **how)
        report = loratool.unmerge(*arguments, dry_run=True, **how)
        assert report.warnings[-1].endswith("are needed and 10 B are free") and not arguments[2].exists()

    def test_the_output_may_not_be_an_input(self, merged: Path) -> None:
        with pytest.raises(UsageError, match="would overwrite an input"):
            loratool.unmerge(merged, FIXTURES / "llama" / "adapter", merged, force=True)


def test_the_undo_file_is_the_same_whatever_the_workers(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {f"{i}.w.weight": weights(700, 3000, seed=i) for i in range(3)}, shards=2)
    adapter = write_peft(tmp_path / "a", {f"{i}.w": factors(700, 3000, 4, seed=i) for i in range(3)})
    files = []
    for workers in (1, 2, 5):
        loratool.merge(base, adapter, tmp_path / f"out{workers}", workers=workers)
        files.append((tmp_path / f"out{workers}" / "loratool.undo").read_bytes())
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("name", ["llama", "gpt2", "sdxl"])
def test_a_dry_run_gives_a_bound(tmp_path: Path, name: str) -> None:
    end = ".safetensors" if name == "sdxl" else ""
    arguments = (FIXTURES / name / f"base{end}", FIXTURES / name / f"adapter{end}", tmp_path / f"out{end}")
    bound = loratool.merge(*arguments, dry_run=True).undo_bytes
    size = loratool.merge(*arguments).undo_bytes
    assert bound is not None and size is not None and 0 < size <= bound
    assert bound <= 1.07 * sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) + 20_000


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"])
def test_a_change_that_drowns_the_weights_comes_near_the_bound(tmp_path: Path, dtype: str) -> None:
    """All digits of W are stored then, and of the other tensor the differences to what replaced it."""
    kind = getattr(torch, dtype)
    small = 1.0 if kind.itemsize == 1 else 2.0**-14
    W, (A, B) = weights(300, 1000) * small, factors(300, 1000, 1)
    base = write_model(tmp_path / "base", {"x.weight": W.to(kind), "y.weight": weights(200, 300).to(kind)})
    adapter = write_peft(tmp_path / "a", {"x": (A.sign() * 20, B.sign() * 20)})
    file = adapter / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.y.weight": -weights(200, 300)}, file)
    bound = loratool.merge(base, adapter, tmp_path / "out", dry_run=True).undo_bytes
    size = loratool.merge(base, adapter, tmp_path / "out").undo_bytes
    assert bound is not None and size is not None and size <= bound
    if dtype != "float64":
        assert size > 0.85 * bound


@pytest.mark.parametrize(("relative", "bits"), [(1e-3, 0.006), (1e-2, 0.04), (1e-1, 0.22)])
def test_its_size(tmp_path: Path, relative: float, bits: float) -> None:
    """Bits a weight in bf16 at rank 16, the payload alone from a million weights on."""
    base, (A, B) = weights(1024, 2048, dtype=torch.bfloat16), factors(1024, 2048, 16)
    D = (B @ A).double()
    B = B * float(relative * base.double().norm() / D.norm())
    loratool.merge(
        write_model(tmp_path / "b", {"x.weight": base}), write_peft(tmp_path / "a", {"x": (A, B)}), tmp_path / "out"
    )
    undo = UndoFile(tmp_path / "out" / "loratool.undo")
    payload = sum(record.length for record in undo.records("x.weight"))
    undo.close()
    assert 8 * payload / base.numel() <= bits


def test_a_pruned_base_costs_little(tmp_path: Path) -> None:
    base = weights(1024, 1040, dtype=torch.bfloat16)
    base[torch.rand(base.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = 0
    A, B = factors(1024, 1040, 16)
    adapter = write_peft(tmp_path / "a", {"x": (A, B * 0.1)})
    report = loratool.merge(write_model(tmp_path / "b", {"x.weight": base}), adapter, tmp_path / "out")
    assert report.undo_bytes is not None and 8 * report.undo_bytes / base.numel() <= 0.6
    loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    assert same_folder(tmp_path / "b", tmp_path / "back")


@needs_shared
def test_real_adapters_cost_next_to_nothing(tmp_path: Path) -> None:
    adapters = sorted(p.parent for p in (SHARED / "minilm-lora-dee66").rglob("adapter_config.json"))
    assert adapters
    for i, adapter in enumerate(adapters):
        shapes = {}
        for key, tensor in load_file(adapter / "adapter_model.safetensors").items():
            module = key.removeprefix("base_model.model.").split(".lora_")[0]
            shapes.setdefault(module, {})["A" if "lora_A" in key else "B"] = tensor
        base = {
            f"{m}.weight": (torch.randn(p["B"].shape[0], p["A"].shape[1]) * 0.05).bfloat16()
            for m, p in shapes.items()
            if len(p) == 2
        }
        model = write_model(tmp_path / f"b{i}", base, {"model_type": "bert"})
        loratool.merge(model, adapter, tmp_path / f"o{i}")
        undo = UndoFile(tmp_path / f"o{i}" / "loratool.undo")
        payload = sum(r.length for name in undo.index["tensors"] for r in undo.records(name))
        undo.close()
        assert 8 * payload / sum(t.numel() for t in base.values()) <= 0.002
        loratool.unmerge(tmp_path / f"o{i}", adapter, tmp_path / f"r{i}")
        assert same_folder(model, tmp_path / f"r{i}")


def test_the_command(tmp_path: Path, run: Callable[..., Any]) -> None:
    base, adapter = FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter"
    merged = run("merge", base, f"{adapter}:0.5", "-o", tmp_path / "m")
    assert f"undo  {tmp_path / 'm' / 'loratool.undo'}  " in merged.stdout
    wrong = run("unmerge", tmp_path / "m", adapter, "-o", tmp_path / "b")
    assert wrong.exit_code == 3 and "merged with weight 0.5, not 1" in wrong.stderr
    right = run("unmerge", tmp_path / "m", f"{adapter}:0.5", "-o", tmp_path / "b")
    assert right.exit_code == 0 and "restored bit for bit: 21 tensors" in right.stdout
    value = json.loads(run("unmerge", tmp_path / "m", f"{adapter}:0.5", "-o", tmp_path / "c", "--json").stdout)
    assert value["report"]["restored"] == 21 and same_folder(base, tmp_path / "c")


class TestApproximate:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_what_is_wrong_is_among_what_is_in_doubt(self, tmp_path: Path, dtype: torch.dtype) -> None:
        W, (A, B) = weights(300, 400, dtype=dtype), factors(300, 400, 4)
        base = write_model(tmp_path / "b", {"x.weight": W, "y.weight": weights(3, 3)})
        adapter = write_peft(tmp_path / "a", {"x": (A, B * 0.2)})
        loratool.merge(base, adapter, tmp_path / "m", undo=False)
        report = loratool.unmerge(tmp_path / "m", adapter, tmp_path / "r", approximate=True)
        back = load_model(tmp_path / "r")
        wrong = int((back["x.weight"] != W).sum())
        assert 0 < wrong <= report.doubtful < 0.3 * W.numel() and report.approximate
        assert torch.equal(back["y.weight"], load_model(base)["y.weight"])

    def test_what_was_not_added_cannot_be_subtracted(self, tmp_path: Path) -> None:
        pair = write_pair(tmp_path / "x", FAMILIES["llama"].make(), target_modules=["q_proj"], use_dora=True)
        loratool.merge(pair.base, pair.adapter, tmp_path / "m", undo=False)
        with pytest.raises(InputError, match="cannot be subtracted"):
            loratool.unmerge(tmp_path / "m", pair.adapter, tmp_path / "r", approximate=True)

    def test_it_takes_no_undo_file(self, tmp_path: Path, run: Callable[..., Any]) -> None:
        base, adapter = FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter"
        run("merge", base, adapter, "-o", tmp_path / "m", "--no-undo")
        assert "--approximate" in run("unmerge", tmp_path / "m", adapter, "-o", tmp_path / "r").stderr
        both = run("unmerge", tmp_path / "m", adapter, "-o", tmp_path / "r", "--approximate", "--undo", "x.undo")
        assert both.exit_code == 2
        done = run("unmerge", tmp_path / "m", adapter, "-o", tmp_path / "r", "--approximate")
        assert done.exit_code == 0 and "weights can be wrong" in done.stderr
