"""Define the command `loratool convert`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import closing
from typing import Any

import click

from ..adapters.formats import FORMATS, written_formats
from ..architectures.runtimes.table import RUNTIMES
from ..commands.choices import DENOISER_DROP_CHOICES, DROP_CHOICES, MODEL_DROP_CHOICES, QKV_LAYOUTS
from ..commands.namings import MODEL_NAMINGS
from ..files.output.output import CONTAINERS
from .format_options import FORMATS_HELP
from .help import Command, option
from .options import (
    PATH,
    SIZE,
    KeyValue,
    Slices,
    alpha_option,
    architecture_option,
    card_option,
    dry_run_option,
    dtype_option,
    exclude_option,
    force_option,
    json_option,
    make_drop_option,
    quiet_option,
    resume_option,
    run_command,
    save_recipe_option,
    verbose_option,
)


class _Choice(click.Choice[str]):
    """Choices, where some other words are those of another option."""

    def __init__(self, choices: Iterable[str], option: str, words: Collection[str]) -> None:
        super().__init__([*choices])
        self.option, self.words = option, words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in self.words and value not in self.choices:
            self.fail(f"{value!r} is a word of another option: {self.option} {value}", param, ctx)
        return super().convert(value, param, ctx)


@click.command(cls=Command)
@click.argument("source", metavar="ADAPTER|CHECKPOINT", type=PATH)
@option(
    "-o",
    "--out",
    title="Output",
    type=PATH,
    metavar="OUT",
    help="A folder, or a file by its ending.  [default: converted, with that ending where it is a file]",
)
@option(
    "--to",
    title="Output",
    type=_Choice(dict.fromkeys([*written_formats(), *CONTAINERS, *MODEL_NAMINGS]), "--for", RUNTIMES),
    metavar="FORMAT",
    help=f"Of an adapter one of {', '.join(written_formats())} ("
    + FORMATS_HELP
    + ")"
    + ". Of a checkpoint: safetensors (the default) or torch. Of an image model's denoiser: "
    + "; ".join(f"{name}: {meaning}" for name, meaning in MODEL_NAMINGS.items())
    + ".",
)
@option(
    "--max-shard-size",
    title="Output",
    type=SIZE,
    metavar="5GB",
    help="Split a checkpoint into shards of this size.  [default: its own shards]",
)
@option(
    "--tokenizer",
    title="Output",
    type=PATH,
    metavar="FOLDER",
    help="Of a GGUF model: where the tokenizer's files are, which are copied.",
)
@option(
    "--from",
    "from_format",
    title="About the inputs",
    type=click.Choice(list(FORMATS)),
    metavar="FORMAT",
    envvar="LORATOOL_CONVERT_FROM",
    help=f"Format of ADAPTER, one of {', '.join(FORMATS)}.  [default: detected]",
)
@option(
    "--enable-lora",
    title="About the inputs",
    type=Slices(),
    default=(),
    metavar="1,0,1",
    help="`enable_lora` of loralib's MergedLinear.",
)
@option("--plain", title="Output", is_flag=True, help="Standard LoRA: no rsLoRA, no patterns, alpha = rank everywhere.")
@option(
    "--initial",
    title="About the inputs",
    type=PATH,
    metavar="ADAPTER",
    help="With --plain or --for: what a PiSSA-like start was, which is subtracted.",
)
@option(
    "--rank",
    title="Rank and method",
    type=click.IntRange(1),
    metavar="N",
    help="With --plain or --for: truncated to this rank (a smaller one stays), DoRA to its own without.",
)
@option(
    "--layout",
    title="Output",
    type=click.Choice(list(QKV_LAYOUTS)),
    help="A language model with " + "; ".join(f"{name}: {meaning}" for name, meaning in QKV_LAYOUTS.items()) + ".",
)
@option(
    "--for",
    "runtime",
    title="Output",
    type=_Choice(RUNTIMES, "--layout", QKV_LAYOUTS),
    metavar="RUNTIME",
    envvar="LORATOOL_CONVERT_FOR",
    help=f"Instead of --to: a language model's adapter as a program loads it and applies it in full, one of "
    f"{', '.join(RUNTIMES)}.",
)
@option(
    "--base",
    title="About the inputs",
    type=PATH,
    metavar="BASE",
    help="The model: with --to peft, for the names of its class; with --to gguf or mlx or from there, and with "
    "--layout, where sizes are to be told (its config.json will do); with --plain, for DoRA; with --for, the model "
    "that is served. Of an image model's adapter: the model, which decides the family.",
)
@architecture_option
@option(
    "--rename",
    title="Output",
    multiple=True,
    metavar="PATTERN=PATH",
    help="Give a language model's modules other paths first: the end of a path is replaced (wq=q_proj); of a glob each "
    "wildcard is the same in the new path (h.*.attn=layers.*.self_attn); of re:EXPRESSION, groups are \\1, \\2.",
)
@option(
    "--set",
    title="Output",
    multiple=True,
    type=KeyValue(),
    metavar="KEY=VALUE",
    help="Set a key of a safetensors file's metadata; all else stays, byte for byte.",
)
@option("--unset", title="Output", multiple=True, metavar="KEY", help="Remove a key of its metadata, in the same way.")
@exclude_option
@make_drop_option({**DROP_CHOICES, **MODEL_DROP_CHOICES, **DENOISER_DROP_CHOICES})
@dtype_option("Dtype of the output.")
@alpha_option
@card_option
@force_option
@resume_option
@dry_run_option
@save_recipe_option
@quiet_option
@verbose_option
@json_option
def convert(quiet: bool, verbose: bool, json: bool, **options: Any) -> None:
    """Write a checkpoint as safetensors or as torch's files, in another type or other shards; or an adapter in another
    format: an image model's (SD 1 to 3, SDXL, Flux and their text encoders) in any, a language model's as PEFT's,
    MLX's, GGUF's or loralib's, as plain LoRA, or as a program applies it in full (--for; loratool guide runtimes).
    What is in the files decides which.

    A checkpoint streams through: no pickle is run, tied weights stay tied, bytes stay what they are unless --dtype says
    otherwise, and the numbers that it flushes to zero are counted by name. With --dtype a quantized model becomes one
    of plain numbers. A GGUF model becomes a folder of transformers, with its names and a config.json. The denoiser of
    an image model gets diffusers' names for its tensors, or its maker's, with rows cut and put together as these have
    them.

    Of an adapter factors are copied as they are; where one format fuses what another splits (Flux's qkv), rows are
    cut or put together, exactly. What the other format cannot hold stops the conversion unless --exclude names it.

    \b
      loratool convert pytorch_model.bin -o model.safetensors
      loratool convert model/ --dtype bf16 --max-shard-size 5GB -o smaller/
      loratool convert model.gguf --dtype bf16 --tokenizer original/ -o folder/
      loratool convert model-nf4/ --dtype bf16 -o dequantized/
      loratool convert model/ --to torch -o old-style/
      loratool convert sdxl.safetensors --to diffusers --drop components -o unet/
      loratool convert unet/ --to single-file -o unet.safetensors
      loratool convert ink.safetensors --to diffusers -o ink-diffusers.safetensors
      loratool convert flux.safetensors --to kohya --exclude 'text_encoder*'
      loratool convert pissa/ --to peft --plain --initial start/ -o exact/
      loratool convert dora/ --to peft --plain --base base/ --rank 32 -o plain/
      loratool convert phi/ --to peft --layout split --base phi-base/ -o llama/
      loratool convert lora/ --to peft --base b/ --architecture LlamaModel -o out/
      loratool convert adapter/ --for vllm --base base/ -o served/
      loratool convert old.bin --to peft --alpha 32 --enable-lora 1,0,1 -o layers/
      loratool convert a.safetensors --set modelspec.title=Ink -o new.safetensors
    """
    from ..commands.convert.command import convert as run
    from .progress import ProgressBar
    from .render import print_report

    with closing(ProgressBar("converting", quiet or json, last="syncing to disk")) as bar:
        report = run_command(run, options, bar)
    print_report("convert", report, json=json, quiet=quiet, verbose=verbose)
