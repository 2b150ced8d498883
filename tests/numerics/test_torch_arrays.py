"""Hold the path of GPUs to numpy's: arrays are torch's tensors, here on the CPU, as no device is needed to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import factors, weights
from lib.hostile.hostile_reals import form_of

from loratool.numerics import factored_svd, input_weights, intruders, linalg, svd
from loratool.numerics.arrays import Numbers, doubled
from loratool.numerics.core_space import core_space, signs
from loratool.numerics.decide import Factor, Reals
from loratool.numerics.factored_svd import FactoredSVD
from loratool.numerics.forms import Wide
from loratool.numerics.merge import RowMerge
from loratool.numerics.norms import row_norms
from loratool.numerics.overlaps import overlaps
from loratool.numerics.products import Products, Term
from loratool.numerics.seeded_random import Draw
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
        finished = recorder.results(stats, out) if recorder else []
        made.append((out.host(), [each.payload for each in finished], [(s.changed, s.not_finite) for s in stats]))
        if finished and matrices == 1:
            Restorer("x", base.form, finished[0].payload, 0).block(out, x, nothing, work)
            assert np.array_equal(nothing.host(), base.bits)
    assert np.array_equal(made[0][0], made[1][0]) and made[0][1:] == made[1][1:]


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_norms_of_rows(dtype: torch.dtype) -> None:
    base, (A, B) = numbers_of(weights(24, 40, dtype=dtype)), factors(24, 40, 3)
    delta = Products([Term(B, A, Fraction(1, 3))]).rows(0, 24)
    both = [row_norms(delta, x, Workspace(x.bits)) for x in (base, as_torch(base))]
    assert np.array_equal(*both)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let numpy read only what `cpu()` gave, as it can't read a tensor on a GPU."""

    class Fetched(torch.Tensor):
        __array__, numpy = torch.Tensor.__array__, torch.Tensor.numpy
        __torch_function__ = torch._C._disabled_torch_function_impl

    def refuse(*_: Any, **__: Any) -> None:
        raise TypeError("numpy reads a tensor that may be on a GPU")

    for name in ("__array__", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: x.detach().as_subclass(Fetched))


def there(x: Any) -> Any:
    """Return arrays as tensors; also those in lists, tuples and dataclasses."""
    if isinstance(x, np.ndarray):
        return torch.from_numpy(x.copy(order="K"))
    if isinstance(x, list | tuple):
        return type(x)(map(there, x))
    if is_dataclass(x) and not isinstance(x, type | Draw):
        return type(x)(*(there(getattr(x, field.name)) for field in fields(x)))
    return x


def parts(x: Any) -> Iterator[Any]:
    """Yield the arrays, tensors and numbers that a result has."""
    if is_dataclass(x) and not isinstance(x, type):
        for field in fields(x):
            yield from parts(getattr(x, field.name))
    elif isinstance(x, list | tuple):
        for each in x:
            yield from parts(each)
    else:
        yield x


def hold(function: Callable[..., Any], *arguments: Any, within: float = 1e-12, read: bool = False) -> None:
    """Hold what a function gives for tensors to what it gives for arrays: type, shape, and numbers.

    Args:
        within: of rounding, relative to the largest number.
        read: arrays are of numpy in both cases.
    """
    for one, other in zip(parts(function(*arguments)), parts(function(*there(arguments))), strict=True):
        if isinstance(one, np.ndarray | np.generic):
            assert isinstance(other, np.ndarray | np.generic if read else torch.Tensor)
            found = other if read else np.asarray(other.cpu())
            assert found.dtype == one.dtype and found.shape == one.shape
        else:
            assert type(one) is type(other)
            found = other
        with np.errstate(invalid="ignore"):
            scale = np.abs(np.where(np.isfinite(one), one, 0)).max(initial=0.0)
            assert np.allclose(one, found, rtol=0, atol=within * scale)


def normal(*shape: int, seed: int = 0) -> Wide:
    return np.random.default_rng(seed).standard_normal(shape)


