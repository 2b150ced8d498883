"""The place of a module in its model: its component, its stack of layers, the layer, and its name there.

Paths are read as names alone, so that a report needs no model. A UNet has stages and no layers: the first number of its
paths follows no stack.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ...architectures.components import FOLDERS, PREFIXES, WEIGHED, component_of
from ...architectures.numbered_names import split_numbers
from ...architectures.projections import PROJECTION_NAMES, projections
from ...architectures.roles import EMBEDDINGS, GGUF_EMBEDDINGS, HEADS
from .numbers import number_ranges

# What stands before the number of a layer
STACKS = frozenset(
    """layers layer h block blocks blk resblocks transformer_blocks single_transformer_blocks double_blocks
    single_blocks joint_blocks""".split()
)

# The same in flattened names, where `down_blocks` and the like are stages
_FLAT_STACK = re.compile(rf"(?:^|_)(?<!down_)(?<!up_)(?<!input_)(?<!output_)(?:{'|'.join(STACKS)})_$")

# Parents of projections in flattened names, behind the last number
_FLAT_PARENT = re.compile(r"(?:self_|cross_|img_|txt_)?(?:attn\d*|attention|mlp|ff|feed_forward)(?=_)")

_SHORT = {components[0]: name for name, components in WEIGHED.items() if len(components) == 1}

NORMS = 7  # where they stand, after all that is in a block

# Words in a path -> where its row stands
_ORDER = (
    (re.compile(r"shared_expert"), 4),
    (re.compile(r"expert"), 5),
    (re.compile(r"attn|attention(?!s[._])|mixer", re.IGNORECASE), 1),
    (re.compile(r"(^|[._])(mlp|ff|feed_forward|ffn|intermediate|output)"), 3),
)


@dataclass(frozen=True)
class ModulePlace:
    """The parts of a module's path.

    Attributes:
        component: of an image model, None for others.
        stack: the path before the layer's number, empty without one.
        texts, numbers: the path behind the layer's number, split at its numbers; the full path without a layer.
        tail: the texts of `texts` behind the last number of a stack, which name the module in its block.
        parent: the first part of the tail, as `self_attn`; empty if it has one part.
    """

    component: str | None
    stack: str
    layer: int | None
    texts: tuple[str, ...]
    numbers: tuple[int, ...]
    tail: tuple[str, ...]
    parent: str


def find_place(name: str) -> ModulePlace:
    """Return the place of a module or of its weight."""
    path = name.removesuffix(".weight")
    flat = "." not in path
    texts, numbers = split_numbers(path, underscores=flat)
    kind = _kind_of(texts, numbers[:1], flat)
    numbers = numbers[kind.skipped :]
    return ModulePlace(
        kind.component,
        kind.stack,
        numbers[0] if kind.stack else None,
        kind.texts[1:] if kind.stack else kind.texts,
        numbers[1:] if kind.stack else numbers,
        kind.tail,
        kind.parent,
    )


@dataclass(frozen=True)
class _Kind:
    """The part of a place that modules share if their names differ only in numbers behind the first."""

    component: str | None
    stack: str
    texts: tuple[str, ...]  # behind the component
    skipped: int  # numbers in the component's prefix
    tail: tuple[str, ...]
    parent: str


@lru_cache(1 << 14)
def _kind_of(texts: tuple[str, ...], first: tuple[int, ...], flat: bool) -> _Kind:
    """Read a name. The component's prefix can hold the first number, as `conditioner.embedders.1.`"""
    numbers = [*map(str, first), *["0"] * (len(texts) - 1 - len(first)), ""]
    path = "".join(text + number for text, number in zip(texts, numbers, strict=True))
    component, path = _split_component(path)
    rest, _ = split_numbers(path, underscores=flat)
    stacks = [i for i, text in enumerate(rest[:-1]) if _ends_in_stack(text, flat)]
    inner = stacks[-1] + 1 if stacks else _last_named(rest)
    parent = _parent(rest[inner:], flat) or ("" if stacks else _stage(rest[:inner], flat))
    stack = rest[0].strip("._") if stacks[:1] == [0] else ""
    return _Kind(component, stack, rest, len(texts) - len(rest), rest[inner:], parent)


