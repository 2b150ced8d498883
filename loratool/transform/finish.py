"""Begin and end a conversion: what `--plain` asks for, and the output of an adapter that has gone through its steps."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..adapters.formats import FORMATS
from ..adapters.formats.peft_config import base_mutating_init
from ..errors import NeedsFlag
from .lazy import Transformed, noted, restated
from .numbers import Settled, cut_ranks, fold, settle, subtract_start
from .output import in_format, rows
from .request import ConvertRequest, alpha_notes


def plain(state: Transformed, request: ConvertRequest) -> Transformed:
    """Return standard LoRA, alpha being the rank everywhere, less what training began with.

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


def own_type(request: ConvertRequest) -> torch.dtype | None:
    """Return the type of the factors where no other is asked for: of plain LoRA float32, else the stored ones."""
    return torch.float32 if request.plain else None


def finish(state: Transformed, request: ConvertRequest) -> Settled:
    """Return a language model's adapter as it is written."""
    to = FORMATS[request.to]
    named = in_format(settle(state, request.dtype or own_type(request)), to)
    return noted(named, *alpha_notes(to.key, rows(named)), *to.model_notes(request.model))
