"""Hold quantization to its tensor: codes that no codec reads are refused where an update is for them, else copied.

What is read is held to its formats' software in tests/files/codecs and tests/commands/test_merge_quantized.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, bits, factors, load_model, spread, weights, write_model, write_peft
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool import InputError
from loratool.files.checkpoint import open_checkpoint
from loratool.files.codecs.quantized import CODINGS

OUT, IN = 64, 128


def codes(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    seeded = torch.Generator().manual_seed(5)
    if dtype == torch.float8_e4m3fn:
        return torch.randn(*shape, generator=seeded).to(dtype)
    return torch.randint(0, 100, shape, generator=seeded).to(dtype)


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, 0.5).to(dtype)


F8, I8, U8, I32, U32 = torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32, torch.uint32
FP8, MARK = codes(OUT, IN, dtype=F8), codes(20)
# format -> what a weight x of (OUT, IN) is stored as, and what config.json has to say of it. Names, types and shapes as
# the packages write them: bitsandbytes, ComfyUI, modelopt, transformers, DeepSeek, mlx-lm, compressed-tensors,
# AutoGPTQ, AutoAWQ, gpt-oss, optimum-quanto, torchao, hqq, aqlm, vptq, exllamav3, EETQ.
STORED: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "bitsandbytes 4-bit": (
        {
            "x.weight": codes(OUT * IN // 2, 1),
            "x.weight.absmax": ones(OUT * IN // 64),
            "x.weight.quant_map": ones(16),
            "x.weight.quant_state.bitsandbytes__nf4": MARK,
        },
        {},
    ),
    "bitsandbytes int8": ({"x.weight": codes(OUT, IN, dtype=I8), "x.SCB": ones(OUT), "x.weight_format": codes(1)}, {}),
    "ComfyUI 8-bit": ({"x.weight": FP8, "x.weight_scale": ones(1), "x.comfy_quant": MARK}, {}),
    "ComfyUI 4-bit": (
        {
            "x.weight": codes(OUT, IN // 2),
            "x.weight_scale": codes(128, 8, dtype=F8),
            "x.weight_scale_2": ones(1),
            "x.comfy_quant": MARK,
        },
        {},
    ),
    "ComfyUI scaled fp8": ({"x.weight": FP8, "x.scale_weight": ones(1), "x.scale_input": ones(1)}, {}),
    "modelopt nvfp4": (
        {
            "x.weight": codes(OUT, IN // 2),
            "x.weight_scale": codes(OUT, IN // 16, dtype=F8),
            "x.weight_scale_2": ones(1),
            "x.input_scale": ones(1),
        },
        {},
    ),
    "fp8": ({"x.weight": FP8, "x.weight_scale_inv": ones(1, 1)}, {}),
    "fp8 of Mistral": ({"x.weight": FP8, "x.qscale_weight": ones(1), "x.qscale_act": ones(1)}, {}),
    "fp8 of DeepSeek-V4": ({"x.weight": FP8, "x.scale": ones(1, 1)}, {}),
    "fp8 by channel": ({"x.weight": FP8, "x.weight_scale": ones(OUT, 1), "x.input_scale": ones(1)}, {}),
    "int8": ({"x.weight": codes(OUT, IN, dtype=I8), "x.weight_scale": ones(OUT, 1)}, {}),
    "DeepSeek fp4": ({"x.weight": codes(OUT, IN // 2, dtype=I8), "x.scale": codes(OUT, IN // 32)}, {}),
    "EETQ int8": ({"x.weight": codes(IN, OUT, dtype=I8), "x.weight_scales": ones(OUT, dtype=torch.half)}, {}),
    "MLX": (
        {
            "x.weight": codes(OUT, IN * 4 // 32, dtype=U32),
            "x.scales": ones(OUT, IN // 64),
            "x.biases": ones(OUT, IN // 64),
        },
        {"quantization": {"group_size": 64, "bits": 4}},
    ),
    "MLX by layer": (
        {"x.weight": codes(OUT, IN * 6 // 32, dtype=U32), "x.scales": ones(OUT, 2), "x.biases": ones(OUT, 2)},
        {"quantization": {"group_size": 64, "bits": 4, "x": {"group_size": 64, "bits": 6}}},
    ),
    "compressed-tensors 4-bit": (
        {
            "x.weight_packed": codes(OUT, IN // 2),
            "x.weight_scale": codes(OUT, IN // 16, dtype=F8),
            "x.weight_global_scale": ones(1),
        },
        {},
    ),
    "compressed-tensors": (
        {
            "x.weight_packed": codes(OUT, IN * 4 // 32, dtype=I32),
            "x.weight_scale": ones(OUT, IN // 32),
            "x.weight_shape": torch.tensor([OUT, IN]),
        },
        {"compression_config": {"config_groups": {"group_0": {"weights": {"num_bits": 4}}}}},
    ),
    "GPTQ": (
        {
            "x.qweight": codes(IN * 4 // 32, OUT, dtype=I32),
            "x.qzeros": codes(1, OUT * 4 // 32, dtype=I32),
            "x.scales": ones(1, OUT, dtype=torch.half),
            "x.g_idx": codes(IN, dtype=I32),
        },
        {"thinker_config": {"text_config": {"quantization_config": {"quant_method": "gptq", "bits": 4}}}},
    ),
    "AWQ or GPTQ": (
        {
            "x.qweight": codes(IN, OUT * 4 // 32, dtype=I32),
            "x.qzeros": codes(1, OUT * 4 // 32, dtype=I32),
            "x.scales": ones(1, OUT, dtype=torch.half),
        },
        {"llm_config": {"quantization_config": {"quant_method": "awq", "w_bit": 4}}},
    ),
    "mxfp4": ({"x_blocks": codes(4, OUT // 4, IN // 32, 16), "x_scales": codes(4, OUT // 4, IN // 32)}, {}),
    "quanto": (
        {"x.weight._data._data": codes(OUT * IN // 256, 128), "x.weight._scale": ones(OUT * IN // 128, 1)},
        {},
    ),
    "quanto of 8 bits": ({"x.weight._data": codes(OUT, IN, dtype=I8), "x.weight._scale": ones(OUT, 1)}, {}),
    "torchao": ({"x._weight_qdata": codes(OUT, IN, dtype=I8), "x._weight_scale": ones(OUT, 1)}, {}),
    "HQQ": ({"x.W_q": codes(OUT, IN // 2), "x.scale": ones(1, 64), "x.zero": ones(1, 64), "x.nbits": ones(1)}, {}),
    "HIGGS": ({"x.weight": codes(OUT // 4, IN, dtype=torch.int16), "x.tables2": ones(16, 16, 2)}, {}),
    "SpQR": ({"x.dense_weights": codes(64, dtype=torch.int64), "x.row_offsets": codes(OUT, dtype=I32)}, {}),
    "FP-Quant": ({"x.qweight": codes(OUT, IN // 2), "x.forward_hadamard_matrix": ones(32, 32)}, {}),
    "4over6": ({f"x.quantized_weight_{end}": codes(OUT, IN // 2) for end in ("values", "scale_factors")}, {}),
    "SINQ": ({"x.W_q": codes(OUT, IN // 2), "x.scale": ones(OUT, 1), "x.zero": ones(OUT, 1), "x.scale2": ones(IN)}, {}),
    "torchao int4 in tiles": (
        {
            "x._weight_qdata": codes(OUT // 8, IN // 128, 32, 4, dtype=I32),
            "x._weight_scale_and_zero": ones(IN // 32, OUT, 2, dtype=torch.bfloat16),
        },
        {},
    ),
    "AQLM": (
        {"x.codes": codes(OUT, IN // 8, 1, dtype=I8), "x.codebooks": ones(1, 256, 1, 8), "x.scales": ones(OUT)},
        {},
    ),
    "VPTQ": ({"x.indices": codes(1, OUT, 8, dtype=I32), "x.centroids": ones(1, 256, 8)}, {}),
    "exl3": ({"x.trellis": codes(8, 4, 64, dtype=torch.int16), "x.suh": ones(IN), "x.svh": ones(OUT)}, {}),
    "fp8 experts": ({"x": codes(4, OUT // 4, IN, dtype=F8), "x_scale_inv": ones(4, 1, 1)}, {}),
    "int8 experts": ({"x": codes(4, OUT // 4, IN, dtype=I8), "x_scale": ones(4, 1, IN)}, {}),
    "4-bit experts": ({"x": codes(4, OUT // 4, IN // 2), "x_weight_scale": codes(4, 16, 8, dtype=F8)}, {}),
    "an unknown fp8 format": ({"x.weight": FP8, "x.some_scales": ones(3)}, {}),
    "ComfyUI scaled weights": ({"x.weight": ones(OUT, IN, dtype=torch.bfloat16), "x.scale_weight": ones(1)}, {}),
}
# Those that a codec reads as they stand here
READ = (
    "ComfyUI scaled fp8", "modelopt nvfp4", "fp8", "fp8 of Mistral", "fp8 of DeepSeek-V4", "fp8 by channel", "int8",
    "DeepSeek fp4", "MLX", "MLX by layer", "compressed-tensors 4-bit", "compressed-tensors", "GPTQ", "AWQ or GPTQ",
    "mxfp4", "fp8 experts", "quanto of 8 bits",
)  # fmt: skip
UNREAD = "EETQ int8"
UNCOUNTED = ("quanto", "4over6", "HQQ", "HIGGS", "SpQR", "SINQ", "AQLM", "VPTQ", "exl3")
PLAIN = {"model.y.weight": weights(8, 6, dtype=torch.bfloat16), "model.norm.weight": weights(6)}


NAMED = "AQLM,EETQ int8,HIGGS,SINQ,SpQR,VPTQ,exl3,torchao int4 in tiles".split(",")


@pytest.mark.parametrize("name", NAMED)
def test_the_remedy_names_what_dequantizes(name: str, tmp_path: Path) -> None:
    tensors, config = STORED[name]
    base = write_model(tmp_path / "base", {**PLAIN, **tensors}, config)
    touching = write_peft(tmp_path / "x", {"x": factors(OUT, IN, 2)})
    package = name.split()[0].removeprefix("SpQR").replace("exl3", "exllamav3").lower() or "spqr_quant"
    for call in (
        lambda: loratool.merge(base, touching, tmp_path / "out"),
        lambda: loratool.convert_model(base, tmp_path / "plain", dtype="bf16"),
    ):
        with pytest.raises(InputError, match="is quantized") as error:
            call()
        remedy = str(error.value.remedy)
        assert "or dequantize it with" in remedy and (package in remedy.lower() or name == "HIGGS")


def test_sinqs_codes_are_not_hqqs(tmp_path: Path) -> None:
    """Its scales of columns are beside what HQQ has; or its config alone tells it."""
    file, config = FIXTURES / "coded" / "hqq_4bit.safetensors", {"quant_method": "sinq"}
    tensors = load_file(file)
    mine = {name: x for name, x in tensors.items() if name.startswith("model.layers.0.self_attn.q_proj")}
    for folder, extra, declared in (
        ("scales", {"model.layers.0.self_attn.q_proj.scale2": torch.ones(48)}, {}),
        ("config", {}, {"quantization_config": config}),
    ):
        with closing(open_checkpoint(write_model(tmp_path / folder, {**mine, **extra}, declared))) as opened:
            assert not opened.weights and opened.coded


def test_every_row_of_the_table_is_tried() -> None:
    found = {stored_format(tensors) for tensors, _ in STORED.values()}
    assert {coding.format for coding in CODINGS} <= found


def stored_format(tensors: dict[str, Tensor]) -> str:
    from loratool.files.codecs.quantized import find_coded
    from loratool.files.dtypes import TensorSpec

    names = {F8: "F8_E4M3", I8: "I8", U8: "U8", I32: "I32", U32: "U32", torch.int16: "I16", torch.int64: "I64"}
    specs = {k: TensorSpec(names.get(v.dtype, "F32"), tuple(v.shape)) for k, v in tensors.items()}
    return next((coded.format for coded in find_coded(specs, {}).values()), "")


@pytest.mark.parametrize("name", STORED)
def test_codes_are_read_or_refused_where_they_are_touched(name: str, tmp_path: Path, run: Callable[..., Any]) -> None:
    tensors, config = STORED[name]
    base = write_model(tmp_path / "base", {**PLAIN, **tensors}, config)
    with closing(open_checkpoint(base)) as opened:
        assert (len(opened.weights), len(opened.coded)) == ((1, 0) if name in READ else (0, 1))
    if name in READ:
        return
    touching = write_peft(tmp_path / "x", {"x": factors(OUT, IN, 2)})
    for options in ((), ("--dtype", "bf16", "--no-undo")):
        result = run("merge", base, touching, "-o", tmp_path / "out", *options)
        assert result.exit_code == 3 and not (tmp_path / "out").exists(), result.output
        assert "is quantized (" in result.stderr and "pass the original model in 16 or 32 bits" in result.stderr


@pytest.mark.parametrize("name", spread(STORED, 12))
def test_codes_are_copied_where_nothing_is_for_them(name: str, tmp_path: Path, run: Callable[..., Any]) -> None:
    tensors, config = STORED[name]
    base = write_model(tmp_path / "base", {**PLAIN, **tensors}, config)
    apart = write_peft(tmp_path / "y", {"model.y": factors(8, 6, 2)})
    for options in ((), ("--dtype", "fp32", "--no-undo")):
        assert run("merge", base, apart, "-o", tmp_path / "out", "--force", *options).exit_code == 0
        merged = load_model(tmp_path / "out")
        assert all(
            merged[each].dtype == tensor.dtype and torch.equal(bits(merged[each]), bits(tensor))
            for each, tensor in tensors.items()
        )
        assert not torch.equal(merged["model.y.weight"].float(), PLAIN["model.y.weight"].float())
        assert loratool.verify(base, apart, tmp_path / "out").status == "proven"
    assert run("merge", base, apart, "-o", tmp_path / "out", "--force").exit_code == 0
    assert run("unmerge", tmp_path / "out", apart, "-o", tmp_path / "back").exit_code == 0
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", STORED)
def test_weights_are_counted_and_not_their_codes(name: str, tmp_path: Path) -> None:
    tensors, config = STORED[name]
    report = loratool.inspect(write_model(tmp_path / "base", {**PLAIN, **tensors}, config))
    assert report.kind == "checkpoint" and report.quantization is not None
    uncounted = name in UNCOUNTED
    assert report.uncounted == uncounted
    assert report.parameters == 8 * 6 + 6 + OUT * IN * (not uncounted)
    assert report.parameters == sum(group.parameters for group in report.groups) == sum(report.dtypes.values())
    coded = [group for group in report.groups if not group.name.startswith("model.")]
    assert sum(bool(group.role) for group in coded) <= 1


def test_inspect_with_a_base_divides_by_no_codes(tmp_path: Path, run: Callable[..., Any]) -> None:
    tensors, config = STORED[UNREAD]
    base = write_model(tmp_path / "base", {**PLAIN, **tensors}, config)
    adapter = write_peft(tmp_path / "a", {"x": factors(OUT, IN, 2), "model.y": factors(8, 6, 2)})
    report = loratool.inspect(adapter, base=base)
    assert report.kind == "adapter"
    relative = {each.name: each.relative for each in report.details}
    assert relative["x"] is None and relative["model.y"] is not None
    assert report.coverage is not None and (report.coverage.bound, report.coverage.unbound) == (2, {})
    assert any("1 modules are quantized in the base (EETQ int8)" in line for line in report.problems)
    assert run("inspect", adapter, "--base", base, "--strict").exit_code == 1


def test_a_config_alone_codes_nothing(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "fp8", "modules_to_not_convert": ["x"]}}
    base = write_model(tmp_path / "base", {"x.weight": weights(6, 4)}, config)
    adapter = write_peft(tmp_path / "a", {"x": factors(6, 4, 2)})
    loratool.merge(base, adapter, tmp_path / "out")
    plain = write_model(tmp_path / "plain", {"x.weight": weights(6, 4)}, {})
    loratool.merge(plain, adapter, tmp_path / "same")
    assert torch.equal(load_model(tmp_path / "out")["x.weight"], load_model(tmp_path / "same")["x.weight"])


@pytest.mark.parametrize(
    ("file", "content", "method"),
    [
        ("hf_quant_config.json", {"producer": {}, "quantization": {"quant_algo": "NVFP4"}}, "NVFP4"),
        ("quantize_config.json", {"bits": 4, "group_size": 128}, "gptq"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128}, "awq"),
    ],
)
def test_what_stands_beside_the_config_is_read(file: str, content: dict[str, Any], method: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", PLAIN, {"model_type": "x"})
    (base / file).write_text(json.dumps(content))
    report = loratool.inspect(base)
    assert report.kind == "checkpoint" and report.quantization == method


def test_a_plain_cast_to_float8_is_no_code(tmp_path: Path) -> None:
    """ComfyUI's `fp8_e4m3fn` files have them, and its scaled ones keep 16-bit layers with a scale of one."""
    W = weights(OUT, IN, dtype=torch.bfloat16)
    state = {"x.weight": W, "x.scale_weight": torch.ones(1), "z.weight": FP8, "scaled_fp8": codes(2, dtype=F8)}
    save_file(state, tmp_path / "base.safetensors")
    adapter = write_peft(tmp_path / "a", {"x": factors(OUT, IN, 2), "z": factors(OUT, IN, 2)})
    with pytest.raises(loratool.NeedsFlag, match='add dtype="bf16", undo=False'):
        loratool.merge(tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors")
    loratool.merge(tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors", dtype="bf16", undo=False)
    merged = load_file(tmp_path / "out.safetensors")
    A, B = factors(OUT, IN, 2)
    for name, base in (("x.weight", W), ("z.weight", FP8)):
        assert torch.equal(merged[name], (base.double() + B.double() @ A.double()).bfloat16())


@pytest.mark.parametrize(
    "beside", ["x_scale", "x.SCALE", "x.weightScale", "x.dequant_factor", "x.weight_inverse_scale", ""]
)
def test_a_scale_by_any_other_name(beside: str, tmp_path: Path) -> None:
    """A float8 weight is a plain cast only where nothing stands beside it and no config speaks of quantization."""
    state = {"x.weight": FP8, "x.bias": ones(OUT), **({beside: ones(1)} if beside else {})}
    config = {} if beside else {"quantization_config": {"quant_method": "new"}}
    base = write_model(tmp_path / "base", {**PLAIN, **state}, config)
    with pytest.raises(InputError, match="is quantized"):
        loratool.merge(base, write_peft(tmp_path / "a", {"x": factors(OUT, IN, 2)}), tmp_path / "o", dtype="bf16")
    report = loratool.inspect(base)
    assert report.kind == "checkpoint" and report.parameters == 8 * 6 + 6 + OUT * IN + OUT


def test_layers_that_only_the_metadata_lists(tmp_path: Path) -> None:
    layers = {"format_version": "1.0", "layers": {"x": {"format": "float8_e4m3fn"}}}
    save_file({"x.weight": FP8}, tmp_path / "b.safetensors", {"_quantization_metadata": json.dumps(layers)})
    adapter = write_peft(tmp_path / "a", {"x": factors(OUT, IN, 2)})
    with pytest.raises(InputError, match=r"is quantized \(ComfyUI\)"):
        loratool.merge(tmp_path / "b.safetensors", adapter, tmp_path / "out.safetensors", dtype="bf16", undo=False)
    with pytest.raises(InputError, match="which a torch file cannot hold"):
        loratool.convert_model(tmp_path / "b.safetensors", tmp_path / "b.bin", to="torch")
    for broken in ("[", '{"layers": 3}', "[]", "[" * 10**5):
        save_file({"y.weight": weights(4, 4)}, tmp_path / "c.safetensors", {"_quantization_metadata": broken})
        assert loratool.inspect(tmp_path / "c.safetensors").kind == "checkpoint"


def test_a_quantized_embedding_is_so_under_the_name_of_its_head(tmp_path: Path) -> None:
    state = {n.replace("x.", "model.embed_tokens."): tensor for n, tensor in STORED[UNREAD][0].items()} | PLAIN
    base = write_model(tmp_path / "base", state, {"model_type": "llama", "tie_word_embeddings": True})
    adapter = write_peft(tmp_path / "a", {"lm_head": factors(OUT, IN, 2)})
    for tied in ("untie", "share"):
        with pytest.raises(InputError, match=r"lm_head.weight: is quantized \(EETQ int8\)"):
            loratool.merge(base, adapter, tmp_path / "out", dtype="bf16", undo=False, tied=tied)
    report = loratool.inspect(adapter, base=base)
    assert report.kind == "adapter" and report.details[0].relative is None


def test_a_model_that_was_quantized_after_its_merge_is_not_verified(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {**PLAIN, "x.weight": weights(OUT, IN)})
    adapter = write_peft(tmp_path / "a", {"x": factors(OUT, IN, 2)})
    merged = write_model(tmp_path / "merged", {**PLAIN, **STORED[UNREAD][0]})
    with pytest.raises(InputError, match=r"x\..*is quantized \(EETQ int8\), but not in"):
        loratool.verify(base, adapter, merged)


def test_codes_that_differ_are_not_compared(tmp_path: Path) -> None:
    tensors, config = STORED[UNREAD]
    base = write_model(tmp_path / "base", {**PLAIN, **tensors}, config)
    other = write_model(
        tmp_path / "other", {**PLAIN, **tensors, "x.weight_scales": tensors["x.weight_scales"] * 2}, config
    )
    apart = {**PLAIN, **tensors, "model.y.weight": weights(8, 6, seed=3, dtype=torch.bfloat16)}
    tuned = write_model(tmp_path / "tuned", apart, config)
    with pytest.raises(InputError, match="differs, and its codes"):
        loratool.diff(base, other)
    found = loratool.diff(base, tuned)
    assert found.kind == "checkpoints" and [row.name for row in found.tensors] == ["model.y.weight"]
    with pytest.raises(InputError, match="differs, and its codes"):
        loratool.diff(write_model(tmp_path / "p", PLAIN), tuned)


def test_an_attention_adapter_on_gpt_oss(tmp_path: Path) -> None:
    """The release has experts in mxfp4, all else in bf16; transformers reads both, and peft's merge is ours."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.GptOssConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_local_experts=4, num_experts_per_tok=2, vocab_size=64, dtype="bfloat16",
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config).bfloat16()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    for i in range(2):
        for name, rows, columns in (("gate_up_proj", 192, 64), ("down_proj", 64, 96)):
            path = f"model.layers.{i}.mlp.experts.{name}"
            del state[path]
            state[f"{path}_blocks"] = codes(4, rows, columns // 32, 16)
            state[f"{path}_scales"] = 118 + codes(4, rows, columns // 32) % 4
    declared = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    base = write_model(tmp_path / "base", state, {**config.to_dict(), "quantization_config": declared})
    paths = [f"model.layers.{i}.self_attn.{m}_proj" for i in range(2) for m in "qkvo"]
    adapter = write_peft(
        tmp_path / "a", {p: factors(*state[f"{p}.weight"].shape, 4, seed=i) for i, p in enumerate(paths)}
    )

    def load(path: Path) -> Any:
        dequantized = transformers.Mxfp4Config(dequantize=True)
        return transformers.AutoModelForCausalLM.from_pretrained(path, quantization_config=dequantized).float()

    loratool.merge(base, adapter, tmp_path / "out", dtype="fp32", undo=False)
    theirs = peft.PeftModel.from_pretrained(load(base), adapter).merge_and_unload().state_dict()
    ours = load(tmp_path / "out").state_dict()
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=0, atol=1e-6), name
    assert any(not torch.equal(ours[f"{p}.weight"], state[f"{p}.weight"].float()) for p in paths)
    experts = write_peft(tmp_path / "e", {"model.layers.0.mlp.experts": factors(96, 64, 4)})
    with pytest.raises(InputError):
        loratool.merge(base, experts, tmp_path / "no")
    report = loratool.inspect(base)
    assert report.kind == "checkpoint" and report.parameters == sum(p.numel() for p in model.parameters())
    roles = {group.name.rpartition(".")[2]: group.role for group in report.groups if ".experts." in group.name}
    assert roles["gate_up_proj"] == roles["down_proj"] == "experts"
    assert not any(role for name, role in roles.items() if name.endswith("_bias"))
