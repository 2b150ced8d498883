"""Hold the path of GPUs to numpy's: arrays are torch's tensors, here on the CPU, as no device is needed to compare."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import factors, weights
from lib.hostile.hostile_reals import form_of

from loratool.numerics.arrays import Numbers
from loratool.numerics.decide import Factor, Reals
from loratool.numerics.merge import RowMerge
from loratool.numerics.norms import row_norms
from loratool.numerics.products import Products, Term
from loratool.numerics.tensors import numbers_of
from loratool.numerics.workspace import Workspace
from loratool.undo.records import Recorder, Restorer

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def as_torch(x: Numbers) -> Numbers:
    return Numbers(torch.from_numpy(x.bits.copy()), x.form)


@pytest.mark.parametrize(("matrices", "is_scaled"), [(1, False), (2, False), (1, True)])
@pytest.mark.parametrize(("dtype", "to"), [(BF16, BF16), (FP16, FP16), (FP32, FP32), (BF16, FP32), (FP32, BF16)])
def test_merge_and_undo(dtype: torch.dtype, to: torch.dtype, matrices: int, is_scaled: bool) -> None:
    """The same W', record and W again; inf, nan, -0.0 and subnormal weights are among them."""
    W, (A, B) = weights(24, 40, dtype=dtype), factors(24, 40 * matrices, 3)
    W[0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])
    W[5] *= 1e-40 if dtype == FP32 else 1e-6
    factor = Factor.of_rows([Fraction(100 + i % 7, 100) for i in range(len(W))]) if is_scaled else None
    x = Reals(Products([Term(B, A, Fraction(1, 3))], matrices).rows(0, len(W)), factor)
    base, form = numbers_of(W), form_of(to)
    made = []
    for source, nothing in ((base, numbers_of(torch.zeros_like(W))), (as_torch(base), as_torch(numbers_of(W * 0)))):
        out = Numbers.empty(form, *W.shape) if source is base else as_torch(Numbers.empty(form, *W.shape))
        recorder = Recorder(base.form, matrices=matrices) if dtype == to else None
        work = Workspace(source.bits)
        stats = RowMerge(x, base.form, form, source.bits).apply_each(source, 0, out, work, recorder)
        finished = [each.finish("") for each in (recorder.results(stats, source, out) if recorder else [])]
        made.append((out.host(), [each.payload for each in finished], [(s.changed, s.not_finite) for s in stats]))
        if finished and matrices == 1:
            Restorer("x", base.form, finished[0].payload, "", 0).block(out, x, nothing, work)
            assert np.array_equal(nothing.host(), base.bits)
    assert np.array_equal(made[0][0], made[1][0]) and made[0][1:] == made[1][1:]


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_norms_of_rows(dtype: torch.dtype) -> None:
    base, (A, B) = numbers_of(weights(24, 40, dtype=dtype)), factors(24, 40, 3)
    delta = Products([Term(B, A, Fraction(1, 3))]).rows(0, 24)
    both = [row_norms(delta, x, Workspace(x.bits)) for x in (base, as_torch(base))]
    assert np.array_equal(*both)
