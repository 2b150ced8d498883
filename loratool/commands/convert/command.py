"""Run the command `convert`: choose one of three functions of the library by the files of the source.

`convert` takes adapters, `convert_model` models, and `edit_metadata` files whose metadata alone is edited. The command
line and recipes call the function here, which has the options of all three.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

from ...adapters.formats import holds_adapter, open_adapter, written_formats
from ...errors import InputError, UsageError
from ...files.output.output import CONTAINERS
from ...views.parts.report import Report
from ..arguments import (
    Argument,
    Opt,
    StrPath,
    arguments_of,
    changed,
    one_of,
    option_word,
    read_arguments,
)
from ..namings import MODEL_NAMINGS, titles_of
from . import call

# each function, and what its options are for
FUNCTIONS: dict[Callable[..., Any], str] = {
    call.convert: "adapters",
    call.convert_model: "checkpoints",
    call.edit_metadata: "a file's metadata",
}

OF_ANY_CALL = ("progress", "workers")  # which a function need not take

# the arguments in the order of the help; others come last
ORDER = (
    "source out to max_shard_size tokenizer from_format enable_lora plain initial rank layout runtime base "
    "architecture rename set unset exclude drop dtype alpha digest card attest force resume dry_run progress workers"
).split()


def convert(*args: object, **keywords: object) -> Report:
    """Convert an adapter to another format, or a model to other files, another dtype or other names.

    The files of the source decide which of `convert`, `convert_model` and `edit_metadata` is called.

    Raises:
        UsageError: an option is for another kind of input.
        LoratoolError: as raised by that function.
    """
    read = read_arguments(convert, args, keywords)
    source, given = read["source"], changed(convert, read)  # the command line gives those that are the defaults too
    function = _function_for(source, given)
    known = arguments_of(function)
    for name, value in given.items():
        if name not in known and name not in OF_ANY_CALL:
            raise _not_for(source, function, name, value)
    given = {name: value for name, value in given.items() if name in known}
    report: Report = function(source, read.get("out"), **given)
    return report


def _function_for(source: StrPath, options: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the function for a source, by its files and by the options."""
    if options.get("set") or options.get("unset"):
        return call.edit_metadata
    to, is_one = options.get("to"), bool(options.get("from_format")) or holds_adapter(source)
    if is_one:
        if to is not None and to not in written_formats():
            from .adapter import needs_format

            raise needs_format(source, to)
        return call.convert
    if to in written_formats() and to not in (*MODEL_NAMINGS, *CONTAINERS):
        _refuse_model(source, options)
    return call.convert_model


def _refuse_model(source: StrPath, options: Mapping[str, Any]) -> None:
    """Raise the error of opening a model as an adapter."""
    from .checkpoint import WRITTEN

    try:
        with closing(open_adapter(source, options.get("alpha")).file):
            pass
    except InputError as error:
        error.remedy = f"convert it as a checkpoint, with --to {' or '.join(WRITTEN)}"
        raise


def _not_for(source: StrPath, function: Callable[..., Any], name: str, value: object) -> UsageError:
    """Return the error for an option that this source's function does not have."""
    word = option_word(name, value is not False)
    if function is call.edit_metadata:
        message = f"--{word} does not go with --set and --unset, which only edit metadata"
        return UsageError(message, culprit=os.fspath(source), remedy="run `loratool convert` twice")
    other = next(what for each, what in FUNCTIONS.items() if name in arguments_of(each))
    this = {"adapters": "an adapter", "checkpoints": "a checkpoint"}[FUNCTIONS[function]]
    return UsageError(f"is {this}, but --{word} is for {other}", culprit=os.fspath(source))


def _all_arguments() -> dict[str, Argument]:
    """Return the arguments of all three functions. Arguments that two share have the choices of both."""
    adapter, model, metadata = (arguments_of(each) for each in FUNCTIONS)
    arguments = {**metadata, **model, **adapter}
    to = (*written_formats(), *CONTAINERS, *MODEL_NAMINGS)
    formats, models = (
        titles_of(written_formats()),
        {"safetensors": "a model (the default)", "torch": "a model, as torch saves it"},
    )
    models |= {key: f"the denoiser of an image model: {title}" for key, title in MODEL_NAMINGS.items()}
    meanings = {**models, **formats, **{key: f"{formats[key]}; {models[key]}" for key in formats if key in models}}
    opt = Opt("Output", "FORMAT", meanings={key: meanings[key] for key in dict.fromkeys((*formats, *models))})
    arguments["to"] = replace(adapter["to"], type=one_of(to), opt=opt, text="Format to write. {meanings}.")
    arguments["dtype"] = model["dtype"]
    drops = {**adapter["drop"].type.meanings, **model["drop"].type.meanings}
    kind = replace(adapter["drop"].type, choices=tuple(drops), meanings=drops)
    arguments["drop"] = replace(adapter["drop"], type=kind)
    return {name: arguments[name] for name in sorted(arguments, key=lambda name: (*ORDER, name).index(name))}


vars(convert)["arguments"] = _all_arguments()
