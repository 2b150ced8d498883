"""Run every command on coded weights: they are numbers as any others, of their own shapes, and no codes.

The checkpoints are the vectors of fixtures/coded, whose numbers their formats' own software read, and twins of tiny
models: the same weights once as fp8 with a power of two beside each (exact in bfloat16), once as plain numbers.
"""

from __future__ import annotations

import json
import lzma
import math
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, MEASURED, bits, factors, load_model, weights, write_model, write_peft
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from torch import Tensor

import loratool
from loratool import InputError, NeedsFlag
from loratool.files.checkpoint import open_checkpoint
from loratool.files.tensor_compare import difference
from loratool.numerics.arrays import ON_CPU
from loratool.views.convert_model import CheckpointConvertReport

CODED = FIXTURES / "coded"

VECTORS: dict[str, dict[str, Any]] = json.loads((CODED / "index.json").read_text())["vectors"]

# A vector of each layout that headers tell otherwise. (Of ComfyUI's padded weights they tell the padded shape alone.)
LAYOUTS = (
    "fp8_blocks ct_mxfp4 ct_nvfp4 ct_pack3_group_asym ct_pack4_act_order ct_int8_channel mxfp4_gpt_oss nvfp4_modelopt "
    "comfy_float8_metadata comfy_scaled_fp8 bnb_nf4_nested bnb_fp4 bnb_int8 gptq_v1_4bit awq_gemm mlx_affine6_64 "
    "mlx_mxfp4 torchao_int8 fbgemm_fp8 fp4_deepseek_v4 bitnet hqq_4bit quanto_int4 quark_mxfp4"
).split()


def write_vector(vector: str, folder: Path) -> Path:
    known = VECTORS[vector]
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((CODED / known["file"]).read_bytes())
    for name, content in {"config.json": known["config"], **known.get("side_files", {})}.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def tame(folder: Path) -> Path:
    """Take the powers of two that float32 does not hold out of a vector of mxfp4."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    state = load_model(folder)
    powers = [name for name, t in state.items() if name.endswith(("_scale", "_scales")) and t.dtype == torch.uint8]
    save_file(state | {name: state[name].clamp(40, 200) for name in powers}, folder / "model.safetensors", metadata)
    return folder


@cache
def expected_numbers() -> dict[str, Tensor]:
    return load(lzma.decompress((CODED / "expected.safetensors.xz").read_bytes()))


def expected(vector: str) -> dict[str, Tensor]:
    """The numbers of a vector's weights as the software of its format reads them."""
    return {name: expected_numbers()[f"{vector}/{name}"] for name in VECTORS[vector]["weights"]}


