"""Test llama.cpp's adapters: files written here byte by byte, and every name, row and scale by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lib.files import gguf_bytes
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.adapters.formats import open_adapter
from loratool.adapters.stacked import stack_factors
from loratool.errors import InputError, LoratoolError, NeedsFlag, UsageError
from loratool.files.containers.gguf_file import GgufFile
from loratool.numerics.tensors import tensor_of

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": 5,
}
# of two heads of 4 rows: GGUF's row i is this row of transformers, which rotates i with i + 2
QUERIES = [0, 2, 1, 3, 4, 6, 5, 7]
KEYS = [0, 2, 1, 3]

ADAPTER = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
HEADS = {"llama.attention.head_count": 2, "llama.attention.head_count_kv": 1}


def numbers(*shape: int, start: int = 1) -> torch.Tensor:
    return torch.arange(start, start + math.prod(shape), dtype=torch.float32).reshape(shape)


def pair(rows: int, columns: int, rank: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return numbers(rank, columns), numbers(rows, rank, start=100)


def peft(folder: Path, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], **config: Any) -> Path:
    folder.mkdir()
    stored = {}
    for module, (A, B) in factors.items():
        stored[f"base_model.model.{module}.lora_A.weight"] = A
        stored[f"base_model.model.{module}.lora_B.weight"] = B
    save_file(stored, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [*factors], **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def config(folder: Path, **fields: Any) -> Path:
    folder.mkdir()
    path = folder / "config.json"
    path.write_text(json.dumps({**LLAMA, **fields}))
    return path


def gguf(path: Path, factors: Mapping[str, tuple[Any, Any]], **fields: Any) -> Path:
    tensors = {}
    for name, (A, B) in factors.items():
        tensors[f"{name}.weight.lora_a"] = gguf_bytes.floats(np.asarray(A))
        tensors[f"{name}.weight.lora_b"] = gguf_bytes.floats(np.asarray(B))
    return gguf_bytes.write(path, {**ADAPTER, **fields}, tensors)


ALPHA = {"adapter.lora.alpha": 4.0}


class TestWriting:
    def test_writes_the_very_bytes_of_the_format(self, tmp_path: Path) -> None:
        A, B = pair(8, 8)
        source = peft(tmp_path / "a", {"model.layers.0.self_attn.q_proj": (A, B)})
        loratool.convert(source, tmp_path / "x.gguf", to="gguf", base=config(tmp_path / "m"))
        fields = {"general.architecture": "llama", **HEADS, **ALPHA, "general.type": "adapter", "adapter.type": "lora"}
        tensors = {
            "blk.0.attn_q.weight.lora_a": gguf_bytes.floats(A.numpy()),
            "blk.0.attn_q.weight.lora_b": gguf_bytes.floats(B[QUERIES].numpy()),
        }
        expected = gguf_bytes.gguf({**fields, "general.file_type": 0}, tensors)
        assert (tmp_path / "x.gguf").read_bytes() == expected

    @pytest.mark.parametrize(("dtype", "number"), [(torch.float16, 1), (torch.bfloat16, 32)])
    def test_keeps_the_type_of_the_factors(self, tmp_path: Path, dtype: torch.dtype, number: int) -> None:
        A, B = (side.to(dtype) for side in pair(4, 8))
        source = peft(tmp_path / "a", {"model.layers.0.self_attn.v_proj": (A, B)})
        loratool.convert(source, tmp_path / "x.gguf", to="gguf", base=config(tmp_path / "m"))
        written = open_adapter(tmp_path / "x.gguf")
        assert torch.equal(written.file.tensor("blk.0.attn_v.weight.lora_b"), B)
        assert written.config.other_fields["general.file_type"] == number

    def test_stacks_single_experts_with_zeros_for_those_that_lack(self, tmp_path: Path) -> None:
        A, B = pair(6, 8)
        source = peft(tmp_path / "a", {"model.layers.0.block_sparse_moe.experts.1.w3": (A, B)})
        base = config(tmp_path / "m", model_type="mixtral", num_local_experts=3)
        loratool.convert(source, tmp_path / "x.gguf", to="gguf", base=base)
        whole = np.zeros((3, 2, 8), "f4"), np.zeros((3, 6, 2), "f4")
        whole[0][1], whole[1][1] = A, B
        there = {
            "blk.0.ffn_up_exps.weight.lora_a": gguf_bytes.floats(whole[0]),
            "blk.0.ffn_up_exps.weight.lora_b": gguf_bytes.floats(whole[1]),
        }
        fields = {"general.architecture": "llama", **HEADS, "llama.expert_count": 3, **ALPHA}
        fields |= {"general.type": "adapter", "adapter.type": "lora", "general.file_type": 0}
        assert (tmp_path / "x.gguf").read_bytes() == gguf_bytes.gguf(fields, there)

    def test_is_read_back_as_it_was_without_a_base(self, tmp_path: Path) -> None:
        factors = {
            "model.layers.0.self_attn.q_proj": pair(8, 8),
            "model.layers.0.self_attn.k_proj": pair(4, 8),
            "model.layers.0.mlp.down_proj": pair(8, 6),
        }
        source = peft(tmp_path / "a", factors)
        loratool.convert(source, tmp_path / "x.gguf", to="gguf", base=config(tmp_path / "m"))
        loratool.convert(tmp_path / "x.gguf", tmp_path / "back", to="peft")
        there, back = (load_file(each / "adapter_model.safetensors") for each in (source, tmp_path / "back"))
        assert there.keys() == back.keys() and all(torch.equal(there[key], back[key]) for key in there)


class TestScales:
    """The scale is alpha / r of each pair, with one alpha."""

    @staticmethod
    def scales(source: Path, tmp_path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
        base = config(tmp_path / "m")
        report = loratool.convert(source, tmp_path / "x.gguf", to="gguf", base=base)
        written = open_adapter(tmp_path / "x.gguf")
        changes = {}
        for module, update in written.updates.items():
            A, B = (written.file.tensor(update.tensors[role]).double() for role in "AB")
            changes[module] = update.scale * B @ A
        return report, changes

    def test_unequal_ranks_of_one_alpha_need_no_fold(self, tmp_path: Path) -> None:
        factors = {"model.layers.0.self_attn.v_proj": pair(4, 8, 2), "model.layers.0.mlp.up_proj": pair(6, 8, 3)}
        source = peft(tmp_path / "a", factors, rank_pattern={"up_proj": 3})
        report, changes = self.scales(source, tmp_path)
        assert [row.how for row in report.modules] == ["exact", "exact"]
        A, B = factors["model.layers.0.mlp.up_proj"]
        assert torch.equal(changes["blk.0.ffn_up"], 4 / 3 * B.double() @ A.double())

    def test_another_alpha_is_folded_into_b_exactly_if_it_can_be(self, tmp_path: Path) -> None:
        names = ["self_attn.v_proj", "self_attn.k_proj", "mlp.up_proj"]
        factors = {f"model.layers.0.{name}": pair(4, 8) for name in names}
        source = peft(tmp_path / "a", factors, alpha_pattern={"up_proj": 16.0})
        report, changes = self.scales(source, tmp_path)
        assert {row.name: (row.how, row.error) for row in report.modules} == {
            "blk.0.attn_v": ("exact", 0),
            "blk.0.attn_k": ("exact", 0),
            "blk.0.ffn_up": ("folded", 0),
        }
        A, B = pair(4, 8)
        assert torch.equal(changes["blk.0.ffn_up"], 8 * B.double() @ A.double())

    def test_a_fold_that_rounds_is_told(self, tmp_path: Path) -> None:
        names = ["self_attn.v_proj", "self_attn.k_proj", "mlp.up_proj"]
        factors = {f"model.layers.0.{name}": (torch.rand(2, 8), torch.rand(4, 2)) for name in names}
        source = peft(tmp_path / "a", factors, alpha_pattern={"up_proj": 3.0})
        report, changes = self.scales(source, tmp_path)
        rows = {row.name: row for row in report.modules}
        assert [rows[f"blk.0.{each}"].how for each in ("attn_v", "attn_k", "ffn_up")] == ["exact", "exact", "rounded"]
        A, B = factors["model.layers.0.mlp.up_proj"]
        true = 1.5 * B.double() @ A.double()
        wrong = float((changes["blk.0.ffn_up"] - true).norm() / true.norm())
        assert 0 < wrong < 1e-6 and wrong == pytest.approx(rows["blk.0.ffn_up"].error, rel=1e-6)

    def test_a_scale_of_rslora_is_the_alpha_that_makes_it(self, tmp_path: Path) -> None:
        factors = {"model.layers.0.self_attn.v_proj": pair(4, 8)}
        report, changes = self.scales(peft(tmp_path / "a", factors, use_rslora=True), tmp_path)
        A, B = pair(4, 8)
        true = 4 / math.sqrt(2) * B.double() @ A.double()
        assert report.modules[0].how == "rounded" and 0 < report.modules[0].error < 2**-24
        assert torch.allclose(changes["blk.0.attn_v"], true, rtol=2**-24)

    def test_scales_of_one_and_unequal_ranks_have_no_alpha(self, tmp_path: Path) -> None:
        factors = {"model.layers.0.self_attn.v_proj": pair(4, 8, 2), "model.layers.0.mlp.up_proj": pair(6, 8, 3)}
        patterns = {"rank_pattern": {"up_proj": 3}, "alpha_pattern": {"up_proj": 3}}
        report, changes = self.scales(peft(tmp_path / "a", factors, lora_alpha=2, **patterns), tmp_path)
        assert [row.error for row in report.modules] == [0, 0]
        assert open_adapter(tmp_path / "x.gguf").config.other_fields["adapter.lora.alpha"] == 0
        A, B = factors["model.layers.0.mlp.up_proj"]
        assert torch.equal(changes["blk.0.ffn_up"], B.double() @ A.double())

    @pytest.mark.parametrize("alpha", [{}, {"adapter.lora.alpha": 0.0}])
    def test_without_alpha_the_scale_is_one(self, tmp_path: Path, alpha: dict[str, float]) -> None:
        path = gguf(tmp_path / "x.gguf", {"blk.0.attn_v": pair(4, 8)}, **alpha)
        assert open_adapter(path).updates["blk.0.attn_v"].scale == 1
        assert open_adapter(path, alpha=4).updates["blk.0.attn_v"].scale == 2


def product(loaded: Any) -> Tensor:
    """Return B A of a loaded update."""
    return tensor_of(loaded.B) @ tensor_of(loaded.A)


class TestReading:
    def test_a_base_gives_the_names_and_rows_of_transformers(self, tmp_path: Path) -> None:
        A, B = pair(8, 8)
        path = gguf(tmp_path / "x.gguf", {"blk.0.attn_q": (A, B[QUERIES]), "blk.0.attn_k": (A, B[:4][KEYS])}, **ALPHA)
        assert [*open_adapter(path).updates] == ["blk.0.attn_q", "blk.0.attn_k"]
        read = open_adapter(path, model=LLAMA)
        loaded: Any = {m.rpartition(".")[2]: read.load(update) for m, update in read.updates.items()}
        assert torch.equal(tensor_of(loaded["q_proj"].B), B) and torch.equal(tensor_of(loaded["k_proj"].B), B[:4])

    def test_an_embedding_is_read_as_the_merge_needs_it(self, tmp_path: Path) -> None:
        rows, columns = numbers(5, 2), numbers(8, 2)  # of the vocabulary, and of the width
        path = gguf(tmp_path / "x.gguf", {"token_embd": (rows, columns)}, **ALPHA)
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "config.json").write_text(json.dumps(LLAMA))
        names = {"model.embed_tokens.weight": torch.zeros(5, 8), "lm_head.weight": torch.zeros(5, 8)}
        save_file(names, tmp_path / "m" / "model.safetensors")
        loratool.merge(tmp_path / "m", path, tmp_path / "out", undo=False)
        merged = load_file(tmp_path / "out" / "model.safetensors")
        assert torch.equal(merged["model.embed_tokens.weight"], 2 * rows @ columns.T)
        assert not merged["lm_head.weight"].any()

    def test_parts_with_other_factors_a_stand_side_by_side(self, tmp_path: Path) -> None:
        """Gate and up of one matrix of transformers need not have one A, as those of GGUF's own training."""
        fields = {"general.architecture": "gpt-oss", **ALPHA}
        gate, up = ((numbers(1, 2, 8, start=s), numbers(1, 6, 2, start=s)) for s in (1, 50))
        path = gguf(tmp_path / "x.gguf", {"blk.0.ffn_gate_exps": gate, "blk.0.ffn_up_exps": up}, **fields)
        read = open_adapter(path, model={**LLAMA, "model_type": "gpt_oss", "num_local_experts": 1})
        (update,) = read.updates.values()
        change = product(read.load(update))
        assert update.module == "model.layers.0.mlp.experts.gate_up_proj" and update.rank == 4
        assert torch.equal(change[0::2], gate[1][0] @ gate[0][0]) and torch.equal(change[1::2], up[1][0] @ up[0][0])

    def test_eight_bit_factors_are_the_numbers_that_they_mean(self, tmp_path: Path) -> None:
        """A block of Q8_0 is a float16 and 32 signed bytes, each multiplied by it."""
        codes = np.arange(-32, 32, dtype=np.int8).reshape(2, 32)
        scales = np.array([0.5, 3.0], "<f2")
        blocks = b"".join(scale.tobytes() + row.tobytes() for scale, row in zip(scales, codes, strict=True))
        tensors = {
            "blk.0.attn_v.weight.lora_a": (8, (2, 32), blocks),
            "blk.0.attn_v.weight.lora_b": gguf_bytes.floats(np.eye(2)),
        }
        gguf_bytes.write(tmp_path / "x.gguf", {**ADAPTER, **ALPHA}, tensors)
        read = open_adapter(tmp_path)  # the one file of the folder
        loaded: Any = read.load(read.updates["blk.0.attn_v"])
        assert torch.equal(tensor_of(loaded.A), torch.from_numpy(codes * scales[:, None].astype("f4")))
        with pytest.raises(InputError, match="is in Q8_0 and F32, but the rule noise needs floating-point factors"):
            loratool.resize(tmp_path, tmp_path / "y.gguf", rank_rule=("noise", 1.0))

    def test_other_formats_go_by_the_names_of_transformers(self, tmp_path: Path) -> None:
        """`--exclude` and `--rename` too."""
        path = gguf(tmp_path / "x.gguf", {"blk.0.attn_q": pair(8, 8), "blk.0.attn_v": pair(4, 8)}, **HEADS, **ALPHA)
        for pattern in ("blk.*", "attn_v"):
            with pytest.raises(LoratoolError, match="names no module"):
                loratool.convert(path, tmp_path / "no", to="peft", exclude=[pattern])
        loratool.convert(path, tmp_path / "one", to="peft", exclude=["v_proj"], rename=["q_proj=query"])
        assert {*open_adapter(tmp_path / "one").updates} == {"model.layers.0.self_attn.query"}
        loratool.convert(path, tmp_path / "y.gguf", to="gguf", exclude=["attn_v"])
        assert {*open_adapter(tmp_path / "y.gguf").updates} == {"blk.0.attn_q"}

    def test_it_is_compared_with_what_it_was_made_of(self, tmp_path: Path) -> None:
        modules = {"model.layers.0.self_attn.q_proj": pair(8, 8), "model.layers.0.mlp.up_proj": pair(6, 8)}
        source = peft(tmp_path / "a", modules)
        loratool.convert(source, tmp_path / "x.gguf", to="gguf", base=config(tmp_path / "m"))
        assert loratool.diff(source, tmp_path / "x.gguf").same

    def test_a_plain_copy_needs_no_base(self, tmp_path: Path) -> None:
        factors = {"blk.0.attn_q": pair(8, 8), "blk.0.ffn_up_exps": (numbers(3, 2, 8), numbers(3, 6, 2))}
        path = gguf(tmp_path / "x.gguf", factors, **HEADS, **ALPHA, **{"general.name": "one"})
        loratool.convert(path, tmp_path / "y.gguf", to="gguf", plain=True)
        (one, two), name = (open_adapter(each) for each in (path, tmp_path / "y.gguf")), "general.name"
        assert two.config.alpha == 2.0 and two.config.other_fields[name] == "one"
        assert one.updates.keys() == two.updates.keys()
        for module in one.updates:
            deltas = [stack_factors(each.load(each.updates[module])) for each in (one, two)]
            assert np.array_equal(*(B @ A for B, A in deltas))

    def test_a_base_of_another_architecture_is_refused(self, tmp_path: Path) -> None:
        path = gguf(tmp_path / "x.gguf", {"blk.0.attn_v": pair(4, 8)}, **ALPHA)
        with pytest.raises(InputError, match="is for llama, but the base is qwen2"):
            open_adapter(path, model={**LLAMA, "model_type": "qwen2"})

    def test_another_format_needs_the_base(self, tmp_path: Path) -> None:
        path = gguf(tmp_path / "x.gguf", {"blk.0.attn_q": pair(8, 8)}, **ALPHA)
        with pytest.raises(NeedsFlag, match="names and rows of a GGUF file of llama") as raised:
            loratool.convert(path, tmp_path / "out", to="peft")
        assert "--base BASE" in str(raised.value.remedy)
        loratool.convert(path, tmp_path / "out", to="peft", base=config(tmp_path / "m"))

    def test_a_tensor_that_the_table_lacks_is_refused_in_other_names(self, tmp_path: Path) -> None:
        path = gguf(tmp_path / "x.gguf", {"blk.0.attn_\x1bz": pair(8, 8)}, **HEADS, **ALPHA)
        assert [*open_adapter(path).updates] == ["blk.0.attn_\x1bz"]
        with pytest.raises(InputError, match="is not a known weight of llama"):
            loratool.convert(path, tmp_path / "out", to="peft")

    def test_a_norm_is_replaced_which_llama_cpp_does_not(self, tmp_path: Path) -> None:
        fields = {**ADAPTER, **ALPHA}
        tensors = {"blk.0.attn_norm.weight": gguf_bytes.floats(np.ones(8))}
        for end, side in zip("ab", pair(4, 8), strict=True):
            tensors[f"blk.0.attn_v.weight.lora_{end}"] = gguf_bytes.floats(side.numpy())
        read = open_adapter(gguf_bytes.write(tmp_path / "x.gguf", fields, tensors))
        assert read.updates["blk.0.attn_norm"].kind == "replace"
        assert read.notes == ("blk.0.attn_norm: a merge replaces these norms, and llama.cpp ignores them",)

    def test_an_unknown_architecture_keeps_its_names(self, tmp_path: Path) -> None:
        path = gguf(tmp_path / "x.gguf", {"blk.0.attn_q": pair(8, 8)}, **{"general.architecture": "nobody", **ALPHA})
        assert [*open_adapter(path).updates] == ["blk.0.attn_q"]
        with pytest.raises(InputError, match="in transformers are unknown"):
            loratool.convert(path, tmp_path / "out", to="peft")


