"""Say what kinds that multiply a weight make of it, by the definition alone, in Python's fractions.

X = f(W) for the whole weight, as (out, in k). Derived numbers are the nearest float64 numbers of their real values:
the entries of R - I of OFT, BOFT and RoAd, and of T U.T of HRA. W U of HRA, W A1 of LyCORIS's GLoRA, W C and C of
PEFT's, relu(P).T W of DEFT and what goes into PEANuT's relu have 36 bits.
For an update with the weight w, X = W + w (f(W) - W). Sources: `peft/tuners/{oft,boft,hra,road,miss,hira,glora}/
layer.py`, those of PEFT 0.13, 0.15 and 0.17, `lycoris/modules/{diag_oft,boft,glora}.py`, sd-scripts' `networks/oft.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import torch
from torch import Tensor

from lib.oracles.fractions_oracle import NORM_BITS, Refused, Update, finite_reals, log2_floor

Grid = Any  # a numpy array of fractions


@dataclass(frozen=True)
class Mixed:
    """X = W + weight * (f(W) - W)."""

    f: Callable[[Grid], Grid]
    weight: float = 1.0

    def parts(self, W: list[Fraction | None], columns: int) -> tuple[list[Fraction], list[Fraction]]:
        if None in W:
            raise Refused
        before = np.array(W, dtype=object).reshape(-1, columns)
        change = Fraction(self.weight) * (self.f(before) - before)
        return [Fraction(1)] * len(W), list(change.flat)


@dataclass(frozen=True)
class OfWeight:
    """The update of a bias that depends on the weight W, (out, in)."""

    of: Callable[[Grid], Mixed]

    def parts(self, W: list[Fraction | None], columns: int) -> tuple[list[Fraction], list[Fraction]]:
        raise AssertionError("`of` says what it is")


def told(update: Any, weight: Tensor) -> Any:
    """Return an update of a bias for a weight."""
    return update.of(grid(weight).reshape(len(weight), -1)) if isinstance(update, OfWeight) else update


def grid(x: Tensor) -> Grid:
    return np.array(finite_reals(x), dtype=object).reshape(tuple(x.shape))


def unit(size: int) -> Grid:
    return np.array([[Fraction(i == j) for j in range(size)] for i in range(size)], dtype=object)


def inverse(matrix: Grid) -> Grid:
    """Return the inverse, by Gauss and Jordan's elimination."""
    size = len(matrix)
    rows = [list(row) for row in np.concatenate([matrix, unit(size)], 1)]
    for k in range(size):
        pivot = next(i for i in range(k, size) if rows[i][k])
        rows[k], rows[pivot] = rows[pivot], rows[k]
        rows[k] = [x / rows[k][k] for x in rows[k]]
        for i in range(size):
            if i != k and rows[i][k]:
                rows[i] = [x - rows[i][k] * y for x, y in zip(rows[i], rows[k], strict=True)]
    return np.array(rows, dtype=object)[:, size:]


def nearest(matrix: Grid) -> Grid:
    """Return the nearest float64 numbers; those below 2**-200 are 0."""
    numbers = [Fraction(float(x)) if abs(x) >= Fraction(1, 1 << 200) else Fraction(0) for x in matrix.flat]
    return np.array(numbers, dtype=object).reshape(matrix.shape)


def short(x: Fraction) -> Fraction:
    """Return a number rounded to NORM_BITS bits, half away from 0."""
    if not x:
        return x
    step = Fraction(2) ** (log2_floor(abs(x)) - NORM_BITS + 1)
    return (abs(x) / step + Fraction(1, 2)).__floor__() * step * (1 if x > 0 else -1)


def root(x: Fraction) -> Fraction:
    scale = 1 << 500
    return Fraction(math.isqrt(int(x * scale * scale)), scale)


def cayley(Q: Grid) -> Grid:
    """Return R - I of R = (I + Q)(I - Q)^-1, the nearest numbers."""
    I = unit(len(Q))  # noqa: E741
    return nearest((I + Q).dot(inverse(I - Q)) - I)


def by_columns(W: Grid, changes: list[Grid]) -> Grid:
    """Return W with each block of columns times I plus a matrix."""
    X, b = W.copy(), len(changes[0])
    for k, change in enumerate(changes):
        X[:, k * b : k * b + b] = W[:, k * b : k * b + b] + W[:, k * b : k * b + b].dot(change)
    return X


