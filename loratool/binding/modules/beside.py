"""Find the weight beside each bias whose change depends on it, as that of PEFT's GLoRA does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ...errors import InputError
from ...files.tensor_ref import TensorRef
from .placement import Placement, RowsOfWeight

Placements = Mapping[str, tuple[Placement, ...]]


def beside_weights(placements: Placements, sources: Mapping[str, TensorRef]) -> Placements:
    """Return the placements with the rows of the weights that they depend on.

    Args:
        sources: what each tensor is read from.

    Raises:
        InputError: the weight does not change, or has the rows of the bias in several tensors.
    """
    return {name: tuple(_beside(name, p, placements, sources) for p in each) for name, each in placements.items()}


def reading_weights(placements: Mapping[str, Iterable[Placement]]) -> list[str]:
    """Return the biases whose change depends on a weight."""
    return [name for name, each in placements.items() if any(p.update.cls.reads_weight(p.update) for p in each)]


def _beside(name: str, bias: Placement, placements: Placements, sources: Mapping[str, TensorRef]) -> Placement:
    reads = bias.update.cls.reads_weight(bias.update)
    if reads is None:
        return bias
    module, inputs = reads
    found = [
        RowsOfWeight(sources[of], p.rows, p.start - p.skip)
        for of, each in placements.items()
        for p in each
        if p.adapter is bias.adapter and p.update.module == module and _holds(p, bias)
    ]
    if len(found) != 1:
        what = f"changes by a product with the weight of {module}, which has not its rows in one changed tensor"
        raise InputError(what, culprit=name, remedy=f"select the weight too, or exclude {bias.update.module}")
    (weight,) = found
    columns = weight.source.spec.size // max(1, weight.rows)
    if columns != inputs:
        raise InputError(f"has {columns} columns, but path C of {module} is for {inputs}", culprit=weight.source.name)
    return replace(bias, beside=weight)


def _holds(weight: Placement, bias: Placement) -> bool:
    """Return whether the rows of a bias are among those of a weight."""
    last, end = (p.skip + p.stop - p.start for p in (weight, bias))
    return not weight.transposed and weight.expert is None and weight.skip <= bias.skip and end <= last
