"""Read LoRA of Segment Anything's image encoder and of timm's vision transformers, by Wang's code of 2023.

Tensors are `w_a_000` (r, in) and `w_b_000` (in, r), numbered over the layers that were trained: q of the first, its v,
q of the second, and so on. They add to the first and the last third of the rows of the fused qkv. No layer has a name,
so a base must have as many layers as the file. Beside them are the decoders of Segment Anything as complete tensors
(the scale is then 1), or a classifier's weight `fc_768in_10out` (the scale is alpha // r, and alpha is not stored).

The state of such a model, or of one by the many copies of that code, names the layers: `<qkv>.linear_a_q.weight` and
`linear_b_q`, `linear_a_v`, `linear_b_v`, and the layer itself as `<qkv>.qkv.weight`. It does not say the scale.
Defined by JamesQFreeman/Sam_LoRA: `sam_lora.py`; JamesQFreeman/LoRA-ViT: `lora.py`; hitachinsk/SAMed:
`sam_lora_image_encoder.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import final

from ...architectures.fused_rows import nested_configs
from ...errors import InputError, NeedsFlag, UsageError
from ...files.weights_file import WeightsFile
from ..adapter import Adapter
from ..updates.headers import unpaired
from ..updates.low_rank import LowRank
from .format import Capabilities, Format, ReadOptions
from .joined_factors import Pair, join, put_tensor
from .made_tensors import MadeTensor, copied
from .peft import read_as_peft

_NAME = re.compile(r"w_([ab])_(\d{3,})")
_NAMED = re.compile(r"(.+)\.linear_([ab])_([qv])\.weight")
_LIKE_NAMED = re.compile(r"\.linear_[ab]_\w+(?=\.|$)")
_OF_K = ".linear_a_k."
_WRAPPER = re.compile(r"^(?:module\.)?(?:sam\.|lora_vit\.)?")  # of the classes that put the factors in
_MAKERS_LAYER = re.compile(r"^image_encoder\.blocks\.(\d+)\.attn\.qkv$")
_HEAD = re.compile(r"fc_\d+in_\d+out")

MAKERS, TRANSFORMERS, TIMM = "image_encoder.blocks.{}", "vision_encoder.layers.{}", "blocks.{}"

HALF = "half of the file is missing: the one who trained it has to save it again"


@dataclass(frozen=True)
class _Layers:
    """The pairs of a file by layer."""

    pairs: Mapping[str, tuple[Pair, Pair]]  # path of the fused layer -> of q and v
    rank: int


@final
class Sam(Format):
    """Files of pairs for the fused q, k and v of vision transformers, numbered or named."""

    key = "sam"
    title = "LoRA for Segment Anything and timm's vision transformers, read only"
    can = Capabilities(kinds=frozenset({LowRank}), writes=False, components="one", alpha="none", kernels=False)

    def claims(self, names: Iterable[str]) -> bool:
        names = [*names]  # a model with tensor product attention has these names and those of k
        named = any(map(_NAMED.fullmatch, names)) and not any(_OF_K in name for name in names)
        return named or any(map(_NAME.fullmatch, names))

    def read(self, name: str, file: WeightsFile, options: ReadOptions) -> Adapter:
        """Read the adapter in `file`.

        Raises:
            InputError: a tensor of a pair or of a layer is missing, or the model has another number of layers.
            NeedsFlag: its alpha is not known, and was not given.
            UsageError: the alpha of `options` is less than the rank, so that the trainer's scale is 0, or no multiple
                of it in a state, so that its code decides what the scale is.
        """
        is_named = not any(map(_NAME.fullmatch, file.specs))
        factors = dict.fromkeys(tensor for tensor in file.specs if (_NAMED if is_named else _NAME).fullmatch(tensor))
        stems = {match[1] for match in map(_NAMED.fullmatch, factors) if match}
        head = next((tensor for tensor in file.specs if not is_named and _HEAD.fullmatch(tensor)), None)
        tensors: dict[str, MadeTensor] = {}
        for tensor in (each for each in file.specs if each not in factors):
            new = "head.weight" if tensor == head else _beside(tensor, stems) if is_named else tensor
            put_tensor(tensors, new, copied(file, tensor))
        try:
            layers = _named_layers(file, options) if is_named else _layers(file, TIMM if head else _pattern(options))
        except InputError as error:
            if not options.lenient:
                raise
            first = next(iter(factors))
            tensors[first] = copied(file, first)
            adapter = read_as_peft(self.key, name, file, tensors, {"lora_alpha": 1}, replace(options, alpha=None))
            fault = unpaired(first, adapter.updates[first].tensors, adapter.file, error)
            return replace(adapter, updates={**adapter.updates, first: fault})
        depth = None if is_named else _depth(options)
        if depth not in (None, len(layers.pairs)):
            raise other_depth(name, len(layers.pairs), depth or 0)
        for path, (q, v) in layers.pairs.items():
            width = q.B.spec.shape[0]
            both = join([(q, slice(0, width)), (v, slice(2 * width, 3 * width))], 3 * width)
            tensors |= {f"{path}.lora_A.weight": both.A, f"{path}.lora_B.weight": both.B}
        scale, notes = (
            (_scale_of_state(name, layers.rank, options), ())
            if is_named
            else _scale(name, layers.rank, bool(head), options)
        )
        fields = {"r": 2 * layers.rank, "lora_alpha": None if scale is None else 2 * layers.rank * scale}
        adapter = read_as_peft(self.key, name, file, tensors, fields, replace(options, alpha=None), notes)
        missing = (f"the file has the classifier's weight {head}, and not its bias",) if head else ()
        by_order = not is_named
        unnamed = tuple(path for path, update in adapter.updates.items() if update.rank and by_order and not depth)
        return replace(adapter, missing=missing, own_names=unnamed, by_order=by_order)

    def with_standard_names(self, adapter: Adapter) -> Adapter:
        if adapter.own_names:
            raise NeedsFlag(
                f"is the first layer that was trained, and only the model tells whether it is its first "
                f"({adapter.name})",
                culprit=adapter.own_names[0],
                flags="--base BASE",
                why="with the model in transformers' format",
            )
        return adapter


def other_depth(name: str, layers: int, depth: int) -> InputError:
    """Return the error for an adapter whose layers are numbered by order alone, and a base that has other ones."""
    return InputError(
        f"has pairs for {layers} layers, numbered by their order, and the base has {depth} of them: the file does not "
        "say which were trained",
        culprit=name,
        remedy=HALF if 2 * layers == depth else "pass the base that it was trained on, if all its layers were trained",
    )


def _pattern(options: ReadOptions) -> str:
    return TRANSFORMERS if "sam" in nested_configs(options.model) else MAKERS


def _depth(options: ReadOptions) -> int | None:
    """Return the layers of the image encoder by a config of transformers' class; None without one."""
    config = options.model.get("vision_config") if "sam" in nested_configs(options.model) else None
    depth = config.get("num_hidden_layers") if isinstance(config, dict) else None
    return depth if type(depth) is int else None