def by_rows(W: Grid, changes: list[Grid]) -> Grid:
    """Return W with each block of rows multiplied from the left by I plus a matrix, cut to the rows there are."""
    X, b = W.copy(), len(changes[0])
    for k, change in enumerate(changes):
        rows = W[k * b : k * b + b]
        X[k * b : k * b + b] = rows + change[: len(rows), : len(rows)].dot(rows)
    return X


def scaled(W: Grid, scales: Tensor | None) -> Grid:
    return W if scales is None else W * np.array(finite_reals(scales), dtype=object)[:, None]


def series(Q: Grid, config: Mapping[str, Any]) -> Grid:
    """Return PEFT's series less the unit matrix, the nearest numbers."""
    t, powers = config.get("num_cayley_neumann_terms", 5), [Q]
    for _ in range(t):
        powers.append(powers[-1].dot(Q))
    if config.get("peft_version", "0.21.2") is None or t < 3:
        factors = [2] * (t - 1)
    else:
        factors = [2, 2, 1] if t < 5 else [2] * (t - 2) + [1]
    return nearest(sum((f * power for f, power in zip(factors, powers, strict=False)), 0 * Q))


def oft(roles: Mapping[str, Tensor], config: Mapping[str, Any]) -> Callable[[Grid], Grid]:
    key = next(role for role in ("oft_R.weight", "oft_r") if role in roles)
    O = grid(roles[key])  # noqa: E741
    if key == "oft_r":
        limit = Fraction(config.get("eps", 0)) * (1 if "oft_s" in roles else len(O[0]) ** 2)
        S = []
        for block in O:
            norm = root((block**2).sum())
            factor = min(Fraction(1), limit / root(Fraction(len(O))) / norm) if config.get("coft") else Fraction(1)
            S.append(factor * (block - block.T) / 2)
        R = [cayley(-each) for each in S]
        if "oft_s" in roles:
            return lambda W: scaled(by_columns(W, [each.T for each in R]), roles["oft_s"])
        return lambda W: by_rows(W, [each.T for each in R])
    b = next(b for b in range(2, 99) if b * (b - 1) // 2 == O.shape[1])
    R = []
    for block in O:
        Q = 0 * unit(b)
        Q[np.triu_indices(b, 1)] = block
        Q = Q - Q.T
        if config.get("coft"):
            limit, norm = Fraction(config["eps"]) / root(Fraction(len(O))), root((Q**2).sum())
            Q = Q * min(Fraction(1), limit / norm)
        R.append(series(Q, config) if config.get("use_cayley_neumann", True) else cayley(-Q))
    return lambda W: by_columns(W, [each.T for each in R] * (W.shape[1] // b // len(R)))


def boft(roles: Mapping[str, Tensor]) -> Callable[[Grid], Grid]:
    factors, n, b, _ = roles["boft_R"].shape
    M, size = unit(n * b), n * b
    for i in range(factors):
        F = 0 * M
        for k, block in enumerate(grid(roles["boft_R"])[i]):
            S = (block - block.T) / 2
            C = (unit(b) - S).dot(inverse(unit(b) + S))
            F[k * b : k * b + b, k * b : k * b + b] = C
        order = list(range(size))
        if i:
            run, half = b << i, b // 2
            halves = [list(range(at, at + half)) for at in range(0, run, half)]
            inside = [k for each in (*halves[::2], *halves[1::2]) for k in each]
            order = [first + each for first in range(0, size, run) for each in inside]
        M = F[np.ix_(order, order)].dot(M)
    change = nearest(M - unit(size))
    return lambda W: scaled(W + W.dot(change.T), roles["boft_s"])


def oft_blocks(roles: Mapping[str, Tensor], is_kohyas: bool = False) -> Callable[[Grid], Grid]:
    O = grid(roles["oft_blocks"])  # noqa: E741
    Q = O - O.swapaxes(-1, -2)
    out, eps = O.shape[-3] * O.shape[-1], Fraction(1, 10**8)
    c, norm = Fraction(float(roles["alpha"])) * out, root((Q**2).sum())
    if is_kohyas:
        Q = Q * ((min(norm, c) + eps) / (norm + eps))
    elif c > 0 and norm + eps > c:
        Q = Q * (c / (norm + eps))
    b = O.shape[-1]
    if O.ndim == 3:
        R = [cayley(each) for each in Q]
        return lambda W: scaled(by_rows(W, [each.T for each in R]), roles.get("rescale"))
    M = unit(out)
    for i, stage in enumerate(Q):
        k = 2**i * (b // 2)
        places = np.arange(out).reshape(-1, 2, k).swapaxes(1, 2).reshape(-1)
        R = [(unit(b) + each).dot(inverse(unit(b) - each)) for each in stage]
        rows = M[places]
        rows = np.concatenate([each.dot(rows[n * b : n * b + b]) for n, each in enumerate(R)])
        M = rows[np.argsort(places)]
    change = nearest(M - unit(out))
    return lambda W: scaled(W + change.dot(W), roles.get("rescale"))


def bat(M: Grid) -> Callable[[Grid], Grid]:
    r = M.shape[1]

    def f(W: Grid) -> Grid:
        X = W.copy()
        for o in range(len(M)):
            for c in range(W.shape[1] // r):
                at = np.s_[o * r : o * r + r, c * r : c * r + r]
                X[at] = W[at] + W[at].dot(M[o]) + M[o]
        return X

    return f


def road(roles: Mapping[str, Tensor], config: Mapping[str, Any]) -> Callable[[Grid], Grid]:
    g, variant = config["group_size"], config["variant"]
    theta, alpha = (finite_reals(roles[role]) for role in ("road_theta", "road_alpha"))

    def number(of: Callable[[Any], Any], at: int, less: int) -> Fraction:
        with mpmath.workprec(600):
            exact = of(mpmath.mpf(theta[at].numerator) / theta[at].denominator)
            return Fraction(float(mpmath.mpf(alpha[at].numerator) / alpha[at].denominator * exact - less))

    def f(W: Grid) -> Grid:
        X, half = W.copy(), g // 2
        for i in range(len(W)):
            group, k = divmod(i, g)
            at = {"road_1": (group * half + k % half,) * 2, "road_2": (i, i), "road_4": (2 * g * group + k,) * 2}[
                variant
            ]
            first, second = at[0], at[1] + (g if variant == "road_4" else 0)
            other = i + half if k < half else i - half
            s = number(mpmath.sin, second, 0)
            X[i] = W[i] + number(mpmath.cos, first, 1) * W[i] + (-s if k < half else s) * W[other]
        return X

    return f


def hra(U: Grid, is_orthogonal: bool) -> Callable[[Grid], Grid]:
    gram, r = U.T.dot(U), U.shape[1]
    if is_orthogonal:
        T = 2 * inverse(gram)
    else:
        T = inverse(
            np.array(
                [[gram[i, j] / (2 if i == j else 1) if i <= j else Fraction(0) for j in range(r)] for i in range(r)],
                dtype=object,
            )
        )
    K = nearest(-T.dot(U.T))
    return lambda W: W + np.vectorize(short, otypes=[object])(W.dot(U)).dot(K)


def lycoris_glora(roles: Mapping[str, Tensor], scale: Fraction) -> Callable[[Grid], Grid]:
    a1, a2, b1 = (
        grid(roles[f"{role}.weight"]).reshape(roles[f"{role}.weight"].shape[:2]) for role in ("a1", "a2", "b1")
    )
    b2 = grid(roles["b2.weight"])

    def f(W: Grid) -> Grid:
        kernels = W.reshape(len(W), len(a1), -1)
        X = kernels.copy()
        for k in range(kernels.shape[2]):
            X[:, :, k] = kernels[:, :, k] + scale * np.vectorize(short, otypes=[object])(kernels[:, :, k].dot(a1)).dot(
                a2
            )
        return X.reshape(W.shape) + scale * b1.dot(b2.reshape(len(b2), -1))

    return f


def peft_mixed(
    kind: str, roles: Mapping[str, Tensor], config: Mapping[str, Any], weight: float
) -> dict[str, Update] | None:
    """Return the updates of weight and bias of a kind of PEFT that multiplies; None of another."""
    if kind == "OFT":
        f = oft(roles, config)
    elif kind == "BOFT":
        f = boft(roles)
    elif kind in ("MISS", "BONE") and config.get("init_weights") == "bat":
        f = bat(grid(next(iter(roles.values()))))
    elif kind == "HRA":
        f = hra(grid(roles["hra_u"]), config["apply_GS"])
    elif kind == "HIRA":
        A, B = (grid(roles[role]).reshape(len(roles[role]), -1) for role in ("hira_A", "hira_B"))
        f = lambda W: W * (1 + B.dot(A))  # noqa: E731
    elif kind == "ROAD":
        f = road(roles, config)
        return {"weight": Mixed(f, weight), "bias": Mixed(f_of_column(f), weight)}
    elif kind == "GLORA":
        return glora(roles, weight)
    elif kind == "DEFT":
        f = deft(roles, config)
    elif kind == "PEANUT":
        f = peanut(roles, config)
    else:
        return None
    return {"weight": Mixed(f, weight)}


def shorts(x: Grid) -> Grid:
    return np.vectorize(short, otypes=[object])(x)


def relu(x: Grid) -> Grid:
    return np.vectorize(lambda each: max(each, Fraction(0)), otypes=[object])(x)


def deft(roles: Mapping[str, Tensor], config: Mapping[str, Any]) -> Callable[[Grid], Grid]:
    P = grid(roles["deft_P"])
    R = Fraction(0)
    if not config.get("para"):
        R = grid(roles["deft_R"]) * Fraction(config["alpha"] / config["r"] if config.get("alpha") else 1)
    is_qr = config.get("decomposition_method") == "qr"
    Q, kept = (reflected(roles["deft_P"]),) * 2 if is_qr else (P, relu(P))
    return lambda W: W + Q.dot(R - shorts(kept.T.dot(W)))


def reflected(P: Tensor) -> Grid:
    """Return Q of LAPACK's QR decomposition, by its reflections one after the other."""
    n, r = P.shape
    with mpmath.workprec(400):
        R, Q = mpmath.matrix(P.double().tolist()), mpmath.eye(n)
        for k in range(min(r, n - 1)):
            v = R[:, k]
            v[:k, 0] *= 0
            v[k, 0] += mpmath.norm(v) * (1 if v[k, 0] >= 0 else -1)
            H = mpmath.eye(n) - 2 * v * v.T / (v.T * v)[0]
            R, Q = H * R, Q * H
        return grid(torch.tensor([[float(Q[i, j]) for j in range(r)] for i in range(n)], dtype=torch.float64))


def peanut(roles: Mapping[str, Tensor], config: Mapping[str, Any]) -> Callable[[Grid], Grid]:
    A, B = grid(roles["peanut_A.weight"]), grid(roles["peanut_B.weight"])
    encoders, decoders = (
        [grid(x) for role, x in sorted(roles.items()) if role.startswith(f"peanut_{side}")]
        for side in ("encoders", "decoders")
    )

    def f(W: Grid) -> Grid:
        H, kept = relu(shorts(A.dot(W))).T, []
        for encoder in encoders:
            kept.append(H)
            H = relu(shorts(H.dot(encoder.T)))
        for decoder in decoders:
            H = nearest(relu(shorts(H.dot(decoder.T))) + kept.pop())
        return W + Fraction(config["scaling"]) * B.dot(H.T)

    return f


def f_of_column(f: Callable[[Grid], Grid]) -> Callable[[Grid], Grid]:
    return lambda bias: f(bias.reshape(-1, 1)).reshape(bias.shape)


def glora(roles: Mapping[str, Tensor], weight: float) -> dict[str, Update]:
    def path(name: str) -> Grid:
        if f"glora_{name}.Xd" in roles:
            return grid(roles[f"glora_{name}.Xd"]).dot(grid(roles[f"glora_{name}.Xu"]))
        return grid(roles[f"glora_{name}.X"]) if f"glora_{name}.X" in roles else Fraction(0)

    A, B, D, E = (path(name) for name in "ABDE")
    found: dict[str, Update] = {"weight": Mixed(lambda W: W * (1 + A) + B, weight)}
    C = path("C")
    if "glora_C.Xd" in roles or "glora_C.X" in roles:

        def of(W: Grid) -> Mixed:
            added = shorts(W.dot(shorts(C))).reshape(-1)
            return Mixed(lambda b: (b.reshape(-1) * (1 + D) + E + added).reshape(b.shape), weight)

        found["bias"] = OfWeight(of)
    elif any(role.startswith(("glora_D", "glora_E")) for role in roles):
        found["bias"] = Mixed(lambda b: (b.reshape(-1) * (1 + D) + E).reshape(b.shape), weight)
    return found
