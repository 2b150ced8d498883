"""Hold skip lists against the runtimes' own rules: every rewritten module is kept in 16 bits, every other is coded."""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from lib.models.quantized_loading import (
    METHODS,
    linear_modules,
    load_quantized,
    loading_faults,
    make_plain,
    require,
    tiny_llama,
    tiny_llava,
    tiny_moe,
    write_coded,
    write_config,
)
from lib.oracles.skip_matchers import LIBRARIES, RUNTIMES, Matcher, SchemesDiffer, sglang_modelopt, vllm_fp8
from safetensors import safe_open
from safetensors.torch import load_file

from loratool import InputError
from loratool.architectures.fusion_groups import close_under_fusion
from loratool.files.codecs.quantized import declared_method, find_coded, find_declared
from loratool.files.codecs.skip_lists import (
    SKIP_LISTS,
    extend_skip_lists,
    find_skip_list,
    mixed_notes,
    plain_metadata,
    quantizes_kv_cache,
    without_quantization,
)
from loratool.files.dtypes import TensorSpec


def extend(
    config: Mapping[str, Any],
    method: str,
    modules: Collection[str],
    plain: Collection[str] = (),
    model_types: Collection[str] = (),
    coded: Collection[str] = (),
) -> dict[str, Any]:
    return extend_skip_lists(config, method, modules, plain, coded, model_types)


QKV = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
LATENT = {"fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"), **QKV}
LAYERS = (0, 1, 11)


@dataclass(frozen=True)
class Model:
    """A checkpoint's modules as the file names them, and what runtimes make of the names."""

    coded: tuple[str, ...]
    plain: tuple[str, ...]
    touched: tuple[str, ...]  # each of them alone is a test
    types: tuple[str, ...]  # of config.json
    packed: Mapping[str, tuple[str, ...]]  # of vLLM's class
    runtime: tuple[str, str] = ("", "")  # prefix on disk -> in vLLM and SGLang
    library: tuple[str, str] = ("", "")  # prefix on disk -> in transformers

    def asked(self, prefix: tuple[str, str], packed: Mapping[str, Collection[str]]) -> dict[str, set[str]]:
        """The modules that a runtime asks for -> those on disk that it keeps in them."""
        fused_as = {member: fused for fused, members in packed.items() for member in members}
        found: dict[str, set[str]] = {}
        for module in self.coded:
            path = prefix[1] + module.removeprefix(prefix[0]) if module.startswith(prefix[0]) else module
            block, _, last = path.rpartition(".")
            before, experts, _ = path.partition(".experts.")
            asked = f"{before}.experts" if experts else f"{block}.{fused_as.get(last, last)}"
            found.setdefault(asked, set()).add(module)
        return found


def blocks(prefix: str, attention: str, mlp: str) -> tuple[str, ...]:
    attention_modules = (f"{prefix}layers.{i}.self_attn.{name}_proj" for i in LAYERS for name in attention.split())
    return (*attention_modules, *(f"{prefix}layers.{i}.mlp.{name}" for i in LAYERS for name in mlp.split()))


DENSE = "gate_proj up_proj down_proj"
ROUTED = " ".join(f"experts.{e}.{name}" for e in range(3) for name in DENSE.split())
SHARED = " ".join(f"shared_experts.{name}" for name in DENSE.split())
GATES = tuple(f"model.layers.{i}.mlp.gate" for i in LAYERS)