def _beside(tensor: str, stems: Collection[str]) -> str:
    """Return the name of a tensor of a state beside its factors; the layers in `stems` have theirs below `qkv`."""
    stem, _, parameter = tensor.rpartition(".")
    is_under = stem.endswith(".qkv") and stem.removesuffix(".qkv") in stems
    return _WRAPPER.sub("", f"{stem.removesuffix('.qkv')}.base_layer.{parameter}" if is_under else tensor)


def _named_layers(file: WeightsFile, options: ReadOptions) -> _Layers:
    """Return the pairs of a state by layer.

    Raises:
        InputError: one tensor of a layer is missing, or is of a variant, or the shapes are not those of q and v.
    """
    found: dict[str, dict[str, str]] = {}
    for tensor in file.specs:
        if match := _NAMED.fullmatch(tensor):
            found.setdefault(match[1], {})[match[2] + match[3]] = tensor
        elif _LIKE_NAMED.search(tensor):
            raise InputError("is of a variant of this code whose forward pass is unknown here", culprit=tensor)
    pattern, layers = _pattern(options), {}
    for stem, names in found.items():
        if absent := [f"{stem}.linear_{x[0]}_{x[1]}.weight" for x in ("aq", "bq", "av", "bv") if x not in names]:
            raise InputError("is missing, of four tensors of its layer", culprit=absent[0], remedy=HALF)
        path = _WRAPPER.sub("", stem)
        if pattern == TRANSFORMERS and (layer := _MAKERS_LAYER.match(path)):
            path = f"{pattern.format(layer[1])}.attn.qkv"
        if path in layers:
            raise InputError(f"is {path}, like another layer of the file", culprit=stem)
        q, v = (Pair(copied(file, names[f"a{x}"]), copied(file, names[f"b{x}"])) for x in "qv")
        layers[path] = (q, v)
    return _Layers(layers, _rank([pair for both in layers.values() for pair in both], next(iter(layers))))


