"""Begin and end a conversion: the steps of `--plain`, and the output after all steps."""

from __future__ import annotations

from dataclasses import replace

from ..adapters.formats import FORMATS
from ..adapters.formats.peft_config import base_mutating_init
from ..errors import NeedsFlag
from ..numerics.forms import F32, Form
from .lazy import Transformed, noted, restated
from .numbers import Settled, cut_ranks, fold, settle, subtract_start
from .output import in_format, rows
from .request import ConvertRequest, alpha_notes


def plain(state: Transformed, request: ConvertRequest) -> Transformed:
    """Return standard LoRA with alpha equal to the rank, minus the initial adapter.

    Raises:
        NeedsFlag: the init altered the base, and the initial adapter was not given.
    """
    source = state.adapter
    init = base_mutating_init(source.config)
    if init and request.initial is None:
        raise NeedsFlag(
            f"was initialized with {init}, which changed the base under it",
            culprit=source.name,
            flags="--initial ADAPTER",
            why="with the adapter as it was before training",
        )
    if request.initial is not None:
        state = subtract_start(state, request.initial(source))
    if request.rank is not None:
        state = cut_ranks(state, request.rank)
    folded = fold(state)
    return replace(folded, adapter=restated(folded.adapter))  # rsLoRA's scale may be 1 as well


def default_dtype(request: ConvertRequest) -> Form | None:
    """Return the default type of the factors: float32 for --plain, else None for the stored types."""
    return F32 if request.plain else None


def finish(state: Transformed, request: ConvertRequest) -> Settled:
    """Return a language model's adapter, ready to be written."""
    to = FORMATS[request.to]
    named = in_format(settle(state, request.dtype or default_dtype(request)), to)
    return noted(named, *alpha_notes(to.key, rows(named)), *to.model_notes(request.model))
