"""Merge into quantized models of many classes in each way, and count what is right, refused by name, or wrong.

transformers makes the models and codes them in nf4, which says too what its quantizers take for a linear layer; fp8
and integers are written for the same layers and for the experts, as real files have them. What is right: numbers that
plain code here reads from the codes, merged by peft in float64 and saved by transformers under a file's names, then
rounded once. `pytest -m slow -s` of this file prints the table.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_model, slow
from lib.models.quantized_loading import load_quantized
from lib.oracles.reference import round_reference, to_longdouble
from safetensors.torch import save_file
from torch import Tensor

import loratool
from loratool.errors import InputError, NeedsFlag

transformers = pytest.importorskip("transformers", minversion="5.0")
peft = pytest.importorskip("peft", minversion="0.19")
pytestmark = [pytest.mark.filterwarnings("ignore")]

Tensors = dict[str, Tensor]

BLOCK = 64  # of fp8's scales
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 320,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 32}
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
QKV = ["q_proj", "k_proj", "v_proj"]
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def model(name: str, sizes: Mapping[str, Any] = GROUPED, suffix: str = "ForCausalLM", **fields: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**{**sizes, **fields})
    return getattr(transformers, f"{name}{suffix}")(config)


def multimodal(name: str, vision: Mapping[str, Any], text: Mapping[str, Any], **fields: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(text_config={**GROUPED, **text}, vision_config={**vision}, **fields)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def llava() -> Any:
    vision = {"model_type": "clip_vision_model", **VISION, "image_size": 28, "patch_size": 14, "projection_dim": 64}
    return multimodal("Llava", vision, {"model_type": "llama"}, image_token_index=300)


def gemma3() -> Any:
    vision = {**VISION, "image_size": 28, "patch_size": 14}
    return multimodal("Gemma3", vision, {"model_type": "gemma3_text"}, mm_tokens_per_image=4)


def qwen2_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    vision = {"depth": 1, "embed_dim": 64, "hidden_size": 128, "num_heads": 2, "patch_size": 14}
    return multimodal("Qwen2VL", vision, {"model_type": "qwen2_vl_text", "rope_parameters": rope})


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LATENT = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
}
LATENT_ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"]

# class -> (how it is made, what its attention's layers are called, its experts' parameters)
CLASSES: dict[str, tuple[Callable[[], Any], list[str], list[str]]] = {
    "llama": (partial(model, "Llama"), QKV, []),
    "qwen2": (partial(model, "Qwen2"), QKV, []),
    "qwen3": (partial(model, "Qwen3"), QKV, []),
    "mistral": (partial(model, "Mistral"), QKV, []),
    "gemma2": (partial(model, "Gemma2", tie_word_embeddings=True), QKV, []),
    "gemma3": (gemma3, QKV, []),
    "phi3": (partial(model, "Phi3"), ["qkv_proj"], []),
    "olmo2": (partial(model, "Olmo2"), QKV, []),
    "cohere": (partial(model, "Cohere", tie_word_embeddings=True), QKV, []),
    "glm4": (partial(model, "Glm4"), QKV, []),
    "starcoder2": (partial(model, "Starcoder2"), QKV, []),
    "stablelm": (partial(model, "StableLm"), QKV, []),
    "gpt_neox": (partial(model, "GPTNeoX", SIZES), ["query_key_value"], []),
    "falcon": (partial(model, "Falcon", SIZES, new_decoder_architecture=True, num_kv_heads=2), ["query_key_value"], []),
    "bloom": (partial(model, "Bloom", SIZES, n_head=4, n_layer=2), ["query_key_value"], []),
    "opt": (partial(model, "OPT", SIZES, ffn_dim=192, word_embed_proj_dim=128), QKV, []),
    "gptj": (partial(model, "GPTJ", SIZES, n_embd=128, n_layer=2, n_head=4, rotary_dim=16), QKV, []),
    "gpt2": (
        partial(model, "GPT2", {}, suffix="LMHeadModel", n_embd=128, n_layer=2, n_head=4, vocab_size=320),
        ["c_attn"],
        [],
    ),
    "mpt": (partial(model, "Mpt", {}, d_model=128, n_layers=2, n_heads=4, vocab_size=320), ["Wqkv"], []),
    "bert": (partial(model, "Bert", SIZES, suffix="ForMaskedLM"), ["query", "key", "value"], []),
    "t5": (
        partial(
            model,
            "T5",
            {},
            "ForConditionalGeneration",
            d_model=128,
            d_kv=32,
            d_ff=192,
            num_layers=2,
            num_heads=4,
            vocab_size=320,
            feed_forward_proj="gated-gelu",
        ),
        ["q", "k", "v"],
        [],
    ),
    "mamba": (partial(model, "Mamba", SIZES, state_size=16), ["in_proj"], []),
    "jamba": (
        partial(
            model,
            "Jamba",
            GROUPED,
            num_experts=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            use_mamba_kernels=False,
            mamba_d_state=16,
            mamba_dt_rank=16,
        ),
        QKV,
        ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"],
    ),
    "mixtral": (partial(model, "Mixtral", num_local_experts=4), QKV, STACKS),
    "qwen3_moe": (partial(model, "Qwen3Moe", **MOE), QKV, STACKS),
    "qwen2_moe": (partial(model, "Qwen2Moe", **MOE, shared_expert_intermediate_size=64), QKV, STACKS),
    "olmoe": (partial(model, "Olmoe", num_experts=4, num_experts_per_tok=2), QKV, STACKS),
    "granitemoe": (partial(model, "GraniteMoe", num_local_experts=4), QKV, []),
    "gpt_oss": (partial(model, "GptOss", num_local_experts=4, num_experts_per_tok=2), QKV, STACKS),
    "deepseek_v3": (partial(model, "DeepseekV3", **LATENT), LATENT_ATTENTION, STACKS),
    "glm4_moe": (
        partial(
            model,
            "Glm4Moe",
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            n_shared_experts=1,
            first_k_dense_replace=1,
        ),
        QKV,
        STACKS,
    ),
    "qwen3_next": (
        partial(
            model,
            "Qwen3Next",
            **MOE,
            shared_expert_intermediate_size=64,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=32,
            linear_value_head_dim=32,
            layer_types=["linear_attention", "full_attention"],
        ),
        ["q_proj", "in_proj_qkvz"],
        STACKS,
    ),
    "llava": (llava, QKV, []),
    "qwen2_vl": (qwen2_vl, QKV, []),
}


def digest(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).digest()


def linear_weights(made: Any, stored: Tensors) -> list[str]:
    """The weights in a file that are of linear layers or of one expert, found by their values; the head is none."""
    head, wide = made.get_output_embeddings(), tuple(made._keep_in_fp32_modules or ())  # of which quantizers know
    layers = {
        digest(layer.weight.detach())
        for name, layer in made.named_modules()
        if type(layer).__name__ in ("Linear", "FalconLinear") and layer is not head and not name.endswith(wide)
    }
    one_expert = re.compile(r"\.experts\.\d+\.\w+\.weight$")
    return [name for name, tensor in stored.items() if digest(tensor) in layers or one_expert.search(name)]


def plain_layers(made: Any, stored: Tensors, coded: Collection[str]) -> list[str]:
    """The paths of linear layers with plain weights in the module tree."""
    known = {digest(stored[name]) for name in coded}
    layers = (
        (name, layer.weight.detach()) for name, layer in made.named_modules() if isinstance(layer, torch.nn.Linear)
    )
    return [name for name, weight in layers if digest(weight) not in known]


class Format(ABC):
    """A way to store a weight (out, in): its tensors by the ends of their names, their numbers, and the config."""

    config: Mapping[str, Any]
    ends: tuple[str, ...]
    bits = 8
    multiple = 1  # of the columns

    @abstractmethod
    def encode(self, weight: Tensor) -> Tensors:
        """By end."""

    @abstractmethod
    def decode(self, stored: Tensors) -> Tensor:
        """Float64, from tensors by end."""


class Fp8(Format):
    """DeepSeek-V3's blocks, ragged at the edges."""

    config: Mapping[str, Any] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK] * 2,
    }
    ends = (".weight", ".weight_scale_inv")

    def encode(self, weight: Tensor) -> Tensors:
        rows, columns = weight.shape
        padded = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
        inverse = 448 / padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).abs().amax((1, 3))
        codes = (weight.float() * self.over(inverse, weight.shape)).to(torch.float8_e4m3fn)
        return {".weight": codes, ".weight_scale_inv": 1 / inverse}  # as transformers does

    def over(self, scales: Tensor, shape: torch.Size) -> Tensor:
        return scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: shape[0], : shape[1]]

    def decode(self, stored: Tensors) -> Tensor:
        codes = stored[".weight"].double()
        return codes * self.over(stored[".weight_scale_inv"].double(), codes.shape)


