"""Factor each matrix that changed, at the rank that the rule asks for, as far as ranks are known before all are seen.

One matrix is in memory at a time; its truncated SVD goes into a spool.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from ...architectures.prefixes import module_path
from ...binding.input_moments import InputMoments
from ...errors import InputError
from ...files.tensor_compare import Difference, matrix_difference
from ...files.tensor_ref import TensorRef, is_finite
from ...numerics.rounding_noise import unknown_noise_edge
from ...numerics.svd import rounding_floor, singular_values_of
from ...streaming.workers import Progress
from ..factor_spool import FactorSpool, SpooledFactors, as_matrix
from ..rank_rules import RANK_RULES, WHOLE, SingularValues, budget_ranks
from .changes import SortedDeltas, WeightDelta

FIRST_RANK = 32  # computed of each matrix at first, if the rule may ask for any rank


FEW = 8  # singular values: of less the median is that of the change


HEADROOM = 4  # the first rank, over the uniform one that the budget allows


class Extraction:
    """The factors of each matrix at the rank that the rule asks for, and the norms measured on the way."""

    def __init__(
        self,
        found: SortedDeltas,
        spool: FactorSpool,
        rule: tuple[str, float],
        itemsize: int,
        max_rank: int | None,
        moments: InputMoments | None,
        device: torch.device,
        progress: Progress | None,
    ) -> None:
        self._found, self._spool, self._device, self._progress = found, spool, device, progress
        self._moments, self.imatrix = moments, str(moments.path) if moments else None
        self._rule, self._value = rule
        budget = int(self._value) - found.exact_cost(self._rule == "size")
        self._budget = max(0, budget // itemsize if self._rule == "size" else budget)  # parameters of factors
        self._max_rank = max_rank or 1 << 30
        self.factored: dict[str, SpooledFactors] = {}
        self.seen: dict[str, tuple[float, float]] = {}  # ||W||^2 and ||D||^2

    @property
    def unweighted(self) -> tuple[str, ...]:
        """The modules of whose inputs the file of moments tells nothing."""
        return tuple(self._moments.missing) if self._moments else ()

    def factor_all(self) -> None:
        deltas = list(self._found.low_rank.values())
        first, stream = self._first_rank(), self._differences(deltas)
        for done, delta in enumerate(deltas, 1):
            self.factored[delta.weight.name] = self._factor(delta, stream, first)
            if self._progress:
                self._progress(done, len(deltas))
        if self._rule not in RANK_RULES:
            self._grow()

    def _first_rank(self) -> int:
        if self._rule == "rank":
            return min(int(self._value), self._max_rank)
        if self._rule in RANK_RULES:
            return min(FIRST_RANK, self._max_rank)
        cost = sum(delta.cost for delta in self._found.low_rank.values())
        return min(max(FIRST_RANK, HEADROOM * (self._budget // max(1, cost))), self._max_rank)

    def _differences(self, deltas: Sequence[WeightDelta]) -> Iterator[Difference]:
        """Yield D of each matrix of each weight, its columns multiplied by the weights of their inputs, if any.

        On a GPU the next one is read while one is computed; on a CPU that would only hold two in memory.
        """
        read = self._read([sides for delta in deltas for sides in delta.matrices])
        for delta in deltas:
            kind, shape, inputs = delta.weight.kind, delta.weight.spec.shape, self._input_weights(delta)
            for e, found in zip(range(delta.weight.sizes[0]), read, strict=False):
                if inputs is not None:
                    as_matrix(found.D, kind, shape).mul_(inputs[e].to(found.D.device))
                    if not is_finite(found.D):
                        raise InputError("its change is too large to be weighted in float32", culprit=delta.weight.name)
                yield found

    def _read(self, matrices: Sequence[tuple[list[TensorRef], list[TensorRef]]]) -> Iterator[Difference]:
        if self._device.type == "cpu":
            yield from (matrix_difference(*sides, self._device) for sides in matrices)
            return
        with ThreadPoolExecutor(1) as reader:
            waiting = [reader.submit(matrix_difference, *sides, self._device) for sides in matrices[:1]]
            for following in [*matrices[1:], None]:
                D = waiting.pop().result()
                if following:
                    waiting.append(reader.submit(matrix_difference, *following, self._device))
                yield D

    def _input_weights(self, delta: WeightDelta) -> Tensor | None:
        """Return the weights of a weight's inputs, (E, in), or None to take them as equal."""
        module = module_path(delta.weight.in_model)
        if self._moments is None:
            return None
        if len(delta.uses) > 1:  # one matrix of several modules, whose inputs differ
            self._moments.missing[module] = None
            return None
        return self._moments.weights(module, delta.weight.sizes)

    def _factor(self, delta: WeightDelta, stream: Iterator[Difference], rank: int) -> SpooledFactors:
        """Factor the next weight of a stream; a stack, of which one matrix is in memory, is read again for more."""
        weight, squares, edges, inputs = delta.weight, list[float](), list[float](), self._input_weights(delta)
        E = weight.sizes[0]
        held = [] if E > 1 else [next(stream)]

        def matrices() -> Iterator[Tensor]:
            squares.clear()
            edges.clear()
            for found in held or islice(stream, E):
                squares.append(found.base_squared)
                edges.append(found.noise.edge())
                yield found.D

        def compute(rank: int) -> SpooledFactors:
            shape = weight.spec.shape
            made = self._spool.add(weight.name, weight.kind, shape, matrices(), rank, delta.cost, inputs)
            return replace(made, spectrum=replace(made.spectrum, noise=math.hypot(*edges)))

        unknown = self._rule == "noise" and delta.is_precise and min(weight.sizes[1:]) >= FEW
        if unknown or self._rule in WHOLE:
            spectrum = _whole_spectrum(matrices(), delta.cost)
            rank, stream = min(self._rule_of(spectrum) or 1, self._max_rank), self._differences([delta])
            factored = compute(rank)
            noise = spectrum.noise if unknown else factored.spectrum.noise
            factored = replace(factored, spectrum=replace(spectrum, noise=noise))
        else:
            factored = compute(rank)
            while self._rule in RANK_RULES and rank < min(self._max_rank, factored.full):
                if self._rule_of(factored.spectrum) is not None:
                    break
                rank, stream = 2 * rank, self._differences([delta])
                factored = compute(min(rank, self._max_rank))
        self.seen[weight.name] = (math.fsum(squares), factored.norm_squared)
        return factored

    def _rule_of(self, spectrum: SingularValues) -> int | None:
        return RANK_RULES[self._rule](spectrum, self._value)

    def _grow(self) -> None:
        """Compute more of a matrix while the budget still chooses the last triplet known of it."""
        while True:
            ranks = self.ranks()
            exhausted = [
                self._found.low_rank[name]
                for name, f in self.factored.items()
                if ranks[name] == f.known < min(f.full, self._max_rank) and not f.spectrum.whole
            ]
            if not exhausted:
                return
            stream = self._differences(exhausted)
            for delta in exhausted:
                name = delta.weight.name
                rank = min(2 * self.factored[name].known, self._max_rank)
                self.factored[name] = self._factor(delta, stream, rank)

    def ranks(self) -> dict[str, int]:
        spectra = {name: factored.spectrum for name, factored in self.factored.items()}
        if self._rule not in RANK_RULES:
            return budget_ranks(spectra, self._budget)
        found = {name: self._rule_of(spectrum) for name, spectrum in spectra.items()}
        most = {name: min(factored.known, self._max_rank) for name, factored in self.factored.items()}
        return {name: most[name] if k is None else min(k, most[name]) for name, k in found.items()}


def _whole_spectrum(matrices: Iterable[Tensor], cost: int) -> SingularValues:
    """Return all singular values of a matrix or of a stack, and what noise of unknown size in them stays below."""
    edges, squares = list[float](), torch.zeros(0, dtype=torch.float64)
    for D in matrices:
        m, n = D.flatten(1).shape
        S = singular_values_of(D.flatten(1)).cpu()
        edges.append(unknown_noise_edge(S, (m, n)))
        kept = torch.where(rounding_floor(m, n) * S[0] < S, S, 0.0).square()
        squares = kept + squares if len(squares) else kept
    found = tuple(squares[squares > 0].tolist())
    return SingularValues(found, math.fsum(found), cost, True, math.hypot(*edges))
