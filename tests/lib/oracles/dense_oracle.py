"""Say what each kind of LyCORIS and PEFT makes of a weight, by the definition alone, in Python's fractions.

A stored number is the real number that its bits mean. W is flattened to (out, in k), row by row; k are the positions of
a kernel. For an update with the weight w, W' = W + w (U(W) - W), and `fractions_oracle` rounds it once. U(W) is

- what `mixed_oracle` says of kinds that multiply W,
- W + D for LoRA (also with `lora_mid`), GLoRA's added part, and every other kind of PEFT that `peft_updates` has,
- W + D for LoRA (also with `lora_mid`), LoHa, LoKr, AdaLoRA, VeRA, Uni-LoRA, TinyLoRA, VB-LoRA, DeLoRA and FourierFT
  (with weights, factors and cosines rounded to float64) and GLoRA's added part; bias + v for BEFT,
- (m / n) (W + D) for those with `dora_scale` m, n the norm of a row of W + D, or of an input's columns, whichever m's
  shape tells. n is the square root rounded to 36 bits; the eps that LyCORIS adds to it counts as 0,
- W + diff and bias + diff_b for full layers, weight + w_norm and bias + b_norm for norms,
- W (1 + v) for LyCORIS's IA3, of which the bias has no part; l W for PEFT's, whose l of outputs multiplies the bias.

A scale is one float64 number: alpha / r, r being the rows of a `_b` or of `lora_down`, or that of PEFT's config, whose
`rank_pattern` may say another. LoKr has no r in LyCORIS where both matrices are whole, and the scale is 1; in PEFT it
is alpha / r still. AdaLoRA's is lora_alpha / (init_r + 1e-5), whatever ranks were pruned since. LyCORIS has it so in
`lycoris/modules/*.py` (the forward pass), PEFT in `peft/tuners/*/layer.py` (`get_delta_weight`; `merge` for IA3).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, getcontext
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import torch
from torch import Tensor

from lib.files.lycoris_files import Base, Peft
from lib.oracles.fractions_oracle import Add, DoRA, Update, finite_reals, merge_codes
from lib.oracles.mixed_oracle import Mixed, lycoris_glora, oft_blocks, peft_mixed, told

Grid = Any  # a numpy array of fractions


@dataclass(frozen=True)
class Multiply:
    """X = W * (1 - weight + weight * factor), a factor for each element."""

    factors: list[Fraction]
    weight: float = 1.0

    def parts(self, W: list[Fraction | None], columns: int) -> tuple[list[Fraction], list[Fraction]]:
        w = Fraction(self.weight)
        return [1 - w + w * factor for factor in self.factors], [Fraction(0)] * len(W)


def grid(x: Tensor) -> Grid:
    """Return the real numbers of a tensor, in its shape."""
    return np.array(finite_reals(x), dtype=object).reshape(tuple(x.shape))


def matrix(x: Tensor) -> Grid:
    return grid(x).reshape(len(x), -1)


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Grid:
    """Return sum over i, j of core[i, j, k] a[i, p] b[j, q], as (p, q k); a: (r, p), b: (r, q)."""
    positions = grid(core).reshape(*core.shape[:2], -1)
    parts = [grid(a).T @ positions[:, :, k] @ grid(b) for k in range(positions.shape[2])]
    return np.stack(parts, axis=2).reshape(a.shape[1], -1)


def scale_of(roles: Mapping[str, Tensor], rank: int) -> Fraction:
    """Return alpha / rank; without an alpha, and where it is 0, 1."""
    alpha = float(roles["alpha"]) if "alpha" in roles else 0.0
    return Fraction(alpha / rank) if alpha else Fraction(1)


def lokr_matrices(roles: Mapping[str, Tensor]) -> tuple[Grid, Grid, int | None]:
    """Return both matrices of LoKr, the second as (b, d k), and the rank of their factors, None if they have none."""
    rank = None
    if "lokr_w1" in roles:
        one = matrix(roles["lokr_w1"])
    else:
        one, rank = matrix(roles["lokr_w1_a"]) @ matrix(roles["lokr_w1_b"]), len(roles["lokr_w1_b"])
    if "lokr_w2" in roles:
        return one, matrix(roles["lokr_w2"]), rank
    a, b = roles["lokr_w2_a"], roles["lokr_w2_b"]
    two = tucker(roles["lokr_t2"], a, b) if "lokr_t2" in roles else matrix(a) @ matrix(b)
    return one, two, len(b)


def loha_matrix(roles: Mapping[str, Tensor]) -> Grid:
    """Return the product, element by element, of LoHa's two matrices, without the scale."""
    a1, b1, a2, b2 = (roles[f"hada_{role}"] for role in ("w1_a", "w1_b", "w2_a", "w2_b"))
    if "hada_t1" in roles:
        return tucker(roles["hada_t1"], a1, b1) * tucker(roles["hada_t2"], a2, b2)
    return (matrix(a1) @ matrix(b1)) * (matrix(a2) @ matrix(b2))


