"""`loratool convert`."""

from __future__ import annotations

import click

from ..converting import TARGETS
from ..formats import FORMATS
from ..relayout import LAYOUTS
from .options import Slices, alpha_option, dry_run_option, force_option, json_option


@click.command()
@click.argument("adapter")
@click.option("-o", "--out", metavar="OUT", help="A .safetensors file, or for peft a folder.  [default: converted]")
@click.option(
    "--to",
    required=True,
    type=click.Choice(list(TARGETS)),
    help="; ".join(f"{meaning}" for meaning in TARGETS.values()) + ".",
)
@click.option(
    "--from", "from_format", type=click.Choice(list(FORMATS)), help="What ADAPTER is.  [default: what its names say]"
)
@click.option("--enable-lora", type=Slices(), metavar="1,0,1", help="Which slices loralib's MergedLinear changes.")
@click.option("--plain", is_flag=True, help="Standard LoRA: no rsLoRA, no patterns, alpha = rank everywhere.")
@click.option("--initial", metavar="ADAPTER", help="With --plain: what a PiSSA-like start was, which is subtracted.")
@click.option("--rank", type=click.IntRange(1), help="With --plain: truncated to this rank, DoRA to its own without.")
@click.option(
    "--for",
    "layout",
    type=click.Choice(list(LAYOUTS)),
    help="A language model with " + "; ".join(f"{name}: {meaning}" for name, meaning in LAYOUTS.items()) + ".",
)
@click.option(
    "--base",
    metavar="BASE",
    help="The model: with --for, where sizes are to be told (its config.json will do); with --plain, for DoRA.",
)
@click.option("--drop", multiple=True, metavar="PATTERNS", help="Leave these modules out, which cannot be carried.")
@click.option("--dtype", type=click.Choice(["keep", "fp32", "fp16", "bf16"]), default="keep", show_default=True)
@alpha_option
@force_option
@dry_run_option
@json_option
def convert(
    adapter: str,
    out: str | None,
    to: str,
    from_format: str | None,
    enable_lora: tuple[bool, ...] | None,
    plain: bool,
    initial: str | None,
    rank: int | None,
    layout: str | None,
    base: str | None,
    drop: tuple[str, ...],
    dtype: str,
    alpha: float | None,
    force: bool,
    dry_run: bool,
    json: bool,
) -> None:
    """Write an adapter in another convention: an image model's (SD 1, SD 2, SDXL, Flux and their text encoders) in any,
    a language model's as PEFT's or loralib's, or as plain LoRA.

    Factors are copied as they are; where one convention fuses what another splits (Flux's qkv), rows are cut or put
    together, exactly. What cannot be carried stops the conversion unless --drop names it.

    \b
      loratool convert style.safetensors --to diffusers -o style-diffusers.safetensors
      loratool convert pytorch_lora_weights.safetensors --to kohya --drop 'text_encoder*'
      loratool convert pissa/ --to peft --plain --initial start/ -o lora/
      loratool convert dora/ --to peft --plain --base base/ --rank 32 -o lora/
      loratool convert phi/ --to peft --for split --base phi-base/ -o llama-like/
      loratool convert old.bin --to peft --alpha 32 --enable-lora 1,0,1 -o lora/
    """
    from ..ops.convert import convert as run
    from ..render import print_convert, to_json
    from ..targets import parse_patterns

    report = run(
        adapter,
        out,
        to=to,
        from_format=from_format,
        drop=parse_patterns(drop),
        alpha=alpha,
        enable_lora=enable_lora or (),
        plain=plain,
        initial=initial,
        rank=rank,
        layout=layout,
        base=base,
        dtype=dtype,
        force=force,
        dry_run=dry_run,
    )
    if json:
        print(to_json("convert", report))
    else:
        print_convert(report)
