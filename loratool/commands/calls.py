"""Build the library's functions from calls, and define the arguments that several calls share, with their help.

A call is a frozen dataclass. Its fields are the arguments of the function, the options of the command, the words of a
recipe and their schema. Its docstring has their help, except for the shared arguments, which have it here.
"""

from __future__ import annotations

import inspect
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from typing import Annotated, Any, ClassVar, Generic, Literal, ParamSpec, TypeVar, get_args, get_type_hints

from ..binding.modules.selection import PRESETS
from ..errors import in_python, on_terminal
from ..files.dtypes import FACTOR_DTYPES, MERGE_DTYPES
from ..files.hub.cache import reading_little
from ..files.hub.names import SCHEME, HubName, parse_hub_name
from ..files.stores.links import StoreLink, links_in_one_state, parse_store_link
from ..transform.rank_rules import OF_ONE_FILE, RANK_RULES, RULES_OF_SEVERAL
from .arguments import (
    AnyDtype,
    Argument,
    Layers,
    Opt,
    ParameterCount,
    Patterns,
    Positive,
    Share,
    Size,
    StrPath,
    arguments_of,
    changed,
    dtype_of,
    one_of,
    read_arguments,
    rest_of,
    type_of,
    words_of,
)
from .choices import DROP_CHOICES, OPEN_FILES, WAYS_IN_PLACE
from .machine import require_ieee

P = ParamSpec("P")

R = TypeVar("R")


class Call(Generic[R]):
    """A call of a function of the library, as the types of its arguments hand them on.

    Each subclass is in a module that loads no torch, so that help, recipes and schemas need none. `work` names the
    function that does what the call says, below this folder; `work_in_place` the one for calls with `in_place`.
    """

    work: ClassVar[str]
    work_in_place: ClassVar[str] = ""

    def run(self) -> R:
        """Run the command, and return the report. With `attest`, also write a statement about the output."""
        module, _, name = (self.work_in_place if getattr(self, "in_place", False) else self.work).rpartition(".")
        work: Callable[[Call[R]], R] = getattr(import_module(f".{module}", __package__), name)

        def worked(call: Call[R]) -> R:
            report = work(call)
            if not hasattr(report, "digests"):
                return report
            complete: Callable[[Call[R], R], R] = import_module(".digests", __package__).with_digests
            return complete(call, report)

        with links_in_one_state(), reading_little() if getattr(self, "dry_run", False) else nullcontext():
            if target := output_elsewhere(getattr(self, "out", None)):
                to_store = import_module(".to_store", __package__)
                send = to_store.sent_to_store if isinstance(target, StoreLink) else to_store.sent_to_hub
                sent: Callable[[Call[R], StoreLink | HubName, Callable[[Call[R]], R]], R] = send
                return sent(self, target, worked)
            if getattr(self, "attest", None) is None:
                return worked(self)
            attested: Callable[[Call[R], Callable[[Call[R]], R]], R]
            attested = import_module(".attest.write", __package__).attested
            return attested(self, worked)

    @classmethod
    def name(cls) -> str:
        """Return the name of the function: merge for Merge, convert_model for ConvertModel."""
        return _function_name(cls)

    def given(self) -> dict[str, Any]:
        """Return the arguments with names, without defaults."""
        return changed(type(self), vars(self))


def output_elsewhere(out: object) -> StoreLink | HubName | None:
    """Return where an output goes that does not stay here."""
    if not isinstance(out, str | os.PathLike):
        return None
    text = os.fspath(out)
    return parse_store_link(text) or (parse_hub_name(text) if SCHEME.match(text) else None)


def function_of(call: Callable[P, Call[R]]) -> Callable[P, R]:
    """Return the library's function whose arguments are the fields of a call: merge of Merge.

    Raises:
        UsageError: an argument has another type or an unknown name, or one is missing.
    """
    make: Callable[..., Call[R]] = call
    arguments = arguments_of(call)
    several = rest_of(arguments)

    def function(*args: P.args, **keywords: P.kwargs) -> R:
        values = read_arguments(function, args, keywords)
        more = values.pop(several) if several else ()
        first = [values.pop(name) for name, each in arguments.items() if name in values and not each.named]
        report = require_ieee(make(*first, *more, **values).run)()
        log_warnings(report)
        return report

    function.__name__ = function.__qualname__ = _function_name(call)
    function.__module__, function.__doc__ = call.__module__, _documented(call, arguments)
    plain = get_type_hints(vars(call)["__init__"])  # for an editor's eyes: without what `Annotated` adds
    written = inspect.signature(call)
    parameters = [each.replace(annotation=plain[name]) for name, each in written.parameters.items()]
    (returned,) = get_args(vars(call)["__orig_bases__"][0])
    vars(function)["__signature__"] = written.replace(parameters=parameters, return_annotation=returned.__forward_arg__)
    vars(function)["arguments"] = arguments
    return function


