"""Factor each matrix that changed, at the rank of the rule. Budgets need the spectra of all matrices first.

The ranks of a job share the matrices, and a journal stores the results. A thread has one matrix in memory at a time.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ...architectures.prefixes import module_path
from ...binding.weights.input_moments import InputMoments
from ...durable.journal import Journal
from ...errors import InputError
from ...files.tensor_compare import Difference, matrix_difference
from ...numerics.arrays import Array, Device, fetched, like_of, sent
from ...numerics.forms import Single
from ...numerics.linalg import isfinite
from ...numerics.rounding_noise import unknown_noise_edge
from ...numerics.svd import rounding_floor, singular_values_of
from ...streaming.journaled import Task, run_tasks
from ...streaming.parallel import Progress, worker_count
from ...streaming.ranks import Job
from ...transform.delta_factors import DeltaFactors, SvdChoices, as_matrix, factor_delta
from ...transform.rank_rules import RANK_RULES, WHOLE, SingularValues, budget_ranks
from .changes import SortedDeltas, Sorting, WeightDelta, compare_sides

FIRST_RANK = 32  # computed of each matrix at first, if the rule may ask for any rank

FEW = 8  # singular values: of less the median is that of the change

HEADROOM = 4  # the first rank, over the uniform one that the budget allows

ROOM = 1 << 30  # numbers of the matrices in memory on a machine, unless one alone has more


@dataclass(frozen=True)
class Work:
    """The job, the journal and the device of an extraction."""

    job: Job
    journal: Journal
    device: Device
    progress: Progress | None

    @property
    def workers(self) -> int:
        """How many matrices are in progress: on a GPU one is read while another is computed."""
        return 2 if self.device.is_gpu else worker_count()


def compare_models(sorting: Sorting, work: Work) -> SortedDeltas:
    """Compare all pairs of a plan, and sort the differences."""
    tasks = [Task(item, (pair.name, 0, 0), partial(compare_sides, pair)) for item, pair in enumerate(sorting.pairs)]
    return sorting.sort(run_tasks("compared", tasks, work.job, work.journal, worker_count()))


class Extraction:
    """The factors of each matrix at the rank of the rule, and the norms measured on the way."""

    def __init__(
        self,
        deltas: SortedDeltas,
        sorting: Sorting,
        work: Work,
        rule: tuple[str, float],
        itemsize: int,
        max_rank: int | None,
        moments: InputMoments | None,
        choices: SvdChoices,
    ) -> None:
        self._found, self._work, self._choices, self._like = deltas, work, choices, like_of(work.device)
        self._numbers = {delta.weight.name: number for number, delta in enumerate(sorting.deltas)}
        self._first_item = len(sorting.pairs)
        self._moments, self.imatrix = moments, str(moments.path) if moments else None
        self._rule, self._value = rule
        budget = int(self._value) - deltas.exact_cost(self._rule == "size")
        self._budget = max(0, budget // itemsize if self._rule == "size" else budget)  # parameters of factors
        self._max_rank = max_rank or 1 << 30
        self._room = _Room(ROOM // work.job.local_count)
        self.factored: dict[str, DeltaFactors] = {}
        self.seen: dict[str, tuple[float, float]] = {}  # ||W||^2 and ||D||^2

    @property
    def unweighted(self) -> tuple[str, ...]:
        """The modules whose inputs are not in the file of moments."""
        return tuple(self._moments.missing) if self._moments else ()

    def require_moments(self) -> None:
        """Raise InputError if there is a file of moments without the inputs of any weight."""
        if self._moments:
            for delta in self._found.low_rank.values():
                self._input_weights(delta)
            self._moments.require_known()

    def factor_all(self) -> None:
        """Factor all changed weights.

        Raises:
            RankDone: on ranks other than 0, which do not have all factors.
        """
        wanted = dict.fromkeys(self._found.low_rank, self._first_rank())
        self._factor_each(0, wanted)
        turn = 0
        while wanted := self._more():
            turn += 1
            self._factor_each(turn, wanted)
        if self._rule not in RANK_RULES:  # else the others have left
            self._work.job.hand_over("factors read")  # rank 0 removes the journal, which a slow rank may still read

    def _first_rank(self) -> int:
        if self._rule == "rank":
            return min(int(self._value), self._max_rank)
        if self._rule in RANK_RULES:
            return min(FIRST_RANK, self._max_rank)
        cost = sum(delta.cost for delta in self._found.low_rank.values())
        return min(max(FIRST_RANK, HEADROOM * (self._budget // max(1, cost))), self._max_rank)

    def _more(self) -> dict[str, int]:
        """Return larger ranks for matrices that need more triplets, as the budget selects all known ones."""
        if self._rule in RANK_RULES:
            return {}
        ranks = self.ranks()
        return {
            name: min(2 * f.known, self._max_rank)
            for name, f in self.factored.items()
            if ranks[name] == f.known < min(f.full, self._max_rank) and not f.spectrum.complete
        }

    def _factor_each(self, turn: int, wanted: Mapping[str, int]) -> None:
        """Factor weights at these ranks, the largest first, so that no large one runs alone at the end."""
        work, names = self._work, sorted(wanted, key=lambda name: -self._found.low_rank[name].weight.spec.size)
        base = self._first_item + turn * len(self._numbers)
        tasks = [
            Task(
                base + self._numbers[name],
                (name, turn, wanted[name]),
                partial(self._factor, self._found.low_rank[name], wanted[name]),
            )
            for name in names
        ]

        def tell() -> None:
            done = work.job.add("matrices", 1)
            if work.progress and not turn:
                work.progress(done, len(names))

        is_last = self._rule in RANK_RULES
        results = run_tasks(f"factored {turn}", tasks, work.job, work.journal, work.workers, tell, is_last)
        by_name = dict(zip(names, results, strict=True))
        for name in wanted:
            self.factored[name], base_squared = by_name[name]
            self.seen[name] = base_squared, self.factored[name].norm_squared

    def _factor(self, delta: WeightDelta, rank: int) -> tuple[DeltaFactors, float]:
        """Return the factors of a weight, and ||W||^2. A stack is read again if it needs more triplets.

        Args:
            rank: the rank to compute, if the rule does not need more.
        """
        with self._room.taken(math.prod(delta.weight.sizes[1:])):
            return self._factor_held(delta, rank)

    @np.errstate(all="ignore")
    def _factor_held(self, delta: WeightDelta, rank: int) -> tuple[DeltaFactors, float]:
        weight, inputs, squares, edges = delta.weight, self._input_weights(delta), list[float](), list[float]()
        held = [*self._differences(delta, inputs)] if weight.sizes[0] == 1 else []

        def matrices() -> Iterator[Array]:
            squares.clear()
            edges.clear()
            for matrix in held or self._differences(delta, inputs):
                squares.append(matrix.base_squared)
                edges.append(matrix.noise.edge())
                yield matrix.D

        def compute(rank: int) -> DeltaFactors:
            name, kind, shape = weight.name, weight.kind, weight.spec.shape
            result = factor_delta(name, kind, shape, matrices(), rank, delta.cost, self._choices, inputs)
            return replace(result, spectrum=replace(result.spectrum, noise=math.hypot(*edges)))

        unknown = self._rule == "noise" and delta.is_precise and min(weight.sizes[1:]) >= FEW
        if unknown or self._rule in WHOLE:
            spectrum = _whole_spectrum(matrices(), delta.cost)
            factored = compute(min(self._rule_of(spectrum) or 1, self._max_rank))
            noise = spectrum.noise if unknown else factored.spectrum.noise
            factored = replace(factored, spectrum=replace(spectrum, noise=noise))
        else:
            factored = compute(rank)
            while self._rule in RANK_RULES and rank < min(self._max_rank, factored.full):
                if self._rule_of(factored.spectrum) is not None:
                    break
                rank *= 2
                factored = compute(min(rank, self._max_rank))
        return factored, math.fsum(squares)

    def _differences(self, delta: WeightDelta, inputs: Single | None) -> Iterator[Difference]:
        """Yield D for each matrix of a weight, with columns times the weights of their inputs, if any."""
        kind, shape = delta.weight.kind, delta.weight.spec.shape
        for e, sides in enumerate(delta.matrices):
            difference = matrix_difference(*sides, self._like)
            if inputs is not None:
                matrix = as_matrix(difference.D, kind, shape)
                matrix *= sent(inputs[e], self._like)
                if not isfinite(matrix).all():
                    raise InputError("its delta is too large to be weighted in float32", culprit=delta.weight.name)
            yield difference

    def _input_weights(self, delta: WeightDelta) -> Single | None:
        """Return the weights of a weight's inputs, (E, in), or None to take them as equal."""
        module = module_path(delta.weight.in_model)
        if self._moments is None:
            return None
        if len(delta.uses) > 1:  # one matrix of several modules, whose inputs differ
            self._moments.missing[module] = None
            return None
        return self._moments.weights(module, delta.weight.sizes)

    def _rule_of(self, spectrum: SingularValues) -> int | None:
        return RANK_RULES[self._rule](spectrum, self._value)

    def ranks(self) -> dict[str, int]:
        spectra = {name: factored.spectrum for name, factored in self.factored.items()}
        if self._rule not in RANK_RULES:
            return budget_ranks(spectra, self._budget)
        ranks = {name: self._rule_of(spectrum) for name, spectrum in spectra.items()}
        most = {name: min(factored.known, self._max_rank) for name, factored in self.factored.items()}
        return {name: most[name] if k is None else min(k, most[name]) for name, k in ranks.items()}


class _Room:
    """A budget of memory for threads. A thread waits until there is enough; a request above the total takes all."""

    def __init__(self, size: int) -> None:
        self._size, self._free, self._changed = size, size, threading.Condition()

    @contextmanager
    def taken(self, size: int) -> Iterator[None]:
        size = min(size, self._size)
        with self._changed:
            self._changed.wait_for(lambda: size <= self._free)
            self._free -= size
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()


def _whole_spectrum(matrices: Iterable[Array], cost: int) -> SingularValues:
    """Return all singular values of a matrix or a stack, and the threshold for noise of unknown size."""
    edges, squares = list[float](), np.zeros(1)
    for D in matrices:
        matrix = D.reshape(len(D), -1)
        m, n = matrix.shape
        S = fetched(singular_values_of(matrix))
        edges.append(unknown_noise_edge(S, (m, n)))
        squares = squares + np.square(np.where(rounding_floor(m, n) * S[0] < S, S, 0.0))
    nonzero = tuple(squares[squares > 0].tolist())
    return SingularValues(nonzero, math.fsum(nonzero), cost, True, math.hypot(*edges))
