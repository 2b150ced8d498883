"""Hold the methods of combine against what their authors' code made of a small case, once, and against dense formulas.

The numbers below are results of published code, run in float64 (torch 2.13, one thread) on the changes of `change`:
apanariello4/core-space-merging 85176fa (core TIES, Iso-C in the core), AntoAndGar/task_singular_vectors a6c9718 (TSV),
danielm1405/iso-merging d34010a (Iso-C, Iso-CTS), nathanielyvo/WUDI-Merging dc3cd12 (WUDI, with its 300 steps of Adam
raised to 200 000, which then are within 5e-8 of a minimum), ZhengbaoHe/compress-then-merge 6017d1e (CtM, its tolerance
of 1e-6 lowered to 1e-15, tensorly 0.10.0) and declare-lab/della 8067515 (DELLA, with the random numbers of `drawn`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_peft
from safetensors.torch import load_file
from torch import Tensor

import loratool
from loratool.commands.combine.methods import entries
from loratool.commands.combine.methods.delta import WeightedDelta
from loratool.commands.combine.methods.table import METHODS
from loratool.commands.combine.results import low_rank_result
from loratool.numerics import core_space

OUT, IN = 8, 7
MIXED, FULL = (3, 1, 2), (2, 3, 4)  # ranks: together 6 directions of 7, and all 7


def matrix(rows: int, columns: int, seed: int) -> Tensor:
    i, j = torch.arange(1, rows + 1)[:, None], torch.arange(1, columns + 1)[None]
    return ((i * i * (j + seed) + 3 * i * j * j + seed * j) % 43 - 21).float() / 64


def change(rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return (A (rank, IN), B (OUT, rank)), exact in float32."""
    return matrix(rank, IN, seed + 5), matrix(OUT, rank, seed)


