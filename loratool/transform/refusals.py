"""Errors for unsupported modules, which a conversion can only exclude."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..adapters.adapter import Adapter
from ..adapters.updates.replace import ReplaceTensor
from ..adapters.updates.update import UpdateSpec
from ..architectures.classifiers import HEADS
from ..errors import InputError, NeedsFlag, shell_word

# the remedy for changes without factors
ONLY_MERGED = "merge it into its base; then `loratool extract BASE MERGED` makes an adapter from the merged model"

TO_EXCLUDE = "to exclude them; a merge applies them to the base"


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
    return NeedsFlag(message, flags=exclude, why=TO_EXCLUDE)


def refuse_classifier(name: str, where: str, modules: Iterable[str], updates: Mapping[str, UpdateSpec]) -> None:
    """Raise InputError if a trained classifier is among unsupported modules: what is left would classify nothing.

    Args:
        where: the format or program that does not support the modules.
    """
    head = next((m for m in modules if updates[m].cls is ReplaceTensor and f"{m}.weight".endswith(HEADS)), None)
    if head:
        raise InputError(
            f"is a trained classifier of {name}, and {where} has only factors: the rest would classify nothing",
            culprit=head,
            remedy=f"merge it, and serve the model where classifiers run: loratool merge BASE {shell_word(name)} -o "
            f"MERGED; or add --exclude {shell_word(head)} if the rest is for another use",
        )
