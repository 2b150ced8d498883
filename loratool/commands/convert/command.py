"""Run the command `convert`: one of three functions of the library, as the files of the source tell.

`convert` takes adapters, `convert_model` models, and `edit_metadata` a file of which the metadata alone is edited. Here
is what the command line and recipes call: the options of all three.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Annotated, Any

from ...adapters.formats import holds_adapter, open_adapter, written_formats
from ...errors import InputError, UsageError
from ...files.dtypes import MERGE_DTYPES
from ...files.output.output import CONTAINERS
from ...views.parts.report import Report
from ..arguments import StrPath, annotations_of, checked, current_call, dtype_of, one_of, option_word
from ..namings import MODEL_NAMINGS
from . import adapter
from .adapter import needs_format
from .checkpoint import WRITTEN, convert_model
from .metadata import edit_metadata

# each function, and what its options are for
FUNCTIONS: dict[Callable[..., Any], str] = {
    adapter.convert: "adapters",
    convert_model: "checkpoints",
    edit_metadata: "a file's metadata",
}

OF_ANY_CALL = ("progress", "workers")  # which a function need not take

# options that mean the same for adapters and models, with the choices of both
OF_BOTH = {
    "to": Annotated[str, one_of((*written_formats(), *CONTAINERS, *MODEL_NAMINGS))] | None,
    "dtype": Annotated[str, dtype_of(MERGE_DTYPES)],
}


def convert(source: StrPath, out: StrPath | None = None, **options: Any) -> Report:
    """Convert an adapter or a model, or edit a file's metadata.

    Raises:
        UsageError: an option is for another kind of input.
        as the function that it calls.
    """
    given = current_call().options  # those that are not the defaults, which the command line gives too
    function = _function_for(source, given)
    known = inspect.signature(function).parameters
    for name, value in given.items():
        if name not in known and name not in OF_ANY_CALL:
            raise _not_for(source, function, name, value)
    report: Report = function(source, out, **{name: value for name, value in given.items() if name in known})
    return report


def _function_for(source: StrPath, options: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the function for what a source is, or is asked to become."""
    if options.get("set") or options.get("unset"):
        return edit_metadata
    to, is_one = options.get("to"), bool(options.get("from_format")) or holds_adapter(source)
    if is_one:
        if to is not None and to not in written_formats():
            raise needs_format(source, to)
        return adapter.convert
    if to in written_formats() and to not in (*MODEL_NAMINGS, *CONTAINERS):
        _refuse_model(source, options)
    return convert_model


def _refuse_model(source: StrPath, options: Mapping[str, Any]) -> None:
    """Raise the error of opening a model as an adapter."""
    try:
        with closing(open_adapter(source, options.get("alpha")).file):
            pass
    except InputError as error:
        error.remedy = f"as a checkpoint it can become {' or '.join(WRITTEN)}"
        raise


def _not_for(source: StrPath, function: Callable[..., Any], name: str, value: object) -> UsageError:
    """Return the error for an option that the function for this source does not have."""
    word = option_word(name, value is not False)
    if function is edit_metadata:
        message = f"--{word} converts, and --set and --unset edit a file as it is"
        return UsageError(message, culprit=os.fspath(source), remedy="do one after the other")
    other = next(what for each, what in FUNCTIONS.items() if name in inspect.signature(each).parameters)
    this = {"adapters": "an adapter", "checkpoints": "a checkpoint"}[FUNCTIONS[function]]
    return UsageError(f"--{word} is for {other}, and this is {this}", culprit=os.fspath(source))


def _all_parameters() -> list[inspect.Parameter]:
    """Return the parameters of all three functions, each with its annotation evaluated."""
    found: dict[str, inspect.Parameter] = {}
    for function in FUNCTIONS:
        types = {**annotations_of(function), **OF_BOTH}
        for name, parameter in inspect.signature(function).parameters.items():
            found.setdefault(name, parameter.replace(annotation=types[name]))
    return [*found.values()]


convert.__signature__ = inspect.Signature(_all_parameters())  # type: ignore[attr-defined]
convert = checked(convert)