def drawn(adapter: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the uniform random numbers of an adapter's entries, row by row."""
    i, j = np.arange(OUT)[:, None], np.arange(IN)[None]
    return (((i * 5 + j * 3 + adapter * 7) % 16 + 0.5) / 16).ravel()


CORE_TIES = (
    (0.065128031, -0.048258657, -0.003256531, -0.037875164, -0.120237308, -0.021693251, 0.037713637),
    (0.116325919, -0.017563685, -0.026522592, 0.014417946, -0.097757300, 0.074797900, -0.061924989),
    (0.099655075, 0.020465678, -0.114999447, -0.060288986, -0.030921507, 0.106083481, 0.133084653),
    (-0.008298628, -0.009984600, 0.023096974, -0.091065189, 0.018732458, -0.008809565, -0.005275213),
    (-0.019995063, -0.025573121, -0.029910132, 0.004926837, 0.046475775, -0.022735369, 0.006652152),
    (-0.029285438, 0.077543185, -0.023486248, -0.166589331, 0.108686414, 0.067729453, 0.088429375),
    (-0.112590671, 0.040537022, 0.054756702, 0.008344376, 0.079360700, -0.056608024, 0.046074773),
    (-0.038527006, -0.072915123, 0.113533171, 0.135917081, -0.054342830, -0.108871291, -0.179497829),
)
TSV = (
    (-0.141146501, -0.194918758, 0.093530672, -0.025649687, -0.121095784, -0.213188321, -0.028257740),
    (0.084884211, -0.089585599, -0.063573984, -0.016305212, -0.118048085, 0.068472484, -0.064807653),
    (0.036365440, 0.190011342, -0.009201122, 0.045182942, -0.226039137, -0.090533591, -0.000623823),
    (0.046955014, 0.120646930, 0.166100767, -0.094679911, 0.121514089, 0.011561172, -0.061187300),
    (-0.037546776, -0.005311953, -0.075169626, 0.133275821, 0.113160669, -0.163509932, -0.142513128),
    (0.150773320, 0.092723461, -0.199961890, -0.224024442, 0.061818068, -0.027427127, 0.044522869),
    (-0.055943789, 0.109247308, 0.078538202, -0.088419486, -0.043413241, 0.089514924, 0.250910544),
    (0.018123783, -0.066585398, -0.008686409, 0.107576662, -0.025375947, 0.038779064, -0.108206887),
)
ISO_C_CORE = (
    (0.037101094, -0.108628272, 0.066302710, -0.074630989, -0.135532630, -0.093721513, 0.041715321),
    (0.117583418, -0.029016913, -0.004924706, 0.036712134, -0.028783105, 0.126235300, -0.050847562),
    (0.059403204, -0.077668032, -0.134559499, 0.100370991, -0.009920323, 0.006567560, 0.121501241),
    (0.009021914, -0.153845556, -0.017325636, 0.010572294, 0.064711698, -0.060298050, -0.086368569),
    (-0.054045658, 0.039049247, -0.142358936, 0.006032507, -0.008048209, -0.109429109, -0.068423352),
    (0.006255155, -0.074334574, -0.010839891, -0.102265862, 0.142448968, 0.039849052, -0.010922407),
    (-0.080847060, -0.026513330, 0.083359955, 0.081227352, 0.082479673, -0.029325121, 0.116599545),
    (-0.014785312, -0.028555513, 0.074790931, 0.151197348, -0.012259308, -0.019991446, -0.110057536),
)
ISO_C = (
    (0.005753548, -0.184530279, 0.078461484, -0.027019793, -0.043448238, -0.132084439, 0.075082333),
    (0.028977663, -0.073657711, -0.039351825, -0.038363991, -0.123597205, 0.122458603, -0.086576314),
    (0.084697981, 0.007377159, 0.030957836, 0.155445416, -0.109273248, 0.073839629, 0.125347884),
    (-0.001376881, -0.066003202, 0.173604352, -0.014068190, 0.106681186, 0.141084468, -0.022107348),
    (0.040410847, -0.000099542, -0.008046992, 0.148333189, 0.127206263, -0.037887529, -0.018415032),
    (0.185958417, -0.011521720, -0.072715863, -0.111625550, 0.081078527, 0.028287489, 0.087264426),
    (-0.044677327, 0.134608183, 0.101115780, -0.080154345, -0.030727357, 0.000277617, 0.115662735),
    (0.145664691, 0.073050923, 0.114446085, -0.005051092, -0.057370891, -0.086261448, -0.129655636),
)
ISO_CTS_CORE = (
    (0.032056537, -0.089776595, 0.115938535, -0.123220503, -0.128888274, -0.063309236, 0.131174389),
    (0.133694817, 0.017240248, -0.008214296, -0.028280401, -0.036285865, 0.166473220, -0.057492940),
    (0.105903101, -0.069600499, -0.147410477, 0.124078443, -0.062801118, 0.042289555, 0.132318194),
    (0.054546748, -0.214654265, 0.033174549, -0.006208290, 0.079557788, -0.004917236, -0.026781059),
    (-0.026457601, -0.078342562, -0.081110136, 0.081527179, -0.054184957, -0.156763157, -0.112370798),
    (-0.000496291, -0.071584003, -0.083065104, -0.119823487, 0.168352016, 0.025268988, -0.001992776),
    (-0.084403524, 0.008375243, 0.049670696, 0.108454599, 0.118823325, 0.010270730, 0.159333794),
    (0.022273120, -0.057432334, 0.169264933, 0.136547757, 0.011685649, 0.062370134, -0.077930747),
)
ISO_CTS = (
    (-0.028220494, -0.258834987, 0.098828417, 0.035580128, -0.040623061, -0.025448959, 0.075124932),
    (0.107375513, -0.008512630, 0.049863091, -0.081452043, -0.110851748, 0.114584987, -0.081353763),
    (0.145293833, 0.094502178, 0.098921931, 0.046233770, -0.121827444, -0.101778697, 0.136428785),
    (-0.012491098, 0.020290997, 0.154346596, -0.205451712, 0.114065984, -0.086042718, -0.006751313),
    (0.052238752, 0.000869142, -0.010610361, 0.118377365, 0.124134808, -0.151418136, -0.044907623),
    (0.148888394, -0.083244845, -0.183817524, -0.120440356, 0.041493428, -0.034087296, 0.081685526),
    (-0.168198572, 0.039850487, -0.079957055, -0.075286530, -0.115124394, -0.096825415, 0.091528110),
    (0.017560196, -0.046465702, -0.030521915, -0.025543965, -0.122114229, -0.148606212, -0.197739185),
)
WUDI = (
    (-0.047815402, 0.231012335, -0.392131126, -0.142824663, -0.370985992, -0.326041619, -0.175630336),
    (0.154114778, -0.049949634, 0.061221581, 0.008060120, -0.078677508, 0.157644003, 0.029277657),
    (0.308184813, -0.528418992, 0.450550551, 0.161364778, 0.227183226, 0.468721313, 0.602765355),
    (-0.003331021, -0.298545883, -0.015173730, -0.089002535, 0.289879002, -0.037317565, -0.130057887),
    (-0.277292087, 0.515291587, -0.852007372, -0.200705079, -0.319522327, -0.622977247, -0.537011618),
    (0.177379132, -0.687178624, 0.420723344, -0.031015010, 0.618981640, 0.374657188, 0.275852733),
    (0.172464693, -0.671658659, 1.064860874, 0.322208483, 0.607386929, 0.660203842, 0.677961085),
    (-0.147488572, 0.237856487, 0.022820095, 0.079516514, -0.091781988, -0.128289053, -0.283475184),
)
CTM_TIES = (
    (0.070485578, 0.016428787, -0.067392755, -0.019300018, -0.037624921, 0.068006513, 0.050608553),
    (0.061322336, 0.035037647, -0.070539755, -0.027443833, 0.009641342, 0.093564214, 0.014068073),
    (0.064687147, 0.138288593, -0.100890608, -0.172928691, 0.049312430, 0.181360955, 0.128199784),
    (-0.046215347, -0.049900502, 0.048144984, 0.086441101, 0.042756455, -0.059625080, -0.128331806),
    (0.034724709, -0.050375461, -0.022820545, 0.087788019, -0.015170098, -0.000996761, -0.080635530),
    (-0.060793745, 0.019931641, 0.039175660, -0.002679072, 0.098799999, -0.003792217, -0.087780018),
    (-0.128972420, 0.014843286, 0.124368117, -0.065602961, 0.018443513, -0.122258452, 0.062462438),
    (-0.064799902, -0.111641030, 0.097572992, 0.124770790, -0.057727887, -0.169260208, -0.069381483),
)
CTM_TSV = (
    (0.091389455, -0.033105029, -0.069608219, 0.041972203, -0.088621013, 0.034219205, 0.033874266),
    (0.066203526, 0.027289859, -0.068719996, -0.028239789, -0.018457167, 0.079805586, 0.041767498),
    (0.038265817, 0.070484490, -0.040303546, -0.133858050, -0.062179884, 0.053814722, 0.197756723),
    (-0.054341256, 0.051554052, 0.018958088, -0.029316612, 0.139711512, 0.043644945, -0.100083704),
    (0.058072553, -0.004453573, -0.064005756, 0.047912100, 0.031880000, 0.076867348, -0.086476755),
    (-0.100036105, 0.116178257, 0.048042521, -0.138464699, 0.166344938, 0.047317558, -0.007155240),
    (-0.167722831, -0.014706156, 0.170713230, -0.037251954, 0.010368591, -0.186979603, 0.043923439),
    (-0.042983393, -0.085444929, 0.056949446, 0.130142177, 0.014249981, -0.092607484, -0.146875007),
)
DELLA = (
    (0.088378906, -0.030808222, 0.031738281, -0.218975361, -0.086558949, -0.091688368, -0.089925130),
    (0.145983574, -0.076171875, -0.081881010, 0.007512019, -0.057262074, 0.148111979, -0.090006510),
    (-0.035574777, 0.116210938, -0.116210938, 0.236002604, -0.202414773, 0.118453414, 0.117594401),
    (0.000000000, -0.130169581, 0.184215199, 0.000000000, -0.013316761, -0.014105903, -0.066351996),
    (-0.093180339, 0.075683594, 0.054931641, 0.112680289, -0.099875710, -0.100763494, 0.119441106),
    (-0.043945312, 0.143554688, 0.000000000, -0.134232629, 0.087483724, -0.205829327, 0.145263672),
    (-0.041852679, -0.078735352, 0.096005394, 0.160667783, 0.133167614, 0.141059028, 0.138346354),
    (-0.066034226, -0.083007812, 0.070667614, 0.135216346, -0.119850852, -0.045166016, -0.153710222),
)


@dataclass(frozen=True)
class Published:
    """A result of published code, and how the same is asked of combine."""

    method: str
    ranks: Sequence[int]
    numbers: Sequence[Sequence[float]]
    weights: Sequence[float] = (1.0, 1.0, 1.0)
    options: Mapping[str, Any] = field(default_factory=dict)


PUBLISHED = {
    # it keeps one entry more than the density says: 19 of 36 at a half, 5 of 9
    "core TIES": Published("core-ties", MIXED, CORE_TIES, options={"density": 0.53}),
    "TSV": Published("tsv", FULL, TSV),
    "Iso-C": Published("iso-c", FULL, ISO_C),
    "Iso-C in the core": Published("iso-c", MIXED, ISO_C_CORE),
    "Iso-CTS": Published("iso-cts", FULL, ISO_CTS),
    "Iso-CTS in the core": Published("iso-cts", MIXED, ISO_CTS_CORE),
    "WUDI": Published("wudi", MIXED, WUDI),
    "CtM with TIES": Published("ties", MIXED, CTM_TIES, options={"density": 0.56, "rank": 3}),
    "CtM with TSV": Published("tsv", MIXED, CTM_TSV, options={"rank": 3}),
    "DELLA": Published("della", MIXED, DELLA, (1.0, 2.0, 0.5), {"density": 0.5}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_authors_code_made_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, keys = PUBLISHED[name], []

    def uniform(key: str, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        assert count == OUT * IN
        if key not in keys:
            keys.append(key)
        return drawn(keys.index(key))

    monkeypatch.setattr(entries, "uniform", uniform)
    monkeypatch.setattr(core_space, "SETTLED", 1e-15)
    paths = [write_peft(tmp_path / str(s), {"x": change(r, s)}) for s, r in enumerate(case.ranks, 1)]
    options = {"rank": IN, "rank_method": "truncate"} if case.method == "della" else {}
    adapters = list(zip(paths, case.weights, strict=True))
    loratool.combine(adapters, tmp_path / "out", method=case.method, **{**options, **case.options})
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    A, B = (found[f"base_model.model.x.lora_{side}.weight"].double() for side in "AB")
    expected = torch.tensor(case.numbers, dtype=torch.float64)
    assert float((B @ A - expected).norm()) <= 1e-6 * float(expected.norm())


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(out: int, inp: int, rank: int, seed: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    return random(rank, inp, seed=seed), scale * random(out, rank, seed=seed + 100)


def made(method: str, pairs: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float], density: float = 1.0) -> Tensor:
    """Return what a method makes of changes of one matrix, each by (A, B) in float64."""
    side = min(len(pairs[0][1]), pairs[0][0].shape[1])
    deltas = [WeightedDelta(B, A, w, str(i), side) for i, ((A, B), w) in enumerate(zip(pairs, weights, strict=True))]
    svd = low_rank_result(METHODS[method], [deltas], density, None).svd
    return ((svd.U * svd.S.unsqueeze(-2)) @ svd.V.mT)[0]


Dense = np.ndarray[Any, np.dtype[np.float64]]


def directions(D: Dense) -> tuple[Dense, Dense, Dense]:
    """Return (U, S, V) of D's own directions."""
    U, S, Vh = np.linalg.svd(D, full_matrices=False)
    k = int((1e-10 * S[0] < S).sum())
    return U[:, :k], S[:k], Vh[:k].T


def polar(X: Dense) -> Dense:
    """Return X (X^T X)^(-1/2), on the space where this is."""
    values, Q = np.linalg.eigh(X.T @ X)
    there = values > 1e-10
    return X @ (Q[:, there] / np.sqrt(values[there])) @ Q[:, there].T


def dense_tsv(D: Sequence[Dense]) -> Dense:
    most = min(D[0].shape) // len(D)
    U, S, V = zip(*map(directions, D), strict=True)
    left, right = (np.concatenate([side[:, :most] for side in sides], 1) for sides in (U, V))
    return polar(left) * np.concatenate([values[:most] for values in S]) @ polar(right).T


def dense_iso_c(D: Sequence[Dense]) -> Dense:
    U, S, V = directions(sum(D, np.zeros_like(D[0])))
    return S.mean() * U @ V.T


def dense_wudi(D: Sequence[Dense]) -> Dense:
    """Solve D_i X^T = D_i D_i^T for all i at once, each divided by its norm; of many solutions the least."""
    unit = [each / np.linalg.norm(each) for each in D]
    right = [one @ each.T for one, each in zip(unit, D, strict=True)]
    X: Dense = np.linalg.lstsq(np.concatenate(unit), np.concatenate(right), rcond=1e-9)[0].T
    return X


FORMULAS: dict[str, Callable[[Sequence[Dense]], Dense]] = {
    "cat": lambda D: sum(D, np.zeros_like(D[0])),
    "tsv": dense_tsv,
    "iso-c": dense_iso_c,
    "wudi": dense_wudi,
}
TWIN = pair(24, 20, 3, 1)
CASES: dict[str, list[tuple[Tensor, Tensor]]] = {
    "mixed ranks": [pair(24, 20, r, s) for s, r in enumerate((3, 4, 2))],
    "of very different size": [pair(24, 20, 3, s, scale) for s, scale in enumerate((1e-2, 1.0, 1e2))],
    "more ranks than sides": [pair(9, 12, 5, s) for s in range(3)],
    "equal ones": [TWIN, TWIN, pair(24, 20, 2, 5)],
    "one": [TWIN],
}


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, -2.0, 1.5)], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", FORMULAS)
def test_the_core_gives_what_the_changes_give(method: str, case: str, weights: tuple[float, ...]) -> None:
    pairs = CASES[case]
    expected = FORMULAS[method]([w * (B @ A).numpy() for w, (A, B) in zip(weights, pairs, strict=False)])
    found = made(method, pairs, weights[: len(pairs)])
    assert np.linalg.norm(found.numpy() - expected) <= 1e-10 * np.linalg.norm(expected)


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].acts_on == "core"])
def test_a_weight_of_0_is_an_adapter_that_is_not_there(method: str) -> None:
    one, two, other = CASES["mixed ranks"]
    found = made(method, [one, other, two], (1.0, 0.0, -2.0))
    assert torch.allclose(found, made(method, [one, two], (1.0, -2.0)), atol=1e-12)