class TestCommands:
    FACTORS = {"blk.0.attn_q": pair(8, 8), "blk.0.ffn_up_exps": (numbers(3, 2, 8), numbers(3, 6, 2))}  # noqa: RUF012

    def test_resize_and_combine_stay_in_the_format(self, tmp_path: Path) -> None:
        path = gguf(tmp_path / "x.gguf", self.FACTORS, **HEADS, **ALPHA)
        loratool.resize(path, tmp_path / "r.gguf", rank=1)
        loratool.combine([path, (path, 0.5)], tmp_path / "c.gguf")
        for name, rank in (("r.gguf", 1), ("c.gguf", 4)):
            read = open_adapter(tmp_path / name)
            assert {m: (u.rank, u.experts, u.scale) for m, u in read.updates.items()} == {
                "blk.0.attn_q": (rank, 1, 1.0),
                "blk.0.ffn_up_exps": (rank, 3, 1.0),
            }
        (A, B), made = self.FACTORS["blk.0.ffn_up_exps"], open_adapter(tmp_path / "c.gguf")
        each = made.load(made.updates["blk.0.ffn_up_exps"])
        assert torch.allclose(product(each.matrix(2)), 3 * B[2] @ A[2])

    def test_what_the_file_says_besides_stays(self, tmp_path: Path) -> None:
        """llama.cpp's converter writes a name and tags."""
        said = {"general.tags": ["a", "ü"], "x.counts": [1, 2], "x.below": -3, "x.half": 0.5, "x.empty": []}
        said |= {"llama.expert_count": "none", "general.name": "one", "x.is": True}
        path = gguf(tmp_path / "x.gguf", {"blk.0.attn_v": pair(4, 8)}, **ALPHA, **said)
        loratool.resize(path, tmp_path / "r.gguf", rank=1)
        kept = {key: GgufFile(tmp_path / "r.gguf").entry(key) for key in said}
        assert kept == {key: gguf_bytes.entry(key, value) for key, value in said.items()}

    @pytest.mark.parametrize("command", ["resize", "combine"])
    def test_an_adapter_in_other_names_has_to_be_converted_first(self, tmp_path: Path, command: str) -> None:
        source = peft(tmp_path / "a", {"model.layers.0.self_attn.q_proj": pair(8, 8)})
        options: dict[str, Any] = {"rank": 1} if command == "resize" else {}
        with pytest.raises(InputError, match="depend on the base") as raised:
            getattr(loratool, command)(source, tmp_path / "x.gguf", to="gguf", **options)
        assert "first loratool convert --base BASE" in str(raised.value.remedy)

    def test_init_does_not_start_one(self, tmp_path: Path) -> None:
        base = config(tmp_path / "m").parent
        save_file({"model.layers.0.self_attn.q_proj.weight": torch.rand(8, 8)}, base / "model.safetensors")
        with pytest.raises(UsageError, match='use to="peft"'):
            loratool.init(base, tmp_path / "x.gguf", to="gguf")

    def test_extract_writes_it(self, tmp_path: Path) -> None:
        base, tuned = config(tmp_path / "m").parent, config(tmp_path / "t").parent
        W, (A, B) = torch.rand(8, 8), (torch.rand(1, 8), torch.rand(8, 1))
        name = "model.layers.0.self_attn.q_proj.weight"
        rest = {"model.embed_tokens.weight": torch.rand(5, 8), "lm_head.weight": torch.rand(5, 8)}
        save_file({name: W, **rest}, base / "model.safetensors")
        save_file({name: W + B @ A / 8, **rest}, tuned / "model.safetensors")
        loratool.extract(base, tuned, tmp_path / "x.gguf", rank=1, to="gguf")
        read = open_adapter(tmp_path / "x.gguf", model=LLAMA)
        loaded: Any = read.load(read.updates["model.layers.0.self_attn.q_proj"])
        assert torch.allclose(loaded.scale * product(loaded), B @ A / 8, atol=1e-5)


