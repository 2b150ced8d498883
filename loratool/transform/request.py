"""Define the options of a conversion, and refuse the modules that its format does not support."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..adapters.adapter import Adapter
from ..adapters.formats import FORMATS
from ..adapters.updates.add import AddDelta
from ..adapters.updates.dora import DoRA
from ..adapters.updates.update import UpdateSpec
from ..architectures.beside_layers import Layers
from ..binding.modules.selection import Selection
from ..binding.names.peft_names import exclude_all
from ..errors import InputError, LoratoolError, NeedsFlag
from ..numerics.forms import Form
from ..views.convert import ModuleConvert
from .base import Base
from .refusals import ONLY_MERGED, cannot_convert, refuse_classifier

# the options for an adapter whose init changed the base under it
INITIAL, WHAT_INITIAL = "--plain --initial ADAPTER", "with the adapter as it was before training"

EXCLUDING = ("combine", "extract", "init")  # commands that apply --exclude before they convert


@dataclass(frozen=True)
class ConvertRequest:
    """The options of a conversion."""

    to: str  # a key of `written_formats`
    exclude: tuple[str, ...] = ()  # patterns of modules to exclude
    dtype: Form | None = None  # of the factors; None keeps their types
    plain: bool = False  # plain LoRA, with alpha equal to the rank
    initial: Callable[[Adapter], Adapter] | None = None  # an adapter -> itself before training, opened and checked
    rank: int | None = None  # to truncate to; None keeps the ranks
    layout: str | None = None  # a key of QKV_LAYOUTS; None keeps the adapter's
    base: Base | None = None  # the model: the rows of q, k and v, weights under DoRA, or names
    architecture: str | None = None  # the class of the base whose names the modules get; None is config.json's
    runtime: str | None = None  # the runtime that will load it, a key of RUNTIMES
    rename: tuple[str, ...] = ()  # `PATTERN=PATH` of modules' paths, applied first

    @property
    def model(self) -> Mapping[str, Any]:
        """The base's config.json; empty without a base."""
        return self.base.config if self.base else {}


@contextmanager
def request_for(command: str) -> Iterator[None]:
    """Reword the remedies of `convert` for another command: its own option, or a run of `convert` before it.

    Raises:
        NeedsFlag: the command has the option.
        InputError: only a run of `convert` helps.
    """
    try:
        yield
    except NeedsFlag as error:
        if error.asks_for("--exclude") and command in EXCLUDING:
            raise
        raise error.elsewhere("loratool convert") from error


def selected(source: Adapter, exclude: Sequence[str]) -> dict[str, UpdateSpec]:
    """Return the updates that no pattern of --exclude selects, without the biases of excluded factors."""
    selection = Selection(tuple(exclude) or ("",))
    updates = {module: update for module, update in source.updates.items() if not selection.selects(module)}
    # a change of a bias belongs to the factors, and no file holds it without them
    return {m: u for m, u in updates.items() if u.cls is not AddDelta or m.removesuffix(".bias") in updates}


def select_updates(source: Adapter, request: ConvertRequest) -> dict[str, UpdateSpec]:
    """Return the updates to convert.

    Raises:
        NeedsFlag: the format does not support an update.
        InputError: no update with factors is left.
    """
    updates = selected(source, request.exclude)
    can = FORMATS[request.to].can
    holds = can.kinds - {DoRA} if request.plain else can.kinds
    unsupported = [
        module
        for module, update in updates.items()
        if update.cls not in holds or (not can.kernels and len(update.shape) - update.cls.stack > 2)
    ]
    if unsupported:
        if can.depends_on_base:  # the files of a program that serves language models
            refuse_classifier(source.name, f"a file of {request.to}", unsupported, updates)
        what = "plain LoRA" if request.plain and DoRA in can.kinds else f"{request.to}'s files"
        kinds = ", ".join(dict.fromkeys(updates[module].kind for module in unsupported))
        raise cannot_convert(source.name, f"({kinds}) are more than {what} can hold", unsupported, among=updates)
    misfits = dict(FORMATS[request.to].misfits(source, updates, request.model))
    if can.depends_on_base or request.layout:  # other conversions check the names against the weights
        layers = Layers.find((), request.model)
        reason = f"of a layer that the base does not have, by the {layers.count} layers of its config.json"
        misfits |= dict.fromkeys(filter(layers.is_beyond, updates), reason)
    if request.to != source.format:
        misfits |= {m: "a matrix that is also the head" for m, update in updates.items() if update.everywhere}
    if misfits:
        raise _misfit(source, request, updates, misfits)
    if not any(update.rank for update in updates.values()):
        finding = "nothing with factors is left to convert" if request.exclude else "has no factors to convert"
        raise InputError(finding, culprit=source.name, remedy=None if request.exclude else ONLY_MERGED)
    return updates


def _misfit(
    source: Adapter, request: ConvertRequest, updates: Mapping[str, UpdateSpec], misfits: Mapping[str, str]
) -> LoratoolError:
    """Return the error for modules that the format does not support, with --exclude for them if others are left."""
    reason = next(iter(misfits.values()))
    alike = [module for module, other in misfits.items() if other == reason]
    others = [module for module in updates if module not in misfits]
    exclude = exclude_all(list(misfits), others)
    error = cannot_convert(source.name, f"cannot be in {request.to}'s files (each is {reason})", alike, exclude)
    return error if any(updates[module].rank for module in others) else InputError(error.message)


def alpha_notes(to: str, rows: Sequence[ModuleConvert]) -> tuple[str, ...]:
    """Return the note on ranks and alphas, if the files of a format do not hold them for each module."""
    ranks = {row.rank for row in rows}
    if FORMATS[to].can.one_scale and len(ranks) > 1:
        return (f"{to}'s files have one rank, the largest: factors of a smaller one are filled up with zeros",)
    if FORMATS[to].can.alpha != "none":
        return ()
    both = sorted({(row.rank, row.alpha) for row in rows})
    settings = "; ".join(f"r={rank}, lora_alpha={alpha:g}" for rank, alpha in both[:4]) + ("; ..." if both[4:] else "")
    per_module = "" if len(both) == 1 else ", each module's own"
    return (f"{to}'s files hold no alpha: make the layers with {settings}{per_module}",)