def _split_component(path: str) -> tuple[str | None, str]:
    folder, slash, rest = path.partition("/")
    if slash and folder in FOLDERS:
        return FOLDERS[folder], rest
    for prefix, (component, _) in PREFIXES.items():
        if path.startswith(prefix):
            return component, path.removeprefix(prefix)
    return component_of(path)


def _ends_in_stack(text: str, flat: bool) -> bool:
    return bool(_FLAT_STACK.search(text)) if flat else text.rstrip(".").rpartition(".")[2] in STACKS


def _last_named(texts: Sequence[str]) -> int:
    """Return the index of the last text with a word in it."""
    return max((i for i, text in enumerate(texts) if text.strip("._")), default=0)


def _parent(tail: Sequence[str], flat: bool) -> str:
    if flat:
        match = _FLAT_PARENT.match(tail[0].strip("_"))
        return match[0] if match else ""
    parts = "".join(tail).strip(".").split(".")
    return parts[0] if len(parts) > 1 else ""


def _stage(texts: Sequence[str], flat: bool) -> str:
    """Return the last word before the numbers of a stage: `resnets`."""
    words = [text.strip("._") for text in texts]
    last = next((word for word in reversed(words) if word), "")
    match = re.search(r"[a-z]+(?:_blocks?)?$", last) if flat else None
    return match[0] if match else last.rpartition(".")[2]


def joined(texts: Sequence[str], numbers: Iterable[Sequence[int]]) -> str:
    """Concatenate the texts of a name, with ranges where its numbers differ: `mlp.experts.{0-63}.up_proj`."""
    columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    cells = [str(column[0]) if len(column) == 1 else f"{{{number_ranges(column)}}}" for column in columns]
    cells += [""] * (len(texts) - len(cells))
    return "".join(text + cell for text, cell in zip(texts, cells, strict=True)).strip("._")


def labels(places: Sequence[ModulePlace]) -> dict[tuple[str | None, str], str]:
    """Return a label for every (component, stack). Labels are empty if there is only one.

    A component's label is its name in `ADAPTER:0.8,te1=0.4`.
    """
    components = list(dict.fromkeys(place.component for place in places if place.component))
    stacks: dict[str | None, dict[str, None]] = {}
    for place in places:
        stacks.setdefault(place.component, {})
        if place.stack:
            stacks[place.component][place.stack] = None
    labels_by_stack = {}
    for component, names in stacks.items():
        first = _SHORT.get(component or "", component or "") if len(components) > 1 else ""
        short = _shorten(list(names)) if len(names) > 1 else {}
        for stack in ["", *names]:
            labels_by_stack[component, stack] = " ".join(filter(None, (first, short.get(stack, ""))))
    return labels_by_stack


def _shorten(stacks: Sequence[str]) -> Mapping[str, str]:
    """Return the first part of each stack in which they differ, or all of it if these are not distinct."""
    parts = [stack.split(".") for stack in stacks]
    common = 0
    while all(len(each) > common + 1 and each[common] == parts[0][common] for each in parts):
        common += 1
    short = [each[common] for each in parts]
    return dict(zip(stacks, short if len(set(short)) == len(short) else stacks, strict=True))


def natural_order(name: str) -> tuple[str | int, ...]:
    """Return a key to sort names by, with numbers by their size: layers.2 before layers.10."""
    return tuple(int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]{1,18})", name)))


def order(place: ModulePlace) -> tuple[int, int]:
    """Return a key to sort modules by: embeddings, attention, MLP, experts, the rest, norms, head."""
    path = joined(place.texts, [place.numbers])
    last = path.rpartition(".")[2]
    if last.endswith(("norm", "layernorm", "layer_norm")) or last.startswith("ln_"):
        return NORMS, 0
    if place.layer is None and last in HEADS:
        return NORMS + 1, 0
    if place.layer is None and last in EMBEDDINGS | GGUF_EMBEDDINGS:
        return 0, 0
    kind = next((rank for words, rank in _ORDER if words.search(path)), 6)
    projection = projections(path)
    between = 1 if kind == 1 else len(PROJECTION_NAMES)  # latent attention has its others between q and o
    return kind, PROJECTION_NAMES.index(projection[0]) if projection else between