HIDDEN, INNER = 16, 32
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
}
FP8_CONFIG = {**CONFIG, "quantization_config": {"quant_method": "fp8", "weight_block_size": None}}
LINEAR = {
    **{f"self_attn.{m}_proj": (HIDDEN, HIDDEN) for m in "qkvo"},
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
MODULES = {f"model.layers.{i}.{m}": shape for i in range(2) for m, shape in LINEAR.items()}


def plain_model() -> dict[str, Tensor]:
    """A tiny Llama whose linear weights are numbers of e4m3 times 1/64, in bfloat16."""
    state = {
        "model.embed_tokens.weight": weights(24, HIDDEN, seed=90, dtype=torch.bfloat16),
        "model.norm.weight": weights(HIDDEN, seed=91, dtype=torch.bfloat16),
        "lm_head.weight": weights(24, HIDDEN, seed=92, dtype=torch.bfloat16),
    }
    for i in range(2):
        for j, norm in enumerate(("input_layernorm", "post_attention_layernorm")):
            state[f"model.layers.{i}.{norm}.weight"] = weights(HIDDEN, seed=93 + j, dtype=torch.bfloat16)
    for seed, (module, shape) in enumerate(MODULES.items()):
        state[f"{module}.weight"] = weights(*shape, seed=seed).to(torch.float8_e4m3fn).bfloat16() / 64
    return state


def as_fp8(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers as fp8 with one scale a matrix."""
    coded = dict(state)
    for module in MODULES:
        coded[f"{module}.weight"] = (state[f"{module}.weight"] * 64).to(torch.float8_e4m3fn)
        coded[f"{module}.weight_scale_inv"] = torch.tensor(1 / 64)
    return coded


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_model(tmp_path / "plain", plain_model(), CONFIG)


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    return write_model(tmp_path / "fp8", as_fp8(plain_model()), FP8_CONFIG)


class TestInspect:
    @pytest.mark.parametrize("vector", LAYOUTS)
    def test_a_row_for_each_weight_in_its_own_shape(self, vector: str, tmp_path: Path) -> None:
        report = loratool.inspect(write_vector(vector, tmp_path / "m"))
        assert report.kind == "checkpoint" and report.quantization and not report.uncounted
        found = {group.name: group for group in report.groups}
        for name, known in VECTORS[vector]["weights"].items():
            group = found[name]
            assert group.shape == tuple(known["shape"]) and group.tensors == 1
            assert bool(group.role) == (len(group.shape) > 1)
            assert group.parameters == expected(vector)[name].numel()
        assert report.nbytes == sum(group.nbytes for group in report.groups)

    def test_parameters_are_those_of_the_plain_twin(self, plain: Path, fp8: Path, run: Callable[..., Any]) -> None:
        twin, report = loratool.inspect(plain), loratool.inspect(fp8)
        assert twin.kind == report.kind == "checkpoint"
        assert (report.parameters, report.tensors) == (twin.parameters, twin.tensors)
        sizes = {(g.name, g.shape, g.tensors, g.parameters, g.role) for g in report.groups}
        assert sizes == {(g.name, g.shape, g.tensors, g.parameters, g.role) for g in twin.groups}
        coded = [g for g in report.groups if g.codec == "fp8"]
        assert sum(g.tensors for g in coded) == len(MODULES)
        assert all(g.bits == 8 + 32 * g.tensors / g.parameters and g.dtype == "F8_E4M3" for g in coded)
        assert {(g.codec, g.bits) for g in twin.groups} == {(None, 16)}
        assert (
            any("dequantizes the weights that it changes to BF16" in note for note in report.notes) and not twin.notes
        )
        assert "bits" in run("inspect", fp8).stdout and "weight_scale_inv" not in run("inspect", fp8).stdout

    def test_a_companion_of_another_length_is_no_other_group(self, tmp_path: Path) -> None:
        """bitsandbytes writes an offset as JSON, whose digits differ from layer to layer."""
        state = {}
        for i in range(3):
            packed = {k: v for k, v in load((CODED / "bnb_nf4_nested.safetensors").read_bytes()).items() if ".1." in k}
            for name, tensor in packed.items():
                if ".quant_state." in name:
                    state_json = json.loads(tensor.numpy().tobytes()) | {"nested_offset": 0.1 + i * 0.1 ** (i + 1)}
                    tensor = torch.tensor([*json.dumps(state_json).encode()], dtype=torch.uint8)
                state[name.replace("layers.1.", f"layers.{i}.")] = tensor
        report = loratool.inspect(write_model(tmp_path / "m", state))
        assert report.kind == "checkpoint" and [g.tensors for g in report.groups] == [3]
        assert report.groups[0].nbytes == sum(t.nbytes for t in state.values())

    def test_what_a_config_says_otherwise_and_what_is_damaged(self, tmp_path: Path) -> None:
        folder = write_vector("awq_gemm", tmp_path / "m")
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["quant_method"] = "gptq"
        (folder / "config.json").write_text(json.dumps(config))
        report = loratool.inspect(folder)
        assert report.kind == "checkpoint" and any("tensors are AWQ's" in note for note in report.notes)
        state = {k: v for k, v in as_fp8(plain_model()).items() if "0.mlp.up_proj" not in k or "scale" not in k}
        state["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(3)
        report = loratool.inspect(write_model(tmp_path / "n", state, FP8_CONFIG))
        assert report.kind == "checkpoint" and report.parameters == sum(t.numel() for t in plain_model().values())
        assert any(note.startswith("model.layers.0.mlp.up_proj.weight cannot be read") for note in report.notes)

    def test_an_adapter_against_it(self, plain: Path, fp8: Path, tmp_path: Path) -> None:
        adapter = write_peft(tmp_path / "a", {m: factors(*MODULES[m], 2, seed=i) for i, m in enumerate(MODULES)})
        ours, twin = (loratool.inspect(adapter, base=base) for base in (fp8, plain))
        assert ours.kind == twin.kind == "adapter" and not ours.problems
        assert ours.coverage and (ours.coverage.bound, ours.coverage.unbound) == (len(MODULES), {})
        for one, other in zip(ours.details, twin.details, strict=True):
            assert one.relative == pytest.approx(other.relative, rel=1e-12) and one.relative
        (note,) = set(ours.notes) - set(twin.notes)
        assert note.startswith("14 of 14 modules are quantized in the base (fp8)") and "BF16" in note

    def test_spectra(self, plain: Path, fp8: Path) -> None:
        from loratool.commands.inspect.call import spectra

        ours, twin = (spectra(base).modules for base in (fp8, plain))
        assert ours == twin and len(ours) == len(MODULES)


class TestDiff:
    @pytest.mark.parametrize("vector", ["bnb_nf4_nested", "fp8_blocks", "gptq_v1_4bit", "mxfp4_gpt_oss", "ct_nvfp4"])
    def test_the_error_of_quantization(self, vector: str, tmp_path: Path) -> None:
        """A model against others in 16 bits: that which its software reads in it, and one further away."""
        numbers = {n: W.double() for n, W in expected(vector).items() if W.bfloat16().isfinite().all()}
        assert numbers
        near = {name: W.bfloat16() for name, W in numbers.items()}
        far = {name: (W + weights(*W.shape, dtype=torch.float64) * W.std()).float() for name, W in numbers.items()}
        coded = write_vector(vector, tmp_path / "coded")
        for other, state in (("near", near), ("far", far)):
            both = loratool.diff(write_model(tmp_path / other, state), coded), loratool.diff(coded, tmp_path / other)
            for found in both:
                assert found.kind == "checkpoints" and found.relative == both[0].relative
                rows = {row.name: row for row in found.tensors}
                for name, W in state.items():
                    row, D = rows[name], W.double() - numbers[name]
                    apart = D.norm() / max(W.double().norm(), numbers[name].norm())
                    assert row.relative == pytest.approx(
                        float(apart), rel=1e-6, abs=1e-7
                    )  # some software reads in float32
                    assert row.steps is None and {row.codec_a, row.codec_b} == {None, *(row.codec_a or row.codec_b,)}

    def test_two_formats(self, plain: Path, fp8: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
        """What is the same number in both differs by its type alone, as float32 does from bfloat16."""
        found = loratool.diff(plain, fp8)
        assert found.kind == "checkpoints" and not found.same and not (found.only_a or found.only_b)
        assert {row.name for row in found.tensors} == {f"{module}.weight" for module in MODULES}
        assert found.worst == found.relative == 0 and not any(row.changed for row in found.tensors)
        assert {(row.codec_a, row.codec_b) for row in found.tensors} == {(None, "fp8")}
        assert "BF16 in A, fp8 in B" in run("diff", plain, fp8).stdout
        doubled = as_fp8(plain_model())
        scale = "model.layers.1.mlp.up_proj.weight_scale_inv"
        other = write_model(tmp_path / "other", {**doubled, scale: doubled[scale] * 2}, FP8_CONFIG)
        (row,) = loratool.diff(fp8, other).tensors
        assert row.name == "model.layers.1.mlp.up_proj.weight" and row.relative == 0.5 and row.codec_b == "fp8"

    def test_the_size_of_a_change_under_adapters(self, plain: Path, fp8: Path, tmp_path: Path) -> None:
        a, b = (
            write_peft(tmp_path / n, {m: factors(*s, 2, seed=seed) for m, s in MODULES.items()})
            for n, seed in (("a", 1), ("b", 2))
        )
        ours, twin = (loratool.diff(a, b, base=base) for base in (fp8, plain))
        assert ours.kind == twin.kind == "adapters"
        for one, other in zip(ours.modules, twin.modules, strict=True):
            assert one.size_a and (one.size_a, one.size_b) == pytest.approx((other.size_a, other.size_b), rel=1e-12)
            assert one.amplification_a == pytest.approx(other.amplification_a, rel=1e-6)


class TestConvert:
    @pytest.mark.parametrize("vector", LAYOUTS)
    def test_every_format_becomes_plain_numbers(self, vector: str, tmp_path: Path) -> None:
        folder = tame(write_vector(vector, tmp_path / "m"))
        before, numbers = load_model(folder), open_checkpoint(folder)
        planned = loratool.convert_model(folder, tmp_path / "out", dtype="fp32", dry_run=True)
        report = loratool.convert_model(folder, tmp_path / "out", dtype="fp32")
        assert isinstance(planned, CheckpointConvertReport) and planned.nbytes == report.nbytes
        assert isinstance(report, CheckpointConvertReport)
        assert all(name.endswith(("scaled_fp8", "norm.scale_weight")) for name in report.left_out)
        found = load_model(tmp_path / "out")
        for name in VECTORS[vector]["weights"]:
            assert found[name].dtype == torch.float32
            assert torch.equal(found[name], numbers[name].float()) and found[name].shape == numbers[name].shape
        plain = {n for n, t in before.items() if t.dtype == torch.bfloat16 and n.endswith(("weight", "bias"))}
        assert found.keys() == {*VECTORS[vector]["weights"], *plain}
        assert "quantiz" not in (tmp_path / "out" / "config.json").read_text()
        with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
            assert not {"_quantization_metadata"} & file.metadata().keys()
        again = loratool.inspect(tmp_path / "out")
        assert again.kind == "checkpoint" and again.quantization is None and not any(g.codec for g in again.groups)
        for name in VECTORS[vector].get("side_files", {}):
            assert not (tmp_path / "out" / name).exists() and name in report.not_copied

    @pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp16"])
    def test_it_loads_as_the_twin(self, dtype: str, plain: Path, fp8: Path, tmp_path: Path) -> None:
        """All numbers of the tiny model fit each type, so that both ways give one file."""
        (fp8 / "recipe.yaml").write_text("quant")
        report = loratool.convert_model(fp8, tmp_path / "a", dtype=dtype, max_shard_size=2500)
        loratool.convert_model(plain, tmp_path / "b", dtype=dtype, max_shard_size=2500)
        ours, twin = load_model(tmp_path / "a"), load_model(tmp_path / "b")
        assert ours.keys() == twin.keys() and len(report.files) > 3 and report.not_copied == ("recipe.yaml",)
        assert all(torch.equal(bits(ours[name]), bits(twin[name])) for name in twin)
        configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in "ab"]
        assert configs[0] == configs[1]

    def test_without_a_type_it_is_copied(self, fp8: Path, tmp_path: Path) -> None:
        loratool.convert_model(fp8, tmp_path / "out", max_shard_size=2500)
        ours, before = load_model(tmp_path / "out"), load_model(fp8)
        assert ours.keys() == before.keys()
        assert all(torch.equal(bits(ours[n].view(-1)), bits(W.view(-1))) for n, W in before.items())
        assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
            (fp8 / "config.json").read_text()
        )

    def test_a_torch_file(self, plain: Path, fp8: Path, tmp_path: Path) -> None:
        loratool.convert_model(fp8, tmp_path / "out", to="torch", dtype="bf16")
        found = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
        assert all(torch.equal(found[name], W) for name, W in plain_model().items()) and len(found) == len(
            plain_model()
        )

    def test_what_is_not_read_is_refused_by_name(self, tmp_path: Path, run: Callable[..., Any]) -> None:
        state = plain_model() | {
            "model.layers.0.mlp.up_proj.weight": torch.ones(HIDDEN, INNER, dtype=torch.int8),
            "model.layers.0.mlp.up_proj.weight_scales": torch.ones(INNER).half(),
        }
        base = write_model(tmp_path / "m", state, {**CONFIG, "quantization_config": {"quant_method": "eetq"}})
        result = run("convert", base, "-o", tmp_path / "out", "--dtype", "bf16")
        assert result.exit_code == 3 and not (tmp_path / "out").exists()
        assert "model.layers.0.mlp.up_proj.weight: is quantized (EETQ int8), which cannot be read" in result.stderr
        assert run("convert", base, "-o", tmp_path / "out").exit_code == 0

    def test_a_damaged_scale_is_found_before_anything_is_written(self, tmp_path: Path, run: Callable[..., Any]) -> None:
        scale = "model.layers.1.mlp.down_proj.weight_scale_inv"
        base = write_model(tmp_path / "m", as_fp8(plain_model()) | {scale: torch.tensor(torch.nan)}, FP8_CONFIG)
        for command in (("convert", base, "-o", tmp_path / "o", "--dtype", "bf16"), ("diff", base, base, "--json")):
            result = run(*command)
            assert result.exit_code == 3 and scale in result.output + result.stderr, result.output
        assert not (tmp_path / "o").exists()

    def test_the_stream_is_the_same_whatever_the_blocks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = tame(write_vector("mxfp4_gpt_oss", tmp_path / "m"))
        loratool.convert_model(folder, tmp_path / "a", dtype="bf16")
        monkeypatch.setattr("loratool.commands.convert.checkpoint.CAST_BLOCK", 50)
        loratool.convert_model(folder, tmp_path / "b", dtype="bf16")
        files = [(tmp_path / n / "model.safetensors").read_bytes() for n in "ab"]
        assert files[0] == files[1]

    def test_a_pipeline(self, plain: Path, fp8: Path, tmp_path: Path) -> None:
        for n, model in (("a", fp8), ("b", plain)):
            for part in ("transformer", "text_encoder"):
                shutil.copytree(model if part == "transformer" else plain, tmp_path / n / part)
            index = {part: ["transformers", "LlamaForCausalLM"] for part in ("transformer", "text_encoder")}
            (tmp_path / n / "model_index.json").write_text(json.dumps(index))
            loratool.convert_model(tmp_path / n, tmp_path / f"{n} out", dtype="bf16")
        for part in ("transformer", "text_encoder"):
            ours, twin = (tmp_path / f"{n} out" / part for n in "ab")
            configs = [json.loads((folder / "config.json").read_text()) for folder in (ours, twin)]
            assert configs[0] == configs[1]
            found, theirs = load_model(ours), load_model(twin)
            assert found.keys() == theirs.keys() and all(torch.equal(found[name], W) for name, W in theirs.items())

    @pytest.mark.slow
    def test_memory_does_not_grow_with_a_stack_of_experts(self, tmp_path: Path) -> None:
        """The larger one has 67 million weights, which are 537 MB of float64."""
        peaks = []
        for experts in (2, 16):
            path, folder = "model.layers.0.mlp.experts.gate_up_proj", tmp_path / str(experts)
            codes = torch.randint(0, 256, (experts, 2048, 64, 16), dtype=torch.uint8)
            stack = {f"{path}_blocks": codes, f"{path}_scales": torch.full((experts, 2048, 64), 120, dtype=torch.uint8)}
            write_model(folder, stack, {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}})
            calls = (["convert", folder, "-o", tmp_path / "out", "--dtype", "bf16", "--force"],)
            calls += (["diff", folder, tmp_path / "out"],)
            runs = [subprocess.run([*MEASURED, *map(str, call)], capture_output=True, text=True) for call in calls]
            peaks.append([int(each.stderr.split()[-1]) for each in runs])
        assert all(large < small + 50_000 for small, large in zip(*peaks, strict=True)), peaks  # kB

    def test_transformers_loads_it(self, tmp_path: Path) -> None:
        """Without a missing or an unexpected key, and without the quantizer of the base."""
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": 24, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
        state, config = as_fp8(plain_model()), {**FP8_CONFIG, **sizes, **heads}
        loratool.convert_model(write_model(tmp_path / "m", state, config), tmp_path / "out", dtype="bf16")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not hasattr(model, "hf_quantizer")
        theirs = model.state_dict()
        assert all(torch.equal(theirs[name], W) for name, W in plain_model().items())


class TestCount:
    def test_all_is_as_of_the_plain_twin(self, plain: Path, fp8: Path) -> None:
        ours, twin = (loratool.count(base, rank=4, target=["all-linear"]) for base in (fp8, plain))
        assert ours.source == twin.source == "checkpoint"
        (note,) = ours.notes
        assert note == "quantized (fp8): 14 weights are counted as BF16" and not twin.notes
        assert replace(ours, path=twin.path, notes=()) == twin

    @pytest.mark.parametrize("vector", ["bnb_nf4_nested", "gptq_v1_4bit_act_order", "awq_gemm", "comfy_scaled_fp8"])
    def test_codes_of_many_shapes(self, vector: str, tmp_path: Path) -> None:
        report = loratool.count(write_vector(vector, tmp_path / "m"), rank=1, target=["all-linear"])
        shapes = [tuple(known["shape"]) for known in VECTORS[vector]["weights"].values()]
        assert report.parameters == sum(math.prod(shape) for shape in shapes) and report.dtype == "BF16"
        lora = next(method for method in report.methods if method.method == "lora")
        assert lora.parameters == sum(sum(shape) for shape in shapes if len(shape) == 2)
        assert lora.nbytes == 2 * lora.parameters

    def test_codes_that_are_not_read(self, tmp_path: Path) -> None:
        state = {"x.weight": torch.ones(8, 4, dtype=torch.int8), "x.weight_scales": torch.ones(4).half()}
        with pytest.raises(InputError, match=r"the shape of x.weight cannot be derived from its codes \(EETQ int8\)"):
            loratool.count(write_model(tmp_path / "m", state))


class TestInit:
    """QLoRA: factors on coded weights, whose shapes and numbers are those of the twin."""

    @pytest.mark.parametrize("method", ["lora", "orthogonal", "mica"])
    def test_the_adapter_is_the_twins(self, method: str, plain: Path, fp8: Path, tmp_path: Path) -> None:
        ours = loratool.init(fp8, tmp_path / "a", method=method, rank=4)
        twin = loratool.init(plain, tmp_path / "b", method=method, rank=4)
        assert {each.name.removesuffix(".weight") for each in ours.modules} == MODULES.keys()
        assert ours.modules == twin.modules and ours.nbytes == twin.nbytes and not ours.warnings
        files = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "ab"]
        assert files[0] == files[1]

    @pytest.mark.parametrize(
        "vector", ["bnb_nf4_nested", "gptq_v1_4bit", "awq_gemm", "ct_pack4_group", "mlx_affine4_64"]
    )
    def test_all_linear_are_the_coded_layers(self, vector: str, tmp_path: Path) -> None:
        report = loratool.init(write_vector(vector, tmp_path / "m"), tmp_path / "out", rank=2)
        shapes = {name: tuple(known["shape"]) for name, known in VECTORS[vector]["weights"].items()}
        assert {module.name: module.shape for module in report.modules} == shapes
        assert loratool.inspect(tmp_path / "out", base=tmp_path / "m").coverage.unbound == {}

    def test_magnitudes_are_the_norms_of_the_numbers(self, plain: Path, fp8: Path, tmp_path: Path) -> None:
        for name, base in (("a", fp8), ("b", plain)):
            loratool.init(base, tmp_path / name, dora=True, rank=2)
        found = load_file(tmp_path / "a" / "adapter_model.safetensors")
        twin = load_file(tmp_path / "b" / "adapter_model.safetensors")
        assert found.keys() == twin.keys() and all(torch.equal(found[name], twin[name]) for name in twin)

    @pytest.mark.parametrize("method", ["pissa", "olora", "milora"])
    def test_a_residual_is_plain_where_it_has_factors(
        self, method: str, plain: Path, fp8: Path, tmp_path: Path
    ) -> None:
        """What is taken out of a coded weight leaves numbers, as a merge does; all else keeps its codes."""
        target = [f"layers.0.{module}" for module in LINEAR if module.startswith("mlp")]
        options: dict[str, Any] = {"method": method, "rank": 4, "target": target}
        ours = loratool.init(fp8, tmp_path / "a", residual=tmp_path / "ra", **options)
        twin = loratool.init(plain, tmp_path / "b", residual=tmp_path / "rb", **options)
        assert ours.residual and twin.residual and ours.modules == twin.modules
        assert (ours.residual.error, ours.residual.dtypes) == (twin.residual.error, ("BF16",))
        residual, theirs, before = load_model(tmp_path / "ra"), load_model(tmp_path / "rb"), load_model(fp8)
        taken = {f"model.layers.0.{module}.weight" for module in LINEAR if module.startswith("mlp")}
        gone = {f"{name}_scale_inv" for name in taken}
        assert residual.keys() == before.keys() - gone
        for name, W in residual.items():
            assert torch.equal(bits(W.view(-1)), bits((theirs if name in taken else before)[name].view(-1)))
        assert any("3 quantized weights with factors" in line for line in ours.warnings)
        planned = loratool.init(fp8, tmp_path / "c", residual=tmp_path / "rc", dry_run=True, **options)
        assert planned.residual and planned.residual.nbytes == sum(W.nbytes for W in residual.values())
        config = json.loads((tmp_path / "ra" / "config.json").read_text())["quantization_config"]
        assert "model.layers.0.mlp.up_proj" in config["modules_to_not_convert"]
        undo = loratool.unmerge(tmp_path / "ra", (tmp_path / "ra" / "initial_adapter", -1), tmp_path / "back")
        assert undo.exact_files
        assert (tmp_path / "back" / "model.safetensors").read_bytes() == (fp8 / "model.safetensors").read_bytes()

    def test_another_type_of_residual(self, fp8: Path, tmp_path: Path) -> None:
        options: dict[str, Any] = {"method": "pissa", "residual": tmp_path / "r", "dtype": "fp32"}
        with pytest.raises(NeedsFlag, match="a change of dtype cannot be undone"):
            loratool.init(fp8, tmp_path / "a", **options)
        report = loratool.init(fp8, tmp_path / "a", undo=False, **options)
        assert report.residual and report.residual.dtypes == ("F32",) and report.residual.error < 1e-6
        assert all(W.dtype == torch.float32 for W in load_model(tmp_path / "r").values())

    def test_codes_that_are_not_read(self, tmp_path: Path) -> None:
        state = {"x.weight": torch.ones(8, 4, dtype=torch.int8), "x.weight_scales": torch.ones(4).half()}
        with pytest.raises(InputError, match=r"is quantized \(EETQ int8\)"):
            loratool.init(write_model(tmp_path / "m", state), tmp_path / "out")


class TestExtract:
    """The change is that of the numbers, whichever side has codes."""

    TARGET = "model.layers.1.self_attn.q_proj"

    def tuned(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        A, B = factors(*MODULES[self.TARGET], 2, dtype=torch.float64)
        name = f"{self.TARGET}.weight"
        return {**state, name: (state[name].double() + B @ A / 500).bfloat16()}

    def test_from_a_coded_base(self, plain: Path, fp8: Path, tmp_path: Path) -> None:
        tuned = write_model(tmp_path / "tuned", self.tuned(plain_model()), CONFIG)
        ours = loratool.extract(fp8, tuned, tmp_path / "a", rank=4)
        twin = loratool.extract(plain, tuned, tmp_path / "b", rank=4)
        assert [each.name for each in ours.modules] == [f"{self.TARGET}.weight"] and ours.unchanged == twin.unchanged
        without = [[replace(each, noise=0.0, above_noise=0) for each in report.modules] for report in (ours, twin)]
        assert without[0] == without[1] and ours.kept == twin.kept and not ours.left_out
        files = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "ab"]
        assert files[0] == files[1]

    def test_to_a_coded_model_and_between_two(self, plain: Path, fp8: Path, tmp_path: Path) -> None:
        coded, scale = as_fp8(plain_model()), f"{self.TARGET}.weight_scale_inv"
        tuned = write_model(tmp_path / "tuned", {**coded, scale: coded[scale] * 1.125}, FP8_CONFIG)
        for n, base in (("a", plain), ("b", fp8)):
            report = loratool.extract(base, tuned, tmp_path / n, rank=16)
            (module,) = report.modules
            assert module.name == f"{self.TARGET}.weight" and report.relative == pytest.approx(0.125)
            found = load_file(tmp_path / n / "adapter_model.safetensors")
            A, B = (found[f"base_model.model.{self.TARGET}.lora_{side}.weight"].double() for side in "AB")
            W = plain_model()[f"{self.TARGET}.weight"].double()
            assert torch.allclose(B @ A, W / 8, rtol=0, atol=1e-6 * float(W.norm()))

    @pytest.mark.parametrize("way", ["mixed", "dequantize"])
    def test_rounding_what_did_not_change_is_no_change(self, way: str, tmp_path: Path) -> None:
        """bfloat16 holds no e4m3 number times 0.0123, so that a merge that dequantizes all rounds all."""
        state = {n: t if t.dim() else torch.tensor(0.0123) for n, t in as_fp8(plain_model()).items()}
        base = write_model(tmp_path / "base", state, FP8_CONFIG)
        A, B = factors(*MODULES[self.TARGET], 2)
        adapter = write_peft(tmp_path / "x", {self.TARGET: (A / 500, B)})
        loratool.merge(base, adapter, tmp_path / "merged", quantized=way)
        for n, sides in (("a", ("base", "merged")), ("b", ("merged", "base"))):
            report = loratool.extract(*(tmp_path / side for side in sides), tmp_path / n, rank=2)
            assert [each.name for each in report.modules] == [f"{self.TARGET}.weight"] and not report.left_out

    def test_the_noise_of_codes(self, tmp_path: Path) -> None:
        """Of whole numbers times a scale it is that of rounding to multiples of the scale."""
        scales = torch.tensor([[0.5]] * 16 + [[0.25]] * 16)
        q = torch.randint(-100, 100, (32, 64), generator=torch.Generator().manual_seed(1)).to(torch.int8)
        write_model(tmp_path / "coded", {"x.weight": q, "x.weight_scale": scales})
        write_model(tmp_path / "plain", {"x.weight": torch.zeros(32, 64)})
        one, two = (open_checkpoint(tmp_path / n).ref("x.weight") for n in ("plain", "coded"))
        found = difference(one, two, ON_CPU).noise
        assert two.weight and found.rows.tolist() == pytest.approx([64 * 0.5**2 / 12] * 16 + [64 * 0.25**2 / 12] * 16)
        assert found.columns.tolist() == pytest.approx([16 * (0.5**2 + 0.25**2) / 12] * 64)
