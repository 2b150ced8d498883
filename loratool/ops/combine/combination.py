"""Compute the combined adapter module by module: choose its ranks, make its factors, and measure what they lose."""

from __future__ import annotations

import math
import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ...adapters.edited import EditedAdapter
from ...adapters.stacked import parameters_per_rank, round_factors, stack_factors
from ...adapters.updates.update import UpdateSpec
from ...binding.input_moments import InputMoments
from ...errors import InputError, UsageError
from ...files.safetensors_file import data_order
from ...files.tensor_ref import is_finite
from ...numerics.factored_svd import FactoredSVD, factored_svd, relative_distance, rounding_distance, singular_values
from ...numerics.seeded_random import Draw
from ...numerics.svd import TruncatedSVD, truncated_svd
from ...streaming.workers import Ahead, Progress, map_in_order, one_thread, worker_count
from ..diff.shared import Shared, overlaps_of_factors, shared_of
from ..inputs import WeightedAdapter
from ..rank_rules import BUDGETS, SingularValues, choose_ranks
from .align import AlignedAdapters
from .methods.delta import WeightedDelta
from .methods.table import METHODS
from .results import dense_result, low_rank_result, result_factors

ROWS = 1024  # of a dense result, compared with its factors at a time


@dataclass(frozen=True)
class CombineChoices:
    """How changes are combined."""

    method: str  # a key of METHODS
    density: float | None  # None if the method has none
    rank_method: str  # a key of RANK_METHODS
    seed: int
    device: torch.device
    dtype: torch.dtype  # of the factors that are written


@dataclass(frozen=True)
class Figures:
    """The figures that are measured of a module."""

    norm: float  # ||D|| of the method's result D
    energy: float  # ||D||^2, or with the weights W of the inputs ||D W||^2
    kept: float  # the share of the energy in the rank, or that of compressed changes in the directions that they share
    error: float  # ||D' - D|| / ||D|| of what is written
    weighted_error: float | None  # the same of D' W and D W; None without W


