import numpy as np

from loratool.adapters.placed_factors import Place, lay_A, lay_B, place_A, place_B, place_pairs, starts


def test_single_experts_are_one_stack_with_zeros():
    one = np.array([[1.0, 2.0]]), np.array([[3.0], [4.0], [5.0]])  # rank 1, 2 inputs, 3 outputs
    A, B = place_pairs([(one, Place(0, slice(0, 3), 2)), (one, Place(1, slice(3, 6), 0))], (3, 6, 2, 2))
    assert A.tolist() == [[[0, 0], [1, 2]], [[0, 0], [0, 0]], [[1, 2], [0, 0]]]
    assert B[0].tolist() == [[0, 0], [0, 0], [0, 0], [0, 3], [0, 4], [0, 5]]
    assert not B[1].any() and B[2].tolist() == [[3, 0], [4, 0], [5, 0], [0, 0], [0, 0], [0, 0]]


def test_shares_have_ranks_one_after_another_or_one_A():
    assert starts([2, 1, 3]) == [0, 2, 3]
    assert starts([2, 2], shared=True) == [0, 0]
    first, second = np.array([[1.0], [2.0]]), np.array([[3.0], [4.0]])  # B, rank 1
    places = [Place(0, slice(0, None, 2)), Place(1, slice(1, None, 2))]
    assert place_B(zip((first, second), places, strict=True), (4, 2)).tolist() == [[1, 0], [0, 3], [2, 0], [0, 4]]
    assert place_A(zip((first.T, second.T), places, strict=True), (2, 2)).tolist() == [[1, 2], [3, 4]]
    shared = [(first, Place(0, [3, 0])), (second, Place(0, [1, 2]))]
    assert place_B(shared, (4, 1)).tolist() == [[2], [3], [4], [1]]


def test_the_type_stays():
    side = np.array([[-0x8000]], np.int16)  # the bits of -0.0
    A, B = place_pairs([((side, side), Place(expert=1))], (2, 1, 1, 1))
    assert A.dtype == B.dtype == np.int16 and A.ravel().tolist() == B.ravel().tolist() == [0, -0x8000]


def test_they_lie_expert_by_expert_in_A_and_rank_by_rank_in_B():
    A = np.array([[[1], [2]], [[3], [4]]])  # (expert, rank, in)
    B = np.array([[[1, 2], [3, 4]], [[5, 6], [7, 8]]])  # (expert, out, rank)
    assert lay_A(A).tolist() == [[1], [2], [3], [4]]
    assert lay_B(B).tolist() == [[1, 5, 2, 6], [3, 7, 4, 8]]
