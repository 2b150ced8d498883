"""Read LoRA of Segment Anything's image encoder and of timm's vision transformers, as Wang's code of 2023 saves it.

Tensors are `w_a_000` (r, in) and `w_b_000` (in, r), numbered over the layers that were trained: q of the first, its v,
q of the second, and so on. They add to the first and the last third of the rows of the fused qkv. No layer has a name,
so a base must have as many layers as the file. Beside them are the decoders of Segment Anything as complete tensors
(the scale is then 1), or a classifier's weight `fc_768in_10out` (the scale is alpha // r, and alpha is not stored).
Defined by JamesQFreeman/Sam_LoRA: `sam_lora.py`; JamesQFreeman/LoRA-ViT: `lora.py`; hitachinsk/SAMed:
`sam_lora_image_encoder.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import final

from ...architectures.fused_rows import nested_configs
from ...errors import InputError, NeedsFlag, UsageError
from ...files.weights_file import WeightsFile
from ..adapter import Adapter
from ..updates.headers import unpaired
from ..updates.low_rank import LowRank
from .format import Capabilities, Format, ReadOptions
from .joined_factors import Pair, join
from .made_tensors import MadeTensor, copied
from .peft import read_as_peft

_NAME = re.compile(r"w_([ab])_(\d{3,})")
_HEAD = re.compile(r"fc_\d+in_\d+out")

MAKERS, TRANSFORMERS, TIMM = "image_encoder.blocks.{}", "vision_encoder.layers.{}", "blocks.{}"

HALF = "half of the file is missing: the one who trained it has to save it again"


@dataclass(frozen=True)
class _Layers:
    """The pairs of a file by layer, and the names that they are given."""

    pairs: Mapping[int, tuple[Pair, Pair]]  # of q and v
    pattern: str  # of a layer's path, for its number
    rank: int


@final
class Sam(Format):
    """Files of numbered pairs for the fused q, k and v of vision transformers."""

    key = "sam"
    title = "LoRA for Segment Anything and timm's vision transformers, read only"
    can = Capabilities(kinds=frozenset({LowRank}), writes=False, components="one", alpha="none", kernels=False)

    def claims(self, names: Iterable[str]) -> bool:
        return any(_NAME.fullmatch(name) for name in names)

    def read(self, name: str, file: WeightsFile, options: ReadOptions) -> Adapter:
        """Read the adapter in `file`.

        Raises:
            InputError: a tensor of a pair or of a layer is missing, or the model has another number of layers.
            NeedsFlag: it is of a vision transformer, and its alpha was not given.
            UsageError: the alpha of `options` is less than the rank, so that the trainer's scale is 0.
        """
        head = next((tensor for tensor in file.specs if _HEAD.fullmatch(tensor)), None)
        tensors: dict[str, MadeTensor] = {}
        for tensor in file.specs:
            if tensor == head:
                tensors["head.weight"] = copied(file, tensor)
            elif not _NAME.fullmatch(tensor):
                tensors[tensor] = copied(file, tensor)
        try:
            layers = _layers(file, TIMM if head else _pattern(options))
        except InputError as error:
            if not options.lenient:
                raise
            first = next(tensor for tensor in file.specs if _NAME.fullmatch(tensor))
            tensors[first] = copied(file, first)
            adapter = read_as_peft(self.key, name, file, tensors, {"lora_alpha": 1}, replace(options, alpha=None))
            fault = unpaired(first, adapter.updates[first].tensors, adapter.file, error)
            return replace(adapter, updates={**adapter.updates, first: fault})
        depth = _depth(options)
        if depth not in (None, len(layers.pairs)):
            raise other_depth(name, len(layers.pairs), depth or 0)
        for number, (q, v) in layers.pairs.items():
            width = q.B.spec.shape[0]
            path = f"{layers.pattern.format(number)}.attn.qkv"
            both = join([(q, slice(0, width)), (v, slice(2 * width, 3 * width))], 3 * width)
            tensors |= {f"{path}.lora_A.weight": both.A, f"{path}.lora_B.weight": both.B}
        scale, notes = _scale(name, layers.rank, bool(head), options)
        fields = {"r": 2 * layers.rank, "lora_alpha": None if scale is None else 2 * layers.rank * scale}
        adapter = read_as_peft(self.key, name, file, tensors, fields, replace(options, alpha=None), notes)
        missing = (f"the file has the classifier's weight {head}, and not its bias",) if head else ()
        unnamed = () if depth else tuple(module for module, update in adapter.updates.items() if update.rank)
        return replace(adapter, missing=missing, own_names=unnamed, by_order=True)

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


def _layers(file: WeightsFile, pattern: str) -> _Layers:
    """Return the pairs by layer.

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
    shapes = {(pair.A.spec.shape, pair.B.spec.shape) for pair in pairs.values()}
    A, B = min(shapes)
    if len(shapes) > 1 or A[::-1] != B or len(A) != 2 or not A[0]:
        shown = ", ".join(f"{a} and {b}" for a, b in sorted(shapes)[:2])
        raise InputError(f"its pairs are {shown}, not (r, width) and (width, r) in all layers", culprit="w_a_000")
    return _Layers({n // 2: (pairs[n], pairs[n + 1]) for n in expected[::2]}, pattern, A[0])


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
        message = f"--alpha {alpha:g} is less than the rank {rank}: its code divides them to a whole number, 0"
        raise UsageError(message, culprit=name)
    note = f"{name}: its code divides alpha {alpha:g} by the rank {rank} to a whole number: the scale is {scale:g}"
    return scale, (note,) if scale * rank != alpha else ()