def change_of(roles: Mapping[str, Tensor]) -> Grid:
    """Return D of a module of LyCORIS as (out, in k), its scale included."""
    if "hada_w1_a" in roles:
        return scale_of(roles, len(roles["hada_w1_b"])) * loha_matrix(roles)
    if "lokr_w1" in roles or "lokr_w1_a" in roles:
        one, two, rank = lokr_matrices(roles)
        return np.kron(one, two) * (scale_of(roles, rank) if rank else 1)
    if "b1.weight" in roles:
        return scale_of(roles, len(roles["b2.weight"])) * (matrix(roles["b1.weight"]) @ matrix(roles["b2.weight"]))
    up, down = roles["lora_up.weight"], roles["lora_down.weight"]
    if "lora_mid.weight" in roles:
        product = tucker(roles["lora_mid.weight"], up.flatten(1).T, down.flatten(1))
    else:
        product = matrix(up) @ matrix(down)
    return scale_of(roles, len(down)) * product


def spread(v: list[Fraction], shape: tuple[int, ...], inputs: bool) -> list[Fraction]:
    """Return the factor of each element of a weight, row by row: of its row, or of its input."""
    size = math.prod(shape[1:])
    kernel = math.prod(shape[2:])
    return [v[at % size // kernel if inputs else at // size] for at in range(math.prod(shape))]


def lycoris_updates(roles: Mapping[str, Tensor], shape: tuple[int, ...], weight: float = 1.0) -> dict[str, Update]:
    """Return the updates of a module of LyCORIS, of its `weight` and its `bias`; shape: (out, in, *kernel) of W."""
    for role, bias in (("diff", "diff_b"), ("w_norm", "b_norm")):
        if role in roles:
            ends = {"weight": role, "bias": bias}
            return {end: Add(finite_reals(roles[name]), weight) for end, name in ends.items() if name in roles}
    if "on_input" in roles:
        factors = [1 + v for v in finite_reals(roles["weight"])]
        return {"weight": Multiply(spread(factors, shape, bool(roles["on_input"])), weight)}
    if "oft_blocks" in roles:
        return {"weight": Mixed(oft_blocks(roles), weight)}
    if "a1.weight" in roles:
        return {"weight": Mixed(lycoris_glora(roles, scale_of(roles, len(roles["b2.weight"]))), weight)}
    D = list(change_of(roles).flat)
    if (m := roles.get("dora_scale")) is None:
        return {"weight": Add(D, weight)}
    inputs = m.shape[0] == 1
    return {"weight": DoRA(D, m, weight, by_columns=inputs, group=math.prod(shape[2:]) if inputs else 1)}


def cells(adapter: Peft, side: str) -> Grid:
    """Return VB-LoRA's weighted sums of the bank's vectors, (rows, columns, length).

    The weights are stored but the last, or they are the softmax of the largest logits, as the nearest float64 numbers.
    """
    roles, bank, name = adapter.roles, grid(adapter.shared["vblora_vector_bank"]), f"vblora_logits_{side}"
    if name not in roles:
        weights = grid(roles[f"{name}_topk_weights"])
        weights = np.concatenate([weights, 1 - weights.sum(-1, keepdims=True)], -1)
        return (weights[..., None] * bank[roles[f"{name}_topk_indices"].long().numpy()]).sum(-2)
    found = []
    for cell in roles[name].double().flatten(0, 1).tolist():
        places = sorted(range(len(cell)), key=lambda place: -cell[place])[: adapter.config["topk"]]
        with mpmath.workprec(2000):
            total = mpmath.fsum(mpmath.exp(cell[place]) for place in places)
            weights = [Fraction(float(mpmath.exp(cell[place]) / total)) for place in places]
        found.append(sum(weight * bank[place] for weight, place in zip(weights, places, strict=True)))
    return np.array(found).reshape(*roles[name].shape[:2], -1)


def delora_scale(factor: Fraction, row: Grid, column: Grid, rank: int) -> Fraction:
    """Return lambda / (r |A_k| |B_k|), with norms of 1e-4 or more, as the nearest float64 number."""
    getcontext().prec = 100
    squares = [max((x**2).sum(), Fraction(1, 10**8)) for x in (row, column)]
    product = squares[0] * squares[1]
    norm = (Decimal(product.numerator) / Decimal(product.denominator)).sqrt()
    return Fraction(float(Decimal(factor.numerator) / Decimal(factor.denominator) / rank / norm))


def drawn_places(config: Mapping[str, Any], count: int, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the places of FourierFT's and WaveFT's numbers, as torch draws them."""
    generator = torch.Generator().manual_seed(config["random_loc_seed"])
    flat = torch.randperm(math.prod(shape), generator=generator)[:count].tolist()
    return [divmod(place, shape[1]) for place in flat]


def turned(of: Any, part: int, count: int) -> Fraction:
    """Return the cosine or sine of a part of a turn as the nearest float64 number."""
    with mpmath.workprec(300):
        value = float(of(2 * mpmath.pi * part / count))
    return Fraction(value if abs(value) > 1e-60 else 0.0)


def cosines(adapter: Peft, shape: tuple[int, ...]) -> Grid:
    """Return FourierFT's sum of cosines, of which each is cos a cos b - sin a sin b."""
    values, D = finite_reals(adapter.roles["fourierft_spectrum"]), np.zeros(shape, dtype=object)
    (down, down_s), (across, across_s) = (
        [[turned(of, k, count) for k in range(count)] for of in (mpmath.cos, mpmath.sin)] for count in shape
    )
    for s, (u, v) in zip(values, drawn_places(adapter.config, len(values), shape), strict=True):
        for x, y in np.ndindex(*shape):
            a, b = u * x % shape[0], v * y % shape[1]
            D[x, y] += s * (down[a] * across[b] - down_s[a] * across_s[b])
    return Fraction(adapter.config["scaling"] / math.prod(shape)) * D


def wavelet_filters(name: str) -> tuple[list[Fraction], list[Fraction]]:
    """Return the low and the high filter of Haar's wavelet, or of Daubechies' next, by their formulas."""
    with mpmath.workprec(300):
        two, three = mpmath.sqrt(2), mpmath.sqrt(3)
        low = [1 / two] * 2 if name == "db1" else [x / (4 * two) for x in (1 + three, 3 + three, 3 - three, 1 - three)]
        numbers = [Fraction(float(x)) for x in low]
    return numbers, [(-1) ** k * x for k, x in enumerate(reversed(numbers))]


def wavelets(adapter: Peft, shape: tuple[int, ...]) -> Grid:
    """Return WaveFT's change: each number spreads its filters' products, and the next number's are two places on."""
    values, config = finite_reals(adapter.roles["waveft_spectrum"]), adapter.config
    places, scale = drawn_places(config, len(values), shape), Fraction(config["scaling"])
    D = np.zeros(shape, dtype=object)
    if not config["use_idwt"]:
        for s, place in zip(values, places, strict=True):
            D[place] += scale * s
        return D
    filters = wavelet_filters(config["wavelet_family"])
    more = len(filters[0]) - 2
    height, width = ((side + more + 1) // 2 for side in shape)
    for s, (row, column) in zip(values, places, strict=True):
        (lower, t), (right, q) = divmod(row + more // 2, height), divmod(column + more // 2, width)
        for (x, f), (y, g) in itertools.product(enumerate(filters[right]), enumerate(filters[lower])):
            i, j = 2 * t + x - more, 2 * q + y - more
            if 0 <= i < shape[0] and 0 <= j < shape[1]:
                D[i, j] += scale * s * f * g
    return D


def peft_updates(adapter: Peft, shape: tuple[int, ...], weight: float = 1.0) -> dict[str, Update]:
    """Return the updates of the layer of an adapter of PEFT, of its `weight` and its `bias`."""
    roles, config, kind = adapter.roles, adapter.config, adapter.config["peft_type"]
    if mixed := peft_mixed(kind, roles, config, weight):
        return mixed
    if kind == "IA3":
        factors = finite_reals(roles["ia3_l"])
        if config["feedforward_modules"]:
            return {"weight": Multiply(spread(factors, shape, True), weight)}
        return {"weight": Multiply(spread(factors, shape, False), weight), "bias": Multiply(factors, weight)}
    if kind == "ADALORA":
        scale = Fraction(float(Fraction(config["lora_alpha"]) / (config["init_r"] + Fraction(1, 10**5))))
        D = scale * ((matrix(roles["lora_B"]) * grid(roles["lora_E"]).reshape(1, -1)) @ matrix(roles["lora_A"]))
    elif kind == "VERA":
        A, B = matrix(adapter.shared["vera_A"])[:, : shape[1]], matrix(adapter.shared["vera_B"])[: shape[0]]
        b, d = grid(roles["vera_lambda_b"]), grid(roles["vera_lambda_d"])
        D = (b[:, None] * B) @ (d[:, None] * A)
    elif kind in ("MISS", "BONE"):
        M = grid(roles["miss_block" if kind == "MISS" else "bone_block"])
        D = np.array([[M[j % M.shape[0], i % M.shape[1]] for j in range(shape[1])] for i in range(shape[0])])
    elif kind == "PVERA":
        B = matrix(adapter.shared["pvera_B"])[: shape[0]]
        half = B.shape[1]
        A = matrix(adapter.shared["pvera_A"])[:half, : shape[1]]
        b, d = grid(roles["pvera_lambda_b"]), grid(roles["pvera_lambda_d"])[:half]
        D = (b[:, None] * B) @ (d[:, None] * A)
    elif kind == "RANDLORA":
        low, high = sorted(shape)
        L, G = grid(roles["randlora_lambda"]), grid(roles["randlora_gamma"])
        A, B = grid(adapter.shared["randlora_A"]), grid(adapter.shared["randlora_B"])
        (r, n), D = L.shape, np.zeros((high, low), dtype=object)
        for t in range(r * n):
            (rho, j), (base, column) = divmod(t, n), divmod(t, r)
            D = D + np.outer(B[:high, base, column], L[rho, j] * A[rho, 0, :low] * G[j])
        D = Fraction(config["randlora_alpha"] / r) * (D if low == shape[1] else D.T)
    elif kind in ("SHIRA", "SUPERTUNING"):
        D, sparse = np.zeros(shape, dtype=object), kind == "SHIRA"
        value, places = (
            roles["shira_weight" if sparse else "supertuning_values"],
            roles["shira_indices" if sparse else "supertuning_indices"],
        )
        for at, x in enumerate(finite_reals(value)):
            place = (int(places[0, at]), int(places[1, at])) if sparse else divmod(int(places[at]), shape[1])
            D[place] += x
        if config["r"] and not sparse:
            A, B = (matrix(roles[f"supertuning_lora_{side}.weight"]) for side in "AB")
            D = D + Fraction(config["lora_alpha"] / config["r"]) * (B @ A)
    elif kind == "C3A":
        K, D = grid(roles["c3a_kernel"]), np.zeros(shape, dtype=object)
        for i, j in np.ndindex(*shape):
            D[i, j] = Fraction(1 / shape[1]) * K[i // K.shape[2], j // K.shape[2], (j - i) % K.shape[2]]
    elif kind == "GRALORA":
        A, B, (k, r, h) = (
            grid(roles["gralora_A"]),
            grid(roles["gralora_B"]),
            map(config.get, ("gralora_k", "r", "hybrid_r")),
        )
        q, rows, columns = r // k, shape[0] // k, shape[1] // k
        D = np.zeros(shape, dtype=object)
        for i, j in np.ndindex(*shape):
            (p, x), (n, y) = divmod(i, rows), divmod(j, columns)
            D[i, j] = sum(A[n, y, p * q + t] * B[p, n * q + t, x] for t in range(q))
        if h:
            D = D + matrix(roles["gralora_B_general.weight"]) @ matrix(roles["gralora_A_general.weight"])
        D = Fraction(config["alpha"] / (r + h)) * D
    elif kind == "UNILORA":
        theta = grid(adapter.shared["unilora_theta_d"])
        B, A = (theta[roles[f"unilora_indices_{s}"].numpy()] * grid(roles[f"unilora_scales_{s}"]) for s in "BA")
        D = B @ A
    elif kind == "TINYLORA":
        v, P = finite_reals(adapter.shared["tinylora_v.0"]), grid(roles["tinylora_P"])
        D = grid(roles["tinylora_B"]) @ sum(x * p for x, p in zip(v, P, strict=True)) @ grid(roles["tinylora_A"])
    elif kind == "VBLORA":
        A, B = (cells(adapter, side) for side in "AB")
        D = B.transpose(0, 2, 1).reshape(-1, len(A)) @ A.reshape(len(A), -1)
    elif kind == "DELORA":
        A, B = grid(roles["delora_A"]), grid(roles["delora_B"])
        (factor,) = finite_reals(roles["delora_lambda"])
        c = [delora_scale(factor, A[k], B[:, k], len(A)) for k in range(len(A))]
        D = (B * c) @ A * finite_reals(roles["delora_w_norm"])
    elif kind == "FOURIERFT":
        D = cosines(adapter, shape)
    elif kind == "WAVEFT":
        D = wavelets(adapter, shape)
    elif kind == "BEFT":
        return {"bias": Add(finite_reals(roles["beft_bias"]), weight)}
    else:
        alpha = config["alpha_pattern"].get(adapter.layer, config["alpha"])
        scale = Fraction(alpha / config["rank_pattern"].get(adapter.layer, config["r"]))
        if kind == "LOKR" and "lokr_w2" in roles and roles["lokr_w2"].dim() == 3:  # peft has the sides of each tap so
            one, taps = lokr_matrices(roles)[0], np.moveaxis(grid(roles["lokr_w2"]), 2, 0)
            D = scale * np.stack([np.kron(tap, one) for tap in taps], axis=2)
        else:
            D = scale * (loha_matrix(roles) if kind == "LOHA" else np.kron(*lokr_matrices(roles)[:2]))
    return {"weight": Add(list(D.flat), weight)}


def merged_codes(base: Base, updates: Mapping[str, Update], out: torch.dtype | None = None) -> dict[str, list[int]]:
    """Return the codes that the base's weight and bias must have after a merge, by their names in the model.

    `out`: the type of the output, by default the base's.
    """
    found = {}
    for end, tensor in (("weight", base.weight), ("bias", base.bias)):
        changes = [told(updates[end], base.weight)] if end in updates else []
        wanted = merge_codes(tensor, out or tensor.dtype, changes)
        assert wanted is not None
        found[f"{base.path}.{end}"] = wanted
    return found


def merged_reals(base: Base, updates: Mapping[str, Update]) -> tuple[Tensor, Tensor]:
    """Return the base's weight and bias after a merge, in their shapes, each number rounded to float64."""
    codes = merged_codes(Base(base.layer, torch.float64, base.weight.double(), base.bias.double()), updates)
    weight, bias = (torch.from_numpy(np.array(each, dtype=np.uint64).view(np.float64)) for each in codes.values())
    return weight.reshape(base.weight.shape), bias
