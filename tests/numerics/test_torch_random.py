"""Hold the permutations that torch draws against torch's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loratool.numerics.torch_random import LARGEST, permutation_start

SEEDS = (0, 1, 777, -1, -5, 2**31, 2**32 - 1, 2**32 + 5, 2**63 - 1, 2**64 - 1, -(2**63))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_first_numbers_are_those_of_torch(seed: int) -> None:
    for total, count in ((1, 1), (2, 2), (150, 40), (150, 150), (4099, 3), (100_003, 1000)):
        whole = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
        assert permutation_start(seed, total, count).tolist() == whole[:count].tolist()


def test_their_bits_are_pinned() -> None:
    """Whatever torch draws one day, adapters of today have these places."""
    places = permutation_start(777, 4096 * 4096, 2592)
    assert places[:4].tolist() == [1374311, 8240085, 6766295, 6474818] and int(places.sum()) == 22032270316


@pytest.mark.slow
def test_the_largest_permutation_that_all_versions_share() -> None:
    """It takes gigabytes. With one number more, torch draws others since 2025."""
    for total in (LARGEST, LARGEST + 1):
        whole = torch.randperm(total, generator=torch.Generator().manual_seed(5))[:500].numpy()
        assert np.array_equal(whole, permutation_start(5, total, 500)) == (total == LARGEST)
