"""Hold how losses add up against dense float64 matrices, and the one rule for the word in reports."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratool.transform.log import EXACT, NO_LOSS, Change, Loss, of_parts

few = settings(max_examples=25)
seeds = st.integers(0, 2**32)


def matrix(seed: int, rows: int = 6, size: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return size * torch.randn(rows, 9, generator=g, dtype=torch.float64)


def lost(true: Tensor, made: Tensor, cut: bool = False) -> Loss:
    return Loss.of_rows((made - true).square().sum(1).numpy(), true.square().sum(1).numpy(), cut)


def error(true: Tensor, made: Tensor) -> float:
    return float((made - true).norm() / true.norm())


def best(D: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


@few
@given(seeds, st.lists(st.sampled_from([0.0, 1e-7, 1e-3, 0.3, 2.0]), min_size=1, max_size=4))
def test_parts_side_by_side_are_one_matrix(seed: int, sizes: list[float]) -> None:
    """A part that lost nothing counts with its size, also one many times as large as the others."""
    true = [matrix(seed + i, 3 + i, 10.0**i) for i in range(len(sizes))]
    made = [D + matrix(seed + 9 + i, len(D), size) for i, (D, size) in enumerate(zip(true, sizes, strict=True))]
    found = lost(true[0], made[0])
    for D, other in zip(true[1:], made[1:], strict=True):
        found += lost(D, other)
    assert found.relative == pytest.approx(error(torch.cat(true), torch.cat(made)), rel=1e-12)
    assert (found.relative == 0) is (not any(sizes))


@few
@given(seeds, st.permutations([5, 4, 3, 2, 1, 1]))
def test_cuts_one_after_another_are_what_is_lost_of_the_first(seed: int, ranks: list[int]) -> None:
    D = true = matrix(seed)
    found = NO_LOSS
    for rank in ranks:
        D, former = best(D, rank), D
        found = found.then(lost(former, D, cut=True) if error(former, D) > 1e-12 else NO_LOSS)
        assert found.cut and found.relative == pytest.approx(error(true, D), rel=1e-9)
        assert found.relative < 1


@few
@given(seeds)
def test_a_cut_of_fused_cuts_is_what_is_lost_of_all(seed: int) -> None:
    """As experts of a stack that were cut before."""
    parts = [matrix(seed), matrix(seed + 1, 4), matrix(seed + 2, 2, 0.1)]
    cut = [best(parts[0], 2), best(parts[1], 1), parts[2]]
    found = sum((lost(D, E, D is not E) for D, E in zip(parts, cut, strict=True)), NO_LOSS)
    last = best(torch.cat(cut), 1)
    found = found.then(lost(torch.cat(cut), last, True))
    assert found.relative == pytest.approx(error(torch.cat(parts), last), rel=1e-12)


@few
@given(seeds, st.integers(0, 5), st.integers(1, 6))
def test_rows_of_a_loss_are_those_of_the_matrices(seed: int, start: int, count: int) -> None:
    true, cut = matrix(seed), best(matrix(seed), 3)
    last = cut + matrix(seed + 1, size=1e-3)
    found = lost(true, cut, True).then(lost(cut, last)).between(start, start + count)
    part = slice(start, start + count)
    squared = (cut - true)[part].square().sum() + (last - cut)[part].square().sum()
    assert found.squared == pytest.approx(float(squared), rel=1e-12)
    assert found.total == pytest.approx(float(true[part].square().sum()), rel=1e-12)
    assert found.cut


def test_rows_are_known_only_where_all_are() -> None:
    whole, rows = Loss(1.0, 4.0, True), lost(matrix(0), matrix(1))
    assert whole.between(0, 1) == whole
    assert (whole + rows).rows is None and whole.then(rows).rows is None and rows.then(whole).rows is None
    both = rows + rows
    assert both.rows is not None and both.rows.shape == (2, 12)
    assert both.summed.rows is None and both.summed == both


@given(seeds)
@few
def test_a_step_that_loses_nothing_changes_nothing(seed: int) -> None:
    found = lost(matrix(seed), matrix(seed + 1))
    assert found.then(NO_LOSS) == NO_LOSS.then(found) == found
    assert NO_LOSS.then(NO_LOSS).relative == 0
    sized = lost(matrix(seed), matrix(seed))  # which knows its size
    assert sized.relative == 0 and sized.then(found) == found and found.then(sized) == found


def test_nothing_is_lost_of_zeros() -> None:
    assert Loss(0.0, 0.0).relative == 0 and Change(("m",), "folded", Loss(0.0, 0.0)).how == "folded"


@pytest.mark.parametrize(("first", "later"), list(itertools.product(EXACT, EXACT)))
def test_of_exact_changes_the_last_of_the_list_names_all(first: str, later: str) -> None:
    word = max(first, later, key=EXACT.index)
    for change in (Change(("m",), first).then(later), of_parts([Change(("m",), first), Change(("n",), later)])):
        assert change.how == word
        assert change.then(loss=Loss(1e-20, 1.0)).how == "rounded"
        assert change.then(loss=Loss(1e-20, 1.0, cut=True)).how == "truncated"
        assert change.then(loss=Loss(0.0, 1.0, cut=True)).how == word


@pytest.mark.parametrize("order", list(itertools.permutations([Loss(0.1, 1.0, cut=True), Loss(1e-4, 1.0), NO_LOSS])))
def test_what_was_cut_stays_truncated(order: tuple[Loss, ...]) -> None:
    change = Change(("m",))
    for loss in order:
        change = change.then("folded", loss)
    assert change.how == "truncated"
    assert of_parts([Change(("m",), loss=loss) for loss in order]).how == "truncated"


def test_a_module_of_parts_names_each_source_once() -> None:
    parts = [Change(("b", "a")), Change(("a",), "folded", Loss(3.0, 4.0)), Change(("c",), "exact", Loss(0.0, 8.0))]
    made = of_parts(parts)
    assert made.sources == ("b", "a", "c") and made.loss == Loss(3.0, 12.0) and made.loss.relative == 0.5
    assert made.then("fused").exact == "fused" and made.then("fused").sources == made.sources
    assert of_parts([]) == Change(())  # zeros that are made of nothing


@few
@given(seeds, st.integers(1, 5), st.sampled_from([0.01, 1.0, 300.0]))
def test_what_was_lost_of_another_change_counts_by_its_share(seed: int, rank: int, size: float) -> None:
    """As DoRA's change, which is made of a LoRA's that was rounded, and is of another size."""
    former, true = matrix(seed), matrix(seed + 1, size=size)
    noise = matrix(seed + 2)
    found = lost(true, best(true, rank), cut=True).after(lost(former, former + 0.1 * noise))
    share = 0.1 * float(noise.norm() / former.norm())
    assert found.relative == pytest.approx((error(true, best(true, rank)) ** 2 + share**2) ** 0.5, rel=1e-12)
    assert found.total == pytest.approx(float(true.norm() ** 2), rel=1e-12) and found.cut
    part = found.between(0, 3)
    alone = (error(true[:3], best(true, rank)[:3]) ** 2 + share**2) ** 0.5
    assert part.relative == pytest.approx(alone, rel=1e-12)
