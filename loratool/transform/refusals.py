"""Errors for unsupported modules, which a conversion can only exclude."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..adapters.adapter import Adapter
from ..adapters.updates.update import UpdateSpec
from ..errors import InputError, NeedsFlag, shell_word

# the remedy for changes without factors
ONLY_MERGED = "merge it into its base; then loratool extract BASE MERGED makes an adapter from the merged model"


def no_factors(source: Adapter) -> InputError:
    """Return the error for an adapter of whole changes alone, which a format cannot hold."""
    kinds = " and ".join(sorted({update.cls.kind for update in source.updates.values()}))
    message = f"has no low-rank factors to convert, only whole changes ({kinds})"
    return InputError(message, culprit=source.name, remedy=ONLY_MERGED)


def cannot_convert(
    name: str,
    what: str,
    modules: Sequence[str],
    exclude: str = "",
    among: Mapping[str, UpdateSpec] | None = None,
) -> NeedsFlag | InputError:
    """Return the error for unsupported modules, with --exclude as its remedy.

    Args:
        exclude: the options that select them all, if they are too many to list.
        among: all modules to convert; if no other has factors, there is no remedy.
    """
    message = f"{len(modules)} modules of {name} {what}: {', '.join(modules[:3])}" + (", ..." if modules[3:] else "")
    if among is not None and not any(update.rank for module, update in among.items() if module not in modules):
        return InputError(f"{message}; nothing else is left to convert", culprit=modules[0])
    exclude = exclude or f"--exclude {shell_word(','.join(modules))}"
    return NeedsFlag(message, flags=exclude, why="to exclude them")
