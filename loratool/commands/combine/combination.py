"""Compute the combined adapter module by module: choose ranks, compute factors, and measure their errors."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ...adapters.edited import EditedAdapter
from ...adapters.stacked import parameters_per_rank, round_factors, stack_factors, stack_sizes
from ...adapters.truncated import Figures, Weighted, share_of, truncated_factors
from ...binding.weights.input_moments import InputMoments
from ...errors import InputError, UsageError
from ...numerics.arrays import Array, Device, Numbers, doubled, fetched, like_of, sent
from ...numerics.factored_svd import FactoredSVD, factored_svd, singular_values
from ...numerics.forms import Form
from ...numerics.linalg import adjoint, isfinite, padded, singled, sqrt, square, stack
from ...numerics.seeded_random import Draw
from ...numerics.spectrum import spectrum_points
from ...numerics.svd import TruncatedSVD, truncated_svd
from ...streaming.parallel import Ahead, Progress, map_in_order, worker_count
from ...streaming.threads import one_thread
from ...transform.rank_rules import BUDGETS, SingularValues, choose_ranks
from ...views.diff_shared import Shared
from ..diff.shared import overlaps_of_factors, shared_of
from ..inputs import WeightedAdapter
from .align import AlignedAdapters
from .methods.delta import WeightedDelta
from .methods.table import METHODS
from .results import LowRankResult, dense_result, low_rank_result, result_factors

ROWS = 1024  # of a dense result, compared with its factors at a time


class DenseResult(NamedTuple):
    """A dense result of one matrix, and its part of a rank."""

    D: Array  # (out, in), float32
    inputs: Array | None  # W, (1, in), float64; None if nothing is known of them
    top: TruncatedSVD  # of D W


def weigh_by_inputs(D: FactoredSVD, inputs: Array) -> FactoredSVD:
    """Return the SVD of D W for the weights W of its inputs, (E, 1, in)."""
    return factored_svd(D.U * D.S[..., None, :], adjoint(D.V) * inputs)


def low_rank_factors(
    module: str, result: LowRankResult, rank: int, inputs: Array | None, form: Form
) -> tuple[tuple[Numbers, Numbers], Figures]:
    """Return B (E, out, rank) and A (E, rank, in) of a result, as `truncated_factors` makes them.

    For compressed changes, `kept` is their share in the shared directions.
    """
    D = result.svd
    weighted = None if inputs is None else Weighted(weigh_by_inputs(D, inputs), inputs)
    factors, figures = truncated_factors(module, D, rank, form, weighted, result.factors)
    return factors, figures if result.held is None else replace(figures, kept=result.held)


def best_factors(
    module: str, results: Iterable[DenseResult], rank: int, form: Form
) -> tuple[tuple[Numbers, Numbers], Figures]:
    """Return B (E, out, rank) and A (E, rank, in) of dense results, one in memory at a time.

    Raises:
        NeedsFlag, InputError: as `round_factors`.
    """
    pairs, is_weighted = list[tuple[Numbers, Numbers]](), False
    norm = squared_error = energy = kept_energy = weighted_error = 0.0  # squares
    squares = np.zeros(rank)
    for D, inputs, top in results:
        U, V = (doubled(side) * sqrt(top.S) for side in (top.U, top.V))
        V = V if inputs is None else V / inputs.T
        B, A = round_factors(module, (padded(U, 1, rank), padded(V, 1, rank).T), form)
        pairs.append((B, A))
        energy, kept_energy = energy + top.total, kept_energy + top.energy
        squares[: len(top.S)] += fetched(square(top.S))
        is_weighted = inputs is not None
        rounded_B, rounded_A = (sent(side.wide(), D) for side in (B, A))
        with one_thread():
            for start in range(0, len(D), ROWS):
                block = slice(start, start + ROWS)
                left = rounded_B[block] @ rounded_A - D[block]
                squared_error += float(square(left).sum())
                if inputs is not None:
                    norm += float(square(doubled(D[block])).sum())
                    weighted_error += float(square(left * inputs).sum())
    norm = norm if is_weighted else energy
    figures = Figures(
        norm=math.sqrt(norm),
        energy=energy,
        kept=share_of(kept_energy, energy),
        error=math.sqrt(squared_error / norm) if norm else 0.0,
        weighted_error=(math.sqrt(weighted_error / energy) if energy else 0.0) if is_weighted else None,
        spectrum=spectrum_points(squares, len(pairs), energy),
    )
    B_bits, A_bits = (np.stack([side.bits for side in sides]) for sides in zip(*pairs, strict=True))
    return (Numbers(B_bits, form), Numbers(A_bits, form)), figures


@dataclass(frozen=True)
class CombineChoices:
    """The choices of a combination."""

    method: str  # a key of METHODS
    density: float | None  # None if the method has none
    rank_method: str  # a key of RANK_METHODS
    seed: int
    device: Device
    form: Form  # of the factors that are written


class Combination:
    """The computation of the combined adapter, with the figures for its report.

    Workers compute small results, each a module with one thread of BLAS, so that the bytes do not depend on the number
    of workers. Methods of entries have one matrix in memory at a time, and use all threads.
    """

    def __init__(
        self,
        loaded: WeightedAdapter,
        aligned: AlignedAdapters,
        choices: CombineChoices,
        moments: InputMoments | None,
        progress: Progress | None,
    ) -> None:
        self.moments = moments
        self.loaded, self.aligned, self.choices = loaded, aligned, choices
        self.ranks: Mapping[str, int] = {module: self._natural(module) for module in aligned.groups}
        self.figures: dict[str, Figures] = {}
        self._method, self._density = METHODS[choices.method], choices.density or 1.0
        self._compress, self._progress = choices.rank_method == "ctm", progress
        self._done, self._steps = 0, len(aligned.groups)
        self._like, self._workers = like_of(choices.device), worker_count(choices.device)
        self._reading = threading.Lock()  # adapters that are converted keep the last module that was asked for
        self._ahead: Ahead[str, tuple[Numbers, Numbers]] | None = None

    def _natural(self, module: str) -> int:
        """Return the sum of the ranks. For methods other than `cat` it is at most the matrix's smaller side."""
        total, (_, *sides) = sum(m.update.rank for m in self.aligned.groups[module]), self._sizes(module)
        return total if self.choices.method == "cat" else max(1, min(total, *sides))

    def _sizes(self, module: str) -> tuple[int, int, int]:
        return stack_sizes(self.aligned.updates[module])

    def _deltas(self, module: str) -> list[list[WeightedDelta]]:
        """Return the adapters' deltas for each matrix of the module, which is one, or a stack of experts."""
        factors, members = [], self.aligned.groups[module]
        for member in members:
            weight, scale = member.weight, member.update.scale
            if not math.isfinite(weight * scale):
                raise UsageError(f"the weight {weight} times the scale {scale} is too large", culprit=module)
            with self._reading:
                update = member.adapter.load(member.update)
            factors.append([sent(side, self._like) for side in stack_factors(update)])
        with self._reading:
            draws = [member.adapter.sha256 if self._method.draws else "" for member in members]
        E, *sides = self._sizes(module)
        return [
            [
                WeightedDelta(B[e], A[e], member.weight, f"{self.choices.seed} {module} {e} {drawn}", min(sides))
                for (B, A), member, drawn in zip(factors, members, draws, strict=True)
            ]
            for e in range(E)
        ]

    def choose(self, rule: tuple[str, float] | None, max_rank: int | None) -> Mapping[str, int]:
        """Choose and return the output's rank for each module."""
        if rule is None:
            self.ranks = {module: min(rank, max_rank or rank) for module, rank in self.ranks.items()}
            return self.ranks
        name, value = rule
        spectra = {module: SingularValues((), 0.0, 0, True) for module in self.ranks}
        if name != "rank":
            self._steps *= 2
            with closing(self._spectra(max_rank)) as results:
                for module, spectrum in zip(self.ranks, results, strict=True):
                    spectra[module] = spectrum
                    self._step()
        if name in BUDGETS:
            value = self.edited().budget(name, value)
        self.ranks = choose_ranks(name, value, spectra, max_rank)
        return self.ranks

    def _spectra(self, max_rank: int | None) -> Generator[SingularValues, None, None]:
        if self._method.dense:
            yield from (self._spectrum(module, max_rank) for module in self.ranks)
        else:
            yield from map_in_order(lambda module: self._spectrum(module, max_rank), self.ranks, self._workers)

    def _spectrum(self, module: str, max_rank: int | None) -> SingularValues:
        """Return the result's singular values. A dense result has them only up to the natural rank or --max-rank."""
        with _factored(module):
            if self._method.dense:
                squares, total = np.zeros(max(max_rank or 0, self.ranks[module])), 0.0
                for result in self._tops(module, len(squares)):
                    squares[: len(result.top.S)] += fetched(square(result.top.S))
                    total += result.top.total
            else:
                squares = fetched(square(self._singular_values(module))).sum(0)
                total = float(squares.sum())
        return SingularValues(tuple(squares.tolist()), total, parameters_per_rank(self.aligned.updates[module]), True)

    def _singular_values(self, module: str) -> Array:
        """Return the singular values of a stack D of low rank, or of D W with the weights W of the inputs, (E, k)."""
        inputs = self._input_weights(module)
        if self._method.acts_on == "factors":
            B, A = result_factors(self._method, self._deltas(module), self._density)
            return singular_values(B, A if inputs is None else A * inputs)
        D = low_rank_result(self._method, self._deltas(module), self._density, None).svd
        return D.S if inputs is None else weigh_by_inputs(D, inputs).S

    def _input_weights(self, module: str) -> Array | None:
        """Return the weights of a module's inputs, (E, 1, in), or None to take them as equal."""
        if self.moments is None:
            return None
        with self._reading:
            inputs = self.moments.column_factors(module, self.aligned.updates[module])
        return None if inputs is None else sent(inputs, like_of(self.choices.device))

    def _step(self) -> None:
        self._done += 1
        if self._progress:
            self._progress(self._done, self._steps)

    def _tops(self, module: str, rank: int) -> Iterator[DenseResult]:
        """Yield the dense result of each matrix, with its truncation."""
        inputs = self._input_weights(module)
        for e, deltas in enumerate(self._deltas(module)):
            D = C = dense_result(self._method, deltas, self._density, module)
            matrix_inputs = None if inputs is None else inputs[e]
            if matrix_inputs is not None and not isfinite(C := D * singled(matrix_inputs)).all():
                raise InputError("the combined delta is too large to be weighted in float32", culprit=module)
            with one_thread():
                top = truncated_svd(C, rank, Draw(self.choices.seed, f"{module} {e}"))
            yield DenseResult(D, matrix_inputs, top)

    def _factors(self, module: str) -> tuple[Numbers, Numbers]:
        """Return the factors of a module. Modules are requested in order."""
        with _factored(module):
            if self._method.dense and not self._compress:
                factors = self._best(module)
            else:
                self._ahead = self._ahead or Ahead(self._low_rank, self.edited().order(), self._workers)
                factors = self._ahead(module)
        self._step()
        return factors

    def close(self) -> None:
        """Stop the workers."""
        if self._ahead:
            self._ahead.close()

    @np.errstate(all="ignore")
    def _low_rank(self, module: str) -> tuple[Numbers, Numbers]:
        """Return the factors of a low-rank result, truncated to the rank if that is lower."""
        rank = self.ranks[module]
        deltas, directions = self._deltas(module), rank if self._compress else None
        result = low_rank_result(self._method, deltas, self._density, directions)
        inputs, form = self._input_weights(module), self.choices.form
        factors, self.figures[module] = low_rank_factors(module, result, rank, inputs, form)
        return factors

    def _best(self, module: str) -> tuple[Numbers, Numbers]:
        """Return the best factors of a dense result."""
        rank = self.ranks[module]
        factors, self.figures[module] = best_factors(module, self._tops(module, rank), rank, self.choices.form)
        return factors

    def edited(self) -> EditedAdapter:
        """Return the output adapter. Its factors are computed on request."""
        return EditedAdapter(
            template=self.loaded[0][0],
            updates=self.aligned.updates,
            ranks=self.ranks,
            factors=self._factors,
            carried=self.aligned.carried,
            dtype=self.choices.form,
            fields=self.aligned.fields,
            metadata=self.aligned.metadata,
            differing=self.aligned.differing,
        )

    def try_all(self) -> None:
        """Compute the figures of a dry run, and keep no tensors."""
        for module in self.edited().order():
            self._factors(module)
        for tensor in self.aligned.carried.values():
            tensor.load()

    def shared(self) -> Shared | None:
        """Return the overlaps of the weighted changes of several adapters, for a dry run."""
        overlaps = []
        for module in self.aligned.groups if len(self.loaded) > 1 else ():
            with _factored(module), one_thread():
                overlaps.append(overlaps_of_factors(self._weighted_factors(module)))
        return shared_of(overlaps) if overlaps else None

    def _weighted_factors(self, module: str) -> list[tuple[Array, Array] | None]:
        """Return B (E, out, r), times the weight, and A (E, r, in) of each adapter; None for one without the module."""
        factors = {}
        for member, deltas in zip(self.aligned.groups[module], zip(*self._deltas(module), strict=True), strict=True):
            sides = stack([each.weight * each.B for each in deltas]), stack([each.A for each in deltas])
            factors[id(member.adapter)] = sides
        return [factors.get(id(adapter)) for adapter, _ in self.loaded]


@contextmanager
def _factored(module: str) -> Iterator[None]:
    """Turn LAPACK's failure to converge into an InputError. It fails only on numbers near the limit of float64."""
    try:
        with np.errstate(all="ignore"):
            yield
    except _failures() as error:
        raise InputError("the combined delta is too large to be factored", culprit=module) from error


def _failures() -> tuple[type[Exception], ...]:
    """Return the errors of numpy's LAPACK, and of torch's if a GPU is in use."""
    modules = (np, sys.modules.get("torch"))
    return tuple(module.linalg.LinAlgError for module in modules if module)