class Compressed(Format):
    """Integers of compressed-tensors, by its own functions; scales in bfloat16."""

    def __init__(self, form: str, ends: str, **weights: Any) -> None:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        args = QuantizationArgs(type="int", symmetric=True, dynamic=False, **weights)
        inputs = QuantizationArgs(num_bits=8, type="int", strategy="token", dynamic=True)
        self.scheme = QuantizationScheme(
            targets=["Linear"], weights=args, input_activations=inputs if args.num_bits == 8 else None, format=form
        )
        self.bits, self.ends, self.multiple = args.num_bits, tuple(ends.split()), args.group_size or 1
        self.config = {
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "config_groups": {"group_0": self.scheme.model_dump(mode="json")},
            "ignore": [],
        }

    @property
    def compressor(self) -> Any:
        from compressed_tensors.compressors import BaseCompressor

        return BaseCompressor.get_value_from_registry(self.scheme.format)

    def encode(self, weight: Tensor) -> Tensors:
        from compressed_tensors.quantization.utils import calculate_qparams

        args = self.scheme.weights
        groups = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        return {f".{key}": tensor for key, tensor in self.compressor.compress(state, self.scheme).items()}

    def decode(self, stored: Tensors) -> Tensor:
        state = {end[1:]: tensor for end, tensor in stored.items()}
        state["weight_scale"] = state["weight_scale"].double()
        return self.compressor.decompress(state, self.scheme)["weight"]