def _scale_of_state(name: str, rank: int, options: ReadOptions) -> float | None:
    """Return the scale that an alpha gives; None without one if the reader is lenient."""
    alpha = options.alpha
    if alpha is None:
        if options.lenient:
            return None
        raise NeedsFlag(
            "is the state of a model whose code has the scale, which the file has not",
            culprit=name,
            remedy=f"pass --alpha {rank} for the scale 1 of Sam_LoRA and SAMed, or the alpha of LoRA-ViT",
            flags="--alpha A",
        )
    if alpha % rank:
        raise UsageError(
            f"{alpha:g} is no multiple of the rank {rank} of {name}, and LoRA-ViT divides them to a whole number",
            culprit="--alpha",
            remedy=f"pass {rank} times the scale that its code adds the product with",
        )
    return alpha / rank


def _layers(file: WeightsFile, pattern: str) -> _Layers:
    """Return the numbered pairs by layer.

    Raises:
        InputError: a number or one tensor of a pair is missing, or the shapes are not those of the q and v of a layer.
    """
    found = {match[0]: (match[1], int(match[2])) for tensor in file.specs if (match := _NAME.fullmatch(tensor))}
    numbers = {number for _, number in found.values()}
    expected = range((max(numbers) // 2 + 1) * 2)
    absent = [name for n in expected for side in "ab" if (name := f"w_{side}_{n:03d}") not in file.specs]
    if absent:
        others = f" and {len(absent) - 1} others" if len(absent) > 1 else ""
        raise InputError(f"is missing{others}, of {2 * len(expected)} tensors", culprit=absent[0], remedy=HALF)
    pairs = {n: Pair(copied(file, f"w_a_{n:03d}"), copied(file, f"w_b_{n:03d}")) for n in expected}
    layers = {f"{pattern.format(n // 2)}.attn.qkv": (pairs[n], pairs[n + 1]) for n in expected[::2]}
    return _Layers(layers, _rank(pairs.values(), "w_a_000"))


def _rank(pairs: Iterable[Pair], culprit: str) -> int:
    """Return the rank of all pairs; raise InputError if they are not those of q and v of equal layers."""
    shapes = {(pair.A.spec.shape, pair.B.spec.shape) for pair in pairs}
    A, B = min(shapes)
    if len(shapes) > 1 or A[::-1] != B or len(A) != 2 or not A[0]:
        shown = ", ".join(f"{a} and {b}" for a, b in sorted(shapes)[:2])
        raise InputError(f"its pairs are {shown}, not (r, width) and (width, r) in all layers", culprit=culprit)
    return A[0]


def _scale(name: str, rank: int, classifies: bool, options: ReadOptions) -> tuple[float | None, tuple[str, ...]]:
    """Return the scale, None if it is unknown and the reader is lenient, and notes for the user."""
    alpha = options.alpha
    if not classifies:
        return (1.0 if alpha is None else alpha / rank), ()
    if alpha is None:
        if options.lenient:
            return None, ()
        raise NeedsFlag(
            "has pairs of a vision transformer, whose alpha is not stored",
            culprit=name,
            remedy="pass --alpha as it was trained",
            flags="--alpha A",
        )
    scale = float(alpha // rank)
    if not scale:
        message = f"{alpha:g} is less than the rank {rank} of {name}: its code divides them to a whole number, 0"
        raise UsageError(message, culprit="--alpha")
    note = f"{name}: its code divides alpha {alpha:g} by the rank {rank} to a whole number: the scale is {scale:g}"
    return scale, (note,) if scale * rank != alpha else ()