def log_warnings(report: object) -> None:
    """Log what a report warns of, unless the command line runs, which prints it.

    As huggingface_hub logs what is true of the files. The module `warnings` is for a call that has to be changed: it
    shows the same text only once, and as an error it would leave no report of a file that is written.
    """
    if not on_terminal.get() and (warnings := getattr(report, "warnings", ())):
        import logging  # most runs can do without it

        for text in warnings:
            logging.getLogger("loratool").warning("%s", in_python(text))


def _function_name(call: Callable[..., object]) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", call.__name__).lower()


def _documented(call: Callable[..., object], arguments: Mapping[str, Argument]) -> str:
    """Return the docstring of a call with the help of all arguments."""
    head, *others = (inspect.getdoc(call) or "").split("\n\n")
    lines = [
        textwrap.fill(f"{name}: {_sentence(each)}", 116, initial_indent=" " * 4, subsequent_indent=" " * 8)
        for name, each in arguments.items()
    ]
    others = [text for text in others if not text.startswith("Args:")]
    place = next((i for i, text in enumerate(others) if text.startswith("Raises:")), len(others))
    told = ["\n".join(["Args:", *lines])] if lines else []
    return "\n\n".join([head, *others[:place], *told, *others[place:]]) + "\n"


def _sentence(argument: Argument) -> str:
    return f"False: {argument.help[:1].lower()}{argument.help[1:]}" if argument.default is True else argument.help


SELECTIONS = ("all-linear", *PRESETS, "experts")  # the patterns with names

PATTERNS = (
    f"ends of module paths (q_proj), globs of whole paths (*.mlp.*), re:EXPRESSION, or {', '.join(SELECTIONS)}; "
    "separate several with commas"
)


def output(name: str) -> Opt:
    """Return how the help shows the output of a command that writes a folder of this name, or a file."""
    text = "Where to write: a folder, or a file if OUT ends in .safetensors (for GGUF in .gguf)."
    return Opt("Output", "OUT", f"{name}, or {name}.safetensors", "-o", text)


Force = Annotated[
    bool,
    Opt(
        "Output",
        letter="-f",
        text="Replace an output that exists. A folder with other files than a model's is never replaced.",
    ),
]

InPlace = Annotated[
    bool,
    Opt(
        "Output",
        text="Change the model where it is, and write no other. It has no name while it changes; loratool recover ends "
        "a change that was interrupted.",
    ),
]

By = Annotated[
    Literal["shard", "window"] | None,
    one_of(WAYS_IN_PLACE),
    Opt(
        "Output",
        default="shard if there is room",
        text="How to change files in place. {meanings}.",
    ),
]

AllowOpen = Annotated[
    Literal["open-files"] | Sequence[Literal["open-files"]],
    words_of(OPEN_FILES),
    Opt("Output", text="Allow what would be refused. {meanings}."),
]

Resume = Annotated[
    bool,
    Opt(
        "Output",
        text="Continue an interrupted run with the same inputs and options, or start if there is none. Inputs are "
        "compared by path, size, time and samples of their bytes.",
    ),
]

DryRun = Annotated[bool, Opt("Output", letter="-n", text="Check everything and print the plan, but write nothing.")]

Card = Annotated[bool, Opt("Output", text="Write no model card (README.md) into an output folder.")]

Attest = Annotated[
    StrPath | None,
    Opt(
        "Output",
        "FILE",
        text="Also write a statement (in-toto, .json) about the output: its files, the inputs and this call, with "
        "digests. Reads all of them once more.",
    ),
]

Undo = Annotated[bool, Opt("Output", text="Write no undo file. Without it, unmerge cannot restore the base exactly.")]

Digest = Annotated[
    bool,
    Opt(
        "Output",
        text="Report the digests of the models that were read and written; their names, types, shapes and bytes.",
    ),
]

