"""Say which runtimes do not load an output where some weights are codes and others of the same kind are plain.

The skip lists of `files.skip_lists` cannot help there: these runtimes do not ask them, or read them otherwise.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from .skip_lists import METHOD_NAMES


@dataclass(frozen=True)
class Note:
    """A runtime's trouble with an output in which some modules of a method are plain."""

    method: str
    text: str
    parts: str = ""  # it holds where a module's path has one of these parts, separated by blanks; empty: always


NOTES = (
    Note(
        "mxfp4",
        "vLLM and SGLang take experts for mxfp4 whatever the list says: this output is for transformers; "
        "a dequantized one is for all three",
        "experts",
    ),
    Note(
        "modelopt",
        "transformers has no quantizer for modelopt and takes codes for weights: this output is for vLLM, SGLang and "
        "TensorRT-LLM",
    ),
    Note(
        "modelopt",
        "SGLang leaves this projection of one layer plain in all layers: this output is not for SGLang unless all "
        "layers changed",
        "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj",
    ),
    Note(
        "compressed-tensors",
        "transformers takes the experts of all layers for codes where codes are packed (4 bits): this output is for "
        "vLLM and SGLang",
        "experts",
    ),
    Note("bitsandbytes", "vLLM 0.33 does not read bitsandbytes"),
    Note("bitsandbytes", "SGLang takes all experts for bitsandbytes codes: this output is for transformers", "experts"),
    Note("torchao", "vLLM takes all experts of torchao for codes: this output is for transformers", "experts"),
    Note("gptq", "transformers reads it with GPTQModel, which was not tried"),
    Note("awq", "transformers reads it with a package that was not tried"),
    Note("auto-round", "loading in any runtime was not tried"),
    Note("quark", "loading in any runtime was not tried"),
    Note("MLX", "only MLX reads it"),
)


def mixed_notes(method: str, modules: Collection[str]) -> tuple[str, ...]:
    """Return what a report must say of an output in which these modules, codes before, are plain."""
    method = METHOD_NAMES.get(method, method)
    parts = {part for module in modules for part in module.split(".")}
    notes = (note for note in NOTES if note.method == method)
    return tuple(note.text for note in notes if not note.parts or parts & set(note.parts.split()))
