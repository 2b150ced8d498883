"""Define the command `loratool convert`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import click

from ..architectures.runtimes.table import PROGRAMS
from ..commands.arguments import arguments_of
from ..commands.choices import QKV_LAYOUTS
from ..commands.convert.command import convert as function
from .from_call import command_of


class _Choice(click.Choice[str]):
    """Choices that name the right option for some words of another option."""

    def __init__(self, choices: Iterable[str], option: str, words: Collection[str]) -> None:
        super().__init__([*choices])
        self.option, self.words = option, words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in self.words and value not in self.choices:
            self.fail(f"{value!r} belongs to another option: {self.option} {value}", param, ctx)
        return super().convert(value, param, ctx)


convert = command_of(
    function,
    """\
The files decide what is converted. Adapters of image models (SD 1 to 3, SDXL, Flux and their text encoders) convert to
every format; those of language models to PEFT, MLX, GGUF or loralib, to plain LoRA, or for a program (--for; `loratool
guide runtimes`). Factors are copied unchanged. Where one format fuses modules that another splits (Flux's qkv), rows
are split or concatenated, exactly. If the other format cannot hold a module, you get an error unless you --exclude it.

A checkpoint is streamed: no pickle is run, tied weights stay tied, and bytes change only with --dtype. The report
counts the numbers that the new dtype makes 0. --dtype dequantizes a quantized model. A GGUF model becomes a folder for
transformers, with its names and a config.json. The denoiser of an image model can be renamed to diffusers' names or
to its maker's, with rows split or concatenated as needed.

\b
  loratool convert adapter/ --for vllm --base base/ -o served/
  loratool convert ink.safetensors --to diffusers -o ink-diffusers.safetensors
  loratool convert model/ --dtype bf16 --max-shard-size 5GB -o smaller/
  loratool convert pytorch_model.bin -o model.safetensors
  loratool convert model.gguf --dtype bf16 --tokenizer original/ -o folder/
  loratool convert model-nf4/ --dtype bf16 -o dequantized/
  loratool convert model/ --to torch -o old-style/
  loratool convert sdxl.safetensors --to diffusers --drop components -o unet/
  loratool convert unet/ --to single-file -o unet.safetensors
  loratool convert flux.safetensors --to kohya --exclude 'text_encoder*'
  loratool convert ink.safetensors --for comfyui -o ink-comfyui.safetensors
  loratool convert pissa/ --to peft --plain --initial start/ -o exact/
  loratool convert dora/ --to peft --plain --base base/ --rank 32 -o plain/
  loratool convert phi/ --to peft --layout split --base phi-base/ -o llama/
  loratool convert lora/ --to peft --base b/ --architecture LlamaModel -o out/
  loratool convert old.bin --to peft --alpha 32 --enable-lora 1,0,1 -o layers/
  loratool convert a.safetensors --set modelspec.title=Ink -o new.safetensors
""",
    "converting",
    last="syncing to disk",
)


for parameter in convert.params:
    if parameter.name == "to":
        parameter.type = _Choice(arguments_of(function)["to"].type.choices, "--for", PROGRAMS)
    if parameter.name == "runtime":
        parameter.type = _Choice(PROGRAMS, "--layout", QKV_LAYOUTS)