class Nf4(Format):
    """bitsandbytes, nested."""

    config: Mapping[str, Any] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    }
    ends = tuple(f".weight{end}" for end in ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")) + (
        ".weight.quant_state.bitsandbytes__nf4",
    )
    bits = 4

    def encode(self, weight: Tensor) -> Tensors:
        from bitsandbytes.functional import quantize_4bit

        codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        return {".weight": codes} | {f".weight.{key}": value for key, value in state.as_dict(packed=True).items()}

    def decode(self, stored: Tensors) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_blockwise

        named = {end.removeprefix(".weight."): tensor for end, tensor in stored.items() if end != ".weight"}
        state = QuantState.from_dict(named, device=torch.device("cpu"))
        absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
        codes = stored[".weight"].flatten()
        values = state.code.double()[torch.stack((codes >> 4, codes & 15), 1).flatten().long()]
        count = state.shape[0] * state.shape[1]
        return (values[:count] * absmax.double().repeat_interleave(64)[:count]).reshape(state.shape)


FORMATS: dict[str, Callable[[], Format]] = {
    "fp8": Fp8,
    "nf4": Nf4,
    "int4": partial(
        Compressed,
        "pack-quantized",
        ".weight_packed .weight_scale .weight_shape",
        num_bits=4,
        strategy="group",
        group_size=32,
    ),
    "int8": partial(Compressed, "int-quantized", ".weight .weight_scale", num_bits=8, strategy="channel"),
}
WAYS = ("mixed", "dequantize", "requantize", "like")
RANK = 4