def refusal(source: Path, base: Path, tmp_path: Path, **options: Any) -> LoratoolError:
    with pytest.raises(LoratoolError) as raised:
        loratool.convert(source, tmp_path / "x.gguf", to="gguf", base=base, **options)
    assert not (tmp_path / "x.gguf").exists()
    return raised.value


class TestRefusals:
    """What llama.cpp would not load, or would drop, is refused by name."""

    @pytest.mark.parametrize(
        ("module", "shape", "reason"),
        [
            ("lm_head", (5, 8), "tied to the embedding"),
            ("model.embed_tokens", (5, 8), "an embedding that is also the head"),
            ("model.vision_tower.layers.0.self_attn.q_proj", (8, 8), "no weight that its table knows"),
            ("model.layers.0.self_attn.qkv_proj", (16, 8), "no weight that its table knows"),
        ],
    )
    def test_a_module_without_a_place_can_be_excluded(
        self, tmp_path: Path, module: str, shape: tuple[int, int], reason: str
    ) -> None:
        factors = {module: pair(*shape), "model.layers.0.self_attn.v_proj": pair(4, 8)}
        source, base = peft(tmp_path / "a", factors), config(tmp_path / "m", tie_word_embeddings=True)
        error = refusal(source, base, tmp_path)
        assert isinstance(error, NeedsFlag) and reason in str(error) and module in str(error.remedy)
        loratool.convert(source, tmp_path / "x.gguf", to="gguf", base=base, exclude=[module])

    def test_rows_of_another_model(self, tmp_path: Path) -> None:
        source = peft(tmp_path / "a", {"model.layers.0.self_attn.q_proj": pair(7, 8)})
        error = refusal(source, config(tmp_path / "m"), tmp_path)
        assert isinstance(error, InputError) and "7 rows are not those of 2 heads" in str(error)

    def test_a_base_without_its_heads(self, tmp_path: Path) -> None:
        source = peft(tmp_path / "a", {"model.layers.0.self_attn.q_proj": pair(8, 8)})
        error = refusal(source, config(tmp_path / "m", num_attention_heads=None), tmp_path)
        assert isinstance(error, InputError) and "does not tell its heads" in str(error)

    def test_a_base_with_heads_of_each_layer(self, tmp_path: Path) -> None:
        source = peft(tmp_path / "a", {"model.layers.0.self_attn.q_proj": pair(8, 8)})
        error = refusal(source, config(tmp_path / "m", num_key_value_heads=[1]), tmp_path)
        assert isinstance(error, InputError) and "does not tell its kv_heads" in str(error)

    def test_an_architecture_in_no_table(self, tmp_path: Path) -> None:
        source = peft(tmp_path / "a", {"model.layers.0.self_attn.q_proj": pair(8, 8)})
        error = refusal(source, config(tmp_path / "m", model_type="xlstm"), tmp_path)
        assert isinstance(error, InputError) and "is an xlstm, whose names and rows in GGUF are unknown" in str(error)

    @pytest.mark.parametrize(
        "fields",
        [
            {"text_config": None},
            {"text_config": [1]},
            {"num_attention_heads": "2"},
            {"num_attention_heads": True},
            {"num_attention_heads": 1 << 40},
            {"num_key_value_heads": -1},
            {"hidden_size": {}},
            {"model_type": ["llama"]},
        ],
    )
    def test_a_config_of_other_types_is_read_or_refused(self, tmp_path: Path, fields: dict[str, Any]) -> None:
        source = peft(tmp_path / "a", {"model.layers.0.self_attn.q_proj": pair(8, 8)})
        try:
            loratool.convert(source, tmp_path / "x.gguf", to="gguf", base=config(tmp_path / "m", **fields))
        except InputError:
            assert not (tmp_path / "x.gguf").exists()

    def test_no_base(self, tmp_path: Path) -> None:
        source = peft(tmp_path / "a", {"model.layers.0.self_attn.q_proj": pair(8, 8)})
        with pytest.raises(NeedsFlag) as raised:
            loratool.convert(source, tmp_path / "x.gguf", to="gguf")
        assert "add --base BASE" in str(raised.value.remedy)

    def test_the_projection_that_gguf_has_a_matrix_for_each_head(self, tmp_path: Path) -> None:
        source = peft(tmp_path / "a", {"model.layers.0.self_attn.kv_b_proj": pair(16, 8)})
        base = config(tmp_path / "m", model_type="deepseek_v3", qk_nope_head_dim=4, v_head_dim=4)
        assert "a matrix for each head" in str(refusal(source, base, tmp_path))

    def test_dora_needs_the_base_to_become_plain(self, tmp_path: Path) -> None:
        name = "base_model.model.model.layers.0.self_attn.v_proj"
        source = peft(tmp_path / "a", {"model.layers.0.self_attn.v_proj": pair(4, 8)}, use_dora=True)
        file = source / "adapter_model.safetensors"
        save_file({**load_file(file), f"{name}.lora_magnitude_vector": torch.rand(4)}, file)
        error = refusal(source, config(tmp_path / "m"), tmp_path)
        assert isinstance(error, NeedsFlag) and "--plain" in str(error.remedy)


