"""Build the library's functions from calls, and define the arguments that several calls share, with their help.

A call is a frozen dataclass. Its fields are the arguments of the function, the options of the command, the words of a
recipe and their schema. Its docstring has their help, except for the shared arguments, which have it here.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Annotated, Any, ClassVar, Generic, Literal, ParamSpec, TypeVar, get_args, get_type_hints

from ..binding.modules.selection import PRESETS
from ..files.dtypes import FACTOR_DTYPES, MERGE_DTYPES
from ..transform.rank_rules import OF_ONE_FILE, RANK_RULES, RULES_OF_SEVERAL
from .arguments import (
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
from .choices import DROP_CHOICES
from .machine import require_ieee

P = ParamSpec("P")

R = TypeVar("R")


class Call(Generic[R]):
    """A call of a function of the library, as the types of its arguments hand them on.

    Each subclass is in a module that loads no torch, so that help, recipes and schemas need none. `work` names the
    function that does what the call says, below this folder.
    """

    work: ClassVar[str]

    def run(self) -> R:
        """Run the command, and return the report."""
        module, _, name = self.work.rpartition(".")
        work: Callable[[Call[R]], R] = getattr(import_module(f".{module}", __package__), name)
        return work(self)

    @classmethod
    def name(cls) -> str:
        """Return the name of the function: merge for Merge, convert_model for ConvertModel."""
        return _function_name(cls)

    def given(self) -> dict[str, Any]:
        """Return the arguments with names, without defaults."""
        return changed(type(self), vars(self))


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
        return require_ieee(make(*first, *more, **values).run)()

    function.__name__ = function.__qualname__ = _function_name(call)
    function.__module__, function.__doc__ = call.__module__, _documented(call, arguments)
    plain = get_type_hints(vars(call)["__init__"])  # for an editor's eyes: without what `Annotated` adds
    written = inspect.signature(call)
    parameters = [each.replace(annotation=plain[name]) for name, each in written.parameters.items()]
    (returned,) = get_args(vars(call)["__orig_bases__"][0])
    vars(function)["__signature__"] = written.replace(parameters=parameters, return_annotation=returned.__forward_arg__)
    vars(function)["arguments"] = arguments
    return function


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
    return "\n\n".join([head, *others[:place], "\n".join(["Args:", *lines]), *others[place:]]) + "\n"


def _sentence(argument: Argument) -> str:
    return f"False: {argument.help[:1].lower()}{argument.help[1:]}" if argument.default is True else argument.help


SELECTIONS = ("all-linear", *PRESETS, "experts")  # the patterns with names

PATTERNS = (
    "a comma list of the ends of their paths (q_proj), globs of whole paths (*.mlp.*), re:EXPRESSION, or "
    f"{', '.join(SELECTIONS)}"
)


def output(name: str) -> Opt:
    """Return how the help shows the output of a command that writes a folder of this name, or a file."""
    text = "A folder, or a .safetensors file, of a GGUF base a .gguf file."
    return Opt("Output", "OUT", f"{name}, or {name}.safetensors", "-o", text)


Force = Annotated[bool, Opt("Output", text="Replace an output that exists (model files only).")]

Resume = Annotated[
    bool,
    Opt(
        "Output",
        text="Go on where a run with the same inputs and options died, if one did. Inputs are compared by path, size, "
        "time and samples of their bytes.",
    ),
]

DryRun = Annotated[bool, Opt("Output", text="Check everything, print the plan, write nothing.")]

Card = Annotated[bool, Opt("Output", text="Leave out the model card, README.md, of a folder.")]

Undo = Annotated[bool, Opt("Output", text="Leave out the undo file, from which unmerge restores the base.")]

Device = Annotated[str, Opt("Running", "auto|cpu|cuda[:N]", text="Where to compute.", free=True)]

Progress = Annotated[Callable[[int, int], None] | None, Opt(text="Called with what is done and what there is in all.")]

Workers = Annotated[Positive | None, Opt(text="Threads; by default one for each core.")]

Target = Annotated[Patterns, Opt("Which modules", "PATTERNS", text=f"Only these modules: {PATTERNS}.")]

Exclude = Annotated[
    Patterns, Opt("Which modules", "PATTERNS", text="Leave these modules out; patterns as of merge --target.")
]

OfLayers = Annotated[
    Layers | None, Opt("Which modules", "0-15,20", text="Only modules of these layers, counted from 0.")
]

Dropped = Literal["extras", "unet", "unet2", "te", "te1", "te2", "te3", "te4"]

Drop = Annotated[
    Dropped | Sequence[Dropped], words_of(DROP_CHOICES), Opt("Which modules", text="Leave out {meanings}.")
]

Alpha = Annotated[
    float | None,
    Opt(
        "About the inputs",
        "N",
        text="The adapter's alpha, where its file does not say it. A contradiction is an error.",
    ),
]

MergeDtype = Annotated[
    Literal["keep", "fp32", "f32", "float32", "float", "bf16", "bfloat16", "fp16", "f16", "float16", "half"],
    dtype_of(MERGE_DTYPES),
    Opt("Output", "keep|fp32|bf16|fp16", text="Dtype of the output.", free=True),
]

FactorDtype = Annotated[
    Literal["fp32", "fp16", "bf16"], one_of(FACTOR_DTYPES), Opt("Output", text="Dtype of the factors.")
]

Architecture = Annotated[
    str | None,
    Opt(
        "Output",
        "CLASS",
        "config.json's",
        text="The class that PEFT will wrap, as LlamaForCausalLM inside a Llava; for convert of an image model's "
        "adapter its family, as flux.",
    ),
]

Energy = Annotated[Share | None, Opt("Rank and method", "0.95", text="Keep this share of each module's delta.")]

Params = Annotated[
    ParameterCount | None,
    Opt("Rank and method", "20M", text="Budget for the whole adapter, in parameters, spent by energy per parameter."),
]

Bytes = Annotated[
    Size | None,
    Opt("Rank and method", "40MB", text="Budget for the whole adapter, in bytes, spent by energy per parameter."),
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
        text="Rank rule of each module: one of {words}. noise: what rounding cannot have made, or what is larger than "
        "VALUE times its bound.",
    ),
]

MaxRank = Annotated[Positive | None, Opt("Rank and method", "N", text="Upper limit for any module.")]

Imatrix = Annotated[
    StrPath | None,
    Opt(
        "Rank and method",
        "FILE",
        text="A file of llama-imatrix, by which each module is the best of its rank for its outputs.",
    ),
]

RankPattern = Annotated[Mapping[str, Positive] | None, Opt("Rank and method", "PATTERN=RANK")]

Top = Annotated[
    Positive | None,
    Opt("Checks", "K", "10", text="With --spectra: look at the K leading singular vectors of each changed matrix."),
]

Threshold = Annotated[
    Share | None,
    Opt(
        "Checks",
        "X",
        "0.5",
        text="With --spectra: what has a |cosine| of X with one of the base's singular vectors is not new.",
    ),
]

Seed = Annotated[int, Opt("Rank and method", "N")]