def signed(n: int, k: int, seed: int) -> Tensor:
    """Return orthonormal columns whose largest entries are positive."""
    Q = torch.linalg.qr(random(n, k, seed=seed)).Q
    largest = Q.gather(0, Q.abs().argmax(0, keepdim=True))
    return Q * largest.sign()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_ties_of_cores_decides_what_ties_in_no_rounding(seed: int, turned: bool) -> None:
    """The bases are those of P and Q, as the sums of magnitudes, 8, 5, 4 and 2, differ: the cores are the diagonals.

    Of 16 entries 2 are kept, and what is as large. 4 and -4 cancel, and what cancels counts as positive.
    """
    P, Q = signed(12, 4, seed), signed(10, 4, seed + 50)
    changes = [(4.0, 2.0, 2.0, 1.0), (-4.0, 3.0, -2.0, 1.0)]
    pairs = [(Q.mT, P * torch.tensor(values).double()) for values in changes]
    found = made("core-ties", pairs[::-1] if turned else pairs, (1.0, 1.0), density=2 / 16)
    assert torch.allclose(P.mT @ found @ Q, torch.diag(torch.tensor([4, 2.5, 2, 0]).double()), atol=1e-12)


@pytest.mark.parametrize("shape", [(120, 100), pytest.param((1300, 1100), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(("method", "rank"), [*((name, None) for name in METHODS), ("ties", 8), ("tsv", 8)])
def test_bytes_depend_on_no_number_of_threads_and_numbers_on_no_order(
    method: str, rank: int | None, shape: tuple[int, int], tmp_path: Path
) -> None:
    paths = [
        write_peft(tmp_path / str(s), {"x": tuple(side.float() for side in pair(*shape, 6 + s, s))}) for s in range(3)
    ]
    before = torch.get_num_threads()
    try:
        for name, threads, adapters in (("one", 1, paths), ("two", 2, paths), ("turned", 2, paths[::-1])):
            torch.set_num_threads(threads)
            loratool.combine(adapters, tmp_path / name, method=method, rank=rank, seed=3)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("one", "two", "turned")]
    assert files[0].read_bytes() == files[1].read_bytes()
    products = [
        each["base_model.model.x.lora_B.weight"].double() @ each["base_model.model.x.lora_A.weight"].double()
        for each in map(load_file, (files[0], files[2]))
    ]
    assert float((products[0] - products[1]).norm()) <= 1e-4 * float(products[0].norm())