class TestPlain:
    """What llama.cpp cannot hold becomes plain LoRA first."""

    @pytest.fixture
    def base(self, tmp_path: Path) -> Path:
        folder = config(tmp_path / "m").parent
        self.W = torch.rand(8, 8)
        weights = {"model.layers.0.self_attn.q_proj.weight": self.W, "model.embed_tokens.weight": torch.rand(5, 8)}
        save_file(weights, folder / "model.safetensors")
        return folder

    def test_dora_is_what_it_changes_of_its_base(self, tmp_path: Path, base: Path) -> None:
        A, B, m = torch.rand(2, 8), torch.rand(8, 2), torch.rand(8) + 1
        source = peft(tmp_path / "a", {"model.layers.0.self_attn.q_proj": (A, B)}, use_dora=True)
        file, name = source / "adapter_model.safetensors", "base_model.model.model.layers.0.self_attn.q_proj"
        save_file({**load_file(file), f"{name}.lora_magnitude_vector": m}, file)
        report = loratool.convert(source, tmp_path / "x.gguf", to="gguf", base=base, plain=True, rank=8)
        merged = self.W + 2 * B @ A
        change = m[:, None] * merged / merged.norm(dim=1, keepdim=True) - self.W
        read = open_adapter(tmp_path / "x.gguf", model=LLAMA)
        loaded: Any = read.load(read.updates["model.layers.0.self_attn.q_proj"])
        assert torch.allclose(loaded.scale * product(loaded), change, atol=1e-5)
        assert report.modules[0].how in ("truncated", "rounded") and report.modules[0].sources == (
            "model.layers.0.self_attn.q_proj",
        )

    @pytest.mark.parametrize("trained", [False, True])
    def test_a_weight_under_the_factors_is_left_out_only_if_it_is_the_bases(
        self, tmp_path: Path, base: Path, trained: bool
    ) -> None:
        """PEFT saves that of an embedding: as it was, or with the rows that were trained beside the factors."""
        module = "model.embed_tokens"
        source = peft(tmp_path / "a", {"model.layers.0.self_attn.q_proj": pair(8, 8)})
        file, own = source / "adapter_model.safetensors", load_file(base / "model.safetensors")[f"{module}.weight"]
        embedding = {"lora_embedding_A": torch.rand(2, 5), "lora_embedding_B": torch.rand(8, 2)}
        embedding["base_layer.weight"] = own + trained
        save_file({**load_file(file), **{f"base_model.model.{module}.{k}": v for k, v in embedding.items()}}, file)
        if trained:
            with pytest.raises(NeedsFlag, match="is not the base's") as raised:
                loratool.convert(source, tmp_path / "x.gguf", to="gguf", base=base)
            assert "--exclude model.embed_tokens" in str(raised.value.remedy)
        else:
            report = loratool.convert(source, tmp_path / "x.gguf", to="gguf", base=base)
            assert any("it is the base's" in note for note in report.notes)
            with pytest.raises(NeedsFlag, match="must be compared with the base's"):
                loratool.convert(source, tmp_path / "y.gguf", to="gguf", base=base / "config.json")

    def test_a_start_that_changed_the_base_is_not_left_unsaid(self, tmp_path: Path, base: Path) -> None:
        source = peft(tmp_path / "a", {"model.layers.0.self_attn.q_proj": pair(8, 8)}, init_lora_weights="pissa")
        error = refusal(source, base, tmp_path)
        assert isinstance(error, NeedsFlag) and "--plain --initial" in str(error.remedy)
        start = peft(tmp_path / "s", {"model.layers.0.self_attn.q_proj": pair(8, 8)}, init_lora_weights="pissa")
        loratool.convert(source, tmp_path / "x.gguf", to="gguf", base=base, plain=True, initial=start)
        read = open_adapter(tmp_path / "x.gguf", model=LLAMA)
        loaded: Any = read.load(read.updates["model.layers.0.self_attn.q_proj"])
        assert loaded.A.shape == (4, 8) and not product(loaded).any()


