"""The command `diff --spectra`: count intruder dimensions of the linear layers that a fine-tune changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

from ...adapters.formats import holds_adapter
from ...adapters.weight_kinds import WEIGHT_KINDS
from ...architectures.prefixes import module_path
from ...binding.modules.selection import Selection
from ...binding.weights.candidates import find_candidates
from ...binding.weights.model_pairs import pair_tensors
from ...binding.weights.model_weights import ModelWeight
from ...errors import InputError
from ...files.tensor_compare import compare
from ...files.tensor_ref import TensorRef, read_float32
from ...numerics.arrays import Array, like_of
from ...streaming.parallel import choose_device
from ...views.diff_spectra import SpectraDiff, WeightSpectra
from ...views.intruders import IntruderRule
from ...views.parts.writing import command_line
from ..inputs import open_model
from ..inspect.intruders import MatrixPair, count_intruders
from ..inspect.spectra import TARGET
from .call import DiffSpectra


def run_diff_spectra(call: DiffSpectra) -> SpectraDiff:
    """Count the intruder dimensions of a fine-tune: of all linear layers, if no target is named."""
    rule, like = IntruderRule.parse(call.top, call.threshold), like_of(choose_device(call.device))
    for path, other in ((call.a, call.b), (call.b, call.a)):
        if holds_adapter(path):
            raise InputError(
                "is an adapter; diff --spectra compares two models",
                culprit=os.fspath(path),
                remedy=command_line("inspect", path, "--spectra", "--base", other),
            )
    with ExitStack() as opened:
        base = open_model(call.a, "diff --spectra compares two models", opened)
        tuned = open_model(call.b, "diff --spectra compares two models", opened)
        pairs = pair_tensors(base, tuned).both
        candidates, left_out = find_candidates(
            base, Selection.parse(call.target or TARGET, call.exclude, call.layers), among=base.specs
        )
        rows, absent, equal = [], list[str](), 0
        for done, weight in enumerate(candidates, 1):
            sides = pairs.get(weight.name)
            if sides is None or sides[0].spec.shape != sides[1].spec.shape:
                absent.append(module_path(weight.name))
            elif (comparison := compare(*sides)).not_finite or comparison.changed:
                rows.append(_weight_row(weight, sides, comparison.norms, rule, like))
            else:
                equal += 1
            if call.progress:
                call.progress(done, len(candidates))
    return SpectraDiff(
        base=os.fspath(call.a),
        tuned=os.fspath(call.b),
        weights=tuple(rows),
        equal=equal,
        not_compared=tuple(absent),
        top=rule.top,
        threshold=rule.threshold,
        left_out=left_out,
    )


def _weight_row(
    weight: ModelWeight,
    sides: tuple[TensorRef, TensorRef],
    norms: tuple[float, float, float],
    rule: IntruderRule,
    like: Array,
) -> WeightSpectra:
    return WeightSpectra(
        name=weight.name,
        kind=weight.kind,
        shape=weight.spec.shape,
        relative=norms[2] / norms[0] if norms[0] else None,
        intruders=count_intruders(weight.name, _matrices(weight, sides, like), rule),
    )


def _matrices(weight: ModelWeight, sides: tuple[TensorRef, TensorRef], like: Array) -> Iterator[MatrixPair]:
    """Yield functions that read the tuned and the base matrix, for each matrix of a weight."""
    base, tuned = (weight.matrices({weight.name: side}.__getitem__) for side in sides)
    for (mine,), (theirs,) in zip(base, tuned, strict=True):
        yield _reader(weight.kind, theirs, like), _reader(weight.kind, mine, like)


def _reader(kind: str, source: TensorRef, like: Array) -> Callable[[], Array]:
    def read() -> Array:
        W = read_float32(source, like)
        return WEIGHT_KINDS[kind].stack(W[None] if kind.startswith("experts") else W)[0]

    return read