Device = Annotated[str, Opt("Running", "auto|cpu|cuda[:N]", text="Device to compute on.", free=True)]

Progress = Annotated[
    Callable[[int, int], None] | None, Opt(text="Called with two numbers: the work done, and all work.")
]

Workers = Annotated[Positive | None, Opt(text="Number of threads. The default is one per core.")]

Target = Annotated[Patterns, Opt("Which modules", "PATTERNS", text=f"Select these modules only: {PATTERNS}.")]

Exclude = Annotated[
    Patterns, Opt("Which modules", "PATTERNS", text="Exclude these modules. Patterns are as in merge --target.")
]

OfLayers = Annotated[
    Layers | None, Opt("Which modules", "0-15,20", text="Select modules of these layers only, counted from 0.")
]

Dropped = Literal["extras", "unet", "unet2", "te", "te1", "te2", "te3", "te4"]

Drop = Annotated[
    Dropped | Sequence[Dropped],
    words_of(DROP_CHOICES),
    Opt("Which modules", text="Exclude parts of an adapter. {meanings}."),
]

Alpha = Annotated[
    float | None,
    Opt(
        "About the inputs",
        "N",
        text="The adapter's alpha, if its files do not store it. A value that contradicts them is an error.",
    ),
]

MergeDtype = Annotated[
    Literal["keep", "fp32", "f32", "float32", "float", "bf16", "bfloat16", "fp16", "f16", "float16", "half"] | AnyDtype,
    dtype_of(MERGE_DTYPES),
    Opt("Output", "keep|fp32|bf16|fp16", text="Dtype of the output.", free=True),
]

FactorDtype = Annotated[
    Literal["fp32", "fp16", "bf16"] | AnyDtype, dtype_of(FACTOR_DTYPES), Opt("Output", text="Dtype of the factors.")
]

Architecture = Annotated[
    str | None,
    Opt(
        "Output",
        "CLASS",
        "config.json's",
        text="Class that PEFT will wrap, such as LlamaForCausalLM inside a Llava. For convert, also the family of an "
        "image model's adapter, such as flux.",
    ),
]

Energy = Annotated[
    Share | None,
    Opt("Rank and method", "0.95", text="Choose ranks that keep this share of the energy of each module's delta."),
]

Params = Annotated[
    ParameterCount | None,
    Opt(
        "Rank and method",
        "20M",
        text="Choose ranks for this many parameters in all. Modules that gain the most energy per parameter come "
        "first.",
    ),
]

Bytes = Annotated[
    Size | None,
    Opt(
        "Rank and method",
        "40MB",
        text="Choose ranks for a file of this size. Modules that gain the most energy per parameter come first.",
    ),
]

RuleName = Literal["rank", "energy", "sv_ratio", "sv_cumulative", "sv_fro", "noise"]

RULE_TYPE = replace(type_of(tuple[Annotated[str, one_of(RANK_RULES)], float]), choices=tuple(RANK_RULES))

RULE_OF_SEVERAL_TYPE = replace(
    type_of(tuple[Annotated[str, one_of(RULES_OF_SEVERAL, OF_ONE_FILE)], float]), choices=tuple(RULES_OF_SEVERAL)
)

RankRule = Annotated[
    Annotated[tuple[RuleName, float], RULE_TYPE] | None,
    Opt(
        "Rank and method",
        "NAME[=VALUE]",
        text="Choose each module's rank by a rule: {words}. noise keeps the singular values above VALUE times (default "
        "1) the bound of what rounding can cause.",
    ),
]

MaxRank = Annotated[Positive | None, Opt("Rank and method", "N", text="Upper limit of every module's rank.")]

Imatrix = Annotated[
    StrPath | None,
    Opt(
        "Rank and method",
        "FILE",
        text="Minimize the error of each module's outputs, not of its weights. FILE is written by llama-imatrix.",
    ),
]

RankPattern = Annotated[Mapping[str, Positive] | None, Opt("Rank and method", "PATTERN=RANK")]

Top = Annotated[
    Positive | None,
    Opt("Checks", "K", "10", text="Number of leading singular vectors that --spectra checks in each changed matrix."),
]

Threshold = Annotated[
    Share | None,
    Opt(
        "Checks",
        "X",
        "0.5",
        text="--spectra calls a singular vector new if its |cosine| with each of the base's is below X.",
    ),
]

Seed = Annotated[int, Opt("Rank and method", "N")]
