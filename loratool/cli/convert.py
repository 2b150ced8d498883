"""`loratool convert`."""

from __future__ import annotations

import click

from ..converting import TARGETS
from .options import alpha_option, dry_run_option, force_option, json_option


@click.command()
@click.argument("adapter")
@click.option("-o", "--out", metavar="OUT", help="A .safetensors file, or for peft a folder.  [default: converted]")
@click.option(
    "--to",
    required=True,
    type=click.Choice(list(TARGETS)),
    help="; ".join(f"{meaning}" for meaning in TARGETS.values()) + ".",
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
    drop: tuple[str, ...],
    dtype: str,
    alpha: float | None,
    force: bool,
    dry_run: bool,
    json: bool,
) -> None:
    """Write an image model's adapter in another convention: SD 1, SD 2, SDXL, Flux and their text encoders.

    Factors are copied as they are; where one convention fuses what another splits (Flux's qkv), rows are cut or put
    together, exactly. What cannot be carried stops the conversion unless --drop names it.

    \b
      loratool convert style.safetensors --to diffusers -o style-diffusers.safetensors
      loratool convert pytorch_lora_weights.safetensors --to kohya --drop 'text_encoder*'
    """
    from ..ops.convert import convert as run
    from ..render import print_convert, to_json
    from ..targets import parse_patterns

    report = run(adapter, out, to=to, drop=parse_patterns(drop), alpha=alpha, dtype=dtype, force=force, dry_run=dry_run)
    if json:
        print(to_json("convert", report))
    else:
        print_convert(report)