class TestBadFiles:
    @pytest.mark.parametrize(
        ("fields", "reason"),
        [
            ({"general.type": "model"}, "has the general.type 'model'"),
            ({"adapter.type": "control_vector"}, "has the adapter.type 'control_vector'"),
            ({"general.architecture": 3}, "does not say its general.architecture"),
            ({"adapter.lora.alpha": math.nan}, "not a finite number"),
            ({"adapter.lora.alpha": math.inf}, "not a finite number"),
            ({"adapter.lora.alpha": "16"}, "not a finite number"),
            ({"adapter.alora.invocation_tokens": [1, 2]}, "activated LoRA"),
        ],
    )
    def test_fields(self, tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
        path = gguf(tmp_path / "x.gguf", {"blk.0.attn_v": pair(4, 8)}, **{**ALPHA, **fields})
        with pytest.raises(InputError, match=reason):
            open_adapter(path)

    @pytest.mark.parametrize(
        ("name", "tensor", "reason"),
        [
            ("blk.0.attn_v.weight.lora_a", gguf_bytes.floats(np.ones((2, 8))), "has no partner"),
            ("blk.0.attn_v.weight.lora_c", gguf_bytes.floats(np.ones((2, 8))), "neither lora_a, lora_b nor a norm"),
            ("blk.0.attn_v.weight.lora_b", gguf_bytes.floats(np.ones((4, 3))), "has no partner"),
            ("blk.0.ffn_up.weight.lora_b", gguf_bytes.floats(np.ones(4)), "should have 2 dimensions"),
            ("blk.0.ffn_up_exps.weight.lora_b", gguf_bytes.floats(np.ones((4, 2))), "should have 3 dimensions"),
            ("blk.0.ffn_up.weight.lora_b", gguf_bytes.floats(np.ones((0, 2))), "above 0"),
            ("blk.0.ffn_up.weight.lora_b", (2, (1, 32), bytes(18)), "is Q4_0"),
        ],
    )
    def test_tensors(self, tmp_path: Path, name: str, tensor: Any, reason: str) -> None:
        tensors = {"blk.0.ffn_up.weight.lora_a": gguf_bytes.floats(np.ones((2, 8))), name: tensor}
        path = gguf_bytes.write(tmp_path / "x.gguf", {**ADAPTER, **ALPHA}, tensors)
        with pytest.raises(InputError, match=reason):
            open_adapter(path)

    def test_a_field_is_never_one_of_pefts(self, tmp_path: Path) -> None:
        path = gguf(tmp_path / "x.gguf", {"blk.0.attn_v": pair(4, 8)}, **ALPHA, r=5, use_rslora=True)
        loratool.convert(path, tmp_path / "a", to="peft")
        (update,) = open_adapter(tmp_path / "a").updates.values()
        assert (update.rank, update.scale) == (2, 2.0)

    def test_stacks_of_unequal_numbers_of_experts(self, tmp_path: Path) -> None:
        factors = {f"blk.{e}.ffn_up_exps": (np.ones((e + 2, 2, 8)), np.ones((e + 2, 6, 2))) for e in range(2)}
        with pytest.raises(InputError, match="has 2 experts, and blk.1.ffn_up_exps.weight.lora_. 3"):
            open_adapter(gguf(tmp_path / "x.gguf", factors, **ALPHA))

    def test_an_alpha_that_contradicts_the_file(self, tmp_path: Path) -> None:
        path = gguf(tmp_path / "x.gguf", {"blk.0.attn_v": pair(4, 8)}, **ALPHA)
        with pytest.raises(UsageError, match="alpha=8 contradicts the file's 4"):
            open_adapter(path, alpha=8)

    def test_a_damaged_pair_is_shown_by_inspect(self, tmp_path: Path) -> None:
        tensors = {"blk.0.ffn_up.weight.lora_a": gguf_bytes.floats(np.ones((2, 8)))}
        path = gguf_bytes.write(tmp_path / "x.gguf", {**ADAPTER, **ALPHA}, tensors)
        report = loratool.inspect(path)
        assert any("has no partner" in str(problem) for problem in vars(report).values())
