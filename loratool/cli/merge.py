"""Define the command `loratool merge`."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import click

from ..binding.merge.choices import LOSSY, TIED, TOKENIZERS, WAYS
from .help import Command, option
from .options import (
    PATH,
    SIZE,
    WeightedPath,
    alpha_option,
    card_option,
    device_option,
    drop_option,
    dry_run_option,
    dtype_option,
    exclude_option,
    force_option,
    html_option,
    json_option,
    labels_option,
    layers_option,
    out_option,
    quiet_option,
    resume_option,
    run_command,
    save_recipe_option,
    target_option,
    verbose_option,
)


@click.command(cls=Command)
@click.argument("base", type=PATH)
@click.argument("adapters", nargs=-1, required=True, type=WeightedPath(), metavar="ADAPTER[:WEIGHT]...")
@out_option("merge")
@force_option
@resume_option
@dry_run_option
@html_option
@dtype_option("Dtype of the output.")
@option(
    "--max-shard-size",
    title="Output",
    type=SIZE,
    metavar="5GB",
    help="Split the output into shards of this size.  [default: the base's shards]",
)
@target_option
@exclude_option
@layers_option
@drop_option
@alpha_option
@option(
    "--tied",
    title="About the inputs",
    type=click.Choice(list(TIED)),
    default="untie",
    show_default=True,
    help="Where an adapter changes one side of a tied head and embedding: "
    + "; ".join(f"{mode}: {meaning}" for mode, meaning in TIED.items())
    + ".",
)
@option(
    "--architecture",
    title="Output",
    metavar="CLASS",
    help="The class that the output's config.json names.  [default: by the adapter's head or task, or the base's]",
)
@labels_option
@option(
    "--initial",
    title="About the inputs",
    type=PATH,
    metavar="ADAPTER",
    help="A PiSSA-like adapter as it was before training, to be subtracted.",
)
@option(
    "--residual-base",
    title="About the inputs",
    is_flag=True,
    help="BASE is what a PiSSA-like adapter's initialization made of it.",
)
@option(
    "--quantized",
    title="Output",
    type=click.Choice(list(WAYS)),
    default="mixed",
    show_default=True,
    help="What becomes of quantized weights that an adapter changes: "
    + "; ".join(f"{way}: {meaning}" for way, meaning in WAYS.items())
    + ".",
)
@option(
    "--like",
    title="Output",
    type=PATH,
    metavar="QUANTIZED",
    help="Write the merge in the format of this quantized model of BASE, with scales of its own.",
)
@option(
    "--allow",
    title="Output",
    type=click.Choice([LOSSY]),
    multiple=True,
    help="lossy: requantize to codes of fewer than 8 bits too, which keep next to nothing of a delta.",
)
@option(
    "--tokenizer",
    title="Output",
    metavar="base|adapter|FOLDER",
    help="Whose tokenizer and chat template the output gets: "
    + "; ".join(f"{choice}: {meaning}" for choice, meaning in TOKENIZERS.items())
    + "; or a folder's.  [default: the adapter's if it changes the vocabulary]",
)
@option(
    "--no-undo", title="Output", is_flag=True, help="Leave out the undo file, from which unmerge restores the base."
)
@card_option
@device_option
@save_recipe_option
@quiet_option
@verbose_option
@json_option
def merge(quiet: bool, verbose: bool, json: bool, **options: Any) -> None:
    """Add adapters to a base model's weights and write the merged model.

    BASE is a file (.safetensors, .gguf, or torch's .bin, .pt, .ckpt) or a folder, a training run's sharded state too;
    ADAPTER a PEFT folder or a LoRA file; each may be org/name on the Hugging Face hub (loratool guide hub). Several
    adapters are added in one pass, each with its weight; each merged weight is the number nearest to the exact sum, so
    the output's bytes are the same on every machine. Modules take weights of their own by pattern, as in --target, and
    those of an image model by component: unet, te, te1, te2 and so on. The last that matches wins.

    \b
      loratool merge base/ adapter/ -o merged/
      loratool merge base/ style/:0.7 task/:-0.2 -o mixed/ --dtype fp32 --no-undo
      loratool merge xl.safetensors ink.safetensors:0.8,te=0.4 -o out.safetensors
      loratool merge base/ "style/:0.8,*.layers.0.*=0,mlp=0.5" -o parts/

    The report groups modules over layers; what needs attention has a line of its own, marked with !. scale: alpha /
    rank, times the weight. delta/W: the size of the delta beside the base's weight. kept: how much of the delta
    rounding has left.
    """
    from ..commands.merge.command import merge as run
    from .progress import ProgressBar
    from .render import print_report

    with closing(ProgressBar("merging", quiet or json, last="syncing to disk")) as bar:
        report = run_command(run, options, bar)
    print_report("merge", report, json=json, quiet=quiet, verbose=verbose, html=options["html"])
