"""The content of all model cards: the command that made an output, its inputs and the licence of its base.

A card has the same bytes for the same inputs. So paths are shortened to their last part, the output has its default
name, and options that change no byte are left out. A journal recognizes its run by the same call.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..binding.merge.choices import TOKENIZERS
from ..files.hub.cache import place_named
from ..files.hub.names import named_repo
from ..files.output.model_card import ModelCard, code, read_licence, shown_name
from ..views.parts.numbers import kept_share, number_ranges, rank, share, spread
from .adapter_requests import parse_adapters
from .arguments import option_word
from .calls import Call

# on the bytes beside the card
WITHOUT_EFFECT = (
    "out",
    "device",
    "force",
    "dry_run",
    "resume",
    "progress",
    "workers",
    "card",
    "attest",
    "in_place",
    "by",
)

INPUTS = ("base", "imatrix", "initial", "like", "tokenizer")  # options whose values are paths or names of the hub


def options_of(call: Call[Any], only: Collection[str] = ()) -> list[str]:
    """Return a call's options of the command line, without its inputs and its output.

    Args:
        only: keywords; all if it is empty.
    """
    words: list[str] = []
    for name, value in call.given().items():
        if name not in WITHOUT_EFFECT and (not only or name in only):
            words += _option(name, value)
    return words


def described_call(call: Call[Any], inputs: Sequence[str]) -> dict[str, str]:
    """Return a call for the journal: its command, inputs and options by name."""
    options = {name: value for name, value in call.given().items() if name not in WITHOUT_EFFECT}
    words = ((option_word(name, value is not False), _option(name, value)[1:]) for name, value in options.items())
    given = {f"--{word}": " ".join(values) or "given" for word, values in words}
    return {"command": call.name(), "inputs": " ".join(inputs), **given}


def _option(name: str, value: Any) -> list[str]:
    option = f"--{option_word(name, value is not False)}"
    if isinstance(value, bool):
        return [option]
    if name == "replace":
        requests = parse_adapters(value)
        return [
            word for each in requests for word in (option, weight_word(each.path, each.weight, each.module_weights))
        ]
    if name == "adapter":
        given = [f"{input_word(each.path)}:{short(each.weight)}" for each in parse_adapters(value)]
        return [word for each in given for word in (option, each)]
    if name == "enable_lora":
        return [option, ",".join(str(int(each)) for each in value)]
    if name == "residual":
        return [option, "residual"]
    if name in INPUTS:
        word = input_word(value)
        return [option, f"./{word}" if word in TOKENIZERS and word != value else word]  # a folder of such a name
    if name == "rank_rule":
        return [option, f"{value[0]}={short(value[1])}"]
    if isinstance(value, Mapping):
        return [word for pattern, rank in value.items() for word in (option, f"{pattern}={rank}")]
    if isinstance(value, float):
        return [option, short(value)]
    if isinstance(value, frozenset):
        return [option, number_ranges(value)]
    if isinstance(value, tuple):
        return [word for each in value for word in (option, str(each))]
    return [option, str(value)]


def short(value: float) -> str:
    """Return the shortest text that parses to this number."""
    return repr(float(value)).removesuffix(".0")


def error_share(value: float) -> str:
    """Return a relative error as text. One below 0.01% may only come from the order of sums."""
    return share(value) if value >= 1e-4 else "below 0.01%"


def kept_or_none(value: float | None) -> str:
    return "nothing" if value is None else kept_share(value)


def rank_range(ranks: Iterable[int]) -> str:
    return f"rank {spread(ranks, rank)}"


def weighted_word(weighted: tuple[Adapter, float]) -> str:
    """Return an adapter and its weights as a word of the command line."""
    adapter, weight = weighted
    return weight_word(adapter.name, weight, dict(adapter.module_weights))


def weight_word(name: str, weight: float, module_weights: Mapping[str, float]) -> str:
    """Return an adapter's name and weights as a word of the command line."""
    weights = [f"{part}={short(module_weight)}" for part, module_weight in module_weights.items()]
    if weight != 1 or weights:
        weights = [short(weight), *weights]
    return input_word(name) + (":" + ",".join(weights) if weights else "")


def input_word(given: str | os.PathLike[str]) -> str:
    """Return an input as a word of the command line, which is no option."""
    name = shown_name(given)
    return f"./{name}" if name.startswith("-") else name


def output_facts(imatrix: str | None, weighted_error: float | None) -> list[str]:
    """Return the sentence of a card on ranks chosen for the outputs. Empty without an imatrix."""
    if imatrix is None or weighted_error is None:
        return []
    by = f"ranks are chosen for the outputs, with the inputs in {code(shown_name(imatrix))}"
    return [f"{by}: they weigh the energy, and {error_share(weighted_error)} of the outputs is lost"]


def few_names(names: Sequence[str]) -> str:
    """Return names as Markdown, the first few of many."""
    shown = [code(name) for name in names[:3]]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def folder_of(given: str | os.PathLike[str], opened: Path) -> Path | None:
    """Return the folder with an input's card. None if the input was given as a file.

    Args:
        opened: the file or folder that was opened.
    """
    if place_named(given).is_file():
        return None
    return opened if opened.is_dir() else opened.parent


def common_licence(licences: Iterable[dict[str, str]]) -> dict[str, str]:
    """Return the licence that the cards of the inputs name. Empty if two differ, as neither is right."""
    named = [licence for licence in licences if licence]
    return named[0] if named and all(licence == named[0] for licence in named) else {}


def source_facts(adapters: Sequence[tuple[Adapter, str]]) -> list[str]:
    """Return a line for each source adapter: its name, the caller's text and its hash."""
    return [f"{code(shown_name(each.name))}: {what}, sha256 {code(each.sha256)}" for each, what in adapters]


def adapter_card(
    title: str,
    library: str,
    sources: Sequence[Adapter],
    facts: Sequence[str],
    commands: Sequence[str],
    left_out: Sequence[str] = (),
) -> bytes:
    """Return the card of an adapter that is made from others. It has their bases and licences.

    Args:
        title, facts: in Markdown.
        library: what loads it, as the hub calls it.
        left_out: the names of excluded modules.
    """
    bases = [named_repo(each.config.base_model) for each in sources]
    licences = [read_licence(folder_of(each.name, each.file.path)) for each in sources]
    return encode_card(title, library, bases, licences, facts, commands, left_out)


def encode_card(
    title: str,
    library: str,
    bases: Iterable[str],
    licences: Iterable[dict[str, str]],
    facts: Sequence[str],
    commands: Sequence[str],
    left_out: Sequence[str] = (),
) -> bytes:
    """Return the card of an adapter.

    Args:
        bases: the repo ids of its base, empty if they are not known.
        licences: of the models that it is made from (`read_licence`).
    """
    known = tuple(dict.fromkeys(filter(None, bases)))
    metadata: dict[str, str | Sequence[str]] = {
        "base_model": known[0] if len(known) == 1 else known,
        "base_model_relation": "adapter" if known else "",
        "library_name": library,
        **common_licence(licences),
        "tags": ("lora", "loratool"),
    }
    lines = [*facts, *([f"excluded: {few_names(left_out)}"] if left_out else [])]
    return ModelCard(title, lines, commands, metadata).encode()