def turned(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return equal matrices that lie in the memory by columns."""
    return np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2)


def without_signs(function: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Return a function's results but the signs, which a decomposition has freely."""
    return lambda *arguments: tuple(abs(each) for each in function(*arguments))


MATRICES = [(5, 3), (3, 5), (4, 4), (1, 1), (2, 3, 5, 3), (2, 3, 5), (0, 3), (3, 0), (0, 0), (0, 4, 3), (2, 0, 3)]
SQUARE = [(4, 4), (1, 1), (0, 0), (3, 4, 4), (2, 3, 4, 4), (0, 3, 3), (2, 0, 0)]


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("kind", [np.float64, np.float32])
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_decompositions_of_matrices(shape: tuple[int, ...], kind: type[np.floating[Any]]) -> None:
    """Of any shape, empty ones and batches of none too, whichever way they lie in the memory."""
    within = 1e-13 if kind == np.float64 else 1e-5
    for x in (normal(*shape).astype(kind), turned(normal(*shape)).astype(kind), 0 * normal(*shape).astype(kind)):
        hold(linalg.qr, x, within=within)
        hold(linalg.triangle_of, x, within=within)
        hold(linalg.svd_values, x, within=within)
        hold(lambda x: linalg.svd(x).S, x, within=within)
        hold(lambda x: (lambda U, S, Vh: (U * S[..., None, :]) @ Vh)(*linalg.svd(x)), x, within=within)
        if x.any():
            hold(without_signs(linalg.svd), x, within=10 * within)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("shape", SQUARE, ids=str)
def test_eigenvalues_and_solutions(shape: tuple[int, ...]) -> None:
    x = normal(*shape)
    symmetric = x + x.swapaxes(-1, -2)
    for each in (symmetric, turned(symmetric)):
        hold(linalg.eigenvalues, each)
        hold(without_signs(linalg.eigh), each)
    for right in (normal(*shape[:-1], 2, seed=1), turned(normal(*shape[:-1], 2, seed=1)), normal(*shape[:-1], 0)):
        hold(linalg.solve, x, right)
    if len(shape) == 2:
        for each, wanted in ((x @ x.T, True), (x @ x.T - 99 * np.eye(len(x)), not len(x)), (-x @ x.T, not len(x))):
            assert linalg.is_positive(each) is linalg.is_positive(there(each)) is wanted
    falling = linalg.eigh(symmetric)[0]
    assert (falling[..., :-1] >= falling[..., 1:]).all()


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_what_keeps_or_moves_numbers(shape: tuple[int, ...]) -> None:
    """It is the same to the last bit, but for sums and torch's roots."""
    x, y = normal(*shape), normal(*shape, seed=1)
    some = np.where(x > 1, np.inf, np.where(x < -1, np.nan, x))
    for each in (x, turned(x), x.astype(np.float32)):
        hold(linalg.adjoint, each, within=0)
        hold(linalg.square, each, within=0)
        hold(linalg.singled, each, within=0)
        hold(linalg.contiguous, each, within=0)
        hold(lambda x: linalg.sqrt(abs(x)), each, within=1e-7 if each.dtype == np.float32 else 1e-15)
        for like in (x, x.astype(np.float32)):
            hold(linalg.cast, each, like, within=0)
            hold(linalg.zeros, shape, like, within=0)
            hold(linalg.eye, shape[0], like, within=0)
    hold(linalg.isfinite, some, within=0)
    hold(linalg.minimum, x, y, within=0)
    hold(linalg.maximum, x, y, within=0)
    for kind in (np.float32, np.float64, np.bool_, np.int64):
        hold(linalg.zeros, shape, x, kind, within=0)
        assert linalg.torch_type(kind) == there(np.zeros(1, kind)).dtype
    for axis in range(-len(shape), len(shape)):
        size = shape[axis]
        hold(linalg.flip, x, axis, within=0)
        hold(linalg.concatenate, [x, y, x], axis, within=0)
        hold(linalg.stack, (x, y), axis, within=0)
        hold(linalg.norm, x, axis)
        for sizes in ([size], [0, size], [size // 2, size - size // 2], [1] * size or [0]):
            hold(linalg.split, x, sizes, axis, within=0)
        for more in (0, 2):
            hold(linalg.padded, x, axis, size + more, within=0)
            hold(linalg.padded, x.astype(np.float32), axis, size + more, within=0)
    hold(linalg.norm, x)
    hold(linalg.norm, x, (-2, -1))
    hold(linalg.einsum, "...ij,...ij->...j", x, y)
    if len(shape) == 2 and all(shape):
        hold(linalg.taken, x, np.arange(shape[1]) % shape[0], within=0)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("x", [[3.0, 1.0, 3.0, -0.0, 0.0, 7.0], [1.0] * 40, [], [2.0]], ids=str)
def test_equal_numbers_stay_in_order(x: list[float]) -> None:
    hold(linalg.order_of, np.array(x), within=0)


# (B, A): of many shapes, the last of one matrix and of a batch of them
PAIRS: list[tuple[Wide, Wide]] = [
    (normal(40, 5), normal(5, 30, seed=1)),
    (turned(normal(40, 5)), turned(normal(5, 30, seed=1))),
    (normal(4, 6), normal(6, 5, seed=1)),
    (normal(40, 1), normal(1, 30, seed=1)),
    (normal(40, 0), normal(0, 30)),
    (normal(0, 3), normal(3, 30)),
    (0 * normal(40, 5), normal(5, 30)),
    (normal(2, 3, 20, 4), normal(2, 3, 4, 30, seed=1)),
    (normal(0, 20, 4), normal(0, 4, 30)),
]


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(("B", "A"), PAIRS, ids=[f"{B.shape}{A.shape}" for B, A in PAIRS])
def test_svds_of_factors(B: Wide, A: Wide) -> None:
    def dense(of: FactoredSVD) -> Any:
        return (of.U * of.S[..., None, :]) @ of.V.swapaxes(-1, -2)

    for kind in (np.float64, np.float32):
        hold(factored_svd.core, B.astype(kind), A.astype(kind))
        hold(factored_svd.singular_values, B.astype(kind), A.astype(kind))
        hold(lambda B, A: dense(factored_svd.factored_svd(B, A)), B.astype(kind), A.astype(kind))
    hold(factored_svd.singular_values, 1e200 * B, 1e200 * A, within=0)
    found = factored_svd.factored_svd(B, A)
    for rank in (0, 1, 3, 8):
        hold(lambda x, rank: x.truncated(rank), found, rank)
        lost = found.truncated(rank)
        hold(factored_svd.rounding_distance, found, lost, tuple(x.astype(np.float32) for x in lost))
    other = factored_svd.factored_svd(B + 1e-9, A)
    hold(lambda x: (x.norm, x.rank(), dense(x.nothing())), found)
    for second in (found, other, found.nothing(), FactoredSVD(found.U, 1e-9 * found.S, found.V)):
        hold(factored_svd.are_equal, found, second, within=0)
        hold(lambda x, y: x.norm + factored_svd.distance(x, y), found, second)
        hold(lambda x, y: 1 + factored_svd.relative_distance(x, y), found, second)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_angles_and_amplification() -> None:
    U, W = (np.linalg.qr(normal(60, k, seed=k))[0] for k in (4, 7))
    for one, two in ((U, W), (W, U), (U, U), (turned(U), W)):
        hold(lambda U, W: 1 + factored_svd.principal_angles(U, W), one, two, read=True)
        hold(factored_svd.subspace_similarity, one, two, read=True)
    change, base = factored_svd.factored_svd(normal(60, 4), normal(4, 30, seed=1)), normal(60, 30)
    for blocks in ([base], [base[:7], base[7:]], [0 * base], [base.astype(np.float32)]):
        for rank in (1, 4, 9):
            hold(factored_svd.amplification, change, blocks, rank)
        assert factored_svd.amplification(there(change.nothing()), there(blocks), 3) == 0


def falling(m: int, n: int, power: float, seed: int = 0) -> npt.NDArray[np.float32]:
    """Return a matrix with singular values 1, 2^-power, 3^-power ..."""
    U, V = (np.linalg.qr(normal(size, min(m, n), seed=seed + i))[0] for i, size in enumerate((m, n)))
    D: Wide = (U * np.arange(1.0, min(m, n) + 1) ** -power) @ V.T
    return D.astype(np.float32)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("certify", [False, True])
@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (900, 700), (700, 900), (560, 530), (1, 5), (5, 1)], ids=str)
def test_truncated_svds(shape: tuple[int, int], certify: bool) -> None:
    """Both paths are taken, and their energies are equal to float32's rounding."""
    D, draw = falling(*shape, 0.9), Draw(3, "x")
    for each, rank in ((D, 8), (turned(D), 1), (D, 0), (0 * D, 8)):
        hold(lambda D, rank: reduced(svd.truncated_svd(D, rank, draw, certify=certify)), each, rank, within=2e-4)
    assert svd.truncated_svd(D, 8, draw, certify=certify).columns == 0 or min(shape) > svd.SMALL


def reduced(found: svd.TruncatedSVD) -> tuple[Any, ...]:
    """Return what does not depend on how far the iteration came, but to the tolerance."""
    return found.U[:, :3], found.S, found.V[:, :3], found.total, found.energy, found.columns


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("shape", [(4, 20, 12), (4, 12, 20), (1, 20, 12), (0, 20, 12), (2, 560, 530)], ids=str)
def test_stacks_of_truncated_svds(shape: tuple[int, ...]) -> None:
    stack = np.array([falling(*shape[1:], 0.9, seed) for seed in range(shape[0])], np.float32).reshape(shape)
    draws = [Draw(seed, "x") for seed in range(shape[0])]
    for each in (stack, turned(stack)) if max(shape) < svd.SMALL else (turned(stack),):
        hold(lambda stack: [reduced(x) for x in svd.truncated_svds(stack, 4, draws)], each, within=2e-4)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (5, 5), (0, 4), (4, 0)], ids=str)