MODELS = {
    "llama": Model(
        blocks("model.", "q k v o", DENSE),
        ("lm_head",),
        ("model.layers.1.self_attn.k_proj", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj"),
        ("llama",),
        QKV,
    ),
    "moe": Model(
        blocks("model.", "q k v o", f"{ROUTED} {SHARED}"),
        ("lm_head", *GATES),
        (
            "model.layers.1.self_attn.o_proj",
            "model.layers.1.mlp.experts.2.up_proj",
            "model.layers.1.mlp.shared_experts.up_proj",
        ),
        ("qwen3_moe",),
        QKV,
    ),
    "deepseek": Model(
        tuple(
            name.replace("kv_a_proj", "kv_a_proj_with_mqa")
            for name in blocks("model.", "q_a q_b kv_a kv_b o", f"{ROUTED} {SHARED}")
        ),
        ("lm_head", *GATES),
        ("model.layers.1.self_attn.q_a_proj", "model.layers.1.mlp.experts.2.down_proj"),
        ("deepseek_v3",),
        LATENT,
    ),
    "llava": Model(
        blocks("language_model.model.", "q k v o", DENSE),
        ("language_model.lm_head", "vision_tower.vision_model.encoder.layers.1.self_attn.q_proj"),
        ("language_model.model.layers.1.self_attn.q_proj", "language_model.model.layers.1.mlp.down_proj"),
        ("llava", "llama", "clip_vision_model"),
        QKV,
        library=("language_model.model.", "model.language_model."),
    ),
    "qwen2.5-vl": Model(
        blocks("model.", "q k v o", DENSE),
        ("lm_head", "visual.blocks.1.attn.proj"),
        ("model.layers.1.self_attn.v_proj", "model.layers.1.mlp.up_proj"),
        ("qwen2_5_vl",),
        QKV,
        runtime=("model.", "language_model.model."),
        library=("model.", "model.language_model."),
    ),
    "gpt-oss": Model(
        blocks("model.", "", "experts.gate_up_proj experts.down_proj"),
        ("lm_head", *blocks("model.", "q k v o", "router")),
        ("model.layers.1.mlp.experts.down_proj",),
        ("gpt_oss",),
        {},
    ),
}

# What the matchers find, and no list can mend
REFUSED = {
    ("sglang_bitsandbytes", "moe", "model.layers.1.mlp.experts.2.up_proj"),
    ("sglang_bitsandbytes", "deepseek", "model.layers.1.mlp.experts.2.down_proj"),
    ("sglang_modelopt", "deepseek", "model.layers.1.self_attn.q_a_proj"),
}


def rewritten(model: Model, touched: str) -> set[str]:
    return {touched, *close_under_fusion({touched}, model.coded)}


def cases() -> list[Any]:
    found = []
    for (name, model), (method, matchers) in product(MODELS.items(), [*RUNTIMES.items(), *LIBRARIES.items()]):
        if (name == "gpt-oss") != (method == "mxfp4"):
            continue
        is_library = matchers is LIBRARIES.get(method)
        for matcher, touched, has_list in product(matchers, model.touched, (True, False)):
            case = f"{matcher.__name__}-{method}-{name}-{touched}-{'list' if has_list else 'null'}"
            if (matcher.__name__, name, touched) not in REFUSED:
                found.append(pytest.param(name, method, matcher, is_library, touched, has_list, id=case))
    return found


def declared_with(method: str, listed: list[str] | None) -> dict[str, Any]:
    fields = SKIP_LISTS[method].fields.split()
    return {"quant_method": method, **({fields[0]: listed} if fields else {})}


@pytest.mark.parametrize(("name", "method", "matcher", "is_library", "touched", "has_list"), cases())
def test_runtimes_keep_what_was_rewritten_and_nothing_else(
    name: str, method: str, matcher: Matcher, is_library: bool, touched: str, has_list: bool
) -> None:
    model = MODELS[name]
    changed = rewritten(model, touched)
    config = {"quantization_config": declared_with(method, ["lm_head"] if has_list else None)}
    extended = extend(config, method, changed, model.plain, model.types, set(model.coded) - changed)[
        "quantization_config"
    ]
    packed = {} if is_library else model.packed
    asked = model.asked(model.library if is_library else model.runtime, packed)
    for path, modules in asked.items():
        assert modules <= changed or modules.isdisjoint(changed), "the groups are not closed"
        assert matcher(path, extended, packed) == (modules <= changed), path
        assert not matcher(path, config["quantization_config"], packed), "the matcher says yes to anything"
    if not has_list and SKIP_LISTS[method].fields:
        prefix = ("language_model.", "") if is_library and name == "llava" else ("", "")
        heads = [p for p in model.plain if p.endswith("lm_head")]
        assert all(matcher(prefix[1] + head.removeprefix(prefix[0]), extended, packed) for head in heads)


@pytest.mark.parametrize(("matcher", "name", "touched"), sorted(REFUSED))
def test_what_no_list_can_mend_is_in_the_notes(matcher: str, name: str, touched: str) -> None:
    method = next(m for m, matchers in RUNTIMES.items() if any(each.__name__ == matcher for each in matchers))
    always = set(mixed_notes(method, ["model.layers.1.self_attn.o_proj"]))
    assert any("SGLang" in note for note in set(mixed_notes(method, rewritten(MODELS[name], touched))) - always)


def test_sglang_leaves_latent_projections_of_modelopt_plain_in_all_layers() -> None:
    changed = rewritten(MODELS["deepseek"], "model.layers.1.self_attn.q_a_proj")
    declared = extend({"quant_method": "modelopt"}, "modelopt", changed, ["lm_head"])
    assert sglang_modelopt("model.layers.11.self_attn.fused_qkv_a_proj_with_mqa", declared, {})


def test_without_closing_the_group_a_runtime_refuses() -> None:
    declared = extend({"quant_method": "fp8"}, "fp8", ["model.layers.1.self_attn.q_proj"])
    with pytest.raises(SchemesDiffer):
        vllm_fp8("model.layers.1.self_attn.qkv_proj", declared, QKV)


NAMES = ["model.layers.1.self_attn.o_proj", "model.layers.0.self_attn.o_proj"]
SORTED = NAMES[::-1]


def test_order_stays_and_nothing_stands_twice() -> None:
    listed = ["z", NAMES[0], "a"]
    declared = extend({"quant_method": "fp8", "modules_to_not_convert": listed}, "fp8", NAMES, ["lm_head"])
    assert declared["modules_to_not_convert"] == [*listed, NAMES[1]]
    assert listed == ["z", NAMES[0], "a"]
    assert extend(declared, "fp8", NAMES, ["lm_head"]) == declared


@pytest.mark.parametrize("missing", [{}, {"modules_to_not_convert": None}, {"modules_to_not_convert": []}])
def test_a_missing_list_gets_every_plain_module(missing: dict[str, Any]) -> None:
    declared = extend({"quant_method": "awq", **missing}, "awq", NAMES, ["visual.merger", "lm_head"])
    assert declared == {"quant_method": "awq", "modules_to_not_convert": ["lm_head", *SORTED, "visual.merger"]}


@pytest.mark.parametrize(
    ("method", "before", "after"),
    [
        ("fp8", {"ignored_layers": ["x"]}, {"ignored_layers": ["x", *SORTED]}),
        (
            "fp8",
            {"ignored_layers": ["x"], "modules_to_not_convert": ["y"]},
            {"ignored_layers": ["x", *SORTED], "modules_to_not_convert": ["y", *SORTED]},
        ),
        ("modelopt", {"quant_method": "modelopt", "ignore": ["x*"]}, {"ignore": ["x*", *SORTED]}),
        ("NVFP4", {"quant_algo": "NVFP4", "exclude_modules": None}, {"exclude_modules": ["lm_head", *SORTED]}),
        ("modelopt", {"quant_algo": "NVFP4"}, {"exclude_modules": ["lm_head", *SORTED]}),
        (
            "modelopt",
            {"ignore": ["x"], "quantized_layers": {NAMES[0]: {"quant_algo": "FP8"}, "y": {"quant_algo": "NVFP4"}}},
            {"ignore": ["x", *SORTED], "quantized_layers": {"y": {"quant_algo": "NVFP4"}}},
        ),
        ("bitsandbytes", {"llm_int8_skip_modules": ["x"]}, {"llm_int8_skip_modules": ["x", *SORTED]}),
        (
            "gptq",
            {"dynamic": {r"+:.*o_proj": {"bits": 8}}},
            {
                "dynamic": {
                    r"-:model\.layers\.0\.self_attn\.o_proj(?:\.|$)": {},
                    r"-:model\.layers\.1\.self_attn\.o_proj(?:\.|$)": {},
                    r"+:.*o_proj": {"bits": 8},
                }
            },
        ),
        (
            "auto_round",
            {"extra_config": {"x": {"bits": 8}}},
            {"extra_config": {"x": {"bits": 8}, **{n: {"bits": 16, "data_type": "float"} for n in SORTED}}},
        ),
        ("quark", {"exclude": ["x"]}, {"exclude": ["x", *SORTED]}),
        ("MLX", {"bits": 4, NAMES[0]: {"bits": 8}, "x": {"bits": 8}}, {"x": {"bits": 8}}),
        ("hqq", {"skip_modules": ["x"]}, {"skip_modules": ["x", *SORTED]}),
        (
            "torchao",
            {"modules_to_not_convert": ["x"], "quant_type": {"default": {"_data": {"fqn_to_config": {"y": {}}}}}},
            {
                "modules_to_not_convert": ["x", *SORTED],
                "quant_type": {"default": {"_data": {"fqn_to_config": {"y": {}, **dict.fromkeys(SORTED)}}}},
            },
        ),
    ],
)
def test_each_method_says_it_in_its_own_way(method: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    untouched = deepcopy(before)
    extended = extend(before, method, NAMES)
    assert extended == {key: value for key, value in before.items() if key not in NAMES} | after
    assert list(extended.get("dynamic", {})) == list(after.get("dynamic", {})), "the first that matches counts"
    assert before == untouched


def test_gptq_keeps_kinds_of_modules_and_loses_full_paths() -> None:
    before = {"modules_in_block_to_quantize": [["self_attn.o_proj"], [NAMES[0]], [NAMES[1], "mlp.up_proj"]]}
    after = extend(before, "gptq", NAMES)
    assert after["modules_in_block_to_quantize"] == [["self_attn.o_proj"], ["mlp.up_proj"]]


def test_experts_are_one_line_and_for_compressed_tensors_a_regular_expression() -> None:
    modules = [f"model.layers.3.mlp.experts.{e}.{name}" for e in range(4) for name in DENSE.split()]
    extended = extend({"ignore": ["lm_head"]}, "compressed-tensors", modules)
    assert extended["ignore"] == ["lm_head", "model.layers.3.mlp.experts", r"re:model\.layers\.3\.mlp\.experts\..*"]
    of_mlx = {name: {"bits": 8} for name in modules}
    assert extend({"bits": 4, "group_size": 64, **of_mlx}, "MLX", modules) == {"bits": 4, "group_size": 64}


def test_biases_of_coded_experts_do_not_make_them_plain() -> None:
    biases = ["model.layers.0.mlp.experts.gate_up_proj_bias", "model.layers.0.mlp.experts.down_proj_bias"]
    changed, coded = ["model.layers.1.mlp.experts.down_proj"], ["model.layers.0.mlp.experts.down_proj"]
    declared = extend({"quant_method": "mxfp4"}, "mxfp4", changed, [*biases, "lm_head"], (), coded)
    assert declared["modules_to_not_convert"] == ["lm_head", "model.layers.1.mlp.experts"]


@pytest.mark.parametrize(
    ("types", "coded", "head"),
    [
        (["llama"], [], ["lm_head"]),
        ([], [], ["lm_head"]),
        (["whisper"], [], ["proj_out"]),
        (["bert"], [], ["cls.predictions.decoder"]),
        (["llama"], ["lm_head"], []),
        (["llava", "llama"], ["language_model.lm_head"], []),
    ],
)
def test_a_made_list_has_the_head_unless_it_is_coded(types: list[str], coded: list[str], head: list[str]) -> None:
    declared = extend({"quant_method": "fp8"}, "fp8", NAMES, (), types, coded)
    assert [name for name in declared["modules_to_not_convert"] if "layers" not in name] == head
    listed = extend({"quant_method": "fp8", "modules_to_not_convert": ["x"]}, "fp8", NAMES, (), types, coded)
    assert [name for name in listed["modules_to_not_convert"] if "layers" not in name] == ["x"]


@pytest.mark.parametrize(
    ("method", "field"),
    [("fp8", "modules_to_not_convert"), ("gptq", "dynamic"), ("auto-round", "extra_config"), ("fp8", "ignored_layers")],
)
def test_a_field_of_another_kind_is_refused(method: str, field: str) -> None:
    with pytest.raises(InputError, match=f"quantization config: {field}"):
        extend({"quant_method": method, field: "lm_head"}, method, NAMES)


DECLARED = {"quant_method": "fp8", "modules_to_not_convert": ["x"]}
PLACES: list[dict[str, Any]] = [
    {"quantization_config": DECLARED},
    {"model_type": "llava", "text_config": {"quantization_config": DECLARED, "hidden_size": 8}, "vision_config": {}},
    {"thinker_config": {"text_config": {"quantization_config": DECLARED}}},
    {"compression_config": {"format": "dense", "quantization_config": DECLARED}},
    {"quantization": DECLARED, "quantization_config": DECLARED},
]


@pytest.mark.parametrize("config", PLACES, ids=[" ".join(place) for place in PLACES])
def test_the_config_is_found_wherever_it_is(config: dict[str, Any]) -> None:
    text = json.dumps(config)
    extended = extend(config, "fp8", NAMES, ["lm_head"])
    assert json.dumps(extended) == text.replace('["x"]', json.dumps(["x", *SORTED]))
    assert json.dumps(config) == text
    plain = without_quantization(config)
    assert find_declared(plain) == {} and "quant_method" not in json.dumps(plain)
    kept = {"model_type", "text_config", "vision_config", "thinker_config"} & config.keys()
    assert plain.keys() == kept and json.dumps(config) == text


def test_a_field_that_is_no_config_stays() -> None:
    assert without_quantization({"quantization": "codebook", "quantization_config": None}) == {
        "quantization": "codebook"
    }


@pytest.mark.parametrize("method", ["exl3", "unnamed", "sparseml"])
def test_an_unknown_method_is_refused_by_name(method: str) -> None:
    assert find_skip_list(method) is None
    with pytest.raises(InputError, match=f"no skip list is known for {method}"):
        extend({"quantization_config": {"quant_method": method}}, method, NAMES)


def test_a_quantized_kv_cache_is_seen() -> None:
    assert quantizes_kv_cache({"kv_cache_scheme": {"num_bits": 8}})
    assert quantizes_kv_cache({"quantization": {"kv_cache_quant_algo": "FP8"}})
    assert not quantizes_kv_cache({"kv_cache_scheme": None})


def test_the_fields_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", minversion="5.20")
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as CLASSES

    assert transformers
    checked = 0
    for method, skip_list in SKIP_LISTS.items():
        made = CLASSES.get(method, CLASSES.get(f"{method}_4bit"))
        if made is not None and skip_list.fields and method not in ("quark", "modelopt"):
            assert skip_list.fields.split()[0] in inspect.signature(made.__init__).parameters, method
            checked += 1
    assert checked > 12


COMFY = {"format": "pt", "_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {"a": {}, "b": {}}})}


def test_comfy_loses_the_layer_and_the_list_with_the_last_one() -> None:
    left = plain_metadata(COMFY, ["model.diffusion_model.a"])
    assert json.loads(left["_quantization_metadata"]) == {"format_version": "1.0", "layers": {"b": {}}}
    assert plain_metadata(left, ["b"]) == {"format": "pt"}
    assert plain_metadata({"format": "pt"}, ["b"]) == {"format": "pt"}


@pytest.mark.parametrize("broken", ["{", "[]", "{}", '{"layers": 3}', "null"])
def test_a_broken_list_is_refused(broken: str) -> None:
    with pytest.raises(InputError, match="_quantization_metadata"):
        plain_metadata({"_quantization_metadata": broken}, ["b"])


def test_torchao_is_told_that_a_tensor_is_plain() -> None:
    """Its entry stays, as torchao leaves out tensors that have none; of others, nothing changes."""
    plain = json.dumps({"_type": "Tensor"})
    metadata = {"tensor_names": '["0.weight", "1.weight"]', "0.weight": '{"_type": "Int8Tensor"}', "1.weight": "{}"}
    assert plain_metadata(metadata, ["0", "2"]) == {**metadata, "0.weight": plain}
    assert plain_metadata({"0.weight": "x"}, ["0"]) == {"0.weight": "x"}


@pytest.mark.parametrize(
    ("declared", "method"),
    [
        ({}, None),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_algo": "NVFP4"}, "NVFP4"),
        ({"load_in_4bit": True}, "bitsandbytes"),  # as bitsandbytes 0.39 wrote it, before there was a method
        ({"load_in_8bit": True, "quant_method": None}, "bitsandbytes"),
        ({"bits": 4, "group_size": 64}, "MLX"),
        ({"load_in_4bit": False, "bits": 4}, "unnamed"),
    ],
)
def test_a_config_names_its_method(declared: dict[str, Any], method: str | None) -> None:
    assert declared_method(declared) == method


@pytest.mark.parametrize(
    ("declared", "size"),
    [({"bits": 4}, 64), ({"w_bit": 8}, 32), ({"bits": 4, "w_bit": 8}, None), ({"bits": 4, "x": {"bits": 2}}, 128)],
)
def test_the_numbers_of_codes_are_counted_by_the_configs_bits(declared: dict[str, Any], size: int | None) -> None:
    """Where it says one number; that of the module wins."""
    found = find_coded({"x.qweight": TensorSpec("I32", (4, 2))}, declared)
    assert found["x.weight"].size == size


def test_torchao_reads_what_is_plain_now() -> None:
    """Also what it would do with a tensor that its list leaves out: it is not among the result."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    linear = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 64, bias=False))
    weight = linear[0].weight.detach().clone()
    quantize_(linear, Int8WeightOnlyConfig(version=2))
    stored, metadata = flatten_tensor_state_dict({name: p.data for name, p in linear.named_parameters()})
    mixed = {name: tensor for name, tensor in stored.items() if not name.startswith("0.")} | {"0.weight": weight}
    result, left = unflatten_tensor_state_dict(mixed, plain_metadata(metadata, ["0"]))
    assert not left and torch.equal(result["0.weight"], weight)
    assert type(result["1.weight"]) is type(linear[1].weight.data)


def mixed_folder(model: Any, folder: Path, method: str, touched: Collection[str], **declared: Any) -> dict[str, Any]:
    """Write a checkpoint of which some coded modules are plain, its list extended; return the plain weights."""
    plain, modules = write_coded(model, folder, method, **declared)
    changed = {*touched, *close_under_fusion(touched, modules)}
    make_plain(folder, changed, plain)
    config = json.loads((folder / "config.json").read_text())
    nested = [config, *(value for value in config.values() if isinstance(value, dict))]
    types = [each["model_type"] for each in nested if "model_type" in each]
    others = {name.removesuffix(".weight") for name, tensor in plain.items() if tensor.ndim > 1} - set(modules)
    named = declared_method(config["quantization_config"])
    assert named is not None
    write_config(folder, extend(config, named, changed, others, types, set(modules) - changed))
    return {name: plain[f"{name}.weight"] for name in changed}


TOUCHED = ["model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize("method", METHODS)
def test_transformers_loads_a_dense_model(method: str, tmp_path: Path) -> None:
    require(method)
    changed = mixed_folder(tiny_llama(), tmp_path, method, TOUCHED)
    assert loading_faults(tmp_path) == []
    model, _ = load_quantized(tmp_path)
    for name in linear_modules([f"{n}.weight" for n, _ in model.named_modules()]):
        module = model.get_submodule(name)
        assert (type(module) is torch.nn.Linear and not hasattr(module, "weight_scale")) == (name in changed), name
        if name in changed:
            assert torch.equal(module.weight, changed[name])
    if method != "fp8":  # its kernels want a GPU
        assert model(torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.parametrize("method", ["fp8", "bitsandbytes nf4"])
def test_a_tied_head_that_is_in_no_file_stays_plain(method: str, tmp_path: Path) -> None:
    require(method)
    mixed_folder(tiny_llama(tie_word_embeddings=True), tmp_path, method, TOUCHED)
    assert loading_faults(tmp_path) == []
    model, _ = load_quantized(tmp_path)
    assert type(model.lm_head) is torch.nn.Linear


def test_transformers_loads_torchao(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from torchao.quantization import Int8WeightOnlyConfig

    tiny_llama().save_pretrained(tmp_path)
    plain = load_file(tmp_path / "model.safetensors")
    declared = transformers.TorchAoConfig(Int8WeightOnlyConfig(version=2))
    coded = transformers.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=declared)
    coded.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        metadata = plain_metadata(file.metadata(), TOUCHED)
    make_plain(tmp_path, TOUCHED, plain, metadata)
    config = json.loads((tmp_path / "config.json").read_text())
    write_config(tmp_path, extend(config, "torchao", TOUCHED, ["lm_head"]))
    assert loading_faults(tmp_path) == []
    model, _ = load_quantized(tmp_path)
    for name, module in model.named_modules():
        if name in linear_modules([f"{name}.weight"]):
            assert (type(module.weight) is torch.nn.Parameter) == (name in TOUCHED), name
    assert all(torch.equal(model.get_submodule(name).weight, plain[f"{name}.weight"]) for name in TOUCHED)


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors fp8"])
def test_transformers_loads_a_layer_of_plain_experts(method: str, tmp_path: Path) -> None:
    require(method)
    changed = mixed_folder(tiny_moe(), tmp_path, method, ["model.layers.1.mlp.experts.2.up_proj"])
    assert len(changed) == 12 and loading_faults(tmp_path) == []


def test_transformers_takes_all_packed_experts_for_codes(tmp_path: Path) -> None:
    """What a note says; if it loads one day, the note must go."""
    require("compressed-tensors int4")
    touched = ["model.layers.1.mlp.experts.2.up_proj"]
    mixed_folder(tiny_moe(), tmp_path, "compressed-tensors int4", touched)
    assert any("experts of all layers" in note for note in mixed_notes("compressed-tensors", touched))
    with pytest.raises(RuntimeError, match="conversion"):
        load_quantized(tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_transformers_loads_a_multimodal_model(method: str, tmp_path: Path) -> None:
    require(method)
    ignore = {"ignore": ["lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"]}
    declared = ignore if method.startswith("compressed") else {}
    touched = ["language_model.model.layers.1.self_attn.k_proj"]
    changed = mixed_folder(tiny_llava(), tmp_path, method, touched, **declared)
    assert loading_faults(tmp_path) == []
    model, _ = load_quantized(tmp_path)
    for name, weight in changed.items():
        module = model.get_submodule(name.replace("language_model.model.", "model.language_model."))
        assert type(module) is torch.nn.Linear and torch.equal(module.weight, weight)