class Subject:
    """A class of models: its original, its adapters, and what peft makes of them."""

    def __init__(self, name: str, folder: Path) -> None:
        make, self.attention, self.experts = CLASSES[name]
        torch.manual_seed(0)
        self.model = make().to(torch.bfloat16).eval()
        self.folder = folder
        self.original = folder / "original"
        self.model.save_pretrained(self.original)
        self.plain = load_model(self.original)
        self.linear = linear_weights(self.model, self.plain)

    def adapters(self) -> Iterator[tuple[str, dict[str, Any]]]:
        yield "attention", {"target_modules": self.attention}
        if self.model.config.model_type != "mamba":  # whose out_proj peft refuses
            yield "all-linear", {"target_modules": "all-linear"}
        if self.experts:
            yield "experts", {"target_modules": [], "target_parameters": self.experts}

    def write_adapter(self, name: str, fields: Mapping[str, Any]) -> Path:
        torch.manual_seed(1)
        copy = type(self.model).from_pretrained(self.original, dtype=torch.float32)
        wrapped = peft.get_peft_model(copy, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, **fields))
        for key, parameter in wrapped.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(std=0.003)
        wrapped.save_pretrained(self.folder / name)
        return self.folder / name

    def merged(self, numbers: Tensors, adapter: Path) -> Tensors:
        """The exact sums in float64, as nearly as float64 has them, under the names of a file."""
        start, out = self.folder / "numbers", self.folder / "merged"
        for each in (start, out):
            shutil.rmtree(each, ignore_errors=True)
        shutil.copytree(self.original, start)
        save_file(numbers, start / "model.safetensors", metadata={"format": "pt"})
        wide = type(self.model).from_pretrained(start, dtype=torch.float64)
        peft.PeftModel.from_pretrained(wide, adapter).double().merge_and_unload().save_pretrained(out)
        return load_model(out)


class Coded:
    """A quantized copy of a subject."""

    def __init__(self, subject: Subject, key: str) -> None:
        self.subject, self.format, self.folder = subject, FORMATS[key](), subject.folder / key
        fitting = [name for name in subject.linear if subject.plain[name].shape[1] % self.format.multiple == 0]
        self.modules = [name.removesuffix(".weight") for name in fitting]
        if key == "nf4":
            self.write_by_transformers()
        else:
            stored = {name: tensor for name, tensor in subject.plain.items() if name not in fitting}
            for module in self.modules:
                made = self.format.encode(subject.plain[f"{module}.weight"])
                stored |= {f"{module}{end}": tensor.contiguous() for end, tensor in made.items()}
            shutil.copytree(subject.original, self.folder)
            save_file(stored, self.folder / "model.safetensors", metadata={"format": "pt"})
            config = json.loads((self.folder / "config.json").read_text())
            config["quantization_config"] = dict(self.format.config)
            if "ignore" in self.format.config:
                config["quantization_config"]["ignore"] = plain_layers(subject.model, subject.plain, fitting)
            (self.folder / "config.json").write_text(json.dumps(config))
        self.stored = load_model(self.folder)
        self.numbers = {
            name: tensor.double() if tensor.is_floating_point() else tensor
            for name, tensor in self.stored.items()
            if not self.is_part(name)
        }
        self.numbers |= {f"{module}.weight": self.read(self.stored, module) for module in self.modules}

    def write_by_transformers(self) -> None:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        cls = type(self.subject.model)
        cls.from_pretrained(self.subject.original, quantization_config=config, dtype=torch.bfloat16).save_pretrained(
            self.folder
        )
        end = ".weight.absmax"
        self.modules = [name.removesuffix(end) for name in load_model(self.folder) if name.endswith(end)]

    def dtype(self, name: str) -> torch.dtype:
        """Of plain numbers: that of the file, or of the model for what was coded."""
        return self.stored[name].dtype if name in self.stored and not self.is_part(name) else torch.bfloat16

    def is_part(self, name: str) -> bool:
        return any(name == module + end for module in self.modules for end in self.format.ends)

    def parts(self, stored: Tensors, module: str) -> Tensors:
        return {end: stored[module + end] for end in self.format.ends if module + end in stored}

    def read(self, stored: Tensors, module: str) -> Tensor:
        return self.format.decode(self.parts(stored, module))


def same(x: Tensor, y: Tensor) -> bool:
    return digest(x) == digest(y)


def is_rounded(found: Tensor, exact: Tensor, dtype: torch.dtype) -> bool:
    """Whether numbers are the nearest ones; where two are as near to what float64 has, either."""
    if not exact.is_floating_point():
        return same(found, exact)
    off = (found.double() - exact).abs() > (rounded(exact, dtype).double() - exact).abs() * (1 + 1e-6)
    return found.dtype == dtype and found.shape == exact.shape and not off.any()