class Combination:
    """The computation of the combined adapter, with the figures for its report.

    Small results are computed by workers, each a module with one of torch's threads, so that the bytes do not depend on
    how many there are. Of entries there is one matrix in memory at a time, and all threads are at it.
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
        self._workers = worker_count() if choices.device.type == "cpu" else 1
        self._reading = threading.Lock()  # adapters that are converted keep the last module that was asked for
        self._ahead: Ahead[str, tuple[Tensor, Tensor]] | None = None

    def _natural(self, module: str) -> int:
        """Return the sum of the ranks, for methods other than `cat` at most the matrix's smaller side."""
        total = sum(member.update.rank for member in self.aligned.groups[module])
        return total if self.choices.method == "cat" else max(1, min(total, *_sides(self.aligned.updates[module])))

    def _deltas(self, module: str) -> list[list[WeightedDelta]]:
        """Return the adapters' deltas for each matrix of the module, which is one, or a stack of experts."""
        factors, members = [], self.aligned.groups[module]
        for member in members:
            weight, scale = member.weight, member.update.scale
            if not math.isfinite(weight * scale):
                raise UsageError(f"the weight {weight} times the scale {scale} is too large", culprit=module)
            with self._reading:
                update = member.adapter.load(member.update)
            factors.append(tuple(side.to(self.choices.device) for side in stack_factors(update)))
        with self._reading:
            draws = [member.adapter.sha256 if self._method.draws else "" for member in members]
        side = min(_sides(self.aligned.updates[module]))
        return [
            [
                WeightedDelta(B[e], A[e], member.weight, f"{self.choices.seed} {module} {e} {drawn}", side)
                for (B, A), member, drawn in zip(factors, members, draws, strict=True)
            ]
            for e in range(len(factors[0][0]))
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
            with closing(self._spectra(max_rank)) as found:
                for module, spectrum in zip(self.ranks, found, strict=True):
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
        """Return the result's singular values, those of a dense one only up to the natural rank or --max-rank."""
        with _factored(module):
            if self._method.dense:
                squares, total = torch.zeros(max(max_rank or 0, self.ranks[module]), dtype=torch.float64), 0.0
                for *_, top in self._tops(module, len(squares)):
                    squares[: len(top.S)] += top.S.square().cpu()
                    total += top.total
            else:
                squares = self._singular_values(module).square().sum(0).cpu()
                total = float(squares.sum())
        return SingularValues(tuple(squares.tolist()), total, parameters_per_rank(self.aligned.updates[module]), True)

    def _singular_values(self, module: str) -> Tensor:
        weights = self._weights(module)
        if self._method.acts_on == "factors":
            B, A = result_factors(self._method, self._deltas(module), self._density)
            return singular_values(B, A if weights is None else A * weights)
        D = low_rank_result(self._method, self._deltas(module), self._density, None).svd
        return D.S if weights is None else _weighted(D, weights).S

    def _weights(self, module: str) -> Tensor | None:
        if self.moments is None:
            return None
        with self._reading:
            return self.moments.column_factors(module, self.aligned.updates[module], self.choices.device)

    def _step(self) -> None:
        self._done += 1
        if self._progress:
            self._progress(self._done, self._steps)

    def _tops(self, module: str, rank: int) -> Iterator[tuple[Tensor, Tensor | None, TruncatedSVD]]:
        """Yield the dense result D of each matrix, the weights of its inputs, (1, in), and the truncated SVD of D W."""
        weights = self._weights(module)
        for e, deltas in enumerate(self._deltas(module)):
            D = C = dense_result(self._method, deltas, self._density, module)
            own = None if weights is None else weights[e]
            if own is not None and not is_finite(C := D * own.float()):
                raise InputError("the combined change is too large to be weighted in float32", culprit=module)
            draw = Draw(self.choices.seed, f"{module} {e}")
            with one_thread():
                top = truncated_svd(C, rank, draw.generator(self.choices.device))
            yield D, own, top

    def _factors(self, module: str) -> tuple[Tensor, Tensor]:
        """Return the factors of a module, which are asked for in this order."""
        with _factored(module):
            if self._method.dense and not self._compress:
                found = self._best(module)
            else:
                self._ahead = self._ahead or Ahead(self._low_rank, self._order(), self._workers)
                found = self._ahead(module)
        self._step()
        return found

    def _order(self) -> Iterator[str]:
        """Return the modules in the order of their factors in the file."""
        edited = self.edited()
        module_of = {name: module for module in self.ranks for name in edited.names(module)}
        return iter(dict.fromkeys(module_of[name] for name in data_order(edited.specs()) if name in module_of))

    def close(self) -> None:
        """End the workers."""
        if self._ahead:
            self._ahead.close()

    def _low_rank(self, module: str) -> tuple[Tensor, Tensor]:
        """Make the factors of a result of low rank, cut to the rank if that is lower."""
        rank = self.ranks[module]
        result = low_rank_result(self._method, self._deltas(module), self._density, rank if self._compress else None)
        D, factors, weights = result.svd, result.factors, self._weights(module)
        C = D if weights is None else _weighted(D, weights)
        if weights is not None or factors is None or factors[0].shape[-1] != rank:
            factors = C.truncated(rank)
        B, A = factors
        stored = round_factors(module, (B, A if weights is None else A / weights), self.choices.dtype)
        energy, kept = (float(S.square().sum()) for S in (C.S, C.S[..., :rank]))
        lost = rounding_distance(
            C, factors, (stored[0], stored[1] if weights is None else stored[1].double() * weights)
        )
        error = float(torch.linalg.vector_norm(lost)) / math.sqrt(energy) if energy else 0.0
        self.figures[module] = Figures(
            float(torch.linalg.vector_norm(D.S)),
            energy,
            result.held if self._compress else _share(kept, energy),
            error if weights is None else relative_distance(D, factored_svd(*stored)),
            None if weights is None else error,
        )
        return stored

    def _best(self, module: str) -> tuple[Tensor, Tensor]:
        """Make the best factors of a dense result."""
        rank, pairs, is_weighted = self.ranks[module], list[tuple[Tensor, Tensor]](), False
        norm = lost = energy = kept = weighted_lost = 0.0  # squares
        for D, weights, top in self._tops(module, rank):
            padding = rank - len(top.S)
            U, V = (side.double() * top.S.sqrt() for side in (top.U, top.V))
            V = V if weights is None else V / weights.mT
            sides = (torch.nn.functional.pad(side, (0, padding)) for side in (U, V))
            B, V = round_factors(module, (next(sides), next(sides)), self.choices.dtype)
            pairs.append((B, V.mT))
            energy, kept = energy + top.total, kept + top.energy
            is_weighted = weights is not None
            with one_thread():
                for start in range(0, len(D), ROWS):
                    block = slice(start, start + ROWS)
                    left = B[block].double() @ V.mT.double() - D[block]
                    lost += float(left.square().sum())
                    if weights is not None:
                        norm += float(D[block].double().square().sum())
                        weighted_lost += float((left * weights).square().sum())
        norm = norm if is_weighted else energy
        self.figures[module] = Figures(
            math.sqrt(norm),
            energy,
            _share(kept, energy),
            math.sqrt(lost / norm) if norm else 0.0,
            (math.sqrt(weighted_lost / energy) if energy else 0.0) if is_weighted else None,
        )
        return torch.stack([B for B, _ in pairs]), torch.stack([A for _, A in pairs])

    def edited(self) -> EditedAdapter:
        """Return the adapter that is written, whose factors are computed when they are asked for."""
        return EditedAdapter(
            template=self.loaded[0][0],
            updates=self.aligned.updates,
            ranks=self.ranks,
            factors=self._factors,
            carried=self.aligned.carried,
            dtype=self.choices.dtype,
            fields=self.aligned.fields,
            metadata=self.aligned.metadata,
            differing=self.aligned.differing,
        )

    def try_all(self) -> None:
        """Compute everything for the figures of a dry run, and keep no tensors."""
        for module in self._order():
            self._factors(module)
        for each in self.aligned.carried.values():
            each.load()

    def shared(self) -> Shared | None:
        """Return what the weighted changes of several adapters share, for a dry run."""
        found = []
        for module in self.aligned.groups if len(self.loaded) > 1 else ():
            with _factored(module), one_thread():
                found.append(overlaps_of_factors(self._weighted_factors(module)))
        return shared_of(found) if found else None

    def _weighted_factors(self, module: str) -> list[tuple[Tensor, Tensor] | None]:
        """Return B (E, out, r), times the weight, and A (E, r, in) of each adapter; None for one without the module."""
        found = {}
        for member, deltas in zip(self.aligned.groups[module], zip(*self._deltas(module), strict=True), strict=True):
            sides = torch.stack([each.weight * each.B for each in deltas]), torch.stack([each.A for each in deltas])
            found[id(member.adapter)] = sides
        return [found.get(id(adapter)) for adapter, _ in self.loaded]


@contextmanager
def _factored(module: str) -> Iterator[None]:
    """Turn LAPACK's failure to converge into an InputError: it fails only on numbers near the limit of float64."""
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise InputError("the combined change is too large to be factored", culprit=module) from error


def _weighted(D: FactoredSVD, weights: Tensor) -> FactoredSVD:
    """Return the SVD of D W for the weights W of its inputs, (E, 1, in)."""
    return factored_svd(D.U * D.S.unsqueeze(-2), D.V.mT * weights)


def _share(part: float, whole: float) -> float:
    return min(1.0, part / whole) if whole else 1.0


def _sides(update: UpdateSpec) -> tuple[int, int]:
    return update.specs["B"].shape[0], math.prod(update.specs["A"].shape[1:])