def test_sums_and_least_triplets(shape: tuple[int, int]) -> None:
    D = falling(*shape, 0.7)
    B, A = normal(shape[0], 3).astype(np.float32), normal(3, shape[1], seed=1).astype(np.float32)
    for each in (D, turned(D), 0 * D):
        hold(svd.energy_of, each)
        hold(svd.gram, each)
        hold(svd.singular_values_of, each, within=1e-7)
        hold(svd.residual_energy, each, B, A)
        hold(input_weights.residuals, each, B, A, np.abs(normal(shape[1], seed=2)) + 0.1)
        for rank in (0, 2, min(shape)):
            hold(least, each, rank, within=1e-5)
    hold(without_signs(svd.least_triplets), D, min(shape), within=1e-5)


def least(D: Any, rank: int) -> Any:
    """Return what the least triplets are together, which does not depend on signs."""
    U, S, V = svd.least_triplets(D, rank)
    return (doubled(U) * S) @ doubled(V).T


CHANGES: list[Sequence[tuple[Wide, Wide]]] = [
    [(normal(24, r, seed=r), normal(r, 18, seed=9 + r)) for r in (4, 2, 3)],
    [(normal(24, 3), normal(3, 18, seed=1)), (0 * normal(24, 3), normal(3, 18))],
    [(normal(24, 3), normal(3, 18, seed=1))],
    [(normal(3, 5, seed=i), normal(5, 4, seed=9 + i)) for i in range(3)],
    [(0 * normal(6, 2), 0 * normal(2, 5))] * 2,
    [(normal(2, 24, r, seed=r), normal(2, r, 18, seed=9 + r)) for r in (4, 2)],
]


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("pairs", CHANGES, ids=[str([B.shape for B, _ in pairs]) for pairs in CHANGES])
def test_what_changes_share(pairs: Sequence[tuple[Wide, Wide]]) -> None:
    changes = [factored_svd.factored_svd(B, A) for B, A in pairs]
    hold(overlaps, changes, within=1e-11, read=True)
    hold(overlaps, [changes[0], changes[0].nothing(), changes[0]], within=1e-11, read=True)
    if pairs[0][0].ndim == 2:
        hold(core_space, changes, within=1e-11)
        for rank in (1, 2, 9):
            hold(lambda changes, rank: core_space(changes).compressed(rank), changes, rank, within=1e-6)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_signs_of_columns() -> None:
    equal = np.array([[0.1, 0.0], [-0.5, 0.0], [np.nextafter(0.5, 1), -1.0]])
    for x in (normal(9, 4), normal(0, 3), normal(3, 0), equal, 0 * equal):
        hold(signs, x, within=0)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (700, 560), (560, 700)], ids=str)
def test_intruders(shape: tuple[int, int]) -> None:
    """Of large matrices by a Krylov space, of small ones and of undecided vectors by the eigenvectors."""
    W = falling(*shape, 0.3)
    D = normal(shape[0], 4, seed=5) @ normal(4, shape[1], seed=6)
    small, large = ((W + D * (size / np.linalg.norm(D, 2))).astype(np.float32) for size in (0.05, 3.0))
    cases = [(W, small), (turned(W), turned(large))]
    if max(shape) < svd.SMALL:
        cases += [(W, large), (0 * W, large), (W, 0 * W)]
    for base, changed in cases:
        hold(found_intruders, base, changed, within=1e-4, read=True)
    hold(lambda W, U: intruders._cosines(W, U), W, np.linalg.qr(W)[0][:, :3], within=1e-5, read=True)


def found_intruders(base: Any, changed: Any) -> intruders.Intruders:
    return intruders.find_intruders(lambda: changed, lambda: base, 8, 0.5, Draw(1, "x"))