def rounded(exact: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return round_reference(to_longdouble(exact), dtype)


def faults(way: str, coded: Coded, out: Tensors, exact: Tensors) -> list[str]:
    """What is wrong in an output, by name; nothing in one that is right."""
    modules = {f"{module}.weight": module for module in coded.modules}
    changed = {name for name, number in exact.items() if not torch.equal(number, coded.numbers[name])}
    found: list[str] = []
    seen: set[str] = set()
    for name, number in exact.items():
        module = modules.get(name, "")
        parts = coded.parts(out, module) if module else {}
        is_coded = bool(parts) and coded.format.ends[1] in parts
        seen |= {module + end for end in parts} if is_coded else {name}
        if not is_coded:
            wrong = name not in out or not is_rounded(out[name], number, coded.dtype(name))
            wrong |= bool(module) and way == "requantize"
        elif way == "requantize" and name in changed:
            wrong = not is_nearest_code(coded, module, out, number)
        else:
            own = coded.parts(coded.stored, module)
            wrong = name in changed or way == "dequantize" or any(not same(parts[end], own[end]) for end in own)
        found += [f"{name} is wrong"] if wrong else []
    return found + [f"{name} is too much" for name in out.keys() - seen]


def is_nearest_code(coded: Coded, module: str, out: Tensors, exact: Tensor) -> bool:
    """Whether no code is nearer, and all but the codes is as it was."""
    own, parts = (coded.parts(stored, module) for stored in (coded.stored, out))
    if any(not same(parts[end], own[end]) for end in own if end != coded.format.ends[0]):
        return False
    off = (coded.format.decode(parts) - exact).abs()
    codes = coded.format.ends[0]
    for code in range(256):
        each = torch.full_like(parts[codes].view(torch.uint8), code).view(parts[codes].dtype)
        other = (coded.format.decode({**parts, codes: each}) - exact).abs()
        if (other < off * (1 - 1e-9)).any():
            return False
    return True


def faults_of_like(coded: Coded, out: Tensors, exact: Tensors) -> list[str]:
    found = [f"{name} is too much" for name in out.keys() - coded.stored.keys()]
    found += [f"{name} is missing" for name in coded.stored.keys() - out.keys()]
    for name, number in exact.items():
        module = name.removesuffix(".weight")
        if module not in coded.modules:
            found += [] if name in out and is_rounded(out[name], number, coded.dtype(name)) else [f"{name} is wrong"]
            continue
        own = coded.format.encode(rounded(number))
        for end in own:
            if not agree(end, own[end], out[module + end]):
                found.append(f"{module}{end} is not what the format's software makes")
    return found


def agree(end: str, own: Tensor, found: Tensor) -> bool:
    """Whether a tensor has the same bytes, but that the offset in bitsandbytes' JSON is a sum that is rounded once."""
    if ".quant_state." not in end:
        return same(own, found)
    states = [json.loads(bytes(each.tolist())) for each in (own, found)]
    offsets = [state.pop("nested_offset") for state in states]
    return states[0] == states[1] and offsets[0] == pytest.approx(offsets[1], rel=1e-5)


def load(folder: Path) -> tuple[Any, list[str]]:
    """The model on transformers' quantized path, None if it cannot be loaded, and what is wrong with it."""
    try:
        made, info = load_quantized(folder)
    except Exception as error:  # of many kinds
        return None, [f"{type(error).__name__}: {error}"]
    keys = (info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return made.eval(), sorted(str(key) for each in keys for key in each)


def distance(made: Any, other: Any) -> float:
    """The median over tokens of the distance of two models' logits: noise sends a token to other experts."""
    tokens = torch.arange(2, 34).reshape(2, 16)
    more = {"decoder_input_ids": tokens} if made.config.is_encoder_decoder else {}
    with torch.no_grad():
        x, y = (each(input_ids=tokens, **more).logits.float() for each in (made, other))
    return float(((x - y).abs().amax(-1) / y.abs().amax(-1)).median())


@dataclass(frozen=True)
class Cell:
    key: str  # of the format
    way: str
    adapter: str
    state: str  # of STATES
    message: str = ""
    loaded: bool = False  # by transformers, as codes


STATES = ("right", "refused", "wrong")


def cells(subject: Subject, keys: Collection[str], only: Collection[str] = ()) -> Iterator[Cell]:
    """Merge each adapter, or these only, into each format in each way."""
    chosen = {name: fields for name, fields in subject.adapters() if not only or name in only}
    adapters = {name: subject.write_adapter(name, fields) for name, fields in chosen.items()}
    wide = {name: tensor.double() for name, tensor in subject.plain.items()}
    for key in keys:
        coded = Coded(subject, key)
        if not coded.modules:
            continue
        loads = not load(coded.folder)[1]
        for (name, adapter), way in product(adapters.items(), WAYS):
            if way == "requantize" and coded.format.bits < 8:
                continue
            out = subject.folder / f"{key}-{name}-{way}"
            try:
                if way == "like":
                    report = loratool.merge(subject.original, adapter, out, like=coded.folder, undo=False)
                else:
                    report = loratool.merge(coded.folder, adapter, out, quantized=way)
            except (InputError, NeedsFlag) as error:
                yield Cell(key, way, name, "refused" if error.culprit else "wrong", str(error))
                continue
            exact = subject.merged(wide if way == "like" else coded.numbers, adapter)
            found = (faults_of_like if way == "like" else partial(faults, way))(coded, load_model(out), exact)
            is_loaded = loads and not any("transformers takes" in note for note in report.warnings)
            if is_loaded:
                found += [f"transformers: {fault}" for fault in load(out)[1]]
            yield Cell(key, way, name, "wrong" if found else "right", "; ".join(found[:3]), is_loaded)
            shutil.rmtree(out)


def table(found: Mapping[str, Sequence[Cell]]) -> str:
    """Classes x formats x ways: how many merges are right, and what the others are."""
    heads = [(key, way) for key in FORMATS for way in WAYS if way != "requantize" or key in ("fp8", "int8")]
    lines = ["| class | " + " | ".join(" ".join(head) for head in heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, each in found.items():
        counts = [Counter(cell.state for cell in each if (cell.key, cell.way) == head) for head in heads]
        told = (", ".join(f"{count[s]} {s}" for s in STATES if count[s]) or "-" for count in counts)
        lines.append(f"| {name} | " + " | ".join(told) + " |")
    states = Counter(cell.state for each in found.values() for cell in each)
    loaded = sum(cell.loaded for each in found.values() for cell in each)
    sums = ", ".join(f"{states[state]} {state}" for state in STATES)
    return "\n".join([*lines, "", f"{sums}; {loaded} were loaded by transformers"])


def packages(key: str) -> None:
    if key != "fp8":
        name = "bitsandbytes" if key == "nf4" else "compressed_tensors"
        pytest.importorskip(name, reason=f"{name} is not installed")


@pytest.mark.parametrize(("name", "adapter"), [slow("llama", "all-linear"), ("qwen3_moe", "experts")])
def test_merges_into_blocks_of_fp8_are_right_in_every_way(name: str, adapter: str, tmp_path: Path) -> None:
    found = list(cells(Subject(name, tmp_path), ["fp8"], [adapter]))
    assert [cell for cell in found if cell.state != "right"] == []
    assert {cell.way for cell in found} == {*WAYS}


REFUSED = {"gpt2": "stores (in, out)"}  # class -> what is said of it


@pytest.mark.slow
def test_merges_into_quantized_models_of_all_classes_are_right_or_refused(tmp_path: Path) -> None:
    for key in FORMATS:
        packages(key)
    found = {name: list(cells(Subject(name, tmp_path / name), [*FORMATS])) for name in CLASSES}
    print(f"\n{table(found)}")
    others = [(name, cell) for name, each in found.items() for cell in each if cell.state != "right"]
    for name, cell in others:
        print(name, cell)
    assert all(cell.state == "refused" and REFUSED.get(name, "-") in cell.message for name, cell in others)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["nf4", "int4", "int8"])
@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2", "opt", "gpt_oss", "deepseek_v3", "qwen2_vl"])
def test_a_mixed_model_answers_as_the_dequantized_one(name: str, key: str, tmp_path: Path) -> None:
    packages(key)
    subject = Subject(name, tmp_path)
    coded = Coded(subject, key)
    made, found = load(coded.folder)
    if found:
        pytest.skip(f"transformers does not load the base: {found[0]}")
    adapter = subject.write_adapter("attention", {"target_modules": subject.attention})
    models = [made]
    for way in ("mixed", "dequantize"):
        loratool.merge(coded.folder, adapter, tmp_path / way, quantized=way)
        models.append(load(tmp_path / way)[0])
    noise = 0.02 if key == "int8" else 0.01  # int8 rounds activations, too
    assert distance(*models[1:]) < noise < distance(models[0], models[2])
